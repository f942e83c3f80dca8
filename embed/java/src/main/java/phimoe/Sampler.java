package phimoe;

import java.util.Arrays;
import java.util.Set;

/** From logits to the next token, as spec/sampling.md says it. */
final class Sampler {
    private static final double COLDEST = 0x1p-126; // of temperatures that are no 0

    private Sampler() {}

    /** The next token; `logits` [vocab_size] may be changed, `step` is the number of tokens generated before. */
    static int sample(float[] logits, Options options, long seed, int step, Set<Integer> seen) {
        boolean finite = true;
        for (float logit : logits) {
            finite &= logit < Float.POSITIVE_INFINITY; // false for NaN, too
        }
        if (!finite || logits[largest(logits)] == Float.NEGATIVE_INFINITY) {
            throw new GenerationException("the graph's logits are not finite; check the bundle with phimoe-verify");
        }
        float penalty = (float) options.repetitionPenalty();
        if (penalty != 1) {
            for (int id : seen) {
                logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
            }
        }
        return options.temperature() < COLDEST ? largest(logits) : draw(logits, options, uniform(seed, step));
    }

    private static int largest(float[] logits) {
        int largest = 0;
        for (int id = 1; id < logits.length; id++) {
            largest = logits[id] > logits[largest] ? id : largest;
        }
        return largest;
    }

    private static int draw(float[] logits, Options options, double u) {
        int[] order = mostLikely(logits, options.topK() == 0 ? logits.length : options.topK());
        double[] weights = new double[order.length];
        double[] sums = new double[order.length];
        double largest = logits[order[0]] / options.temperature();
        double sum = 0;
        for (int rank = 0; rank < order.length; rank++) {
            weights[rank] = Math.exp(logits[order[rank]] / options.temperature() - largest);
            sum += weights[rank];
            sums[rank] = sum;
        }
        int kept = order.length;
        if (options.topP() < 1) {
            kept = 1;
            while (sums[kept - 1] < options.topP() * sum) {
                kept++;
            }
        }
        while (weights[kept - 1] < options.minP()) {
            kept--;
        }
        int rank = 0;
        while (rank < kept - 1 && sums[rank] <= u * sums[kept - 1]) {
            rank++;
        }
        return order[rank];
    }

    /** The ids of the `count` largest logits, largest first, ties by lower id. */
    private static int[] mostLikely(float[] logits, int count) {
        long[] keys = new long[logits.length];
        for (int id = 0; id < keys.length; id++) {
            int bits = Float.floatToRawIntBits(logits[id] + 0f); // + 0 makes -0 equal to 0
            int rising = bits < 0 ? bits ^ Integer.MAX_VALUE : bits; // an int in the order of the floats
            keys[id] = (long) ~rising << 32 | id;
        }
        Arrays.sort(keys);
        return Arrays.stream(keys, 0, Math.min(count, keys.length)).mapToInt(key -> (int) key).toArray();
    }

    /** A number in [0, 1): the top 53 bits of the output number `step` of SplitMix64 started at `seed`. */
    private static double uniform(long seed, int step) {
        long z = seed + (step + 1) * 0x9E3779B97F4A7C15L;
        z = (z ^ z >>> 30) * 0xBF58476D1CE4E5B9L;
        z = (z ^ z >>> 27) * 0x94D049BB133111EBL;
        return ((z ^ z >>> 31) >>> 11) * 0x1p-53;
    }
}
