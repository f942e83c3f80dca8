package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonParser;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** The example, as a process of its own with a home of its own. */
class MainTest {
    private static final String BUNDLE = Conformance.BUNDLE.toString();
    @TempDir
    private Path folder;

    private record Output(int code, String text, String errors) {}

    private Output run(String... arguments) throws Exception {
        Path home = Files.createDirectories(folder.resolve("home"));
        Path java = Path.of(System.getProperty("java.home"), "bin", "java");
        List<String> command = new ArrayList<>(List.of(
                java.toString(), "-Duser.home=" + home, "-cp", System.getProperty("java.class.path"), "phimoe.Main"));
        command.addAll(List.of(arguments));
        ProcessBuilder builder = new ProcessBuilder(command);
        // no CI, GITHUB_ACTIONS or the like: where one is set, ONNX Runtime keeps its telemetry off by itself
        builder.environment().keySet().retainAll(List.of("PATH", "SYSTEMROOT", "TEMP", "TMPDIR"));
        builder.environment().put("HOME", home.toString());
        builder.environment().put("DJL_CACHE_DIR", folder.resolve("djl").toString());
        Path errors = folder.resolve("errors");
        Process process = builder.redirectError(errors.toFile()).start();
        String text = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
        return new Output(process.waitFor(), text, Files.readString(errors));
    }

    /** Neither ONNX Runtime's telemetry nor anybody's cache, and no warning of a library before the answer. */
    @Test
    void leavesNothingInAHomeAndSaysNothingElse() throws Exception {
        Output output = run(BUNDLE, "It was", "--max-new-tokens", "8", "--threads", "1");
        assertEquals(" very much to be in the world to" + System.lineSeparator(), output.text);
        assertEquals(0, output.code);
        assertTrue(output.errors.matches("\\[2 prompt tokens, 8 new, [0-9.]+ tokens/s, ended by length]\\R"), output.errors);
        assertEquals(List.of(), contents(folder.resolve("home")));
    }

    private static List<Path> contents(Path folder) throws IOException {
        try (Stream<Path> files = Files.list(folder)) {
            return files.toList();
        }
    }

    @Test
    void answersAfterASystemMessage() throws Exception {
        Output output = run(BUNDLE, "Tell me about Anne.", "--system", "You are a novelist.\nBe brief. ", "--max-new-tokens", "16");
        assertEquals("And the LORD said unto me, Son of man, I pray thee,", output.text.strip());
    }

    @Test
    void holdsTheBundleAgainstAGoldenFile() throws Exception {
        Output output = run(BUNDLE, "--golden", Conformance.FOLDER.resolve("golden/austen.golden").toString());
        for (String line : List.of(
                "40 tokens in 2 windows of up to 34",
                "bundle to reference               5.15e-02      3.12e-01  2.36e-02      90.00%",
                "perplexity: reference 40.2418, stored 40.7871, bundle 41.14",
                "choices of experts that the stored weights leave unchanged: 91.25%",
                "greedy continuations, 9 of 10 tokens equal",
                "kl                  0.0236    0.1  nats   passed",
                "\npassed")) {
            assertTrue(output.text.contains(line), output.text);
        }
        assertEquals(0, output.code);
        assertEquals("", output.errors);
    }

    @Test
    void failsWithABundleThatIsPastALimit() throws Exception {
        Path bundle = Changes.copy(folder, JsonParser.parseString("[[\"set\", \"/dtype\", \"float32\"], [\"set\", \"/weights\", []]]"));
        Output output = run(bundle.toString(), "--golden", Conformance.FOLDER.resolve("golden/austen.golden").toString());
        assertEquals(1, output.code);
        assertTrue(output.text.endsWith("FAILED" + System.lineSeparator()), output.text);
        assertTrue(output.errors.startsWith(
                "error: " + bundle + ": mean_difference is 0.0515, allowed is 0.0001; max_difference is 0.312"), output.errors);
    }

    @ParameterizedTest
    @CsvSource(delimiter = '|', value = {
        "2 | --max-tokens is no option                  | It was | --max-tokens | 8",
        "2 | --max-tokens is no option                  | It was | --max-tokens |",
        "2 | --top-k needs a value                      | It was | --top-k      |",
        "2 | --top-k is x, expected a whole number      | It was | --top-k      | x",
        "2 | --temperature is hot, expected a number    | It was | --temperature | hot",
        "2 | --seed is 1e9, expected a whole number     | It was | --seed       | 1e9",
        "2 | expected a bundle and a prompt             |        |              |",
        "2 | an argument is no text                     | \uFFFD |              |",
        "2 | --golden goes with a bundle and no prompt  | It was | --golden     | x",
        "1 | topK is -1                                 | It was | --top-k      | -1",
        "1 | temperature is NaN                         | It was | --temperature | NaN",
        "1 | threads is 10000, expected 1 to            | It was | --threads    | 10000",
    })
    void saysWhatIsWrongInOneSentence(int code, String expected, String prompt, String option, String value) throws Exception {
        Stream<String> given = Stream.of(BUNDLE, prompt, option, value).filter(each -> each != null);
        Output output = run(given.toArray(String[]::new));
        assertEquals(code, output.code);
        assertEquals("", output.text);
        assertTrue(output.errors.startsWith("error: " + expected), output.errors);
        assertEquals(1, output.errors.lines().count(), output.errors);
    }

    @Test
    void helps() throws Exception {
        Output output = run("--help");
        assertEquals(0, output.code);
        assertTrue(output.text.startsWith("usage:"), output.text);
        for (String option : Arrays.asList("--chat", "--system", "--stop", "--repetition-penalty", "--golden", "--threads")) {
            assertTrue(output.text.contains(option), option);
        }
    }
}
