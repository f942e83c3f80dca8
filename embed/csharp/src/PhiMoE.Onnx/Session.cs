using System.Text.RegularExpressions;
using Microsoft.ML.OnnxRuntime;

namespace PhiMoEOnnx;

/// <summary>A bundle's graph in ONNX Runtime, on the CPU.</summary>
internal sealed class Session : IDisposable
{
    private const string Device = "cpu";
    // ONNX Runtime starts whatever is asked for, and a million threads would never all be running
    private static readonly int MostThreads = Math.Max(256, Environment.ProcessorCount);
    // a pass below so many bytes of weights times tokens is too short to be worth waking another thread
    private const long Short = 8_000_000;

    private readonly InferenceSession _all;
    private readonly InferenceSession? _single; // the same graph with one thread, for short passes
    private readonly long _weights; // bytes

    private Session(InferenceSession all, InferenceSession? single, long weights)
    {
        _all = all;
        _single = single;
        _weights = weights;
    }

    /// <summary>
    /// The manifest's first graph that runs here, on ONNX Runtime <c>installed</c> ("1.32.0") and with <c>provided</c>
    /// of what a graph may require.
    /// </summary>
    /// <exception cref="DeviceException">
    /// None is for the CPU, or each requires what is unknown here or a newer release.
    /// </exception>
    public static Graph ChooseGraph(
        string folder, Manifest manifest, string installed, IReadOnlySet<string> provided)
    {
        Graph[] here = manifest.Graphs.Where(graph => graph.Devices.ContainsKey(Device)).ToArray();
        if (here.Length == 0)
        {
            string others = string.Join(", ", manifest.Graphs.SelectMany(graph => graph.Devices.Keys).Distinct());
            throw new DeviceException(
                $"{folder}: was exported for {others}, not for {Device}; export it again with --target {Device}");
        }
        Graph[] understood = here.Where(graph => graph.Requires.All(provided.Contains)).ToArray();
        if (understood.Length == 0)
        {
            string unknown = string.Join(", ", here.SelectMany(graph => graph.Requires).Except(provided));
            throw new DeviceException(unknown == Operators.Name
                ? $"{folder}: {Operators.Missing}"
                : $"{folder}: its graphs require {unknown}, which this release does not know; upgrade PhiMoE.Onnx");
        }
        int[] release = Release(installed);
        Graph? graph = understood.FirstOrDefault(each => Compare(Release(each.Devices[Device]), release) <= 0);
        if (graph == null)
        {
            Comparer<string> byRelease = Comparer<string>.Create((one, other) => Compare(Release(one), Release(other)));
            string? needed = understood.Select(each => each.Devices[Device]).Min(byRelease);
            throw new DeviceException(
                $"{folder}: needs ONNX Runtime {needed} or newer, installed is {installed}; "
                + "upgrade the package Microsoft.ML.OnnxRuntime");
        }
        return graph;
    }

    /// <summary>
    /// A session over a graph of the bundle, once its weights' files and its inputs and outputs are what the manifest
    /// says.
    /// </summary>
    /// <exception cref="BundleException">They are not.</exception>
    /// <exception cref="DeviceException">ONNX Runtime refuses the graph, or <c>threads</c> is out of range.</exception>
    public static Session Open(string folder, Manifest manifest, Graph graph, int? threads)
    {
        if (threads < 1 || threads > MostThreads)
        {
            throw new DeviceException($"threads is {threads}, expected 1 to {MostThreads}, or null");
        }
        string path = Path.Combine(folder, graph.File);
        ExternalData.Check(path, manifest.Files);
        InferenceSession all = Open(path, graph, threads ?? 0);
        try
        {
            Agreement.Check(folder, graph, all, manifest.Decoding);
            long weights = manifest.Files.Where(file => file.Key.EndsWith(".data", StringComparison.Ordinal))
                .Sum(file => file.Value.Size);
            return new Session(all, threads == null && weights <= Short ? Open(path, graph, 1) : null, weights);
        }
        catch
        {
            all.Dispose();
            throw;
        }
    }

    /// <summary>Where a pass over so many new tokens, those of all rows together, runs.</summary>
    public InferenceSession For(int tokens) => _single != null && tokens * _weights <= Short ? _single : _all;

    /// <summary>Frees the memory.</summary>
    public void Dispose()
    {
        _all.Dispose();
        _single?.Dispose();
    }

    /// <summary>The release of the installed ONNX Runtime.</summary>
    /// <exception cref="DeviceException">There is none for this system.</exception>
    public static string Installed()
    {
        try
        {
            Telemetry.TurnOff();
            return OrtEnv.Instance().GetVersionString();
        }
        catch (Exception error) when (error is TypeInitializationException || error is DllNotFoundException)
        {
            throw new DeviceException(
                "ONNX Runtime's native library does not load; its package serves Windows, Linux and macOS", error);
        }
    }

    private static InferenceSession Open(string path, Graph graph, int threads)
    {
        using SessionOptions options = new SessionOptions
        {
            LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR,
            IntraOpNumThreads = threads,
        };
        // longer, and threads that wait take a busy machine's time
        options.AddSessionConfigEntry("session.intra_op.spin_duration_us", "50");
        options.AddSessionConfigEntry("session.load_model_format", "ONNX"); // the one that ExternalData has looked at
        try
        {
            if (graph.Requires.Contains(Operators.Name))
            {
                options.RegisterCustomOpLibrary(Operators.Library);
            }
            return new InferenceSession(path, options);
        }
        catch (OnnxRuntimeException error)
        {
            throw new DeviceException($"{path}: ONNX Runtime {Installed()} cannot load it: {error.Message}", error);
        }
    }

    /// <summary>The numbers of a release: "1.32.0+cu13" -> 1, 32, 0.</summary>
    private static int[] Release(string version) =>
        Regex.Match(version, @"^[0-9]+(\.[0-9]+)*").Value.Split('.').Select(int.Parse).ToArray();

    /// <summary>Compares number by number; those that are not there count as 0.</summary>
    private static int Compare(int[] one, int[] other)
    {
        for (int i = 0; i < Math.Max(one.Length, other.Length); i++)
        {
            int difference = one.ElementAtOrDefault(i).CompareTo(other.ElementAtOrDefault(i));
            if (difference != 0)
            {
                return difference;
            }
        }
        return 0;
    }
}
