package phimoe;

import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession.RunOptions;
import java.nio.ByteBuffer;
import java.nio.FloatBuffer;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.function.Consumer;

/**
 * The tokens that each row of a batch has in its cache, and how they go on: prefill one row, or step all rows by a token.
 *
 * <p>For each layer and part one buffer [rows, heads, capacity, head_dim] is past and present at once; the graph writes in place.
 * A row's part of it is one stretch of memory, on which it is prefilled alone.
 */
final class Decoder implements AutoCloseable {
    private final Session session;
    private final Manifest.Decoding decoding;
    private final int capacity;
    private final OnnxJavaType dtype;
    private final long rowBytes; // of one buffer
    private final List<List<Integer>> held = new ArrayList<>();
    private final ByteBuffer[] memory; // key and value of layer 0, of layer 1, ...
    private final ByteBuffer ids;
    private final ByteBuffer mask;
    private final ByteBuffer logits; // [rows, vocab_size], of the last run
    private final float[] scores;
    private final ByteBuffer ropeLength = Session.allocate(OnnxJavaType.INT64, 1);
    private final ByteBuffer logitsToKeep = Session.allocate(OnnxJavaType.INT64, 1);
    private final Map<String, OnnxTensor> inputs = new HashMap<>();
    private final Map<String, OnnxTensor> outputs = new HashMap<>();
    private final RunOptions options;
    private int boundFirst;
    private int boundRows;
    private boolean closed;

    /**
     * Empty caches for `rows` rows of up to `capacity` tokens.
     *
     * @throws GenerationException there is no memory for them
     */
    Decoder(Session session, Manifest.Decoding decoding, int rows, int capacity) throws OrtException {
        this.session = session;
        this.decoding = decoding;
        this.capacity = capacity;
        Manifest.CacheShape cache = decoding.cache();
        dtype = cache.dtype();
        rowBytes = Session.bytes(dtype, cache.numKeyValueHeads(), capacity, cache.headDim());
        ids = Session.allocate(OnnxJavaType.INT64, Math.max(rows, Math.min(decoding.prefillChunk(), capacity)));
        mask = Session.allocate(OnnxJavaType.INT64, rows, capacity);
        logits = Session.allocate(OnnxJavaType.FLOAT, rows, decoding.vocabSize());
        memory = session.takeMemory(
                2 * cache.numHiddenLayers(), dtype, rows, cache.numKeyValueHeads(), capacity, cache.headDim());
        options = new RunOptions();
        scores = new float[decoding.vocabSize()];
        for (int row = 0; row < rows; row++) {
            held.add(List.of());
        }
        inputs.put("rope_length", Session.tensor(ropeLength, 0, OnnxJavaType.INT64, 1));
        put(logitsToKeep, 0, 1);
        inputs.put("logits_to_keep", Session.tensor(logitsToKeep, 0, OnnxJavaType.INT64, 1));
    }

    /** Makes a row hold `tokens`; whichever row this is, the logits are row 0's then. */
    void prefill(int row, List<Integer> tokens) throws OrtException {
        prefill(row, tokens, tokens.size());
    }

    /** Appends one token to every row. */
    void step(List<Integer> tokens) throws OrtException {
        int longest = 0;
        for (int row = 0; row < held.size(); row++) {
            List<Integer> before = held.get(row);
            if (decoding.ropeBoundary() != null && before.size() == decoding.ropeBoundary()) {
                prefill(row, before, before.size() + 1); // beyond it every position is rotated by other factors
            }
            longest = Math.max(longest, before.size() + 1);
        }
        for (int row = 0; row < held.size(); row++) {
            held.get(row).add(tokens.get(row));
            put(ids, row, tokens.get(row));
            for (int place = 0; place < longest; place++) {
                put(mask, row * longest + place, place < held.get(row).size() ? 1 : 0);
            }
        }
        run(0, held.size(), 1, longest, 0);
    }

    /** A row's logits [vocab_size] of the last run; the array is the same at each call. */
    float[] logits(int row) {
        logits.asFloatBuffer().get(row * scores.length, scores);
        return scores;
    }

    /** Forgets a row; the last row takes its number. */
    void drop(int row) {
        int last = held.size() - 1;
        int bytes = row == last ? 0 : (int) rowBytes;
        for (ByteBuffer buffer : memory) {
            buffer.put(row * bytes, buffer, last * bytes, bytes);
        }
        held.set(row, held.get(last));
        held.remove(last);
    }

    /**
     * Prefills row 0, and hands out the logits [vocab_size] after each of the tokens, in order; the array is the same
     * each time.
     */
    void logits(List<Integer> tokens, Consumer<float[]> listener) throws OrtException {
        int chunk = Math.min(decoding.prefillChunk(), tokens.size());
        ByteBuffer all = Session.allocate(OnnxJavaType.FLOAT, chunk, decoding.vocabSize());
        bind(0, 1);
        OnnxTensor last = outputs.get("logits");
        put(logitsToKeep, 0, 0); // all
        try {
            for (int start = 0; start < tokens.size(); start += chunk) {
                int end = Math.min(start + chunk, tokens.size());
                try (OnnxTensor each = Session.tensor(all, 0, OnnxJavaType.FLOAT, 1, end - start, decoding.vocabSize())) {
                    outputs.put("logits", each);
                    run(0, tokens, start, end, tokens.size());
                }
                FloatBuffer rows = all.asFloatBuffer();
                for (int place = start; place < end; place++) {
                    rows.get(scores);
                    listener.accept(scores);
                }
            }
        } finally {
            put(logitsToKeep, 0, 1);
            outputs.put("logits", last);
        }
        held.set(0, new ArrayList<>(tokens));
    }

    private void prefill(int row, List<Integer> tokens, int length) throws OrtException {
        int chunk = Math.min(decoding.prefillChunk(), tokens.size());
        for (int start = 0; start < tokens.size(); start += chunk) {
            run(row, tokens, start, Math.min(start + chunk, tokens.size()), length);
        }
        held.set(row, new ArrayList<>(tokens));
    }

    /** Runs the tokens from `start` to `end` of a row that holds those before them. */
    private void run(int row, List<Integer> tokens, int start, int end, int length) throws OrtException {
        for (int place = 0; place < end; place++) {
            put(mask, place, 1);
        }
        for (int place = start; place < end; place++) {
            put(ids, place - start, tokens.get(place));
        }
        run(row, 1, end - start, end, length);
    }

    private static void put(ByteBuffer buffer, int index, long value) {
        buffer.putLong(index * Long.BYTES, value);
    }

    private void run(int first, int rows, int sequence, int total, int length) throws OrtException {
        bind(first, rows);
        put(ropeLength, 0, length);
        try (OnnxTensor tokens = Session.tensor(ids, 0, OnnxJavaType.INT64, rows, sequence);
                OnnxTensor real = Session.tensor(mask, 0, OnnxJavaType.INT64, rows, total)) {
            inputs.put("input_ids", tokens);
            inputs.put("attention_mask", real);
            session.run(rows * sequence, inputs, outputs, options);
        }
    }

    /** Makes rows first .. first + rows of the buffers the graph's cache. */
    private void bind(int first, int rows) throws OrtException {
        if (first == boundFirst && rows == boundRows) {
            return;
        }
        outputs.values().forEach(OnnxTensor::close);
        Manifest.CacheShape cache = decoding.cache();
        long[] shape = {rows, cache.numKeyValueHeads(), capacity, cache.headDim()};
        for (int index = 0; index < memory.length; index++) {
            String name = index / 2 + (index % 2 == 0 ? ".key" : ".value");
            OnnxTensor tensor = Session.tensor(memory[index], first * rowBytes, dtype, shape);
            inputs.put("past_key_values." + name, tensor);
            outputs.put("present." + name, tensor);
        }
        outputs.put("logits", Session.tensor(logits, 0, OnnxJavaType.FLOAT, rows, 1, decoding.vocabSize()));
        boundFirst = first;
        boundRows = rows;
    }

    /** Ends a run that is under way in another thread, with an exception there. */
    synchronized void terminate() throws OrtException {
        if (!closed) {
            options.setTerminate(true);
        }
    }

    @Override
    public synchronized void close() {
        if (!closed) {
            closed = true;
            outputs.values().forEach(OnnxTensor::close);
            inputs.get("rope_length").close();
            inputs.get("logits_to_keep").close();
            options.close();
            session.giveBackMemory(memory);
        }
    }
}
