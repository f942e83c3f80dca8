using System.Text.RegularExpressions;
using Microsoft.ML.OnnxRuntime;

namespace PhiMoEOnnx;

/// <summary>Opens a bundle's graph in ONNX Runtime, on the CPU.</summary>
internal static class Session
{
    /// <summary>A session over the first graph of the manifest that the installed ONNX Runtime can load.</summary>
    /// <exception cref="DeviceException">The bundle is for another device, or ONNX Runtime is too old or refuses its graph.</exception>
    public static InferenceSession Open(string folder, Manifest manifest, int? threads)
    {
        if (manifest.Target != "cpu" && manifest.Target != "portable")
        {
            throw new DeviceException($"{folder}: was exported for {manifest.Target}, not for cpu; export it again with --target cpu");
        }
        if (threads < 1)
        {
            throw new DeviceException($"threads is {threads}, expected 1 or more, or null for ONNX Runtime's own choice");
        }
        string installed = Installed();
        string path = Path.Combine(folder, ChooseGraph(manifest, installed).File);
        using SessionOptions options = new SessionOptions
        {
            LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR,
            IntraOpNumThreads = threads ?? 0,
        };
        try
        {
            return new InferenceSession(path, options);
        }
        catch (OnnxRuntimeException error)
        {
            throw new DeviceException($"{path}: ONNX Runtime {installed} cannot load it: {error.Message}", error);
        }
    }

    /// <summary>The manifest's first graph that ONNX Runtime <c>installed</c> ("1.32.0") loads.</summary>
    /// <exception cref="DeviceException">Every graph needs a newer release.</exception>
    public static Graph ChooseGraph(Manifest manifest, string installed)
    {
        Graph? graph = manifest.Graphs.FirstOrDefault(each => Release(each.MinimumOnnxRuntime) <= Release(installed));
        if (graph == null)
        {
            string? needed = manifest.Graphs.Select(each => each.MinimumOnnxRuntime).MinBy(Release);
            throw new DeviceException(
                $"the bundle needs ONNX Runtime {needed} or newer, installed is {installed}; upgrade the package Microsoft.ML.OnnxRuntime");
        }
        return graph;
    }

    private static string Installed()
    {
        try
        {
            return OrtEnv.Instance().GetVersionString();
        }
        catch (Exception error) when (error is TypeInitializationException || error is DllNotFoundException)
        {
            throw new DeviceException("ONNX Runtime's native library does not load; its package serves Windows, Linux and macOS", error);
        }
    }

    /// <summary>The numbers of a release: "1.32.0+cu13" -> 1.32.0.</summary>
    private static Version Release(string version)
    {
        Match match = Regex.Match(version, @"^([0-9]{1,9})\.([0-9]{1,9})(?:\.([0-9]{1,9}))?");
        return match.Success
            ? new Version(Number(match.Groups[1]), Number(match.Groups[2]), Number(match.Groups[3]))
            : throw new BundleException($"manifest.json: minimum_onnxruntime is {version}, expected a release; export the bundle again");
    }

    private static int Number(Group group) => group.Success ? int.Parse(group.Value) : 0;
}
