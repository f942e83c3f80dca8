package phimoe;

import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;

/**
 * Spaces that a stream of text loses before punctuation, where the manifest asks for it. The replacements are those of
 * transformers' PreTrainedTokenizerBase.clean_up_tokenization; what the next text may still change is held back.
 */
final class CleanUp {
    private static final Map<String, String> REPLACEMENTS = new LinkedHashMap<>(); // in this order, each over the whole text
    private static final Set<String> STARTS = new HashSet<>(); // what may become more by the next text
    private static final int LONGEST; // characters of a start

    static {
        for (String word : List.of(".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re")) {
            REPLACEMENTS.put(" " + word, word.strip());
        }
        Set<String> spans = new HashSet<>(REPLACEMENTS.keySet());
        spans.addAll(List.of(" n ' t", "  ' m", "  ' s", "  ' ve", "  ' re")); // become one when " ' " loses its spaces
        for (String span : spans) {
            for (int size = 1; size < span.length(); size++) {
                STARTS.add(span.substring(0, size));
            }
        }
        LONGEST = STARTS.stream().mapToInt(String::length).max().orElseThrow();
    }

    private String held = "";

    /** A whole text without the spaces. */
    static String of(String text) {
        for (Map.Entry<String, String> replacement : REPLACEMENTS.entrySet()) {
            text = text.replace(replacement.getKey(), replacement.getValue());
        }
        return text;
    }

    /** Takes more text; returns what is now certain. */
    String add(String text) {
        held += text;
        int end = held.length() - overlap();
        if (end < held.length()) {
            // nor may the cut go through what is changed already: of those characters alone it may lie among
            while (end > 0 && " 'n".indexOf(held.charAt(end - 1)) >= 0) {
                end--;
            }
        }
        String certain = of(held.substring(0, end));
        held = held.substring(end);
        return certain;
    }

    /** What was held back, now that no more text comes. */
    String finish() {
        String text = of(held);
        held = "";
        return text;
    }

    /** The length of the longest end of what is held that begins a span. */
    private int overlap() {
        int size = Math.min(LONGEST, held.length());
        while (size > 0 && !STARTS.contains(held.substring(held.length() - size))) {
            size--;
        }
        return size;
    }
}
