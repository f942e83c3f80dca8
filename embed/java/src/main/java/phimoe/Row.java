package phimoe;

import java.time.Duration;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Objects;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.ThreadLocalRandom;
import java.util.stream.Collectors;

/** A request on its way to its end. */
final class Row {
    final Request request;
    final List<Integer> tokenIds = new ArrayList<>();
    boolean finished;

    private final int number;
    private final long seed;
    private final Set<Integer> seen;
    private final Set<Integer> eos;
    private final Set<Integer> stopIds; // a hidden token has no text in which a stop string could be found
    private final Tokenizer.TextStream characters;
    private final StopStrings stops;
    private final StringBuilder text = new StringBuilder();
    private final long start = System.nanoTime();
    private long first;

    Row(int number, Request request, Manifest.Decoding decoding, Tokenizer tokenizer) {
        this.number = number;
        this.request = request;
        Options options = request.options();
        seed = options.seed() == null ? ThreadLocalRandom.current().nextLong() : options.seed();
        seen = new HashSet<>(request.prompt());
        eos = decoding.eosTokenIds();
        stopIds = options.stop().stream().map(decoding.hiddenTokens()::get).filter(Objects::nonNull)
                .collect(Collectors.toSet());
        characters = tokenizer.stream(request.prompt());
        stops = new StopStrings(options.stop());
    }

    /** Chooses the next token from logits [vocab_size], which may be changed. */
    Piece next(float[] logits) {
        int token = Sampler.sample(logits, request.options(), seed, tokenIds.size(), seen);
        long now = System.nanoTime();
        first = tokenIds.isEmpty() ? now : first;
        tokenIds.add(token);
        seen.add(token);
        StopStrings.Certain certain = stops.add(eos.contains(token) ? "" : characters.add(token));
        FinishReason reason = null;
        if (eos.contains(token)) {
            reason = FinishReason.EOS;
        } else if (certain.stopped() || stopIds.contains(token)) {
            reason = FinishReason.STOP;
        } else if (tokenIds.size() == request.maxNewTokens()) {
            reason = FinishReason.LENGTH;
        }
        text.append(certain.text());
        if (reason == null) {
            return new Piece(number, token, certain.text(), Optional.empty());
        }
        finished = true;
        String last = "";
        if (!certain.stopped()) { // what waited for what might follow it
            StopStrings.Certain end = stops.add(characters.finish());
            last = end.text() + stops.finish();
            reason = end.stopped() ? FinishReason.STOP : reason;
        }
        Generation result = new Generation(
                text.append(last).toString(),
                List.copyOf(tokenIds),
                reason,
                request.prompt().size(),
                Duration.ofNanos(first - start),
                Duration.ofNanos(now - start));
        return new Piece(number, token, certain.text() + last, Optional.of(result));
    }
}
