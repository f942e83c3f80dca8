package phimoe;

import ai.onnxruntime.OrtException;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.Queue;

/**
 * The new tokens of a prompt or a batch, computed as they are asked for, the rows of a batch in turn.
 *
 * <p>It is to be closed: at its end it does so itself, and leaving it early or calling {@link #close} from another thread cancels
 * what is still to come, a run of the graph that is under way included.
 */
public final class Pieces implements Iterator<Piece>, Iterable<Piece>, AutoCloseable {
    private final PhiMoE model;
    private final Decoder decoder;
    private final List<Row> active;
    private final Queue<Piece> ready = new ArrayDeque<>();
    private volatile boolean cancelled;

    Pieces(PhiMoE model, Decoder decoder, List<Row> rows) {
        this.model = model;
        this.decoder = decoder;
        active = new ArrayList<>(rows);
    }

    /**
     * Whether another token comes; computes it.
     *
     * @throws GenerationException the graph failed
     */
    @Override
    public synchronized boolean hasNext() {
        if (ready.isEmpty() && !active.isEmpty() && !cancelled) {
            model.whileOpen(this::advance);
        }
        return !ready.isEmpty() && !cancelled;
    }

    @Override
    public synchronized Piece next() {
        if (!hasNext()) {
            throw new NoSuchElementException("the text has ended");
        }
        return ready.remove();
    }

    /** This iterator itself; a stream can be gone through once. */
    @Override
    public Iterator<Piece> iterator() {
        return this;
    }

    /** One token more of every row. */
    private Void advance() {
        boolean more = false;
        try {
            if (active.get(0).tokenIds.isEmpty()) {
                for (int row = 0; row < active.size(); row++) {
                    decoder.prefill(row, active.get(row).prompt);
                    take(row, 0);
                }
            } else {
                decoder.step(active.stream().map(row -> row.tokenIds.get(row.tokenIds.size() - 1)).toList());
                for (int row = 0; row < active.size(); row++) {
                    take(row, row);
                }
            }
            for (int row = active.size() - 1; row >= 0; row--) {
                if (active.get(row).finished) {
                    decoder.drop(row);
                    active.set(row, active.get(active.size() - 1)); // as in the decoder, the last row takes its number
                    active.remove(active.size() - 1);
                }
            }
            more = !active.isEmpty();
        } catch (OrtException error) {
            if (!cancelled) {
                throw new GenerationException("ONNX Runtime failed: " + error.getMessage(), error);
            }
        } finally {
            if (!more) {
                active.clear();
                decoder.close();
            }
        }
        return null;
    }

    private void take(int row, int logitsRow) {
        ready.add(active.get(row).next(decoder.logits(logitsRow)));
    }

    /** Cancels what is still to come; waits for a run of the graph in another thread, which it ends. */
    @Override
    public void close() {
        cancelled = true;
        try {
            decoder.terminate();
        } catch (OrtException error) {
            throw new GenerationException("ONNX Runtime cannot end a run: " + error.getMessage(), error);
        }
        synchronized (this) {
            active.clear();
            decoder.close();
        }
    }
}
