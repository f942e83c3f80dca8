package phimoe;

import ai.onnxruntime.OnnxJavaType;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.TreeSet;

/**
 * manifest.json, held against the rules of spec/embedding.md, which also says what each key means.
 *
 * @param chat null where the bundle has no chat format
 * @param dtypes of stored matrices and of activations; empty where the manifest does not say them
 */
record Manifest(
        List<Graph> graphs, Decoding decoding, Map<String, Entry> files, ChatFormat chat, Set<String> dtypes) {
    static final String FILE = "manifest.json";
    private static final int FORMAT_VERSION = 2;
    private static final String TASK = "text-generation";
    private static final Map<String, OnnxJavaType> CACHE_DTYPES = new TreeMap<>(Map.of(
            "float32", OnnxJavaType.FLOAT,
            "float16", OnnxJavaType.FLOAT16,
            "bfloat16", OnnxJavaType.BFLOAT16,
            "int8", OnnxJavaType.INT8,
            "uint8", OnnxJavaType.UINT8));

    /**
     * One graph file over the bundle's weights, and what it takes to run it.
     *
     * @param devices "cpu", "cuda" and the least ONNX Runtime release that loads it there
     * @param optionalInputs the inputs that have a default
     * @param requires what it needs beyond an ONNX Runtime release
     */
    record Graph(String file, Map<String, String> devices, List<String> optionalInputs, List<String> requires) {
        private static Graph of(Json graph) {
            Map<String, String> devices = graph.get("devices").map(Json::release);
            if (devices.isEmpty()) {
                throw graph.get("devices").unlike("at least one device");
            }
            return of(graph, devices);
        }

        /** Version 1 has one target for all graphs. */
        private static Graph ofVersion1(Json graph, String target) {
            String device = target.equals("portable") ? "cpu" : target;
            return of(graph, Map.of(device, graph.get("minimum_onnxruntime").release()));
        }

        private static Graph of(Json graph, Map<String, String> devices) {
            return new Graph(
                    graph.get("file").fileName(), devices, names(graph, "optional_inputs"), names(graph, "requires"));
        }

        private static List<String> names(Json graph, String key) {
            return graph.find(key).map(names -> names.list(Json::text)).orElse(List.of());
        }
    }

    /**
     * What the generation loop must know.
     *
     * @param ropeBoundary null where there is none
     * @param cleanUpTokenizationSpaces whether text loses spaces before punctuation
     */
    record Decoding(
            int vocabSize,
            int context,
            Integer ropeBoundary,
            int prefillChunk,
            Set<Integer> eosTokenIds,
            Map<String, Integer> hiddenTokens,
            CacheShape cache,
            boolean cleanUpTokenizationSpaces) {
        private static Decoding of(Json decoding) {
            return new Decoding(
                    decoding.get("vocab_size").number(1),
                    decoding.get("context").number(1),
                    decoding.get("rope_boundary").unlessNull().map(length -> length.number(1)).orElse(null),
                    decoding.get("prefill_chunk").number(1),
                    Set.copyOf(decoding.get("eos_token_ids").list(id -> id.number(0))),
                    decoding.get("hidden_tokens").map(id -> id.number(0)),
                    CacheShape.of(decoding.get("cache")),
                    decoding.find("clean_up_tokenization_spaces").map(Json::flag).orElse(false));
        }
    }

    /**
     * One of the cache's tensors is [rows, numKeyValueHeads, length, headDim].
     *
     * @param shared whether past and present may be one buffer
     */
    record CacheShape(int numHiddenLayers, int numKeyValueHeads, int headDim, OnnxJavaType dtype, boolean shared) {
        private static CacheShape of(Json cache) {
            OnnxJavaType dtype = CACHE_DTYPES.get(cache.get("dtype").text());
            if (dtype == null) {
                throw cache.get("dtype").unlike("one of " + String.join(", ", CACHE_DTYPES.keySet()));
            }
            return new CacheShape(
                    cache.get("num_hidden_layers").number(1),
                    cache.get("num_key_value_heads").number(1),
                    cache.get("head_dim").number(1),
                    dtype,
                    cache.get("shared").flag());
        }
    }

    /** A file's size in bytes, and its hash in hexadecimal. */
    record Entry(long size, String sha256) {
        private static Entry of(Json file) {
            return new Entry(file.get("size").size(), file.get("sha256").sha256());
        }
    }

    /**
     * Reads a bundle's manifest.
     *
     * @throws BundleException there is none, it breaks a rule, or it is of another version or for another task
     */
    static Manifest read(Path bundle) {
        Json root = Json.read(bundle.resolve(FILE));
        int version = version(root);
        String task = root.get("task").text();
        if (!task.equals(TASK)) {
            throw new BundleException(bundle + ": is a bundle for " + task + ", expected one for " + TASK);
        }
        Manifest manifest = new Manifest(
                graphs(root, version),
                Decoding.of(root.get("decoding")),
                root.get("files").map(Entry::of),
                root.find("chat").flatMap(Json::unlessNull).map(ChatFormat::of).orElse(null),
                dtypes(root, version));
        manifest.checkNames(root);
        return manifest;
    }

    private static int version(Json root) {
        Json version = root.get("format_version");
        for (int known = 1; known <= FORMAT_VERSION; known++) {
            if (version.value().toString().equals(String.valueOf(known))) {
                return known;
            }
        }
        throw new BundleException(root.file() + ": format_version is " + version.shown() + ", this release reads 1 to "
                + FORMAT_VERSION + "; upgrade phimoe");
    }

    private static List<Graph> graphs(Json root, int version) {
        List<Graph> graphs;
        if (version == 1) {
            String target = root.get("target").text();
            graphs = root.get("graphs").list(graph -> Graph.ofVersion1(graph, target));
        } else {
            graphs = root.get("graphs").list(Graph::of);
        }
        if (graphs.isEmpty()) {
            throw root.get("graphs").unlike("at least one graph");
        }
        return graphs;
    }

    /** Running a bundle takes none of this, so nothing is wrong with a manifest that says it in other ways or not at all. */
    private static Set<String> dtypes(Json root, int version) {
        try {
            Json weights = root.get("weights");
            Set<String> dtypes = new TreeSet<>();
            dtypes.add(root.get("dtype").text());
            if (version == 1) { // such as "int4, block 32"
                weights.map(form -> dtypes.add(form.text().split(",")[0]));
            } else {
                weights.list(group -> dtypes.add(group.get("dtype").text()));
            }
            return dtypes;
        } catch (BundleException error) {
            return Set.of();
        }
    }

    /** Holds that names of files are plain, and that every graph's file is listed, and the tokenizer's. */
    private void checkNames(Json root) {
        root.get("files").keys().forEach(Json::fileName);
        root.get("files").get("tokenizer.json");
        root.get("graphs").list(graph -> listed(graph.get("file")));
        root.get("decoding").find("sampling_graph").flatMap(Json::unlessNull).ifPresent(this::listed);
    }

    private String listed(Json file) {
        if (!files.containsKey(file.fileName())) {
            throw file.unlike("one of files");
        }
        return file.fileName();
    }
}
