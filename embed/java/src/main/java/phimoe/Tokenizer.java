package phimoe;

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Stream;

/** Text to token ids and back; back also as a stream of whole characters. */
final class Tokenizer implements AutoCloseable {
    private static final String INCOMPLETE = "\uFFFD"; // what a decoder makes of half a character

    private final HuggingFaceTokenizer tokenizer;
    private final Set<Integer> hidden;
    private final boolean cleanUp;
    private final List<Integer> anchor;
    private final int anchorLength;

    /**
     * Reads a tokenizer.json.
     *
     * @param hidden the special tokens that are no text
     * @param cleanUp whether streams lose spaces before punctuation
     * @throws BundleException it cannot be read
     */
    Tokenizer(Path path, Collection<Integer> hidden, boolean cleanUp) {
        TokenizerFile.check(Json.read(path));
        try (InputStream file = Files.newInputStream(path)) {
            tokenizer = HuggingFaceTokenizer.newInstance(file, Map.of("truncation", "false", "padding", "false"));
        } catch (Exception error) { // the native library throws RuntimeExceptions
            throw new BundleException(path + ": cannot be read as a tokenizer (" + error + "); copy or export the bundle again", error);
        }
        this.hidden = Set.copyOf(hidden);
        this.cleanUp = cleanUp;
        anchor = encode("a", false);
        anchorLength = decode(anchor).length();
    }

    /** The text's token ids; `special` adds those that tokenizer.json puts around a text. */
    List<Integer> encode(String text, boolean special) {
        return Arrays.stream(tokenizer.encode(text, special, false).getIds()).mapToObj(id -> (int) id).toList();
    }

    /** The text of the ids, without the hidden tokens. */
    String decode(List<Integer> ids) {
        return tokenizer.decode(ids.stream().filter(id -> !hidden.contains(id)).mapToLong(id -> id).toArray(), false);
    }

    /**
     * Refuses half characters, which no encoding has: surrogates without their other one.
     *
     * @throws GenerationException `name` holds one
     */
    static void checkCharacters(String name, String text) {
        for (int place = 0; place < text.length(); place += Character.charCount(text.codePointAt(place))) {
            char character = text.charAt(place);
            if (Character.isSurrogate(character) && Character.charCount(text.codePointAt(place)) == 1) {
                throw new GenerationException(String.format(
                        "%s holds \\u%04x at place %d, which is half a character; expected Unicode", name, (int) character, place));
            }
        }
    }

    /** The text that continues `prompt`. */
    TextStream stream(List<Integer> prompt) {
        return new TextStream(prompt);
    }

    @Override
    public void close() {
        tokenizer.close();
    }

    /** Token ids in, text out: each character once, and only when it is whole. */
    final class TextStream {
        private final List<Integer> waiting = new ArrayList<>(); // the bytes of an incomplete character
        private final CleanUp spaces = cleanUp ? new CleanUp() : null;
        private boolean follows; // a decoder strips the space before a text's first word only

        private TextStream(List<Integer> prompt) {
            int start = prompt.size();
            follows = start > 0 && !hidden.contains(prompt.get(start - 1));
            while (start > 0 && !hidden.contains(prompt.get(start - 1)) && decode(prompt.subList(start - 1, start)).equals(INCOMPLETE)) {
                start--;
            }
            prompt.subList(start, prompt.size()).forEach(this::add);
        }

        /** The text that this token completes; often none. */
        String add(int id) {
            if (hidden.contains(id)) {
                return "";
            }
            waiting.add(id);
            String text = follows
                    ? decode(Stream.concat(anchor.stream(), waiting.stream()).toList()).substring(anchorLength)
                    : decode(waiting);
            if (text.endsWith(INCOMPLETE)) {
                return "";
            }
            waiting.clear();
            follows = true;
            return spaces == null ? text : spaces.add(text);
        }

        /** The text that waits for what may follow it, now that nothing does; half a character is left out. */
        String finish() {
            return spaces == null ? "" : spaces.finish();
        }
    }
}
