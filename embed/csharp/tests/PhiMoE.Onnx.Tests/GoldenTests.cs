using System.Buffers.Binary;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>spec/golden: a golden file, changes to it, and what every language finds with them.</summary>
public sealed class GoldenTests : IClassFixture<Conformance>, IDisposable
{
    private static readonly string Folder = Path.Combine(Conformance.Repository, "spec", "golden");
    private static readonly string Saved = Path.Combine(Folder, "austen.golden");
    private static readonly JsonElement All =
        JsonDocument.Parse(File.ReadAllText(Path.Combine(Folder, "cases.json"))).RootElement;

    private readonly string _scratch = Directory.CreateTempSubdirectory().FullName;
    private readonly PhiMoE _model;

    public GoldenTests(Conformance conformance)
    {
        _model = conformance.Model;
    }

    public static IEnumerable<object[]> Names(string key) =>
        All.GetProperty("cases").EnumerateArray()
            .Where(each => each.TryGetProperty(key, out _))
            .Select(each => new object[] { Conformance.Text(each, "name") });

    [Theory]
    [MemberData(nameof(Names), "expected")]
    public void FindsWhatPythonFinds(string name)
    {
        JsonElement given = Case(name);
        string file = Changed(given.GetProperty("changes"));
        JsonElement expected = given.GetProperty("expected");
        if (given.TryGetProperty("bundle", out _))
        {
            string copy = Conformance.ChangedBundle(given);
            try
            {
                using PhiMoE other = PhiMoE.Load(copy, threads: 1);
                AssertReport(expected, other.VerifyGolden(file));
            }
            finally
            {
                Directory.Delete(copy, recursive: true);
            }
            return;
        }
        Report report = _model.VerifyGolden(file);
        AssertReport(expected, report);
        if (given.TryGetProperty("notes", out JsonElement notes))
        {
            Assert.Subset(report.Notes.ToHashSet(), notes.EnumerateArray().Select(note => note.GetString()!).ToHashSet());
        }
    }

    [Fact]
    public void FindsItWithACacheThatGrows()
    {
        string copy = Conformance.GrowingBundle();
        try
        {
            using PhiMoE other = PhiMoE.Load(copy, threads: 1);
            AssertReport(Case("as it is").GetProperty("expected"), other.VerifyGolden(Saved));
        }
        finally
        {
            Directory.Delete(copy, recursive: true);
        }
    }

    [Theory]
    [MemberData(nameof(Names), "error")]
    public void RefusesOtherFiles(string name)
    {
        JsonElement given = Case(name);
        string file = Changed(given.GetProperty("changes"));
        string message = Assert.Throws<GoldenException>(() => _model.VerifyGolden(file)).Message;
        Assert.StartsWith($"{file}: ", message);
        foreach (JsonElement word in given.GetProperty("error").EnumerateArray())
        {
            Assert.Contains(word.GetString()!, message);
        }
    }

    [Fact]
    public void RefusesWhatIsNoFile()
    {
        Assert.Throws<GoldenException>(() => _model.VerifyGolden(null!));
        foreach (string path in new[] { _scratch, Path.Combine(_scratch, "nowhere") })
        {
            string message = Assert.Throws<GoldenException>(() => _model.VerifyGolden(path)).Message;
            Assert.StartsWith($"{path}: cannot be read", message);
        }
    }

    [Fact]
    public void JudgesByTheSameLimits()
    {
        foreach (JsonElement each in All.GetProperty("limits").EnumerateArray())
        {
            string[] dtypes = each.GetProperty("dtypes").EnumerateArray().Select(dtype => dtype.GetString()!).ToArray();
            IReadOnlyDictionary<string, double> found = Thresholds.Of(dtypes, Conformance.Text(each, "cache"))!;
            JsonProperty[] expected = each.GetProperty("limits").EnumerateObject().ToArray();
            Assert.Equal(expected.Select(limit => limit.Name).Order(), found.Keys.Order());
            foreach (JsonProperty limit in expected)
            {
                Assert.Equal(limit.Value.GetDouble(), found[limit.Name], 12);
            }
        }
        Assert.Null(Thresholds.Of(Array.Empty<string>(), "float32"));
        Assert.Null(Thresholds.Of(new[] { "float32", "odd" }, "float32"));
    }

    [Theory]
    [InlineData("/weights")]
    [InlineData("/dtype")]
    public void NeedsToKnowHowWeightsAreStored(string pointer)
    {
        string copy = Conformance.CopyBundle();
        try
        {
            Changes.Set(copy, pointer, JsonValue.Create(0));
            using PhiMoE other = PhiMoE.Load(copy, threads: 1);
            string message = Assert.Throws<BundleException>(() => other.VerifyGolden(Saved)).Message;
            Assert.StartsWith("manifest.json does not say how the weights are stored", message);
        }
        finally
        {
            Directory.Delete(copy, recursive: true);
        }
    }

    [Fact]
    public void EndsWhenItIsCancelled()
    {
        using CancellationTokenSource source = new CancellationTokenSource();
        Assert.ThrowsAny<OperationCanceledException>(
            () => _model.VerifyGolden(Saved, (done, total) => source.Cancel(), source.Token));
    }

    [Theory]
    [InlineData(0, "0")]
    [InlineData(0.0430256, "0.043")]
    [InlineData(1e-6, "1e-06")]
    [InlineData(1.2345e-5, "1.23e-05")]
    [InlineData(0.00099999, "0.001")]
    [InlineData(1970.8, "1.97e+03")]
    [InlineData(999.6, "1e+03")]
    [InlineData(1.05, "1.05")]
    [InlineData(double.NaN, "NaN")]
    public void WritesThreeDigits(double number, string expected) => Assert.Equal(expected, Report.Brief(number));

    public void Dispose() => Directory.Delete(_scratch, recursive: true);

    internal static JsonElement Case(string name) =>
        All.GetProperty("cases").EnumerateArray().Single(each => Conformance.Text(each, "name") == name);

    private static void AssertReport(JsonElement expected, Report report)
    {
        Assert.Equal(expected.GetProperty("tokens").GetInt32(), report.Tokens);
        Assert.Equal(Conformance.Ids(expected, "windows"), report.Windows);
        AssertComparison(expected.GetProperty("bundle_to_reference"), report.BundleToReference);
        AssertComparison(expected.GetProperty("bundle_to_stored"), report.BundleToStored);
        AssertComparison(expected.GetProperty("stored_to_reference"), report.StoredToReference);
        JsonProperty[] perplexity = expected.GetProperty("perplexity").EnumerateObject().ToArray();
        Assert.Equal(perplexity.Select(each => each.Name), report.Perplexity.Keys);
        foreach (JsonProperty each in perplexity)
        {
            AssertNear(each.Value, report.Perplexity[each.Name]);
        }
        JsonElement greedy = expected.GetProperty("greedy");
        Assert.Equal(greedy.GetProperty("agreeing").GetInt32(), report.Greedy.Agreeing);
        Assert.Equal(greedy.GetProperty("new_tokens").GetInt32(), report.Greedy.NewTokens);
        JsonElement[] checks = expected.GetProperty("checks").EnumerateArray().ToArray();
        Assert.Equal(checks.Select(each => Conformance.Text(each, "name")), report.Checks.Select(each => each.Name));
        foreach ((JsonElement check, Check found) in checks.Zip(report.Checks))
        {
            Assert.Equal(check.GetProperty("passed").GetBoolean(), found.Passed);
            AssertNear(check.GetProperty("limit"), found.Limit);
            AssertNear(check.GetProperty("measured"), found.Measured);
        }
    }

    private static void AssertComparison(JsonElement expected, Comparison? found)
    {
        if (expected.ValueKind == JsonValueKind.Null)
        {
            Assert.Null(found);
            return;
        }
        Assert.Equal(expected.GetProperty("tokens").GetInt32(), found!.Tokens);
        AssertNear(expected.GetProperty("mean_difference"), found.MeanDifference);
        AssertNear(expected.GetProperty("max_difference"), found.MaxDifference);
        AssertNear(expected.GetProperty("kl"), found.Kl);
        AssertNear(expected.GetProperty("top1_agreement"), found.Top1Agreement);
    }

    private static void AssertNear(JsonElement expected, double found)
    {
        double tolerance = All.GetProperty("tolerance").GetDouble() * expected.GetDouble();
        Assert.InRange(found, expected.GetDouble() - tolerance, expected.GetDouble() + tolerance);
    }

    /// <summary>The golden file with the changes that spec/golden.md describes.</summary>
    private string Changed(JsonElement changes)
    {
        string path = Path.Combine(_scratch, "golden");
        File.WriteAllBytes(path, ChangedBytes(changes));
        return path;
    }

    internal static byte[] ChangedBytes(JsonElement changes)
    {
        byte[] data = File.ReadAllBytes(Saved);
        foreach (JsonElement change in changes.EnumerateArray())
        {
            switch (change[0].GetString())
            {
                case "replace":
                    data = Replaced(data, change[1].GetString()!, change[2].GetString()!);
                    break;
                case "truncate":
                    data = data[..change[1].GetInt32()];
                    break;
                case "invert":
                    data[change[1].GetInt32()] ^= 0xFF;
                    break;
                case "sign":
                    data = Signed(data);
                    break;
                default:
                    throw new NotSupportedException(change.GetRawText());
            }
        }
        return data;
    }

    private static byte[] Replaced(byte[] data, string old, string text)
    {
        string content = Encoding.Latin1.GetString(data); // a character for every byte
        int place = content.IndexOf(old, StringComparison.Ordinal);
        Assert.True(place >= 0, old);
        byte[] changed = Encoding.Latin1.GetBytes(
            string.Concat(content.AsSpan(0, place), text, content.AsSpan(place + old.Length)));
        long length = BinaryPrimitives.ReadInt64LittleEndian(changed) + text.Length - old.Length;
        BinaryPrimitives.WriteInt64LittleEndian(changed, length);
        return changed;
    }

    private static byte[] Signed(byte[] data)
    {
        int end = 8 + (int)BinaryPrimitives.ReadInt64LittleEndian(data);
        JsonElement metadata = JsonDocument.Parse(data.AsMemory(8, end - 8)).RootElement.GetProperty("__metadata__");
        byte[] text = Encoding.UTF8.GetBytes(Conformance.Text(metadata, "golden"));
        string sha256 = Convert.ToHexString(SHA256.HashData(text.Concat(data[end..]).ToArray())).ToLowerInvariant();
        return Replaced(data, Conformance.Text(metadata, "sha256"), sha256);
    }
}
