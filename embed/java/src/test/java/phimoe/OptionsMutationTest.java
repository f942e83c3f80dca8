package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Random options: refused exactly where spec/embedding.md says, by name; else tokens, the same ones each time. */
class OptionsMutationTest {
    private static final Double[] NUMBERS = {
        null, 0.0, -0.0, 1.0, 0.5, 0.999, 2.0, 100.0, 1e-9, 1e-30, 9e-31, 1e-45, 1e-300, Double.MIN_VALUE, 1e30, 1.1e30, 3e38,
        1e308, Double.MAX_VALUE, -1.0, -1e-300, Double.NaN, Double.POSITIVE_INFINITY, Double.NEGATIVE_INFINITY,
    };
    private static final Integer[] INTEGERS = {
        null, 0, 1, 2, 3, 40, 2048, 2049, Integer.MAX_VALUE, -1, Integer.MIN_VALUE,
    };
    private static final String[] STOPS = {
        "very", ".", " ", "\n", "<|end|>", "\0", "e\u0301", "\ud83d\ude00", "x".repeat(10_000), "\ud800", "a\udc00", "", null,
    };
    private static final String PROMPT = "It was a fine morning, and";
    private static PhiMoE model;

    @BeforeAll
    static void load() {
        model = PhiMoE.load(Conformance.BUNDLE, 1);
    }

    @AfterAll
    static void close() {
        model.close();
    }

    /** Values of all options; what is null is left out. */
    private record Values(
            Integer maxNewTokens, Double temperature, Integer topK, Double topP, Double minP, Double repetitionPenalty,
            long seed, List<String> stop) {
        private static Values random(Random random) {
            // each option in three of seven times; the rest has its default
            return new Values(
                    random.nextInt(7) < 3 ? integer(random) : Integer.valueOf(3),
                    random.nextInt(7) < 3 ? number(random) : null,
                    random.nextInt(7) < 2 ? integer(random) : null,
                    random.nextInt(7) < 2 ? number(random) : null,
                    random.nextInt(7) < 2 ? number(random) : null,
                    random.nextInt(7) < 2 ? number(random) : null,
                    random.nextLong(),
                    Stream.generate(() -> STOPS[random.nextInt(STOPS.length)]).limit(random.nextInt(2)).toList());
        }

        private static Integer integer(Random random) {
            return INTEGERS[random.nextInt(INTEGERS.length)];
        }

        private static Double number(Random random) {
            return random.nextInt(4) == 0 ? Double.valueOf(random.nextDouble()) : NUMBERS[random.nextInt(NUMBERS.length)];
        }

        private Options options() {
            return Options.GREEDY.temperature(temperature).topK(topK).topP(topP).minP(minP)
                    .repetitionPenalty(repetitionPenalty).seed(seed).stop(stop.toArray(String[]::new)).maxNewTokens(maxNewTokens);
        }

        /** The names of the options that are out of their range. */
        private List<String> wrong() {
            List<String> names = new ArrayList<>();
            expect(names, "maxNewTokens", maxNewTokens == null || maxNewTokens >= 1 && maxNewTokens < 900);
            expect(names, "temperature", temperature == null || temperature >= 0 && temperature <= Double.MAX_VALUE);
            expect(names, "topK", topK == null || topK >= 0);
            expect(names, "topP", topP == null || topP > 0 && topP <= 1);
            expect(names, "minP", minP == null || minP >= 0 && minP <= 1);
            expect(names, "repetitionPenalty",
                    repetitionPenalty == null || repetitionPenalty >= 1e-30 && repetitionPenalty <= 1e30);
            List<String> bad = Arrays.asList("", null, "\ud800", "a\udc00");
            expect(names, "stop", Collections.disjoint(bad, stop));
            return names;
        }

        private static void expect(List<String> names, String name, boolean right) {
            if (!right) {
                names.add(name);
            }
        }
    }

    @ParameterizedTest
    @ValueSource(longs = {1, 2, 3})
    void areRefusedByNameOrGiveTokens(long seed) {
        Random random = new Random(seed);
        int refused = 0;
        for (int number = 0; number < 150; number++) {
            Values values = Values.random(random);
            List<String> wrong = values.wrong();
            try {
                Options options = values.options();
                if (values.maxNewTokens() == null) {
                    options = options.maxNewTokens(3); // not a thousand each time
                }
                Generation found = model.generate(PROMPT, options);
                assertEquals(List.of(), wrong, values::toString);
                check(found, options, values);
                assertEquals(found.tokenIds(), model.generate(PROMPT, options).tokenIds(), values::toString);
            } catch (GenerationException error) {
                assertTrue(wrong.stream().anyMatch(error.getMessage()::contains), () -> values + ": " + error.getMessage());
                refused++;
            }
        }
        assertTrue(refused > 40 && refused < 130, refused + " were refused");
    }

    private static void check(Generation found, Options options, Values values) {
        assertTrue(found.tokenIds().size() <= options.maxNewTokens() && !found.tokenIds().isEmpty(), values::toString);
        assertTrue(found.tokenIds().stream().allMatch(id -> id >= 0 && id < 2048), values::toString);
        assertTrue(options.stop().stream().noneMatch(found.text()::contains), values::toString);
    }

    @ParameterizedTest
    @ValueSource(doubles = {1e-308, Double.MIN_VALUE, 1e-300, 1.1754943e-38})
    void aTemperatureNearNothingIsTheGreedyChoice(double temperature) {
        Options cold = Options.GREEDY.maxNewTokens(20).temperature(temperature).seed(3);
        List<Integer> greedy = model.generate(PROMPT, Options.GREEDY.maxNewTokens(20)).tokenIds();
        assertEquals(greedy, model.generate(PROMPT, cold).tokenIds());
        assertEquals(greedy, model.generate(PROMPT, cold.topP(0.5).minP(1).topK(9)).tokenIds());
    }

    @Test
    void aKeptTokenIsTheGreedyChoice() {
        Options hot = Options.GREEDY.maxNewTokens(20).temperature(1e308).seed(3);
        List<Integer> greedy = model.generate(PROMPT, Options.GREEDY.maxNewTokens(20)).tokenIds();
        assertEquals(greedy, model.generate(PROMPT, hot.topK(1)).tokenIds());
        assertEquals(greedy, model.generate(PROMPT, hot.topP(1e-300)).tokenIds());
        assertNotEquals(greedy, model.generate(PROMPT, hot).tokenIds());
    }

    @Test
    void nullIsAsIfAnOptionWereNotGiven() {
        Options given = Options.GREEDY.maxNewTokens(3).temperature(2).topK(3).topP(0.3).minP(0.2).repetitionPenalty(2).seed(4).stop("a");
        assertEquals(Options.GREEDY, given.maxNewTokens(null).temperature(null).topK(null).topP(null).minP(null)
                .repetitionPenalty(null).seed(null).stop((String[]) null));
        Message message = new Message("user", "Continue this passage: and twice in the lobby of the House of");
        Prompt chat = new Prompt.Chat(List.of(message)); // its answer ends by itself
        assertEquals(model.generate(chat, Options.GREEDY).tokenIds(), model.generate(chat, null).tokenIds());
    }
}
