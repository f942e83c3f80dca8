using System.Diagnostics;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>The application of tests/Published in the forms in which applications are shipped.</summary>
public sealed class PublishTests : IClassFixture<Conformance>
{
    private readonly PhiMoE _model;

    public PublishTests(Conformance conformance)
    {
        _model = conformance.Model;
    }

    [PublishFact("single-file")]
    public void RunsAsASingleFile() => AssertRuns("single-file");

    [PublishFact("trimmed")]
    public void RunsTrimmed() => AssertRuns("trimmed");

    [PublishFact("aot")]
    public void RunsAsNativeCode() => AssertRuns("aot");

    private void AssertRuns(string form)
    {
        string artifacts = Directory.CreateTempSubdirectory().FullName;
        string bundle = Conformance.CopyBundle();
        try
        {
            string folder = Path.Combine(artifacts, "out");
            (int code, string output) = Publishing.DotNet(form, artifacts, "publish", "-o", folder);
            Assert.True(code == 0, output);
            Assert.DoesNotMatch("warning IL[0-9]+.*PhiMoE\\.Onnx", output);
            string program = Path.Combine(folder, OperatingSystem.IsWindows() ? "Published.exe" : "Published");
            (code, output) = Publishing.Run(program, bundle);
            Assert.True(code == 0, output);
            string[] lines = output.Split('\n');
            GenerationOptions options = new GenerationOptions { MaxNewTokens = 8, Stop = new[] { "." } };
            string text = string.Join(" ", _model.Generate("It was", options).TokenIds);
            Assert.Equal(text, lines[0].TrimEnd());
            Message[] chat = { new Message("user", "Hi") };
            Assert.Equal(string.Join(" ", _model.Generate(chat, options).TokenIds), lines[1].TrimEnd());
            Assert.Equal(text, lines[2].TrimEnd());
            Assert.Contains("manifest.json: is missing", lines[3]);
        }
        finally
        {
            Directory.Delete(artifacts, recursive: true);
            Directory.Delete(bundle, recursive: true);
        }
    }
}

/// <summary>
/// A test that publishes; skipped where the packages that the SDK publishes with cannot be had, without a network.
/// </summary>
[AttributeUsage(AttributeTargets.Method)]
internal sealed class PublishFactAttribute : FactAttribute
{
    public PublishFactAttribute(string form)
    {
        string artifacts = Directory.CreateTempSubdirectory().FullName;
        (int code, string output) = Publishing.DotNet(form, artifacts, "restore");
        Directory.Delete(artifacts, recursive: true);
        string[] missing = { "error NU1101", "error NU1102", "error NU1301" };
        if (code != 0 && output.Split('\n').FirstOrDefault(line => missing.Any(line.Contains)) is string reason)
        {
            Skip = reason.Trim();
        }
    }
}

/// <summary>Calls of the SDK.</summary>
internal static class Publishing
{
    /// <summary>A command over tests/Published, with what it builds in a folder of its own.</summary>
    public static (int Code, string Output) DotNet(
        string form, string artifacts, string command, params string[] options)
    {
        string project = Path.Combine(Conformance.Repository, "embed", "csharp", "tests", "Published");
        string[] arguments = { command, project, "--artifacts-path", artifacts, $"-p:Form={form}", "-nodeReuse:false" };
        return Run(Environment.ProcessPath!, arguments.Concat(options).ToArray());
    }

    /// <summary>A process's exit code, and all that it wrote.</summary>
    public static (int Code, string Output) Run(string program, params string[] arguments)
    {
        ProcessStartInfo start = new ProcessStartInfo(program)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        arguments.ToList().ForEach(start.ArgumentList.Add);
        foreach (string name in start.Environment.Keys.Where(name => name.StartsWith("MSBUILD")).ToArray())
        {
            start.Environment.Remove(name); // of the build that runs these tests
        }
        using Process process = Process.Start(start)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return (process.ExitCode, output + errors.Result);
    }
}
