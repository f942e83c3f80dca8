using System.Text;
using System.Text.Json.Nodes;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>
/// Manifests, tokenizers and graphs with a fault each give the tokens of the whole one, or an error of this library.
/// </summary>
public sealed class MutationTests : IDisposable
{
    private const string Placeholder = "\"@@\"";

    private static readonly string[] Values =
    {
        "null", "true", "false", "0", "1", "3", "-1", "0.5", "1e9", "1000000000", "2147483647", "2147483648",
        new string('9', 5000),
        "\"\"", "\"1\"", "\"x\"", "\"..\"", "\"../model.data\"", "\"/etc/hostname\"",
        "\"model.data\"", "\"config.json\"",
        "\"\\ud800\"", "\"\\u0000\"", "[]", "[null]", "{}", "{\"\": 0}", "{\"\\ud800\": 1}",
        new string('[', 100_000) + new string(']', 100_000),
    };

    private readonly string _bundle = Conformance.CopyBundle();

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    public void AChangedManifestGivesTheSameTokensOrAnError(int seed)
    {
        Random random = new Random(seed);
        string path = Path.Combine(_bundle, "manifest.json");
        string whole = File.ReadAllText(path);
        int[] expected = Tokens();
        int refused = 0;
        for (int number = 0; number < 100; number++)
        {
            (string what, string mutant) = Mutate(whole, random);
            File.WriteAllText(path, mutant);
            refused += AssertTokensOrError(expected, $"seed {seed}, {number}: {what}") ? 0 : 1;
        }
        Assert.InRange(refused, 20, 99); // so that the mutants are neither all harmless nor all alike
    }

    [Fact]
    public void ADamagedTokenizerGivesTokensOrAnError()
    {
        Random random = new Random(0);
        string path = Path.Combine(_bundle, "tokenizer.json");
        byte[] whole = File.ReadAllBytes(path);
        int refused = 0;
        for (int number = 0; number < 100; number++)
        {
            byte[] mutant = whole.AsSpan(0, number % 4 == 0 ? random.Next(whole.Length) : whole.Length).ToArray();
            if (mutant.Length > 0)
            {
                mutant[random.Next(mutant.Length)] = (byte)random.Next(number % 4 == 1 ? 256 : 0x7F);
            }
            File.WriteAllBytes(path, mutant);
            Changes.List(_bundle, "tokenizer.json"); // so that it gets past the hash
            try
            {
                Assert.NotEmpty(Tokens());
            }
            catch (PhiMoEException error)
            {
                Assert.Contains(error is BundleException ? "tokenizer.json" : "token", error.Message);
                refused++;
            }
        }
        Assert.InRange(refused, 90, 100); // hardly a byte of it is without meaning
    }

    [Fact]
    public void AChangedGraphGivesAnErrorThatNamesIt()
    {
        Random random = new Random(0);
        string path = Path.Combine(_bundle, "mutant.onnx");
        byte[] whole = File.ReadAllBytes(Path.Combine(_bundle, "model.onnx"));
        IReadOnlyDictionary<string, BundleFile> files = Bundle.ReadManifest(_bundle).Files;
        for (int number = 0; number < 300; number++)
        {
            byte[] mutant = whole.AsSpan(0, number % 3 == 0 ? random.Next(whole.Length) : whole.Length).ToArray();
            for (int i = 0; i < 8 && mutant.Length > 0; i++)
            {
                mutant[random.Next(mutant.Length)] = (byte)random.Next(256);
            }
            File.WriteAllBytes(path, mutant);
            if (Record.Exception(() => ExternalData.Check(path, files)) is Exception error)
            {
                Assert.Contains("mutant.onnx", Assert.IsType<BundleException>(error).Message);
            }
        }
    }

    public void Dispose() => Directory.Delete(_bundle, recursive: true);

    /// <summary>The manifest with a value changed or gone, a key renamed, or a character changed.</summary>
    private static (string What, string Text) Mutate(string whole, Random random)
    {
        if (random.Next(6) == 0)
        {
            int place = random.Next(whole.Length);
            StringBuilder text = new StringBuilder(whole);
            text[place] = (char)random.Next(0x20, 0x7F);
            return ($"character {place} is {text[place]}", text.ToString());
        }
        JsonNode manifest = JsonNode.Parse(whole)!;
        List<string> pointers = new List<string>();
        Collect(manifest, "", pointers);
        string pointer = pointers[random.Next(pointers.Count)];
        if (random.Next(5) == 0)
        {
            Changes.Remove(manifest, pointer);
            return ($"{pointer} removed", manifest.ToJsonString());
        }
        string value = Values[random.Next(Values.Length)];
        Changes.Set(manifest, pointer, "@@");
        string what = value.Length > 60 ? value.Substring(0, 60) + "..." : value;
        return ($"{pointer} is {what}", manifest.ToJsonString().Replace(Placeholder, value));
    }

    /// <summary>The JSON pointers of all values.</summary>
    private static void Collect(JsonNode? node, string pointer, List<string> pointers)
    {
        if (pointer.Length > 0)
        {
            pointers.Add(pointer);
        }
        if (node is JsonObject members)
        {
            foreach (KeyValuePair<string, JsonNode?> member in members)
            {
                Collect(member.Value, $"{pointer}/{member.Key.Replace("~", "~0").Replace("/", "~1")}", pointers);
            }
        }
        else if (node is JsonArray items)
        {
            for (int i = 0; i < items.Count; i++)
            {
                Collect(items[i], $"{pointer}/{i}", pointers);
            }
        }
    }

    private int[] Tokens()
    {
        using PhiMoE model = PhiMoE.Load(_bundle, threads: 1);
        GenerationOptions options = new GenerationOptions { MaxNewTokens = 8 };
        return model.Generate("It was a fine morning, and", options).TokenIds.ToArray();
    }

    /// <summary>Whether the bundle gives the tokens; false where it is refused.</summary>
    private bool AssertTokensOrError(int[] expected, string what)
    {
        try
        {
            int[] tokens = Tokens();
            Assert.True(expected.SequenceEqual(tokens), $"{what}: other tokens, {string.Join(", ", tokens)}");
            return true;
        }
        catch (Exception error) when (error is not Xunit.Sdk.XunitException)
        {
            Assert.True(error is PhiMoEException, $"{what}: {error}");
            return false;
        }
    }
}
