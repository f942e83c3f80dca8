package phimoe;

import java.util.List;

/** Passes text on up to the first stop string; what may be the beginning of one is held back until that is known. */
final class StopStrings {
    private final List<String> stops;
    private String held = "";

    StopStrings(List<String> stops) {
        this.stops = stops;
    }

    /** Text that is certain, and whether a stop string was met. */
    record Certain(String text, boolean stopped) {}

    /** Takes more text; a stop string and what follows it are dropped. */
    Certain add(String text) {
        held += text;
        int end = stops.stream().mapToInt(held::indexOf).filter(place -> place >= 0).min().orElse(-1);
        if (end >= 0) {
            String certain = held.substring(0, end);
            held = "";
            return new Certain(certain, true);
        }
        int certain = held.length() - overlap();
        String passed = held.substring(0, certain);
        held = held.substring(certain);
        return new Certain(passed, false);
    }

    /** What was held back, now that no more text comes. */
    String finish() {
        String text = held;
        held = "";
        return text;
    }

    /** The length of the longest end of what is held back that begins a stop string. */
    private int overlap() {
        int longest = 0;
        for (String stop : stops) {
            for (int size = longest + 1; size < stop.length() && size <= held.length(); size++) {
                longest = held.endsWith(stop.substring(0, size)) ? size : longest;
            }
        }
        return longest;
    }
}
