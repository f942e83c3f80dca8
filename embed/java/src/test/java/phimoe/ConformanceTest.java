package phimoe;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import java.nio.file.Path;
import java.util.List;
import java.util.Set;
import java.util.function.Consumer;
import java.util.regex.Pattern;
import java.util.stream.IntStream;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestFactory;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.api.io.TempDir;

/** What every language's runtime must give, token for token. */
class ConformanceTest {
    private static PhiMoE model;
    private static Tokenizer tokenizer;

    @BeforeAll
    static void load() {
        model = PhiMoE.load(Conformance.BUNDLE);
        Manifest manifest = Manifest.read(Conformance.BUNDLE);
        tokenizer = new Tokenizer(
                Conformance.BUNDLE.resolve("tokenizer.json"), manifest.decoding().hiddenTokens().values(), false);
    }

    @AfterAll
    static void close() {
        tokenizer.close();
        model.close();
    }

    /** The cases with `kind`, "expected" or "error", on a changed bundle or on the bundle itself. */
    private static Stream<DynamicTest> cases(String kind, boolean changed, Consumer<JsonObject> test) {
        return Conformance.section("cases").filter(each -> each.has(kind) && each.has("bundle") == changed)
                .map(each -> DynamicTest.dynamicTest(each.get("name").getAsString(), () -> test.accept(each)));
    }

    @TestFactory
    Stream<DynamicTest> generation() {
        return cases("expected", false, test -> generate(model, test));
    }

    @TestFactory
    Stream<DynamicTest> changedBundles(@TempDir Path folder) {
        return cases("expected", true, test -> {
            try (PhiMoE changed = load(folder, test)) {
                generate(changed, test);
            }
        });
    }

    @TestFactory
    Stream<DynamicTest> badBundles(@TempDir Path folder) {
        return cases("error", true, test -> check(test, () -> load(folder, test).close()));
    }

    @TestFactory
    Stream<DynamicTest> badPromptsAndOptions() {
        return cases("error", false, test -> check(test, () -> {
            Options options = Conformance.options(test.getAsJsonObject("options"));
            if (test.has("batch")) {
                model.generate(Conformance.prompts(test), options);
            } else {
                model.generate(Conformance.prompts(test).get(0), options);
            }
        }));
    }

    /** Loads a copy of the bundle with the changes of a case. */
    private static PhiMoE load(Path folder, JsonObject test) {
        Path bundle = Changes.copy(folder, test.get("bundle"));
        JsonElement threads = test.has("load") ? test.getAsJsonObject("load").get("threads") : null;
        return threads == null ? PhiMoE.load(bundle) : PhiMoE.load(bundle, threads.getAsInt());
    }

    /** Holds that a model makes of a case's prompts what it expects, and its stream too. */
    static void generate(PhiMoE model, JsonObject test) {
        List<Prompt> prompts = Conformance.prompts(test);
        Options options = Conformance.options(test.getAsJsonObject("options"));
        JsonElement expected = test.get("expected");
        List<JsonObject> rows = Conformance.elements(expected.isJsonArray() ? expected : listOf(expected))
                .map(JsonElement::getAsJsonObject).toList();
        String[] streamed = IntStream.range(0, prompts.size()).mapToObj(row -> "").toArray(String[]::new);
        Generation[] results = new Generation[prompts.size()];
        try (Pieces pieces = model.stream(prompts, options)) {
            for (Piece piece : pieces) {
                streamed[piece.row()] += piece.text();
                piece.result().ifPresent(result -> results[piece.row()] = result);
            }
        }
        for (int row = 0; row < rows.size(); row++) {
            assertEquals(Conformance.ints(rows.get(row).get("token_ids")), results[row].tokenIds());
            assertEquals(rows.get(row).get("text").getAsString(), results[row].text());
            String reason = results[row].finishReason().name().toLowerCase();
            assertEquals(rows.get(row).get("finish_reason").getAsString(), reason);
            assertEquals(rows.get(row).get("prompt_tokens").getAsInt(), results[row].promptTokens());
        }
        assertArrayEquals(rows.stream().map(row -> row.get("text").getAsString()).toArray(), streamed);
    }

    private static JsonElement listOf(JsonElement value) {
        JsonArray array = new JsonArray();
        array.add(value);
        return array;
    }

    /** Holds that `action` throws what a case expects; options have this language's names. */
    private static void check(JsonObject test, Executable action) {
        PhiMoEException error = assertThrows(PhiMoEException.class, action);
        assertEquals(test.get("error").getAsString().replace("Error", "Exception"), error.getClass().getSimpleName());
        Set<String> optionNames = test.has("options") ? test.getAsJsonObject("options").keySet() : Set.of();
        for (String name : Conformance.strings(test.get("names"))) {
            String own = optionNames.contains(name)
                    ? Pattern.compile("_(.)").matcher(name).replaceAll(m -> m.group(1).toUpperCase()) : name;
            assertTrue(error.getMessage().contains(own), () -> own + " in " + error.getMessage());
        }
    }

    @Test
    void encodings() {
        Conformance.section("encodings").forEach(test -> {
            String text = test.get("text").getAsString();
            assertEquals(Conformance.ints(test.get("token_ids")), model.encode("the prompt", new Prompt.Text(text)), text);
        });
    }

    @Test
    void streams() {
        Conformance.section("streams").forEach(test -> {
            Tokenizer.TextStream characters = tokenizer.stream(Conformance.ints(test.get("prompt")));
            List<String> pieces = Conformance.ints(test.get("token_ids")).stream().map(characters::add).toList();
            assertEquals(Conformance.strings(test.get("pieces")), pieces);
        });
    }

    @Test
    void draws() {
        Conformance.section("draws").forEach(test -> {
            Options options = Conformance.options(test.getAsJsonObject("options"));
            List<Float> values = Conformance.elements(test.get("logits")).map(JsonElement::getAsFloat).toList();
            List<Integer> expected = Conformance.ints(test.get("token_ids"));
            for (int step = 0; step < expected.size(); step++) {
                float[] logits = new float[values.size()];
                IntStream.range(0, logits.length).forEach(id -> logits[id] = values.get(id));
                assertEquals(expected.get(step), Sampler.sample(logits, options, options.seed(), step, Set.of()));
            }
        });
    }
}
