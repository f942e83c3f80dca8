using System.Diagnostics;
using System.Text.Json.Nodes;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>The example, as a process of its own with a home of its own.</summary>
public sealed class ProgramTests : IDisposable
{
    private readonly string _home = Directory.CreateTempSubdirectory().FullName;
    private readonly string _bundle = Conformance.CopyBundle();

    [Fact]
    public void LeavesNothingInAHome()
    {
        (int code, string output, string errors) = Run(_bundle, "It was", "--max-new-tokens", "8", "--threads", "1");
        Assert.Equal((0, " very much to be in the world to"), (code, output.TrimEnd('\r', '\n')));
        Assert.Contains("8 new", errors);
        Assert.Empty(Directory.EnumerateFileSystemEntries(_home)); // ONNX Runtime's telemetry would lie here
    }

    [Fact]
    public void HoldsTheBundleAgainstAGoldenFile()
    {
        string golden = Path.Combine(Conformance.Repository, "spec", "golden", "austen.golden");
        (int code, string output, string errors) = Run(_bundle, "--golden", golden);
        Assert.Equal((0, ""), (code, errors));
        string[] lines =
        {
            "40 tokens in 2 windows of up to 34",
            "bundle to reference               5.15e-02      3.12e-01  2.36e-02      90.00%",
            "perplexity: reference 40.2418, stored 40.7871, bundle 41.14",
            "choices of experts that the stored weights leave unchanged: 91.25%",
            "greedy continuations, 9 of 10 tokens equal",
            "kl                  0.0236    0.1  nats   passed",
        };
        Assert.All(lines, line => Assert.Contains(line, output));
        Assert.EndsWith("passed", output.TrimEnd());
        Changes.Set(_bundle, "/dtype", "float32");
        Changes.Set(_bundle, "/weights", new JsonArray());
        (code, output, errors) = Run(_bundle, "--golden", golden);
        Assert.Equal(1, code);
        Assert.EndsWith("FAILED", output.TrimEnd());
        Assert.StartsWith($"error: {_bundle}: mean_difference is ", errors);
        Assert.Contains(", allowed is 0.0001; max_difference is ", errors);
    }

    [Theory]
    [InlineData(2, "--max-tokens is no option", "It was", "--max-tokens", "8")]
    [InlineData(2, "--top-k needs a value", "It was", "--top-k")]
    [InlineData(2, "--top-k is x, expected a whole number", "It was", "--top-k", "x")]
    [InlineData(2, "--temperature is hot, expected a number", "It was", "--temperature", "hot")]
    [InlineData(2, "--seed is 1e9, expected a whole number", "It was", "--seed", "1e9")]
    [InlineData(2, "an argument is no text", "\uFFFD")]
    [InlineData(2, "expected a bundle and a prompt")]
    [InlineData(2, "with --golden no prompt", "It was", "--golden", "x")]
    [InlineData(1, "TopK", "It was", "--top-k", "-1")]
    [InlineData(1, "threads", "It was", "--threads", "10000")]
    public void SaysWhatIsWrong(int expected, string names, params string[] arguments)
    {
        (int code, string output, string errors) = Run(arguments.Prepend(_bundle).ToArray());
        Assert.Equal((expected, ""), (code, output));
        Assert.Contains(names, errors);
        Assert.DoesNotContain("   at ", errors);
    }

    [Fact]
    public void Helps()
    {
        (int code, string output, _) = Run("--help");
        Assert.Equal(0, code);
        Assert.StartsWith("usage:", output);
    }

    public void Dispose()
    {
        Directory.Delete(_home, recursive: true);
        Directory.Delete(_bundle, recursive: true);
    }

    private (int Code, string Output, string Errors) Run(params string[] arguments)
    {
        string program = Path.Combine(AppContext.BaseDirectory, "Generate.dll");
        ProcessStartInfo start = new ProcessStartInfo(Environment.ProcessPath!)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach (string argument in arguments.Prepend(program))
        {
            start.ArgumentList.Add(argument);
        }
        // no CI, GITHUB_ACTIONS or the like: where one is set, ONNX Runtime keeps its telemetry off by itself
        string[] kept = { "PATH", "SYSTEMROOT", "TEMP", "TMPDIR" };
        foreach (string name in start.Environment.Keys.ToList())
        {
            if (!kept.Contains(name) && !name.StartsWith("DOTNET_"))
            {
                start.Environment.Remove(name);
            }
        }
        start.Environment["HOME"] = _home;
        using Process process = Process.Start(start)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return (process.ExitCode, output, errors.Result);
    }
}
