package phimoe;

import ai.onnxruntime.NodeInfo;
import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Map;
import java.util.TreeMap;

/** Whether an opened graph is the one that the manifest describes: what the loop relies on, before the first run. */
final class Agreement {
    private static final long ANY = -1; // as ONNX Runtime says a dimension that is no number

    /** What a tensor must be. */
    private record Tensor(OnnxJavaType dtype, long... shape) {}

    private final Path graph;
    private final Manifest.Decoding decoding;

    private Agreement(Path graph, Manifest.Decoding decoding) {
        this.graph = graph;
        this.decoding = decoding;
    }

    /**
     * Holds a session's inputs and outputs against the manifest: names, dtypes, and the dimensions that are numbers.
     *
     * @throws BundleException they disagree
     */
    static void check(OrtSession session, Path graph, Manifest.Decoding decoding) throws OrtException {
        Agreement agreement = new Agreement(graph, decoding);
        agreement.checkLayers(session.getNumInputs());
        agreement.check("inputs", session.getInputInfo(), agreement.inputs());
        agreement.check("outputs", session.getOutputInfo(), agreement.outputs());
    }

    /** Counts before any names are made: a damaged manifest may claim a billion layers. */
    private void checkLayers(long inputs) {
        int layers = decoding.cache().numHiddenLayers();
        if (4 + 2L * layers != inputs) {
            throw disagree("num_hidden_layers is " + layers + ", but the graph has " + inputs + " inputs, expected "
                    + (4 + 2L * layers));
        }
    }

    private Map<String, Tensor> inputs() {
        Map<String, Tensor> inputs = cache("past_key_values.");
        inputs.put("input_ids", new Tensor(OnnxJavaType.INT64, ANY, ANY));
        inputs.put("attention_mask", new Tensor(OnnxJavaType.INT64, ANY, ANY));
        inputs.put("logits_to_keep", new Tensor(OnnxJavaType.INT64, 1));
        inputs.put("rope_length", new Tensor(OnnxJavaType.INT64, 1));
        return inputs;
    }

    private Map<String, Tensor> outputs() {
        Map<String, Tensor> outputs = cache("present.");
        outputs.put("logits", new Tensor(OnnxJavaType.FLOAT, ANY, ANY, decoding.vocabSize()));
        return outputs;
    }

    private Map<String, Tensor> cache(String prefix) {
        Manifest.CacheShape cache = decoding.cache();
        Map<String, Tensor> tensors = new TreeMap<>();
        for (int layer = 0; layer < cache.numHiddenLayers(); layer++) {
            for (String part : new String[] {".key", ".value"}) {
                tensors.put(
                        prefix + layer + part,
                        new Tensor(cache.dtype(), ANY, cache.numKeyValueHeads(), ANY, cache.headDim()));
            }
        }
        return tensors;
    }

    private void check(String what, Map<String, NodeInfo> found, Map<String, Tensor> expected) {
        expected.forEach((name, tensor) -> {
            if (!found.containsKey(name)) {
                throw disagree("the graph's " + what + " lack " + name);
            }
            check(name, found.get(name), tensor);
        });
        for (String name : found.keySet()) {
            if (!expected.containsKey(name)) {
                throw disagree("the graph's " + what + " have " + name + ", which is not expected");
            }
        }
    }

    private void check(String name, NodeInfo found, Tensor expected) {
        if (!(found.getInfo() instanceof TensorInfo info) || info.type != expected.dtype) {
            throw disagree(name + " is " + found.getInfo() + " in the graph, expected the dtype " + expected.dtype);
        }
        long[] shape = info.getShape();
        boolean agrees = shape.length == expected.shape.length;
        for (int axis = 0; agrees && axis < shape.length; axis++) {
            agrees = shape[axis] == ANY || expected.shape[axis] == ANY || shape[axis] == expected.shape[axis];
        }
        if (!agrees) {
            String keys = name.equals("logits") ? "vocab_size" : "num_key_value_heads and head_dim";
            throw disagree(name + " has the shape " + Arrays.toString(shape) + " in the graph, expected "
                    + Arrays.toString(expected.shape) + " by " + keys + ", where -1 is any");
        }
    }

    private BundleException disagree(String what) {
        return new BundleException(graph.resolveSibling(Manifest.FILE) + ": does not describe " + graph.getFileName() + ": "
                + what + "; copy or export the bundle again");
    }
}
