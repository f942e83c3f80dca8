package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import java.io.IOException;
import java.math.BigInteger;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.Set;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Manifests that no exporter wrote: each is either read rightly or refused with an error of this library. */
class ManifestTest {
    private static final Prompt PROMPT = new Prompt.Text("It was a fine morning, and");
    private static final int MUTANTS = 300;
    private static Path bundle;
    private static String original;

    @BeforeAll
    static void copy(@TempDir Path folder) throws IOException {
        bundle = Changes.copy(folder, new JsonArray());
        original = Files.readString(bundle.resolve(Manifest.FILE));
    }

    private static PhiMoE load(String manifest) throws IOException {
        Files.writeString(bundle.resolve(Manifest.FILE), manifest);
        return PhiMoE.load(bundle, 1);
    }

    private static List<Integer> tokens(PhiMoE model) {
        return model.generate(PROMPT, Options.GREEDY.maxNewTokens(6)).tokenIds();
    }

    @Test
    void nestingAndDigitsWithoutEndAreDamage() throws IOException {
        String deep = "{\"a\":" + "[".repeat(100_000) + "]".repeat(100_000) + "}";
        assertThrows(BundleException.class, () -> load(deep));
        String wide = original.replace("\"vocab_size\": 2048", "\"vocab_size\": " + "9".repeat(5_000));
        assertThrows(BundleException.class, () -> load(wide));
    }

    @ParameterizedTest
    @CsvSource({"1e999999999", "-0.5", "true", "null", "\"2048\"", "2147483648", "0", "[2048]"})
    void aNumberIsANumberAndInItsRange(String value) {
        String manifest = original.replace("\"vocab_size\": 2048", "\"vocab_size\": " + value);
        BundleException error = assertThrows(BundleException.class, () -> load(manifest));
        assertTrue(error.getMessage().contains("manifest.json"), error.getMessage());
        assertTrue(error.getMessage().contains("decoding.vocab_size"), error.getMessage());
    }

    @Test
    void aBillionLayersAreRefusedAtOnce() {
        String manifest = original.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 1000000000");
        BundleException error = assertThrows(BundleException.class, () -> load(manifest));
        assertTrue(error.getMessage().contains("num_hidden_layers is 1000000000"), error.getMessage());
    }

    @Test
    void aReleaseOfManyPartsNeedsNoStack() {
        String manifest = original.replaceFirst("\"1\\.29\"", "\"99" + ".1".repeat(1_000_000) + "\"");
        assertThrows(DeviceException.class, () -> load(manifest).close());
    }

    @Test
    void aCacheThatIsNotSharedIsForAnotherLanguage() {
        String manifest = original.replace("\"shared\": true", "\"shared\": false");
        assertTrue(assertThrows(DeviceException.class, () -> load(manifest)).getMessage().contains("shared"));
    }

    /** Whether a system allows them or not. */
    @ParameterizedTest
    @ValueSource(strings = {"\u00e9", "a*b", "a\tb", "con", "a:b", "ab ", "-"})
    void aFileOfAnyNameIsAtMostMissing(String name) {
        String manifest = original.replace("\"config.json\": {", JsonParser.parseString("'" + name + "'") + ": {");
        assertThrows(BundleException.class, () -> load(manifest));
        String longer = original.replace("\"config.json\": {", "\"" + "x".repeat(5_000) + "\": {");
        assertThrows(BundleException.class, () -> load(longer));
    }

    /** From Java a graph with optional inputs cannot be run; beside that the choice is as in every language. */
    @ParameterizedTest
    @CsvSource(delimiter = '|', nullValues = "-", value = {
        "cpu=1.31            | -        | -    | 1.29.0 | DeviceException | 1.31",
        "cpu=1.9             | -        | -    | 1.31.0 | a.onnx          | -",
        "cpu=1.31            | -        | -    | 1.31.0 | a.onnx          | -",
        "cuda=1.29           | -        | -    | 1.31.0 | DeviceException | cuda",
        "cpu=1.29            | operators/9 | - | 1.31.0 | DeviceException | operators/9",
        "cpu=1.29            | -        | rope | 1.31.0 | DeviceException | optional inputs",
    })
    void theGraphIsChosenByDeviceNeedsAndRelease(
            String device, String requires, String optional, String installed, String expected, String names) {
        String[] parts = device.split("=");
        Manifest.Graph graph = new Manifest.Graph(
                "a.onnx", Map.of(parts[0], parts[1]), optional == null ? List.of() : List.of(optional),
                requires == null ? List.of() : List.of(requires));
        if (names == null) {
            assertEquals(expected, Session.chooseGraph(List.of(graph), installed, Set.of()).file());
        } else {
            DeviceException error =
                    assertThrows(DeviceException.class, () -> Session.chooseGraph(List.of(graph), installed, Set.of()));
            assertTrue(error.getMessage().contains(names), error.getMessage());
        }
    }

    @Test
    void theFirstGraphThatFitsIsTaken() {
        List<Manifest.Graph> graphs = List.of(
                new Manifest.Graph("cuda", Map.of("cuda", "1.1"), List.of(), List.of()),
                new Manifest.Graph("optional", Map.of("cpu", "1.1"), List.of("rope_length"), List.of()),
                new Manifest.Graph("needs", Map.of("cpu", "1.1"), List.of(), List.of("operators/1")),
                new Manifest.Graph("newer", Map.of("cpu", "1.40"), List.of(), List.of()),
                new Manifest.Graph("fits", Map.of("cuda", "9", "cpu", "1.29"), List.of(), List.of()),
                new Manifest.Graph("later", Map.of("cpu", "1.28"), List.of(), List.of()));
        assertEquals("fits", Session.chooseGraph(graphs, "1.29.1", Set.of("operators/2")).file());
    }

    @Test
    void mutantsLoadRightlyOrAreRefused() throws IOException {
        List<Integer> expected;
        try (PhiMoE model = load(original)) {
            expected = tokens(model);
        }
        int loaded = 0;
        int refused = 0;
        for (int seed = 0; seed < MUTANTS; seed++) {
            String mutant = mutant(new Random(seed));
            try (PhiMoE model = load(mutant)) {
                loaded++;
                assertEquals(expected, tokens(model), "mutant " + seed);
            } catch (PhiMoEException error) {
                refused++;
            } catch (RuntimeException error) {
                throw new AssertionError("mutant " + seed + ": " + error, error);
            }
        }
        // that the mutator mutates, and not everything to pieces
        assertTrue(loaded > MUTANTS / 20 && refused > MUTANTS / 3, loaded + " loaded, " + refused + " refused");
    }

    /** The manifest with a byte changed, its end cut off, or a value removed, replaced, renamed or joined by another. */
    private static String mutant(Random random) {
        int place = random.nextInt(original.length());
        switch (random.nextInt(10)) {
            case 0:
                return original.substring(0, place);
            case 1:
                return original.substring(0, place) + (char) (random.nextInt(94) + ' ') + original.substring(place + 1);
            default:
                JsonElement root = JsonParser.parseString(original);
                List<JsonElement> containers = new ArrayList<>();
                collect(root, containers);
                mutate(containers.get(random.nextInt(containers.size())), random);
                return root.toString().replace("\ud800", "\\ud800"); // half a character cannot be written as such
        }
    }

    private static void collect(JsonElement value, List<JsonElement> containers) {
        if (value instanceof JsonObject object) {
            containers.add(object);
            object.asMap().values().forEach(each -> collect(each, containers));
        } else if (value instanceof JsonArray array && !array.isEmpty()) {
            containers.add(array);
            array.forEach(each -> collect(each, containers));
        }
    }

    private static void mutate(JsonElement container, Random random) {
        if (container instanceof JsonArray array) {
            int place = random.nextInt(array.size());
            switch (random.nextInt(3)) {
                case 0 -> array.remove(place);
                case 1 -> array.add(array.get(place));
                default -> array.set(place, strange(random));
            }
            return;
        }
        JsonObject object = container.getAsJsonObject();
        List<String> keys = List.copyOf(object.keySet());
        String key = keys.get(random.nextInt(keys.size()));
        switch (random.nextInt(5)) {
            case 0 -> object.remove(key);
            case 1 -> object.add(key + "x", object.remove(key));
            case 2 -> object.add("unknown", strange(random));
            default -> object.add(key, strange(random));
        }
    }

    private static JsonElement strange(Random random) {
        List<JsonElement> values = List.of(
                JsonNull.INSTANCE, new JsonPrimitive(true), new JsonPrimitive(false), new JsonArray(), new JsonObject(),
                new JsonPrimitive(0), new JsonPrimitive(1), new JsonPrimitive(-1), new JsonPrimitive(7.5),
                new JsonPrimitive(Integer.MAX_VALUE), new JsonPrimitive(1L << 31), new JsonPrimitive(Long.MIN_VALUE),
                new JsonPrimitive(BigInteger.TEN.pow(500)), new JsonPrimitive(1_000_000_000), new JsonPrimitive(1e300),
                new JsonPrimitive(""), new JsonPrimitive("1"), new JsonPrimitive("."), new JsonPrimitive(".."),
                new JsonPrimitive("../x"), new JsonPrimitive("/etc/hosts"), new JsonPrimitive("a\0b"),
                new JsonPrimitive("\ud800"),
                new JsonPrimitive("model.onnx"), new JsonPrimitive("é".repeat(5_000)), new JsonPrimitive("99.1"),
                new JsonPrimitive("1..2"), new JsonPrimitive("float16"), new JsonPrimitive("cuda"),
                JsonParser.parseString("[[[1]]]"), JsonParser.parseString("{\"cpu\": 1}"),
                JsonParser.parseString("[1, \"1\", null]"));
        return values.get(random.nextInt(values.size()));
    }
}
