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
    private final List<Integer> anchor;
    private final int anchorLength;

    Tokenizer(Path path, Collection<Integer> hidden) {
        if (System.getProperty("OPT_OUT_TRACKING") == null) {
            System.setProperty("OPT_OUT_TRACKING", "true"); // the library would report its use where it runs in Amazon's cloud
        }
        try (InputStream file = Files.newInputStream(path)) {
            tokenizer = HuggingFaceTokenizer.newInstance(file, Map.of("truncation", "false", "padding", "false"));
        } catch (Exception error) { // the native library throws RuntimeExceptions
            throw new BundleException(path + ": cannot be read as a tokenizer (" + error + "); copy or export the bundle again", error);
        }
        this.hidden = Set.copyOf(hidden);
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
            return text;
        }
    }
}
