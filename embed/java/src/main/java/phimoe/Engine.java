package phimoe;

import ai.onnxruntime.OrtException;
import java.util.ArrayList;
import java.util.List;

/** The generation loop: prefills the requests of a batch one by one, then steps all of them until each has ended. */
final class Engine implements AutoCloseable {
    private final Decoder decoder;
    private final List<Row> active = new ArrayList<>(); // each at its row's number in the decoder

    Engine(Session session, Manifest.Decoding decoding, Tokenizer tokenizer, List<Request> requests)
            throws OrtException {
        long longest = 0;
        for (Request request : requests) {
            active.add(new Row(active.size(), request, decoding, tokenizer));
            longest = Math.max(longest, (long) request.prompt().size() + request.maxNewTokens());
        }
        long capacity = (longest + 255) / 256 * 256; // so that the next call can often take over the memory
        decoder = new Decoder(session, decoding, requests.size(), (int) Math.min(capacity, Integer.MAX_VALUE));
    }

    /** Whether a request has not reached its end. */
    boolean hasMore() {
        return !active.isEmpty();
    }

    /** One token more of every request that has not reached its end. */
    List<Piece> step() throws OrtException {
        List<Piece> pieces = new ArrayList<>();
        if (active.get(0).tokenIds.isEmpty()) {
            for (int row = 0; row < active.size(); row++) {
                decoder.prefill(row, active.get(row).request.prompt());
                pieces.add(active.get(row).next(decoder.logits(0)));
            }
        } else {
            decoder.step(active.stream().map(row -> row.tokenIds.get(row.tokenIds.size() - 1)).toList());
            for (int row = 0; row < active.size(); row++) {
                pieces.add(active.get(row).next(decoder.logits(row)));
            }
        }
        for (int row = active.size() - 1; row >= 0; row--) {
            if (active.get(row).finished) {
                decoder.drop(row);
                active.set(row, active.get(active.size() - 1)); // as in the decoder, the last row takes its number
                active.remove(active.size() - 1);
            }
        }
        return pieces;
    }

    /** Ends a step that is under way in another thread, with an exception there. */
    void cancel() throws OrtException {
        decoder.terminate();
    }

    @Override
    public void close() {
        active.clear();
        decoder.close();
    }
}
