package phimoe;

import com.google.gson.JsonParseException;
import java.io.IOException;
import java.io.InputStream;
import java.io.StringReader;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.function.Function;

/**
 * A golden file, held against the rules of spec/golden.md; docs/golden.md says what each part means.
 *
 * @param adapterSha256 null without an adapter
 * @param scales of each window
 * @param vocabSize of the checkpoint
 * @param stored null where nothing is known of stored weights
 * @param arrays by name
 */
record Golden(
        Path path,
        String checkpoint,
        String checkpointSha256,
        String adapterSha256,
        List<Integer> windows,
        List<Double> scales,
        double perplexity,
        int vocabSize,
        Stored stored,
        Map<String, Array> arrays) {
    static final int TOP = 64;
    static final int SAMPLED = 32;
    private static final int FORMAT_VERSION = 1;
    private static final String TASK = "text-generation";
    private static final String MARK = "{\"__metadata__\":{\"written_by\":\"phimoe-verify\"";
    private static final Map<String, Integer> WIDTHS = Map.of("F64", 8, "F32", 4, "I32", 4, "I16", 2);

    /** What is known of PyTorch over the weights that one bundle stores; `files` are their names and SHA-256. */
    record Stored(
            Map<String, String> files, List<Double> scales, double perplexity, double routingAgreement, Comparison toReference) {
        private static Stored of(Json stored) {
            Json compared = stored.get("to_reference");
            return new Stored(
                    stored.get("files").map(Json::sha256),
                    stored.get("scales").list(Json::decimal),
                    stored.get("perplexity").decimal(),
                    stored.get("routing_agreement").decimal(),
                    new Comparison(
                            compared.get("tokens").number(1),
                            compared.get("mean_difference").decimal(),
                            compared.get("max_difference").decimal(),
                            compared.get("kl").decimal(),
                            compared.get("top1_agreement").decimal()));
        }
    }

    /** An array of one of the four dtypes, in row-major order. */
    record Array(String dtype, List<Integer> shape, ByteBuffer numbers) {
        int integer(int index) {
            return numbers.getInt(index * Integer.BYTES);
        }

        double number(int index) {
            return dtype.equals("F64") ? numbers.getDouble(index * Double.BYTES) : numbers.getFloat(index * Float.BYTES);
        }

        List<Integer> integers() {
            Integer[] all = new Integer[numbers.capacity() / Integer.BYTES];
            Arrays.setAll(all, this::integer);
            return List.of(all);
        }
    }

    /**
     * Reads a golden file for a bundle.
     *
     * @throws GoldenException it is missing, damaged, of a newer format, no golden file, or another checkpoint's
     */
    static Golden read(Path path, Manifest manifest) {
        ByteBuffer file = ByteBuffer.wrap(bytes(path)).order(ByteOrder.LITTLE_ENDIAN);
        Function<String, PhiMoEException> damaged = what -> damaged(path, what);
        long length = file.getLong();
        if (length < 0 || length > file.remaining()) {
            throw damaged(path, "its header has " + length + " bytes, behind which " + file.remaining() + " are left");
        }
        ByteBuffer numbers = file.slice((int) length + 8, file.remaining() - (int) length).order(ByteOrder.LITTLE_ENDIAN);
        Json header = object(path, StandardCharsets.UTF_8.decode(file.slice(8, (int) length)).toString(), damaged);
        Json metadata = header.get("__metadata__");
        String text = metadata.get("golden").text();
        Json golden = object(path, text, damaged);
        Json version = golden.get("format_version");
        if (!version.value().toString().equals(String.valueOf(FORMAT_VERSION))) {
            throw new GoldenException(path + ": format_version is " + version.shown() + ", this release reads " + FORMAT_VERSION
                    + "; upgrade phimoe");
        }
        if (!sha256(text, numbers).equals(metadata.get("sha256").text())) {
            throw damaged(path, "its SHA-256 is not the one that it says");
        }
        Map<String, Array> arrays = new TreeMap<>();
        for (Json name : header.keys()) {
            String key = name.text();
            if (!key.equals("__metadata__")) {
                arrays.put(key, array(header.get(key), numbers));
            }
        }
        Golden read = of(path, golden, arrays);
        if (golden.get("task").text().equals(TASK)) {
            read.checkArrays(golden.get("config").get("num_hidden_layers").number(1));
        }
        read.checkCheckpoint(golden, manifest);
        return read;
    }

    private static byte[] bytes(Path path) {
        if (!Files.isRegularFile(path)) { // a pipe would be waited for, a device has no end
            String what = Files.exists(path) ? "it is no regular file" : "there is no such file";
            throw new GoldenException(path + ": cannot be read (" + what + "); give a file of phimoe-verify --save-golden");
        }
        try (InputStream stream = Files.newInputStream(path)) {
            byte[] beginning = stream.readNBytes(8 + MARK.length()); // so that no other large file is read
            String text = new String(beginning, StandardCharsets.ISO_8859_1);
            if (text.startsWith("version https://git-lfs")) {
                throw new GoldenException(
                        path + ": is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder");
            }
            if (!text.startsWith(MARK, 8)) {
                throw new GoldenException(path + ": is no golden file; phimoe-verify --save-golden writes one");
            }
            return Files.readAllBytes(path);
        } catch (IOException | OutOfMemoryError error) {
            throw new GoldenException(path + ": cannot be read (" + error + ")", error);
        }
    }

    private static GoldenException damaged(Path path, String what) {
        return new GoldenException(path + ": is damaged (" + what + "); save it again with phimoe-verify --save-golden");
    }

    private static Json object(Path path, String text, Function<String, PhiMoEException> damaged) {
        try {
            return Json.parse(path, new StringReader(text), damaged).orElseThrow(
                    () -> damaged(path, "its header is no JSON object"));
        } catch (IOException | JsonParseException error) {
            throw damaged(path, "its header is no JSON: " + error.getMessage());
        }
    }

    private static String sha256(String text, ByteBuffer numbers) {
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            digest.update(text.getBytes(StandardCharsets.UTF_8));
            digest.update(numbers.duplicate());
            return HexFormat.of().formatHex(digest.digest());
        } catch (NoSuchAlgorithmException error) {
            throw new AssertionError("every Java has SHA-256", error);
        }
    }

    private static Array array(Json entry, ByteBuffer numbers) {
        String dtype = entry.get("dtype").text();
        List<Integer> shape = entry.get("shape").list(length -> length.number(0));
        List<Integer> offsets = entry.get("data_offsets").list(offset -> offset.number(0));
        Integer width = WIDTHS.get(dtype);
        if (width == null) {
            throw entry.get("dtype").unlike("one of " + new TreeMap<>(WIDTHS).keySet());
        }
        double bytes = shape.stream().mapToDouble(Integer::doubleValue).reduce(width, (product, each) -> product * each);
        if (offsets.size() != 2 || offsets.get(1) > numbers.capacity() || offsets.get(1) - offsets.get(0) != bytes) {
            throw entry.get("data_offsets").unlike("the place of " + dtype + " " + shape + " in " + numbers.capacity() + " bytes");
        }
        return new Array(dtype, shape, numbers.slice(offsets.get(0), (int) bytes).order(ByteOrder.LITTLE_ENDIAN));
    }

    private static Golden of(Path path, Json golden, Map<String, Array> arrays) {
        List<Integer> windows = golden.get("windows").list(length -> length.number(1));
        if (windows.isEmpty()) {
            throw golden.get("windows").unlike("at least one window");
        }
        Json config = golden.get("config");
        String task = golden.get("task").text();
        Json perplexity = golden.get("perplexity");
        return new Golden(
                path,
                golden.get("checkpoint").text(),
                golden.get("checkpoint_sha256").text(),
                golden.get("adapter_sha256").unlessNull().map(Json::text).orElse(null),
                windows,
                golden.get("scales").list(Json::decimal),
                task.equals(TASK) ? perplexity.decimal() : Double.NaN,
                config.get("vocab_size").number(1),
                golden.get("stored").unlessNull().filter(each -> task.equals(TASK)).map(Stored::of).orElse(null),
                arrays);
    }

    /** Holds that the file is of the bundle's checkpoint, as far as the manifest knows that. */
    private void checkCheckpoint(Json golden, Manifest manifest) {
        Manifest.Decoding decoding = manifest.decoding();
        String task = golden.get("task").text();
        int layers = golden.get("config").get("num_hidden_layers").number(1);
        String what = !task.equals(TASK) ? "the task " + task + ", not " + TASK
                : vocabSize != decoding.vocabSize() ? "vocab_size " + vocabSize + ", not " + decoding.vocabSize()
                : layers != decoding.cache().numHiddenLayers()
                        ? "num_hidden_layers " + layers + ", not " + decoding.cache().numHiddenLayers()
                : null;
        if (what != null) {
            throw new GoldenException(path + ": is of the checkpoint " + checkpoint + " (SHA-256 " + checkpointSha256
                    + "), whose bundle has " + what + " as this one has; give the golden file of this bundle's checkpoint");
        }
    }

    /** Holds each array against the sizes that the header tells. */
    private void checkArrays(int layers) {
        int tokens = windows.stream().mapToInt(each -> each).sum();
        int top = Math.min(TOP, vocabSize);
        int sampled = Math.min(SAMPLED, vocabSize);
        expect("token_ids", "I32", tokens);
        expect("routing", "I16", layers, tokens, 2);
        expect("top_ids", "I32", tokens, top);
        for (String kind : stored == null ? List.of("") : List.of("", "stored_")) {
            expect(kind + "top_logits", "F32", tokens, top);
            expect(kind + "sampled_logits", "F32", tokens, sampled);
            expect(kind + "logsumexp", "F64", tokens);
            checkScales(kind.isEmpty() ? scales : stored.scales());
        }
        if (!(perplexity > 0)) {
            throw damaged(path, "perplexity is " + perplexity + ", expected a positive number");
        }
        if (stored != null) {
            expect("stored_best", "I32", tokens);
        }
        expect("greedy", "I32", array("greedy").shape().stream().limit(1).mapToInt(each -> each).toArray());
        for (String name : List.of("token_ids", "top_ids", "greedy", "stored_best")) {
            if ((stored != null || !name.equals("stored_best"))
                    && array(name).integers().stream().anyMatch(id -> id < 0 || id >= vocabSize)) {
                throw damaged(path, name + " holds ids outside the vocabulary of " + vocabSize);
            }
        }
    }

    private void expect(String name, String dtype, int... shape) {
        List<Integer> lengths = Arrays.stream(shape).boxed().toList();
        Array array = array(name);
        if (!array.dtype().equals(dtype) || !array.shape().equals(lengths)) {
            throw damaged(path, name + " is " + array.dtype() + " " + array.shape() + ", expected " + dtype + " " + lengths);
        }
    }

    private void checkScales(List<Double> given) {
        if (given.size() != windows.size() || given.stream().anyMatch(scale -> scale <= 0)) {
            String what = "scales are " + given.stream().limit(4).toList();
            throw damaged(path, what + ", expected " + windows.size() + " positive numbers");
        }
    }

    /** An array by its name. */
    Array array(String name) {
        if (!arrays.containsKey(name)) {
            throw damaged(path, name + " is missing");
        }
        return arrays.get(name);
    }
}
