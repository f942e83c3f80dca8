package phimoe;

import java.util.List;

/**
 * How a text is continued, for example {@code Options.GREEDY.maxNewTokens(60).stop("\n")}. Sampling is specified to the bit in
 * spec/sampling.md: the same seed gives the same tokens in every language.
 *
 * @param maxNewTokens where to end at the latest; null for 1024, or what the context leaves
 * @param temperature divides the logits; 0 takes the most likely token
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
        stop = List.copyOf(stop);
        check("maxNewTokens", maxNewTokens, maxNewTokens == null || maxNewTokens >= 1, "1 or more");
        check("temperature", temperature, temperature >= 0 && temperature < Double.POSITIVE_INFINITY, "0 (greedy) or more");
        check("topK", topK, topK >= 0, "0 (off) or more");
        check("topP", topP, topP > 0 && topP <= 1, "more than 0 and at most 1 (off)");
        check("minP", minP, minP >= 0 && minP <= 1, "between 0 (off) and 1");
        boolean holds = repetitionPenalty > 0 && repetitionPenalty < Double.POSITIVE_INFINITY;
        check("repetitionPenalty", repetitionPenalty, holds, "more than 0; 1 is off");
        check("stop", stop, !stop.contains(""), "no empty string, which would end the text before it began");
    }

    /** These options with another {@link #maxNewTokens()}. */
    public Options maxNewTokens(int value) {
        return new Options(value, temperature, topK, topP, minP, repetitionPenalty, seed, stop);
    }

    /** These options with another {@link #temperature()}. */
    public Options temperature(double value) {
        return new Options(maxNewTokens, value, topK, topP, minP, repetitionPenalty, seed, stop);
    }

    /** These options with another {@link #topK()}. */
    public Options topK(int value) {
        return new Options(maxNewTokens, temperature, value, topP, minP, repetitionPenalty, seed, stop);
    }

    /** These options with another {@link #topP()}. */
    public Options topP(double value) {
        return new Options(maxNewTokens, temperature, topK, value, minP, repetitionPenalty, seed, stop);
    }

    /** These options with another {@link #minP()}. */
    public Options minP(double value) {
        return new Options(maxNewTokens, temperature, topK, topP, value, repetitionPenalty, seed, stop);
    }

    /** These options with another {@link #repetitionPenalty()}. */
    public Options repetitionPenalty(double value) {
        return new Options(maxNewTokens, temperature, topK, topP, minP, value, seed, stop);
    }

    /** These options with another {@link #seed()}. */
    public Options seed(long value) {
        return new Options(maxNewTokens, temperature, topK, topP, minP, repetitionPenalty, value, stop);
    }

    /** These options with other {@link #stop()} strings. */
    public Options stop(String... values) {
        return new Options(maxNewTokens, temperature, topK, topP, minP, repetitionPenalty, seed, List.of(values));
    }

    private static void check(String name, Object value, boolean holds, String expected) {
        if (!holds) {
            throw new GenerationException(name + " is " + value + ", expected " + expected);
        }
    }
}
