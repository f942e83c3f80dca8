package phimoe;

import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtLoggingLevel;
import ai.onnxruntime.OrtSession;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.atomic.AtomicReference;

/** A bundle's graph in ONNX Runtime, and the memory of an ended generation's cache, which the next one takes over. */
final class Session implements AutoCloseable {
    private static final OrtEnvironment ENVIRONMENT = OrtEnvironment.getEnvironment();

    private final OrtSession session;
    private final AtomicReference<ByteBuffer[]> spare = new AtomicReference<>();

    /** Opens the graph that the installed ONNX Runtime loads; `threads` is null for ONNX Runtime's own choice. */
    Session(Path bundle, Manifest manifest, Integer threads) {
        if (!manifest.target().equals("cpu")) {
            throw new DeviceException("the bundle was exported for " + manifest.target() + ", not for cpu; export it with --target cpu");
        }
        if (threads != null && threads < 1) {
            throw new DeviceException("threads is " + threads + ", expected 1 or more");
        }
        Path path = bundle.resolve(manifest.chooseGraph(ENVIRONMENT.getVersion()).file());
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR);
            options.setIntraOpNumThreads(threads == null ? 0 : threads);
            session = ENVIRONMENT.createSession(path.toString(), options);
        } catch (OrtException error) {
            throw new DeviceException(path + ": ONNX Runtime " + ENVIRONMENT.getVersion() + " cannot load it: " + error.getMessage(), error);
        }
    }

    /** Runs the graph into outputs that are there already. */
    void run(Map<String, OnnxTensor> inputs, Map<String, OnnxTensor> outputs, OrtSession.RunOptions options) throws OrtException {
        session.run(inputs, Set.of(), outputs, options).close();
    }

    /** So many buffers of at least so many bytes. */
    ByteBuffer[] takeMemory(int count, long bytes) {
        ByteBuffer[] memory = spare.getAndSet(null);
        if (memory != null && memory[0].capacity() >= bytes) {
            return memory;
        }
        if (bytes > Integer.MAX_VALUE) {
            throw new GenerationException("a layer's cache is larger than Java's buffers; give fewer prompts or a lower maxNewTokens");
        }
        memory = new ByteBuffer[count];
        try {
            Arrays.setAll(memory, index -> allocate((int) bytes));
        } catch (OutOfMemoryError error) {
            throw new GenerationException("the cache needs " + (count * bytes >> 20)
                    + " MiB outside the heap; lower maxNewTokens or raise -XX:MaxDirectMemorySize", error);
        }
        return memory;
    }

    void giveBackMemory(ByteBuffer[] memory) {
        spare.set(memory);
    }

    /** Memory outside Java's heap, where ONNX Runtime can read and write it; of a buffer on the heap it makes a copy. */
    static ByteBuffer allocate(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
    }

    /** A tensor whose memory is the buffer's from byte `start` on. */
    static OnnxTensor tensor(ByteBuffer buffer, long start, OnnxJavaType type, long... shape) throws OrtException {
        long bytes = Arrays.stream(shape).reduce(type.size, (product, length) -> product * length);
        return OnnxTensor.createTensor(ENVIRONMENT, buffer.slice((int) start, (int) bytes), shape, type);
    }

    @Override
    public void close() {
        try {
            session.close();
        } catch (OrtException error) {
            throw new DeviceException("ONNX Runtime cannot close the session: " + error.getMessage(), error);
        }
    }
}
