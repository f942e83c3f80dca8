package phimoe;

import java.math.BigDecimal;
import java.math.MathContext;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.stream.Collectors;

/**
 * What holding a bundle against a golden file found.
 *
 * @param bundle its folder
 * @param reference the checkpoint and the file
 * @param tokens how many were run
 * @param windows how many of them each window has
 * @param bundleToReference what a user of the bundle sees
 * @param bundleToStored the kernels alone, against PyTorch over the stored weights; null where the file does not know these
 * @param storedToReference the rounding of the weights alone, as it was when the file was saved; null as before
 * @param routingAgreement the share of choices of experts that it leaves unchanged, likewise; null as before
 * @param perplexity of "reference", "stored" and "bundle", as far as it is known
 * @param greedy how both continue the beginning of the first window
 * @param notes what else a reader must know
 * @param checks the figures that were held against a limit
 */
public record Report(
        String bundle,
        String reference,
        int tokens,
        List<Integer> windows,
        Comparison bundleToReference,
        Comparison bundleToStored,
        Comparison storedToReference,
        Double routingAgreement,
        Map<String, Double> perplexity,
        Greedy greedy,
        List<String> notes,
        List<Check> checks) {

    /** A figure beside its limit. */
    public record Check(String name, double measured, double limit) {
        /** Whether the figure is a number and no more than the limit. */
        public boolean passed() {
            return measured <= limit;
        }
    }

    /** Two greedy continuations as text, and how many of how many tokens are equal from the start. */
    public record Greedy(String reference, String bundle, int agreeing, int newTokens) {}

    /** Whether every figure is within its limit. */
    public boolean passed() {
        return failures().isEmpty();
    }

    /** What is past its limit, in words. */
    public List<String> failures() {
        return checks.stream().filter(check -> !check.passed()).map(check ->
                check.name + " is " + brief(check.measured) + ", allowed is " + brief(check.limit)).toList();
    }

    /** All of it for people, as phimoe-verify prints it. */
    public String text() {
        StringBuilder text = new StringBuilder(bundle + " against " + reference + "\n");
        int longest = windows.stream().mapToInt(length -> length).max().orElse(0);
        line(text, "%d tokens in %d windows of up to %d\n", tokens, windows.size(), longest);
        line(text, "%-27s  %13s  %12s  %8s  %10s", "", "mean |d|, std", "max |d|, std", "KL, nats", "same top-1");
        row(text, "bundle to reference", bundleToReference);
        row(text, "bundle to stored weights", bundleToStored);
        row(text, "stored weights to reference", storedToReference);
        text.append('\n');
        text.append("perplexity: ").append(perplexity.entrySet().stream()
                .map(each -> String.format(Locale.ROOT, "%s %.4f", each.getKey(), each.getValue()))
                .collect(Collectors.joining(", "))).append('\n');
        if (routingAgreement != null) {
            line(text, "choices of experts that the stored weights leave unchanged: %.2f%%", 100 * routingAgreement);
        }
        notes.forEach(note -> text.append(note).append('\n'));
        line(text, "greedy continuations, %d of %d tokens equal", greedy.agreeing, greedy.newTokens);
        line(text, "  reference: %s", greedy.reference);
        line(text, "  bundle:    %s\n", greedy.bundle);
        line(text, "%-16s  %8s  %5s  %-5s", "threshold", "measured", "limit", "unit");
        for (Check check : checks) {
            line(text, "%-16s  %8s  %5s  %-5s  %s", check.name, brief(check.measured), brief(check.limit),
                    Thresholds.UNITS.get(check.name), check.passed() ? "passed" : "FAILED");
        }
        return text.append(passed() ? "\npassed" : "\nFAILED").toString();
    }

    private static void line(StringBuilder text, String format, Object... values) {
        text.append(String.format(Locale.ROOT, format, values)).append('\n');
    }

    private static void row(StringBuilder text, String name, Comparison of) {
        if (of != null) {
            line(text, "%-27s  %13.2e  %12.2e  %8.2e  %9.2f%%", name, of.meanDifference(), of.maxDifference(), of.kl(),
                    100 * of.top1Agreement());
        }
    }

    /** Three digits: 0.0123, 1.23e-05. */
    static String brief(double number) {
        if (!Double.isFinite(number) || number == 0) {
            return number == 0 ? "0" : String.valueOf(number);
        }
        BigDecimal rounded = new BigDecimal(number).round(new MathContext(3)).stripTrailingZeros();
        int exponent = rounded.precision() - rounded.scale() - 1;
        return exponent >= -4 && exponent < 3 ? rounded.toPlainString()
                : String.format(Locale.ROOT, "%." + (rounded.precision() - 1) + "e", rounded);
    }
}
