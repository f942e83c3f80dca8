package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonParser;
import java.nio.file.Path;
import java.util.Random;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

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

    @Test
    void aBundlesManifestAsksForIt(@TempDir Path folder) {
        String change = "[['set', '/decoding/clean_up_tokenization_spaces', true]]";
        Path bundle = Changes.copy(folder, JsonParser.parseString(change));
        Options options = Options.GREEDY.maxNewTokens(40).temperature(3);
        int changed = 0;
        try (PhiMoE plain = PhiMoE.load(Changes.copy(folder, new JsonArray()), 1); PhiMoE cleaned = PhiMoE.load(bundle, 1)) {
            for (int seed = 0; seed < 40; seed++) {
                Generation before = plain.generate("It was", options.seed(seed));
                StringBuilder pieces = new StringBuilder();
                Prompt prompt = new Prompt.Text("It was");
                Generation after = cleaned.generate(prompt, options.seed(seed), piece -> pieces.append(piece.text()));
                assertEquals(before.tokenIds(), after.tokenIds());
                assertEquals(CleanUp.of(before.text()), after.text());
                assertEquals(after.text(), pieces.toString());
                changed += after.text().equals(before.text()) ? 0 : 1;
            }
            assertTrue(changed > 3, changed + " texts lost spaces");
        }
    }

    @Test
    void aStopStringIsFoundInTheTextAsItIsGiven(@TempDir Path folder) {
        String change = "[['set', '/decoding/clean_up_tokenization_spaces', true]]";
        try (PhiMoE model = PhiMoE.load(Changes.copy(folder, JsonParser.parseString(change)), 1)) {
            Options options = Options.GREEDY.maxNewTokens(40).temperature(3);
            int found = 0;
            for (int seed = 0; seed < 20; seed++) {
                String whole = model.generate("It was", options.seed(seed)).text();
                Generation stopped = model.generate("It was", options.seed(seed).stop(",", "!", " "));
                int place = place(whole);
                assertEquals(place < 0 ? whole : whole.substring(0, place), stopped.text(), "seed " + seed);
                found += stopped.finishReason() == FinishReason.STOP ? 1 : 0;
            }
            assertTrue(found > 3, found + " were stopped");
        }
    }

    private static int place(String text) {
        for (int place = 0; place < text.length(); place++) {
            if (",! ".indexOf(text.charAt(place)) >= 0) {
                return place;
            }
        }
        return -1;
    }
}
