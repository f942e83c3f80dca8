package phimoe;

import java.util.LinkedHashMap;
import java.util.Map;
import java.util.NavigableMap;
import java.util.Set;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** The most that a bundle's figures may be, by name; phimoe_onnx/parity/thresholds.py says where the numbers come from. */
final class Thresholds {
    private static final NavigableMap<Integer, Map<String, Double>> DEFAULTS = new TreeMap<>(Map.of(
            32, Map.of("mean_difference", 1e-4, "max_difference", 1e-3),
            16, Map.of("kl", 1e-3, "kernel_kl", 1e-6, "perplexity_ratio", 1.001),
            8, Map.of("kl", 1e-2, "kernel_kl", 1e-2, "perplexity_ratio", 1.005),
            4, Map.of("kl", 1e-1, "kernel_kl", 1e-2, "perplexity_ratio", 1.05)));
    // what a cache of integers may add
    private static final Map<String, Map<String, Double>> CACHES = Map.of(
            "int8", Map.of("kl", 1e-2, "kernel_kl", 1e-3, "perplexity_ratio", 5e-3),
            "uint8", Map.of("kl", 2e-1, "kernel_kl", 3e-2, "perplexity_ratio", 5e-2));
    private static final Pattern BITS = Pattern.compile("[a-z]+([0-9]{1,2})");

    /** What a figure is counted in. */
    static final Map<String, String> UNITS = Map.of(
            "mean_difference", "std", "max_difference", "std", "kl", "nats", "kernel_kl", "nats", "perplexity_ratio", "ratio");

    private Thresholds() {}

    /**
     * The thresholds of a bundle with matrices and activations of these dtypes and a cache of that one.
     *
     * @throws IllegalArgumentException a dtype is none, or there are none
     */
    static Map<String, Double> of(Set<String> dtypes, String cache) {
        int bits = dtypes.stream().mapToInt(Thresholds::bits).min().orElseThrow(IllegalArgumentException::new);
        Map<String, Double> known = (bits < 4 ? DEFAULTS.firstEntry() : DEFAULTS.floorEntry(bits)).getValue();
        Map<String, Double> limits = new LinkedHashMap<>();
        Map<String, Double> added = CACHES.get(cache);
        if (added == null) {
            limits.putAll(known);
        } else {
            added.forEach((name, more) ->
                    limits.put(name, known.getOrDefault(name, name.equals("perplexity_ratio") ? 1.0 : 0.0) + more));
        }
        return limits;
    }

    private static int bits(String dtype) {
        Matcher bits = BITS.matcher(dtype);
        if (!bits.matches()) {
            throw new IllegalArgumentException(dtype);
        }
        return Integer.parseInt(bits.group(1));
    }
}
