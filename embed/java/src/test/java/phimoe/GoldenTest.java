package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Set;
import java.util.TreeMap;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;

/** spec/golden: a golden file, changes to it, and what every language finds with them. */
class GoldenTest {
    private static final Path FOLDER = Conformance.FOLDER.resolve("golden");
    private static final Path FILE = FOLDER.resolve("austen.golden");
    private static final JsonObject ALL = Conformance.read(FOLDER.resolve("cases.json"));
    private static PhiMoE model;
    @TempDir
    private Path folder;

    /** A case, which prints as its name. */
    private record Case(JsonObject json) {
        @Override
        public String toString() {
            return json.get("name").getAsString();
        }
    }

    @BeforeAll
    static void load() {
        model = PhiMoE.load(Conformance.BUNDLE, 1);
    }

    @AfterAll
    static void close() {
        model.close();
    }

    private static Stream<Case> cases(String kind) {
        return Conformance.elements(ALL.get("cases")).map(JsonElement::getAsJsonObject).filter(each -> each.has(kind)).map(Case::new);
    }

    static Stream<Case> found() {
        return cases("expected");
    }

    static Stream<Case> refused() {
        return cases("error");
    }

    static Stream<JsonObject> limits() {
        return Conformance.elements(ALL.get("limits")).map(JsonElement::getAsJsonObject);
    }

    @ParameterizedTest
    @MethodSource("found")
    void findsWhatPythonFinds(Case each) throws Exception {
        Path file = changed(each.json.get("changes"));
        JsonObject expected = each.json.getAsJsonObject("expected");
        if (each.json.has("bundle")) {
            try (PhiMoE other = PhiMoE.load(Changes.copy(folder, each.json.get("bundle")), 1)) {
                check(expected, other.verifyGolden(file));
            }
        } else {
            Report report = model.verifyGolden(file);
            check(expected, report);
            if (each.json.has("notes")) {
                assertTrue(report.notes().containsAll(Conformance.strings(each.json.get("notes"))), report.text());
            }
        }
    }

    private static void check(JsonObject expected, Report report) {
        assertEquals(expected.get("tokens").getAsInt(), report.tokens());
        assertEquals(Conformance.ints(expected.get("windows")), report.windows());
        check(expected.get("bundle_to_reference"), report.bundleToReference());
        check(expected.get("bundle_to_stored"), report.bundleToStored());
        check(expected.get("stored_to_reference"), report.storedToReference());
        JsonObject perplexity = expected.getAsJsonObject("perplexity");
        assertEquals(perplexity.keySet(), report.perplexity().keySet());
        report.perplexity().forEach((name, value) -> check(name, perplexity.get(name).getAsDouble(), value));
        JsonObject greedy = expected.getAsJsonObject("greedy");
        assertEquals(greedy.get("agreeing").getAsInt(), report.greedy().agreeing());
        assertEquals(greedy.get("new_tokens").getAsInt(), report.greedy().newTokens());
        List<JsonObject> checks = Conformance.elements(expected.get("checks")).map(JsonElement::getAsJsonObject).toList();
        assertEquals(checks.size(), report.checks().size());
        for (int place = 0; place < checks.size(); place++) {
            Report.Check found = report.checks().get(place);
            assertEquals(checks.get(place).get("name").getAsString(), found.name());
            assertEquals(checks.get(place).get("limit").getAsDouble(), found.limit(), 1e-12);
            assertEquals(checks.get(place).get("passed").getAsBoolean(), found.passed(), found.toString());
            check(found.name(), checks.get(place).get("measured").getAsDouble(), found.measured());
        }
    }

    private static void check(JsonElement expected, Comparison found) {
        if (expected.isJsonNull()) {
            assertNull(found);
            return;
        }
        JsonObject figures = expected.getAsJsonObject();
        assertEquals(figures.get("tokens").getAsInt(), found.tokens());
        check("mean_difference", figures.get("mean_difference").getAsDouble(), found.meanDifference());
        check("max_difference", figures.get("max_difference").getAsDouble(), found.maxDifference());
        check("kl", figures.get("kl").getAsDouble(), found.kl());
        check("top1_agreement", figures.get("top1_agreement").getAsDouble(), found.top1Agreement());
    }

    private static void check(String name, double expected, double found) {
        assertEquals(expected, found, ALL.get("tolerance").getAsDouble() * expected, name);
    }

    @ParameterizedTest
    @MethodSource("refused")
    void refuses(Case each) throws Exception {
        Path file = changed(each.json.get("changes"));
        String message = assertThrows(GoldenException.class, () -> model.verifyGolden(file)).getMessage();
        assertTrue(message.startsWith(file + ": "), message);
        for (String word : Conformance.strings(each.json.get("error"))) {
            assertTrue(message.contains(word), message);
        }
    }

    @Test
    void refusesWhatIsNoFile() {
        assertThrows(GoldenException.class, () -> model.verifyGolden(null));
        for (Path file : List.of(folder, folder.resolve("nowhere"))) {
            String message = assertThrows(GoldenException.class, () -> model.verifyGolden(file)).getMessage();
            assertTrue(message.startsWith(file + ": cannot be read"), message);
        }
    }

    @ParameterizedTest
    @MethodSource("limits")
    void judgesByTheSameLimits(JsonObject each) {
        TreeMap<String, Double> expected = new TreeMap<>();
        each.getAsJsonObject("limits").asMap().forEach((name, limit) -> expected.put(name, limit.getAsDouble()));
        Set<String> dtypes = Set.copyOf(Conformance.strings(each.get("dtypes")));
        TreeMap<String, Double> found = new TreeMap<>(Thresholds.of(dtypes, each.get("cache").getAsString()));
        assertEquals(expected.keySet(), found.keySet());
        expected.forEach((name, limit) -> assertEquals(limit, found.get(name), 1e-12));
    }

    @ParameterizedTest
    @CsvSource({
        "set /weights 0, manifest.json does not say how the weights are stored",
        "remove /dtype, manifest.json does not say how the weights are stored",
    })
    void needsToKnowHowWeightsAreStored(String change, String message) {
        String[] words = change.split(" ", 3);
        String value = words.length == 3 ? ", " + words[2] : "";
        JsonElement changes = JsonParser.parseString("[[\"" + words[0] + "\", \"" + words[1] + "\"" + value + "]]");
        try (PhiMoE other = PhiMoE.load(Changes.copy(folder, changes), 1)) {
            assertTrue(assertThrows(BundleException.class, () -> other.verifyGolden(FILE)).getMessage().startsWith(message));
        }
    }

    @ParameterizedTest
    @CsvSource({"0, 0", "0.1, 0.1", "0.0430256, 0.043", "1e-6, 1e-06", "1.2345e-5, 1.23e-05", "0.00099999, 0.001", "1970.8, 1.97e+03",
        "999.6, 1e+03", "1.05, 1.05", "100, 100", "NaN, NaN"})
    void writesThreeDigits(double number, String expected) {
        assertEquals(expected, Report.brief(number));
    }

    /** The golden file with the changes that spec/golden.md describes. */
    private Path changed(JsonElement changes) throws Exception {
        byte[] data = Files.readAllBytes(FILE);
        for (JsonElement each : changes.getAsJsonArray()) {
            JsonElement value = each.getAsJsonArray().size() > 1 ? each.getAsJsonArray().get(1) : null;
            switch (each.getAsJsonArray().get(0).getAsString()) {
                case "replace" -> data = replaced(data, value.getAsString(), each.getAsJsonArray().get(2).getAsString());
                case "truncate" -> data = Arrays.copyOf(data, value.getAsInt());
                case "invert" -> data[value.getAsInt()] ^= (byte) 0xFF;
                case "sign" -> data = signed(data);
                default -> throw new AssertionError(each);
            }
        }
        return Files.write(folder.resolve("golden"), data);
    }

    private static byte[] replaced(byte[] data, String old, String value) {
        String text = new String(data, StandardCharsets.ISO_8859_1); // a character for each byte
        assertTrue(text.contains(old), old);
        int place = text.indexOf(old);
        byte[] changed = (text.substring(0, place) + value + text.substring(place + old.length())).getBytes(StandardCharsets.ISO_8859_1);
        ByteBuffer length = ByteBuffer.wrap(changed).order(ByteOrder.LITTLE_ENDIAN);
        length.putLong(0, length.getLong(0) + value.length() - old.length());
        return changed;
    }

    private static byte[] signed(byte[] data) throws Exception {
        int end = 8 + (int) ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN).getLong();
        String header = new String(data, 8, end - 8, StandardCharsets.UTF_8);
        JsonObject metadata = JsonParser.parseString(header).getAsJsonObject().getAsJsonObject("__metadata__");
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        digest.update(metadata.get("golden").getAsString().getBytes(StandardCharsets.UTF_8));
        digest.update(data, end, data.length - end);
        return replaced(data, metadata.get("sha256").getAsString(), HexFormat.of().formatHex(digest.digest()));
    }
}
