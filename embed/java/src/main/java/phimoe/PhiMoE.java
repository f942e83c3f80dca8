package phimoe;

import ai.onnxruntime.OrtException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.locks.ReadWriteLock;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import java.util.function.BiConsumer;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * A bundle of phimoe-export, loaded for generation.
 *
 * <p>Its methods may be called from several threads: each call has a cache of its own. It holds memory outside Java's heap and is to
 * be closed.
 */
public final class PhiMoE implements AutoCloseable {
    private final Path bundle;
    private final Manifest manifest;
    private final Tokenizer tokenizer;
    private final Session session;
    private final ReadWriteLock lock = new ReentrantReadWriteLock(); // read: in use; write: closing
    private boolean closed;

    private PhiMoE(Path bundle, Manifest manifest, Integer threads) {
        this.bundle = bundle;
        this.manifest = manifest;
        Manifest.Decoding decoding = manifest.decoding();
        BundleFiles.check(bundle, manifest.files());
        tokenizer = new Tokenizer(
                bundle.resolve("tokenizer.json"), decoding.hiddenTokens().values(), decoding.cleanUpTokenizationSpaces());
        try {
            session = new Session(bundle, manifest, threads);
        } catch (RuntimeException error) {
            tokenizer.close();
            throw error;
        }
    }

    /** Loads a bundle with the default number of threads; see {@link #load(Path, Integer)}. */
    public static PhiMoE load(Path bundle) {
        return load(bundle, null);
    }

    /**
     * Loads a bundle.
     *
     * @param bundle its folder
     * @param threads how many threads one operator may use, from 1 to 256 or the number of processors, whichever is more;
     *     null for one a physical core, and one alone for passes that are short
     * @throws BundleException the folder is no bundle, a file of it is missing or changed, its manifest does not describe
     *     its graph, or another bundle took its place meanwhile
     * @throws DeviceException the installed ONNX Runtime cannot run the bundle, or threads is out of range
     */
    public static PhiMoE load(Path bundle, Integer threads) {
        if (bundle == null) {
            throw new BundleException("the bundle is null, expected the path of a folder");
        }
        Libraries.prepare();
        Manifest manifest = Manifest.read(bundle);
        Snapshot snapshot = new Snapshot(bundle, manifest);
        PhiMoEException refused = null;
        try {
            PhiMoE model = new PhiMoE(bundle, manifest, threads);
            if (snapshot.isCurrent()) {
                return model;
            }
            model.close();
        } catch (PhiMoEException error) {
            if (snapshot.isCurrent()) {
                throw error;
            }
            refused = error;
        }
        // what was opened may be some of one bundle and some of another
        throw new BundleException(bundle + ": was changed while it was read; load it again", refused);
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
     * @param options for every prompt; null for {@link Options#GREEDY}
     * @throws GenerationException a prompt is empty, holds null or half a character, does not fit the context, or is a chat
     *     that the bundle's format cannot say
     */
    public Pieces stream(List<Prompt> batch, Options options) {
        if (batch == null || batch.isEmpty()) {
            String what = batch == null ? "null" : "empty";
            throw new GenerationException("the batch is " + what + "; give at least one prompt");
        }
        return whileOpen(() -> {
            List<Request> requests = new ArrayList<>();
            for (Prompt prompt : batch) {
                requests.add(request("prompt " + requests.size(), prompt, options));
            }
            return start(requests);
        });
    }

    /** Holds the bundle against a golden file; see {@link #verifyGolden(Path, BiConsumer)}. */
    public Report verifyGolden(Path golden) {
        return verifyGolden(golden, (done, count) -> {});
    }

    /**
     * Holds the bundle against what phimoe-verify --save-golden kept of the checkpoint that it came from: runs the same
     * tokens, and judges by the limits of the bundle's precision. The checkpoint and Python are not needed.
     *
     * @param golden the file, saved with this bundle or with another of the same checkpoint
     * @param progress is called with the windows of tokens that are done, and with how many there are
     * @throws GoldenException the file is missing, damaged, or another checkpoint's
     * @throws BundleException the manifest does not say how the weights are stored
     */
    public Report verifyGolden(Path golden, BiConsumer<Integer, Integer> progress) {
        if (golden == null) {
            throw new GoldenException("the golden file is null, expected a path");
        }
        Verification verification = new Verification(manifest, tokenizer, Golden.read(golden, manifest));
        return whileOpen(() -> {
            try {
                return verification.run(bundle.toString(), session, progress);
            } catch (OrtException error) {
                throw new GenerationException("ONNX Runtime failed: " + error.getMessage(), error);
            }
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
        return Request.of(
                name, encode(name, prompt), options == null ? Options.GREEDY : options, manifest.decoding().context());
    }

    /** The token ids of a prompt; `name` is its name in errors. */
    List<Integer> encode(String name, Prompt prompt) {
        if (prompt instanceof Prompt.Text text) {
            expect(name, text.text(), "");
            return checkIds(name, encode(name, text.text(), true));
        }
        if (prompt instanceof Prompt.Chat chat) {
            expect(name, chat.messages(), List.of());
            return checkIds(name, encode(name, render(name, chat.messages()), false));
        }
        return checkIds(name, prompt instanceof Prompt.Tokens tokens ? tokens.tokenIds() : null);
    }

    /** A text of far more tokens than the context holds is refused by its beginning: all of it might take a minute. */
    private List<Integer> encode(String name, String text, boolean special) {
        Tokenizer.checkCharacters(name, text);
        int context = manifest.decoding().context();
        if (text.length() > 8L * context) {
            int end = 8 * context - (Character.isHighSurrogate(text.charAt(8 * context - 1)) ? 1 : 0);
            if (tokenizer.encode(text.substring(0, end), false).size() > context) {
                throw new GenerationException(name + " has " + text.length() + " characters, of which the first " + end
                        + " are more tokens than the context of " + context + "; shorten it");
            }
        }
        return tokenizer.encode(text, special);
    }

    private List<Integer> checkIds(String name, List<Integer> ids) {
        expect(name, ids, List.of());
        int last = manifest.decoding().vocabSize() - 1;
        for (Integer id : ids) {
            if (id == null || id < 0 || id > last) {
                throw new GenerationException(name + " holds " + id + ", expected token ids from 0 to " + last);
            }
        }
        return List.copyOf(ids);
    }

    private static void expect(String name, Object content, Object empty) {
        if (content == null || content.equals(empty)) {
            String what = content == null ? "null" : "empty";
            throw new GenerationException(name + " is " + what + "; give at least one character, message or token");
        }
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
