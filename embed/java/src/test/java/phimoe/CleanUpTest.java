package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonParser;
import java.nio.file.Path;
import java.util.Random;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Spaces before punctuation, where a manifest asks for it. */
class CleanUpTest {
    /** What transformers 4.57 gives. */
    @ParameterizedTest
    @CsvSource(delimiter = '|', quoteCharacter = '"', ignoreLeadingAndTrailingWhitespace = false, value = {
        "a . b ? c ! d , e ' f n't 'm 's 've 're|a. b? c! d, e'fn't'm's've're",
        "  ' s  . ' '  ' ve n ' t |'s .'''ven't ",
        "it is n ' t .|it isn't.",
        "the word|the word",
    })
    void aTextLosesThem(String text, String expected) {
        assertEquals(expected, CleanUp.of(text));
    }

    @Test
    void aStreamIsTheWholeTextCleaned() {
        for (int seed = 0; seed < 5000; seed++) {
            Random random = new Random(seed);
            StringBuilder text = new StringBuilder();
            for (int count = random.nextInt(20); count > 0; count--) {
                text.append(" '.,?!ntmsver a".charAt(random.nextInt(15)));
            }
            CleanUp stream = new CleanUp();
            StringBuilder given = new StringBuilder();
            for (int place = 0; place < text.length();) {
                int end = Math.min(place + 1 + random.nextInt(5), text.length());
                given.append(stream.add(text.substring(place, end)));
                assertTrue(CleanUp.of(text.toString()).startsWith(given.toString()), "seed " + seed);
                place = end;
            }
            assertEquals(CleanUp.of(text.toString()), given + stream.finish(), "seed " + seed);
        }
    }

    @Test
    void textComesAsSoonAsItIsCertain() {
        assertEquals("the word", new CleanUp().add("the word"));
        assertEquals("the word", new CleanUp().add("the word "));
    }

    /** The model writes no such spaces, so its tokenizer gives " ," and " ' " in place of two frequent words. */
    private static PhiMoE load(Path folder, boolean cleanUp) {
        String changes = """
                [["replace", "tokenizer.json", '"type": "ByteFallback"',
                  '"type": "Replace", "pattern": {"String": "the"}, "content": " ,"},
                   {"type": "Replace", "pattern": {"String": "of"}, "content": " \\' "}, {"type": "ByteFallback"'],
                 ["list", "tokenizer.json"],
                 ["set", "/decoding/clean_up_tokenization_spaces", %s]]""".formatted(cleanUp);
        return PhiMoE.load(Changes.copy(folder, JsonParser.parseString(changes)), 1);
    }

    @Test
    void aBundlesManifestAsksForIt(@TempDir Path folder) {
        Options options = Options.GREEDY.maxNewTokens(20).temperature(1);
        int changed = 0;
        try (PhiMoE plain = load(folder, false); PhiMoE cleaned = load(folder, true)) {
            for (int seed = 0; seed < 10; seed++) {
                Generation before = plain.generate("It was", options.seed(seed));
                StringBuilder pieces = new StringBuilder();
                Prompt prompt = new Prompt.Text("It was");
                Generation after = cleaned.generate(prompt, options.seed(seed), piece -> pieces.append(piece.text()));
                assertEquals(before.tokenIds(), after.tokenIds());
                assertEquals(CleanUp.of(before.text()), after.text());
                assertEquals(after.text(), pieces.toString());
                changed += after.text().equals(before.text()) ? 0 : 1;
            }
            assertTrue(changed > 5, changed + " texts lost spaces");
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"1", "null", "'true'", "[]"})
    void theManifestSaysTrueOrFalse(String value, @TempDir Path folder) {
        String change = "[['set', '/decoding/clean_up_tokenization_spaces', " + value + "]]";
        Path bundle = Changes.copy(folder, JsonParser.parseString(change));
        BundleException error = assertThrows(BundleException.class, () -> PhiMoE.load(bundle));
        assertTrue(error.getMessage().contains("decoding.clean_up_tokenization_spaces"), error.getMessage());
    }

    @Test
    void aStopStringIsFoundInTheTextAsItIsGiven(@TempDir Path folder) {
        try (PhiMoE model = load(folder, true)) {
            String prompt = "of the gentleman, and the head";
            int atTheEnd = 0;
            for (int length = 1; length <= 12; length++) { // each cuts the text elsewhere, also where a piece is held back
                Options options = Options.GREEDY.maxNewTokens(length);
                String whole = model.generate(prompt, options).text();
                String last = whole.substring(whole.length() - 1);
                Generation stopped = model.generate(prompt, options.stop(last));
                assertEquals(whole.substring(0, whole.indexOf(last)), stopped.text(), "length " + length);
                assertEquals(FinishReason.STOP, stopped.finishReason());
                atTheEnd += last.equals("'") ? 1 : 0;
            }
            assertTrue(atTheEnd > 0, "no text ends with what was held back");
        }
    }
}
