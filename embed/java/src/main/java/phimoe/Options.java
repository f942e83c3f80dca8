package phimoe;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;

/**
 * How a text is continued, for example {@code Options.GREEDY.maxNewTokens(60).stop("\n")}. Sampling is specified to the bit in
 * spec/sampling.md: the same seed draws the same random numbers in every language.
 *
 * <p>Each method gives these options with another value; null gives the default back.
 *
 * @param maxNewTokens where to end at the latest; null for 1024, or what the context leaves
 * @param temperature divides the logits; 0, and what is less than 2^-126, takes the most likely token
 * @param topK keeps the k most likely tokens; 0 keeps all
 * @param topP keeps the fewest most likely tokens whose probabilities reach topP; 1 keeps all
 * @param minP keeps tokens at least minP times as likely as the most likely one; 0 keeps all
 * @param repetitionPenalty divides positive logits of tokens seen before and multiplies others; 1 changes nothing
 * @param seed of the draws; null for a fresh one for each row
 * @param stop strings at which the text ends, themselves left out
 */
public record Options(
        Integer maxNewTokens,
        double temperature,
        int topK,
        double topP,
        double minP,
        double repetitionPenalty,
        Long seed,
        List<String> stop) {
    /** The most likely token each time. */
    public static final Options GREEDY = new Options(null, 0, 0, 1, 0, 1, null, List.of());

    /**
     * Checks the values.
     *
     * @throws GenerationException one is out of range
     */
    public Options {
        check("maxNewTokens", maxNewTokens, maxNewTokens == null || maxNewTokens >= 1, "1 or more");
        check("temperature", temperature, temperature >= 0 && temperature < Double.POSITIVE_INFINITY, "0 (greedy) or more");
        check("topK", topK, topK >= 0, "0 (off) or more");
        check("topP", topP, topP > 0 && topP <= 1, "more than 0 and at most 1 (off)");
        check("minP", minP, minP >= 0 && minP <= 1, "between 0 (off) and 1");
        boolean holds = repetitionPenalty >= 1e-30 && repetitionPenalty <= 1e30;
        check("repetitionPenalty", repetitionPenalty, holds, "1e-30 to 1e30; 1 is off");
        stop = stop == null ? List.of() : Collections.unmodifiableList(new ArrayList<>(stop)); // the caller's may change
        for (String each : stop) {
            check("stop", stop, each != null, "no null among the strings");
            check("stop", stop, !each.isEmpty(), "no empty string, which would end the text before it began");
            Tokenizer.checkCharacters("stop", each);
        }
    }

    /** Another {@link #maxNewTokens()}. */
    public Options maxNewTokens(Integer value) {
        return new Options(value, temperature, topK, topP, minP, repetitionPenalty, seed, stop);
    }

    /** Another {@link #temperature()}. */
    public Options temperature(Number value) {
        return new Options(maxNewTokens, or(value, 0), topK, topP, minP, repetitionPenalty, seed, stop);
    }

    /** Another {@link #topK()}. */
    public Options topK(Integer value) {
        return new Options(maxNewTokens, temperature, value == null ? 0 : value, topP, minP, repetitionPenalty, seed, stop);
    }

    /** Another {@link #topP()}. */
    public Options topP(Number value) {
        return new Options(maxNewTokens, temperature, topK, or(value, 1), minP, repetitionPenalty, seed, stop);
    }

    /** Another {@link #minP()}. */
    public Options minP(Number value) {
        return new Options(maxNewTokens, temperature, topK, topP, or(value, 0), repetitionPenalty, seed, stop);
    }

    /** Another {@link #repetitionPenalty()}. */
    public Options repetitionPenalty(Number value) {
        return new Options(maxNewTokens, temperature, topK, topP, minP, or(value, 1), seed, stop);
    }

    /** Another {@link #seed()}. */
    public Options seed(long value) {
        return seed(Long.valueOf(value));
    }

    /** Another {@link #seed()}, or a fresh one for each row. */
    public Options seed(Long value) {
        return new Options(maxNewTokens, temperature, topK, topP, minP, repetitionPenalty, value, stop);
    }

    /** Other {@link #stop()} strings. */
    public Options stop(String... values) {
        List<String> strings = values == null ? null : Arrays.asList(values);
        return new Options(maxNewTokens, temperature, topK, topP, minP, repetitionPenalty, seed, strings);
    }

    private static double or(Number value, double otherwise) {
        return value == null ? otherwise : value.doubleValue();
    }

    private static void check(String name, Object value, boolean holds, String expected) {
        if (!holds) {
            throw new GenerationException(name + " is " + value + ", expected " + expected);
        }
    }
}
