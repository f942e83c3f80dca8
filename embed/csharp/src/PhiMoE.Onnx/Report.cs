using System.Globalization;

namespace PhiMoEOnnx;

/// <summary>How far one model's logits are from another's, over all tokens that were run.</summary>
/// <param name="Tokens">How many.</param>
/// <param name="MeanDifference">
/// The mean of the differences, without their signs, in standard deviations of the logits.
/// </param>
/// <param name="MaxDifference">The largest of them.</param>
/// <param name="Kl">The mean divergence of a token, in nats.</param>
/// <param name="Top1Agreement">The share of tokens after which both find the same one most likely.</param>
public sealed record Comparison(
    int Tokens, double MeanDifference, double MaxDifference, double Kl, double Top1Agreement);

/// <summary>A figure beside its limit.</summary>
/// <param name="Name">The figure's.</param>
/// <param name="Measured">What it is.</param>
/// <param name="Limit">The most that it may be.</param>
public sealed record Check(string Name, double Measured, double Limit)
{
    /// <summary>Whether the figure is a number and no more than the limit.</summary>
    public bool Passed => Measured <= Limit;
}

/// <summary>How the checkpoint and the bundle continue a text greedily.</summary>
/// <param name="Reference">The checkpoint's text.</param>
/// <param name="Bundle">The bundle's.</param>
/// <param name="Agreeing">How many tokens are equal from the start.</param>
/// <param name="NewTokens">Of how many.</param>
public sealed record Greedy(string Reference, string Bundle, int Agreeing, int NewTokens);

/// <summary>What holding a bundle against a golden file found.</summary>
/// <param name="Bundle">Its folder.</param>
/// <param name="Reference">The checkpoint and the file.</param>
/// <param name="Tokens">How many were run.</param>
/// <param name="Windows">How many of them each window has.</param>
/// <param name="BundleToReference">What a user of the bundle sees.</param>
/// <param name="BundleToStored">
/// The kernels alone, against PyTorch over the stored weights; null where the file does not know these.
/// </param>
/// <param name="StoredToReference">
/// The rounding of the weights alone, as it was when the file was saved; null as before.
/// </param>
/// <param name="RoutingAgreement">The share of choices of experts that it leaves unchanged, likewise.</param>
/// <param name="Perplexity">Of "reference", "stored" and "bundle", as far as it is known.</param>
/// <param name="Greedy">How both continue the beginning of the first window.</param>
/// <param name="Notes">What else a reader must know.</param>
/// <param name="Checks">The figures that were held against a limit.</param>
public sealed record Report(
    string Bundle,
    string Reference,
    int Tokens,
    IReadOnlyList<int> Windows,
    Comparison BundleToReference,
    Comparison? BundleToStored,
    Comparison? StoredToReference,
    double? RoutingAgreement,
    IReadOnlyDictionary<string, double> Perplexity,
    Greedy Greedy,
    IReadOnlyList<string> Notes,
    IReadOnlyList<Check> Checks)
{
    /// <summary>Whether every figure is within its limit.</summary>
    public bool Passed => Checks.All(check => check.Passed);

    /// <summary>What is past its limit, in words.</summary>
    public IReadOnlyList<string> Failures => Checks.Where(check => !check.Passed)
        .Select(check => $"{check.Name} is {Brief(check.Measured)}, allowed is {Brief(check.Limit)}").ToArray();

    /// <summary>All of it for people, as phimoe-verify prints it.</summary>
    public string Text()
    {
        List<string> lines = new List<string>
        {
            $"{Bundle} against {Reference}",
            $"{Tokens} tokens in {Windows.Count} windows of up to {Windows.Max()}",
            "",
            $"{"",-27}  {"mean |d|, std",13}  {"max |d|, std",12}  {"KL, nats",8}  {"same top-1",10}",
        };
        AddRow(lines, "bundle to reference", BundleToReference);
        AddRow(lines, "bundle to stored weights", BundleToStored);
        AddRow(lines, "stored weights to reference", StoredToReference);
        lines.Add("");
        lines.Add("perplexity: " + string.Join(", ", Perplexity.Select(each => $"{each.Key} {Show(each.Value, "F4")}")));
        if (RoutingAgreement is double share)
        {
            lines.Add($"choices of experts that the stored weights leave unchanged: {Percent(share)}");
        }
        lines.AddRange(Notes);
        lines.Add($"greedy continuations, {Greedy.Agreeing} of {Greedy.NewTokens} tokens equal");
        lines.Add($"  reference: {Greedy.Reference}");
        lines.Add($"  bundle:    {Greedy.Bundle}");
        lines.Add("");
        lines.Add($"{"threshold",-16}  {"measured",8}  {"limit",5}  unit");
        foreach (Check check in Checks)
        {
            string cells = $"{check.Name,-16}  {Brief(check.Measured),8}  {Brief(check.Limit),5}";
            lines.Add($"{cells}  {Thresholds.Units[check.Name],-5}  {(check.Passed ? "passed" : "FAILED")}");
        }
        lines.Add("");
        lines.Add(Passed ? "passed" : "FAILED");
        return string.Join("\n", lines);
    }

    /// <summary>Three digits: 0.0123, 1.23e-05.</summary>
    internal static string Brief(double number) =>
        double.IsFinite(number) ? Show(number, "G3").Replace('E', 'e') : Show(number, "G3");

    private static void AddRow(List<string> lines, string name, Comparison? of)
    {
        if (of != null)
        {
            const string Three = "0.00e+00";
            lines.Add(
                $"{name,-27}  {Show(of.MeanDifference, Three),13}  {Show(of.MaxDifference, Three),12}  "
                + $"{Show(of.Kl, Three),8}  {Percent(of.Top1Agreement),10}");
        }
    }

    private static string Percent(double share) => Show(100 * share, "F2") + "%";

    private static string Show(double number, string format) => number.ToString(format, CultureInfo.InvariantCulture);
}
