package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeFalse;

import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestFactory;

/** spec/native: a bundle of native operators and its tokens, and what is said where there are no such operators. */
class OperatorsTest {
    private static final Path FOLDER = Conformance.FOLDER.resolve("native");
    private static final Path BUNDLE = FOLDER.resolve("bundle");
    private static PhiMoE model;

    @AfterAll
    static void close() {
        if (model != null) {
            model.close();
        }
    }

    @TestFactory
    Stream<DynamicTest> generation() {
        assumeFalse(Operators.provided().isEmpty(), "the native operators are not built; cargo build --release in native");
        model = PhiMoE.load(BUNDLE);
        return Conformance.elements(Conformance.read(FOLDER.resolve("cases.json")).get("cases"))
                .map(test -> test.getAsJsonObject())
                .map(test -> DynamicTest.dynamicTest(
                        test.get("name").getAsString(), () -> ConformanceTest.generate(model, test)));
    }

    @Test
    void withoutTheLibraryTheErrorSaysWhatToDo() {
        List<Manifest.Graph> graphs = Manifest.read(BUNDLE).graphs();
        String message = assertThrows(
                DeviceException.class, () -> Session.chooseGraph(graphs, "1.31.0", Set.of())).getMessage();
        for (String part : List.of(
                "native operators", System.mapLibraryName("phimoe_operators"), System.getProperty("os.arch"),
                "build native", "--operators stock")) {
            assertTrue(message.contains(part), message);
        }
    }

    @Test
    void ofSeveralNeedsTheErrorNamesTheUnknownOne() {
        Manifest.Graph graph = new Manifest.Graph(
                "a", Map.of("cpu", "1.29"), List.of(), List.of(Operators.NAME, "operators/9"));
        String message = assertThrows(DeviceException.class,
                () -> Session.chooseGraph(List.of(graph), "1.31.0", Set.of(Operators.NAME))).getMessage();
        assertEquals("the bundle requires operators/9, not known here; upgrade phimoe", message);
    }
}
