using System.Globalization;
using System.Text.RegularExpressions;

namespace PhiMoEOnnx;

/// <summary>
/// The most that a bundle's figures may be, by name; phimoe_onnx/parity/thresholds.py says where the numbers come from.
/// </summary>
internal static class Thresholds
{
    /// <summary>The figures that may have a limit, in the order of a report, and what each is counted in.</summary>
    public static readonly IReadOnlyDictionary<string, string> Units = new Dictionary<string, string>
    {
        ["mean_difference"] = "std",
        ["max_difference"] = "std",
        ["kl"] = "nats",
        ["kernel_kl"] = "nats",
        ["perplexity_ratio"] = "ratio",
    };

    private static readonly (int Bits, Dictionary<string, double> Limits)[] Defaults =
    {
        (32, new Dictionary<string, double> { ["mean_difference"] = 1e-4, ["max_difference"] = 1e-3 }),
        (16, Divergences(1e-3, 1e-6, 1.001)),
        (8, Divergences(1e-2, 1e-2, 1.005)),
        (0, Divergences(1e-1, 1e-2, 1.05)),
    };

    // what a cache of integers may add
    private static readonly Dictionary<string, Dictionary<string, double>> Caches =
        new Dictionary<string, Dictionary<string, double>>
        {
            ["int8"] = Divergences(1e-2, 1e-3, 5e-3),
            ["uint8"] = Divergences(2e-1, 3e-2, 5e-2),
        };

    /// <summary>
    /// The limits of a bundle with matrices and activations of these dtypes and a cache of that one; null where a dtype
    /// is none, or there are none.
    /// </summary>
    public static IReadOnlyDictionary<string, double>? Of(IReadOnlyCollection<string> dtypes, string cache)
    {
        Match[] bits = dtypes.Select(dtype => Regex.Match(dtype, "^[a-z]+([0-9]{1,2})$")).ToArray();
        if (bits.Length == 0 || !bits.All(each => each.Success))
        {
            return null;
        }
        int fewest = bits.Min(each => int.Parse(each.Groups[1].Value, CultureInfo.InvariantCulture));
        Dictionary<string, double> known = Defaults.First(each => each.Bits <= fewest).Limits;
        return Caches.TryGetValue(cache, out Dictionary<string, double>? added)
            ? added.ToDictionary(
                more => more.Key,
                more => known.GetValueOrDefault(more.Key, more.Key == "perplexity_ratio" ? 1 : 0) + more.Value)
            : known;
    }

    private static Dictionary<string, double> Divergences(double kl, double kernelKl, double perplexityRatio) =>
        new Dictionary<string, double>
        {
            ["kl"] = kl,
            ["kernel_kl"] = kernelKl,
            ["perplexity_ratio"] = perplexityRatio,
        };
}
