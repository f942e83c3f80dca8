package phimoe;

import java.time.Duration;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.ThreadLocalRandom;
import java.util.stream.Collectors;

/** A prompt of a batch on its way to its end. */
final class Row {
    final List<Integer> prompt;
    final int maxNewTokens;
    final List<Integer> tokenIds = new ArrayList<>();
    boolean finished;

    private final int number;
    private final Options options;
    private final long seed;
    private final Set<Integer> seen;
    private final Set<Integer> eos;
    private final Set<Integer> stopIds; // a hidden token has no text in which a stop string could be found
    private final Tokenizer.TextStream characters;
    private final StringBuilder text = new StringBuilder();
    private final long start = System.nanoTime();
    private String heldBack = ""; // may be the beginning of a stop string
    private long first;

    Row(int number, List<Integer> prompt, int maxNewTokens, Options options, Manifest.Decoding decoding, Tokenizer tokenizer) {
        this.number = number;
        this.prompt = prompt;
        this.maxNewTokens = maxNewTokens;
        this.options = options;
        seed = options.seed() == null ? ThreadLocalRandom.current().nextLong() : options.seed();
        seen = new HashSet<>(prompt);
        eos = decoding.eosTokenIds();
        stopIds = options.stop().stream().map(decoding.hiddenTokens()::get).filter(id -> id != null).collect(Collectors.toSet());
        characters = tokenizer.stream(prompt);
    }

    /** Chooses the next token from logits [vocab_size], which may be changed. */
    Piece next(float[] logits) {
        int token = Sampler.sample(logits, options, seed, tokenIds.size(), seen);
        long now = System.nanoTime();
        first = tokenIds.isEmpty() ? now : first;
        tokenIds.add(token);
        seen.add(token);
        heldBack += eos.contains(token) ? "" : characters.add(token);
        int end = options.stop().stream().mapToInt(heldBack::indexOf).filter(place -> place >= 0).min().orElse(-1);
        FinishReason reason = null;
        if (eos.contains(token)) {
            reason = FinishReason.EOS;
        } else if (end >= 0 || stopIds.contains(token)) {
            reason = FinishReason.STOP;
        } else if (tokenIds.size() == maxNewTokens) {
            reason = FinishReason.LENGTH;
        }
        if (end < 0) {
            end = reason == null ? heldBack.length() - overlap() : heldBack.length();
        }
        String certain = heldBack.substring(0, end);
        heldBack = heldBack.substring(end);
        text.append(certain);
        if (reason == null) {
            return new Piece(number, token, certain, Optional.empty());
        }
        finished = true;
        Duration untilFirst = Duration.ofNanos(first - start);
        Duration total = Duration.ofNanos(now - start);
        Generation result = new Generation(text.toString(), List.copyOf(tokenIds), reason, prompt.size(), untilFirst, total);
        return new Piece(number, token, certain, Optional.of(result));
    }

    /** The length of the longest end of what is held back that begins a stop string. */
    private int overlap() {
        int longest = 0;
        for (String stop : options.stop()) {
            for (int size = longest + 1; size < stop.length() && size <= heldBack.length(); size++) {
                longest = heldBack.endsWith(stop.substring(0, size)) ? size : longest;
            }
        }
        return longest;
    }
}
