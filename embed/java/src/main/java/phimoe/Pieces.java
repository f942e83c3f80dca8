package phimoe;

import ai.onnxruntime.OrtException;
import java.util.ArrayDeque;
import java.util.Iterator;
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
    private final Engine engine;
    private final Queue<Piece> ready = new ArrayDeque<>();
    private volatile boolean cancelled;

    Pieces(PhiMoE model, Engine engine) {
        this.model = model;
        this.engine = engine;
    }

    /**
     * Whether another token comes; computes it.
     *
     * @throws GenerationException the graph failed
     */
    @Override
    public synchronized boolean hasNext() {
        if (ready.isEmpty() && engine.hasMore() && !cancelled) {
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

    private Void advance() {
        boolean more = false;
        try {
            ready.addAll(engine.step());
            more = engine.hasMore();
        } catch (OrtException error) {
            if (!cancelled) {
                throw new GenerationException("ONNX Runtime failed: " + error.getMessage(), error);
            }
        } finally {
            if (!more) {
                engine.close();
            }
        }
        return null;
    }

    /** Cancels what is still to come; waits for a run of the graph in another thread, which it ends. */
    @Override
    public void close() {
        cancelled = true;
        try {
            engine.cancel();
        } catch (OrtException error) {
            throw new GenerationException("ONNX Runtime cannot end a run: " + error.getMessage(), error);
        }
        synchronized (this) {
            engine.close();
        }
    }
}
