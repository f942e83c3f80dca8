using System.Text.Json;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>
/// spec/native: a bundle of native operators and its tokens, and what is said where there are no such operators.
/// </summary>
public sealed class OperatorsTests
{
    private static readonly string Folder = Path.Combine(Conformance.Repository, "spec", "native");
    private static readonly string Bundle = Path.Combine(Folder, "bundle");

    [OperatorsFact]
    public async Task GeneratesAsExpected()
    {
        using PhiMoE model = PhiMoE.Load(Bundle);
        string cases = File.ReadAllText(Path.Combine(Folder, "cases.json"));
        foreach (JsonElement given in JsonDocument.Parse(cases).RootElement.GetProperty("cases").EnumerateArray())
        {
            await ConformanceTests.AssertGenerates(model, given);
        }
    }

    [Fact]
    public void SaysWhatToDoWithoutTheLibrary()
    {
        string message = Refusal(PhiMoEOnnx.Bundle.ReadManifest(Bundle));
        string[] parts = { Bundle, "native operators", "phimoe_operators.", "build native", "--operators stock" };
        Assert.All(parts, part => Assert.Contains(part, message));
    }

    [Fact]
    public void NamesTheUnknownOneOfSeveralNeeds()
    {
        Manifest manifest = PhiMoEOnnx.Bundle.ReadManifest(Bundle);
        Graph[] graphs = manifest.Graphs.Select(each => each with { Requires = new[] { Operators.Name, "x/9" } }).ToArray();
        Assert.Contains("its graphs require x/9, which", Refusal(manifest with { Graphs = graphs }, Operators.Name));
    }

    private static string Refusal(Manifest manifest, params string[] provided) =>
        Assert.Throws<DeviceException>(
            () => Session.ChooseGraph(Bundle, manifest, "1.32.0", provided.ToHashSet())).Message;
}

/// <summary>A test of the operators; skipped where they are not built.</summary>
[AttributeUsage(AttributeTargets.Method)]
internal sealed class OperatorsFactAttribute : FactAttribute
{
    public OperatorsFactAttribute()
    {
        if (Operators.Library == null)
        {
            Skip = "the native operators are not built; cargo build --release in native";
        }
    }
}
