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
import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.atomic.AtomicReference;
import java.util.stream.LongStream;
import java.util.stream.Stream;
import phimoe.Manifest.Graph;

/** A bundle's graph in ONNX Runtime, and the memory of an ended generation's cache, which the next one takes over. */
final class Session implements AutoCloseable {
    private static final OrtEnvironment ENVIRONMENT = OrtEnvironment.getEnvironment();
    // ONNX Runtime starts whatever is asked for, and a million threads would never all be running
    private static final int MOST_THREADS = Math.max(256, Runtime.getRuntime().availableProcessors());
    private static final String DEVICE = "cpu";
    private static final Comparator<String> RELEASES = Comparator.comparing(Session::numbers, Arrays::compare);

    // a pass below so many bytes of weights times tokens is too short to be worth waking another thread
    private static final long SHORT = 8_000_000;

    private final OrtSession session;
    private final OrtSession single; // the same graph with one thread, for short passes; null where there are none
    private final long weights; // bytes
    private final AtomicReference<ByteBuffer[]> spare = new AtomicReference<>();

    /**
     * Opens the first graph of the manifest that this ONNX Runtime loads from Java.
     *
     * @param threads null for one a physical core, and one thread alone for short passes
     * @throws DeviceException there is no such graph, ONNX Runtime refuses it, or threads is out of range
     * @throws BundleException the graph reads files that are not listed, or is not the one that the manifest describes
     */
    Session(Path bundle, Manifest manifest, Integer threads) {
        Graph graph = chooseGraph(manifest.graphs(), ENVIRONMENT.getVersion(), Operators.provided());
        Path path = bundle.resolve(graph.file());
        if (!manifest.decoding().cache().shared()) {
            throw new DeviceException("the bundle's cache cannot be one buffer (decoding.cache.shared is false), which Java "
                    + "needs; export it with --target cpu");
        }
        if (threads != null && (threads < 1 || threads > MOST_THREADS)) {
            throw new DeviceException("threads is " + threads + ", expected 1 to " + MOST_THREADS + ", or null");
        }
        ExternalData.check(path, manifest.files().keySet());
        weights = manifest.files().entrySet().stream().filter(file -> file.getKey().endsWith(".data"))
                .mapToLong(file -> file.getValue().size()).sum();
        session = open(path, graph, manifest.decoding(), threads == null ? 0 : threads);
        try {
            single = threads == null && weights <= SHORT ? open(path, graph, manifest.decoding(), 1) : null;
        } catch (RuntimeException error) {
            close(session);
            throw error;
        }
    }

    private static OrtSession open(Path path, Graph graph, Manifest.Decoding decoding, int threads) {
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR);
            options.setIntraOpNumThreads(threads);
            options.addConfigEntry("session.intra_op.spin_duration_us", "50"); // longer, and threads take a busy machine's time
            options.addConfigEntry("session.load_model_format", "ONNX"); // by any name: ExternalData knows this format
            if (graph.requires().contains(Operators.NAME)) {
                options.registerCustomOpLibrary(Operators.library());
            }
            OrtSession session = ENVIRONMENT.createSession(path.toString(), options);
            try {
                Agreement.check(session, path, decoding);
            } catch (RuntimeException error) {
                session.close();
                throw error;
            }
            return session;
        } catch (OrtException error) {
            String problem = ENVIRONMENT.getVersion() + " cannot load it: " + error.getMessage();
            throw new DeviceException(path + ": ONNX Runtime " + problem, error);
        }
    }

    /**
     * The first graph that ONNX Runtime `installed` loads on the CPU and from Java, where it takes no optional inputs.
     *
     * @param provided what a graph may require
     * @throws DeviceException there is none
     */
    static Graph chooseGraph(List<Graph> graphs, String installed, Set<String> provided) {
        List<Graph> here = graphs.stream().filter(graph -> graph.devices().containsKey(DEVICE)).toList();
        if (here.isEmpty()) {
            Set<String> devices = new TreeSet<>();
            graphs.forEach(graph -> devices.addAll(graph.devices().keySet()));
            throw new DeviceException(
                    "the bundle runs on " + String.join(", ", devices) + ", not on cpu; export it with --target cpu");
        }
        List<Graph> usable = here.stream().filter(graph -> graph.optionalInputs().isEmpty()).toList();
        if (usable.isEmpty()) {
            throw new DeviceException(
                    "every graph of the bundle has optional inputs, which Java cannot give; export it with --target cpu");
        }
        List<Graph> known = usable.stream().filter(graph -> provided.containsAll(graph.requires())).toList();
        if (known.isEmpty()) {
            Set<String> missing = new TreeSet<>();
            usable.forEach(graph -> missing.addAll(graph.requires()));
            missing.removeAll(provided);
            throw new DeviceException(missing.equals(Set.of(Operators.NAME))
                    ? Operators.missing()
                    : "the bundle requires " + String.join(", ", missing) + ", not known here; upgrade phimoe");
        }
        return known.stream().filter(graph -> RELEASES.compare(graph.devices().get(DEVICE), installed) <= 0).findFirst()
                .orElseThrow(() -> new DeviceException("the bundle needs ONNX Runtime "
                        + known.stream().map(graph -> graph.devices().get(DEVICE)).min(RELEASES).orElseThrow()
                        + " or newer, installed is " + installed));
    }

    /** The numbers of a release: "1.32.0-dev" gives 1, 32, 0. */
    private static int[] numbers(String release) {
        return Stream.of(release.split("[^0-9.]")[0].split("\\.")).mapToInt(Integer::parseInt).toArray();
    }

    /** Runs the graph over so many new tokens, those of all rows together, into outputs that are there already. */
    void run(int tokens, Map<String, OnnxTensor> inputs, Map<String, OnnxTensor> outputs, OrtSession.RunOptions options)
            throws OrtException {
        OrtSession chosen = single != null && tokens * weights <= SHORT ? single : session;
        chosen.run(inputs, Set.of(), outputs, options).close();
    }

    /** So many buffers for tensors of a shape, or larger ones. */
    ByteBuffer[] takeMemory(int count, OnnxJavaType type, long... shape) {
        ByteBuffer[] memory = spare.getAndSet(null);
        if (memory == null || memory[0].capacity() < bytes(type, shape)) {
            memory = new ByteBuffer[count];
            Arrays.setAll(memory, index -> allocate(type, shape));
        }
        return memory;
    }

    void giveBackMemory(ByteBuffer[] memory) {
        spare.set(memory);
    }

    /** Memory for a tensor outside Java's heap, where ONNX Runtime can write; of a buffer on the heap it makes a copy. */
    static ByteBuffer allocate(OnnxJavaType type, long... shape) {
        long bytes = bytes(type, shape);
        if (bytes > Integer.MAX_VALUE) {
            throw new GenerationException("a tensor " + Arrays.toString(shape) + " is larger than Java's buffers, 2 GiB; "
                    + "give fewer prompts or a lower maxNewTokens");
        }
        try {
            return ByteBuffer.allocateDirect((int) bytes).order(ByteOrder.nativeOrder());
        } catch (OutOfMemoryError error) {
            throw new GenerationException("no memory for " + (bytes >> 20) + " MiB more outside the heap, one of the buffers "
                    + "that the cache needs; lower maxNewTokens or raise -XX:MaxDirectMemorySize", error);
        }
    }

    /** A tensor whose memory is the buffer's from byte `start` on. */
    static OnnxTensor tensor(ByteBuffer buffer, long start, OnnxJavaType type, long... shape) throws OrtException {
        return OnnxTensor.createTensor(ENVIRONMENT, buffer.slice((int) start, (int) bytes(type, shape)), shape, type);
    }

    /** The size of a tensor with no dimension of 0; Long.MAX_VALUE where it is more. */
    static long bytes(OnnxJavaType type, long... shape) {
        return LongStream.of(shape).reduce(type.size, (product, length) ->
                product > Long.MAX_VALUE / length ? Long.MAX_VALUE : product * length);
    }

    @Override
    public void close() {
        close(session);
        if (single != null) {
            close(single);
        }
    }

    private static void close(OrtSession session) {
        try {
            session.close();
        } catch (OrtException error) {
            throw new DeviceException("ONNX Runtime cannot close the session: " + error.getMessage(), error);
        }
    }
}
