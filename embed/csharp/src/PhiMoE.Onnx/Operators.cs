using System.Runtime.InteropServices;

namespace PhiMoEOnnx;

/// <summary>
/// This project's own operators for ONNX Runtime, docs/native.md: a library that comes with this one, if it lay there
/// when this one was built.
/// </summary>
internal static class Operators
{
    /// <summary>What a graph with these operators requires.</summary>
    public const string Name = "phimoe.native.1";

    private static readonly string Kernel =
        OperatingSystem.IsWindows() ? "win" : OperatingSystem.IsMacOS() ? "osx" : "linux";

    private static readonly string Platform =
        $"{Kernel}-{RuntimeInformation.ProcessArchitecture.ToString().ToLowerInvariant()}";

    private static readonly string FileName = Kernel switch
    {
        "win" => "phimoe_operators.dll",
        "osx" => "libphimoe_operators.dylib",
        _ => "libphimoe_operators.so",
    };

    /// <summary>The library's path; null where there is none.</summary>
    public static string? Library { get; } = Folders().Select(folder => Path.Combine(folder, FileName))
        .FirstOrDefault(File.Exists);

    /// <summary>What of a graph's <c>requires</c> is here.</summary>
    public static IReadOnlySet<string> Provided { get; } =
        Library == null ? new HashSet<string>() : new HashSet<string> { Name };

    /// <summary>Why a graph that requires them does not run, and what to do.</summary>
    public static string Missing =>
        $"needs the native operators, and PhiMoE.Onnx has no {FileName} for {Platform}; build native and then PhiMoE.Onnx "
        + "again (docs/native.md), or export with --operators stock";

    /// <summary>
    /// Where native libraries lie: beside a published program, below one that runs on several systems, and in packages.
    /// </summary>
    private static IEnumerable<string> Folders()
    {
        yield return AppContext.BaseDirectory;
        yield return Path.Combine(AppContext.BaseDirectory, "runtimes", Platform, "native");
        string packages = AppContext.GetData("NATIVE_DLL_SEARCH_DIRECTORIES") as string ?? "";
        foreach (string folder in packages.Split(Path.PathSeparator, StringSplitOptions.RemoveEmptyEntries))
        {
            yield return folder;
        }
    }
}
