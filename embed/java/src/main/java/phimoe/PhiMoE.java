package phimoe;

import ai.onnxruntime.OrtException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.locks.ReadWriteLock;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * A bundle of phimoe-export, loaded for generation.
 *
 * <p>Its methods may be called from several threads: each call has a cache of its own. It holds memory outside Java's heap and is to
 * be closed.
 */
public final class PhiMoE implements AutoCloseable {
    private final Manifest manifest;
    private final Tokenizer tokenizer;
    private final Session session;
    private final ReadWriteLock lock = new ReentrantReadWriteLock(); // read: in use; write: closing
    private boolean closed;

    private PhiMoE(Path bundle, Integer threads) {
        manifest = Manifest.read(bundle);
        BundleFiles.check(bundle, manifest.files());
        tokenizer = new Tokenizer(bundle.resolve("tokenizer.json"), manifest.decoding().hiddenTokens().values());
        try {
            session = new Session(bundle, manifest, threads);
        } catch (RuntimeException error) {
            tokenizer.close();
            throw error;
        }
    }

    /**
     * Loads a bundle; ONNX Runtime chooses the number of threads.
     *
     * @param bundle its folder
     * @throws BundleException the folder is no bundle, a file of it is missing or changed, or its manifest does not
     *     describe its graph
     * @throws DeviceException the installed ONNX Runtime cannot run the bundle
     */
    public static PhiMoE load(Path bundle) {
        return new PhiMoE(bundle, null);
    }

    /**
     * As {@link #load(Path)}.
     *
     * @param threads how many threads one operator may use, 1 or more
     */
    public static PhiMoE load(Path bundle, int threads) {
        return new PhiMoE(bundle, threads);
    }

    /** Continues a text; see {@link #stream(List, Options)}. */
    public Generation generate(String prompt, Options options) {
        return generate(new Prompt.Text(prompt), options);
    }

    /** Continues a prompt; see {@link #stream(List, Options)}. */
    public Generation generate(Prompt prompt, Options options) {
        return generate(prompt, options, piece -> {});
    }

    /** Continues a prompt and calls `listener` with every token; an exception that it throws ends the text. */
    public Generation generate(Prompt prompt, Options options, Consumer<Piece> listener) {
        try (Pieces pieces = stream(prompt, options)) {
            return collect(pieces, 1, listener)[0];
        }
    }

    /** Continues every prompt of a batch exactly as if it were alone; see {@link #stream(List, Options)}. */
    public List<Generation> generate(List<Prompt> batch, Options options) {
        try (Pieces pieces = stream(batch, options)) {
            return List.of(collect(pieces, batch.size(), piece -> {}));
        }
    }

    /** Continues a prompt, token by token; see {@link #stream(List, Options)}. */
    public Pieces stream(Prompt prompt, Options options) {
        return whileOpen(() -> start(List.of(request("the prompt", prompt, options))));
    }

    /**
     * Continues every prompt of a batch exactly as if it were alone, token by token.
     *
     * @throws GenerationException a prompt is empty or does not fit the context, or is a chat that the bundle's format cannot say
     */
    public Pieces stream(List<Prompt> batch, Options options) {
        if (batch.isEmpty()) {
            throw new GenerationException("the batch is empty; give at least one prompt");
        }
        return whileOpen(() -> {
            List<Request> requests = new ArrayList<>();
            for (Prompt prompt : batch) {
                requests.add(request("prompt " + requests.size(), prompt, options));
            }
            return start(requests);
        });
    }

    /** Ends the model; waits for calls in other threads, and streams that are still open end with an exception. */
    @Override
    public void close() {
        lock.writeLock().lock();
        try {
            if (!closed) {
                closed = true;
                session.close();
                tokenizer.close();
            }
        } finally {
            lock.writeLock().unlock();
        }
    }

    <T> T whileOpen(Supplier<T> action) {
        lock.readLock().lock();
        try {
            if (closed) {
                throw new IllegalStateException("the model is closed");
            }
            return action.get();
        } finally {
            lock.readLock().unlock();
        }
    }

    private Pieces start(List<Request> requests) {
        try {
            return new Pieces(this, new Engine(session, manifest.decoding(), tokenizer, requests));
        } catch (OrtException error) {
            throw new GenerationException("ONNX Runtime failed: " + error.getMessage(), error);
        }
    }

    private Request request(String name, Prompt prompt, Options options) {
        return Request.of(name, encode(name, prompt), options, manifest.decoding().context());
    }

    /** The token ids of a prompt; `name` is its name in errors. */
    List<Integer> encode(String name, Prompt prompt) {
        List<Integer> ids;
        if (prompt instanceof Prompt.Tokens tokens) {
            ids = List.copyOf(tokens.tokenIds());
        } else if (prompt instanceof Prompt.Chat chat && !chat.messages().isEmpty()) {
            ids = tokenizer.encode(render(name, chat.messages()), false);
        } else {
            ids = prompt instanceof Prompt.Text text && !text.text().isEmpty() ? tokenizer.encode(text.text(), true) : List.of();
        }
        if (ids.isEmpty()) {
            throw new GenerationException(name + " is empty; give at least one character, message or token");
        }
        int last = manifest.decoding().vocabSize() - 1;
        for (int id : ids) {
            if (id < 0 || id > last) {
                throw new GenerationException(name + " holds " + id + ", expected token ids from 0 to " + last);
            }
        }
        return ids;
    }

    private String render(String name, List<Message> messages) {
        if (manifest.chat() == null) {
            throw new GenerationException("the bundle has no chat format; give the prompt as a text");
        }
        return manifest.chat().render(name, messages);
    }

    private static Generation[] collect(Pieces pieces, int rows, Consumer<Piece> listener) {
        Generation[] results = new Generation[rows];
        for (Piece piece : pieces) {
            listener.accept(piece);
            piece.result().ifPresent(result -> results[piece.row()] = result);
        }
        return results;
    }
}
