using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>What no case of spec/cases.json can say of a manifest, and the choice of a graph.</summary>
public sealed class ManifestTests : IDisposable
{
    private const string VocabSize = "\"vocab_size\": 2048";
    private static readonly string Deep = new string('[', 100_000) + new string(']', 100_000);

    private static readonly HashSet<string> Without = new HashSet<string>(); // native operators

    private readonly string _bundle = Conformance.CopyBundle();
    private readonly string _path;

    public ManifestTests()
    {
        _path = Path.Combine(_bundle, "manifest.json");
    }

    public static IEnumerable<object[]> Damages => new[]
    {
        new[] { VocabSize, "\"vocab_size\": " + new string('9', 5000), "vocab_size" },
        new[] { VocabSize, "\"vocab_size\": " + Deep, "manifest.json" },
        new[] { "\"task\":", $"\"unknown\": {Deep}, \"task\":", "manifest.json" },
        new[] { "\"float32\",\n      \"shared\"", "\"\\ud800\",\n      \"shared\"", "manifest.json" },
        new[] { "\"<unk>\": 0", "\"\\udfff\": 0", "manifest.json" },
        new[] { VocabSize, VocabSize + ", \"vocab_size\": 0", "vocab_size" },
        new[] { VocabSize, VocabSize + ".0", "vocab_size" },
        new[] { "}", "", "manifest.json" },
    };

    [Theory]
    [MemberData(nameof(Damages))]
    public void RefusesADamagedManifest(string before, string after, string names)
    {
        string text = File.ReadAllText(_path);
        Assert.Contains(before, text);
        File.WriteAllText(_path, text.Replace(before, after));
        BundleException error = Assert.Throws<BundleException>(() => PhiMoE.Load(_bundle));
        Assert.Contains("manifest.json", error.Message);
        Assert.Contains(names, error.Message);
        Assert.True(error.Message.Length < 1000);
    }

    [Fact]
    public void RefusesAnOptionalInputThatTheGraphLacks()
    {
        Changes.Set(_bundle, "/graphs/0/optional_inputs/0", "top_k");
        BundleException error = Assert.Throws<BundleException>(() => PhiMoE.Load(_bundle));
        Assert.Contains("optional_inputs", error.Message);
        Assert.Contains("top_k", error.Message);
    }

    [Fact]
    public void RefusesBytesThatAreNoUtf8()
    {
        byte[] bytes = File.ReadAllBytes(_path);
        bytes[Array.IndexOf(bytes, (byte)'t')] = 0xFF;
        File.WriteAllBytes(_path, bytes);
        Assert.Contains("manifest.json", Assert.Throws<BundleException>(() => PhiMoE.Load(_bundle)).Message);
    }

    [Fact]
    public void RefusesWhatIsNoFolder()
    {
        Assert.Contains("manifest.json", Assert.Throws<BundleException>(() => PhiMoE.Load(_path)).Message);
    }

    [Theory]
    [InlineData(null)]
    [InlineData("")]
    [InlineData("a\0b")]
    [InlineData("no such folder")]
    public void RefusesWhatIsNoPath(string? bundle)
    {
        Assert.Throws<BundleException>(() => PhiMoE.Load(bundle!));
    }

    [Theory]
    [InlineData(0)]
    [InlineData(-1)]
    [InlineData(10_000)]
    [InlineData(1_000_000)]
    [InlineData(int.MaxValue)]
    public void RefusesThreadsThatNoMachineHas(int threads)
    {
        string message = Assert.Throws<DeviceException>(() => PhiMoE.Load(_bundle, threads)).Message;
        Assert.Contains($"threads is {threads}", message);
    }

    [Theory]
    [InlineData("1.32.0", "a")]
    [InlineData("1.32.0+cu13", "a")]
    [InlineData("1.31.9", "b")]
    [InlineData("1.9.0", "c")]
    public void ChoosesTheFirstGraphThatRunsHere(string installed, string expected)
    {
        Manifest manifest = WithGraphs(
            MakeGraph("d", "cpu", "1.0", "operators/9"), MakeGraph("e", "cuda", "1.0"),
            MakeGraph("a", "cpu", "1.32"), MakeGraph("b", "cpu", "1.31.9"), MakeGraph("c", "cpu", "1.9"));
        Assert.Equal(expected, Session.ChooseGraph(_bundle, manifest, installed, Without).File);
    }

    [Fact]
    public void SaysWhyNoGraphRunsHere()
    {
        Assert.Contains("tpu", Refusal(MakeGraph("a", "cuda", "1.0", "operators/9"), MakeGraph("b", "tpu", "1.0")));
        Graph needy = MakeGraph("a", "cpu", "1.0", "operators/9");
        Assert.Contains("operators/9", Refusal(MakeGraph("b", "cuda", "1.0"), needy));
        string needed = Refusal(needy, MakeGraph("b", "cpu", "1.100"), MakeGraph("c", "cpu", "1.99.1"));
        Assert.Contains("1.99.1", needed);
        Assert.DoesNotContain("1.100", needed);
    }

    public void Dispose() => Directory.Delete(_bundle, recursive: true);

    private static Graph MakeGraph(string file, string device, string release, params string[] requires) =>
        new Graph(file, new Dictionary<string, string> { [device] = release }, Array.Empty<string>(), requires);

    private Manifest WithGraphs(params Graph[] graphs) => Bundle.ReadManifest(_bundle) with { Graphs = graphs };

    private string Refusal(params Graph[] graphs) =>
        Assert.Throws<DeviceException>(() => Session.ChooseGraph(_bundle, WithGraphs(graphs), "1.32.0", Without)).Message;
}
