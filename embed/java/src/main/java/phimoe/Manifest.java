package phimoe;

import ai.onnxruntime.OnnxJavaType;
import com.google.gson.FieldNamingPolicy;
import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonParseException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.DigestInputStream;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import java.util.stream.IntStream;
import java.util.stream.Stream;

/** manifest.json; spec/embedding.md says what each key means. */
record Manifest(
        int formatVersion, String task, String target, List<Graph> graphs, Decoding decoding, Map<String, Entry> files, Chat chat) {
    record Graph(String file, String minimumOnnxruntime, List<String> optionalInputs) {}

    record Decoding(
            int vocabSize,
            int context,
            Integer ropeBoundary,
            int prefillChunk,
            Set<Integer> eosTokenIds,
            Map<String, Integer> hiddenTokens,
            CacheShape cache) {}

    record CacheShape(int numHiddenLayers, int numKeyValueHeads, int headDim, String dtype, boolean shared) {
        OnnxJavaType type() {
            return DTYPES.get(String.valueOf(dtype));
        }
    }

    record Entry(long size, String sha256) {}

    record Chat(Map<String, List<String>> turns, String generation, Set<String> skippedWhenEmpty) {}

    private static final int FORMAT_VERSION = 1;
    private static final long HASH_LIMIT = 256 << 20; // bytes; reading 20 GB takes longer than loading them
    private static final Map<String, OnnxJavaType> DTYPES = Map.of(
            "float32", OnnxJavaType.FLOAT, "float16", OnnxJavaType.FLOAT16, "int8", OnnxJavaType.INT8, "uint8", OnnxJavaType.UINT8);
    private static final Gson GSON = new GsonBuilder().setFieldNamingPolicy(FieldNamingPolicy.LOWER_CASE_WITH_UNDERSCORES).create();

    /** Reads a bundle's manifest and holds every file against it. */
    static Manifest read(Path bundle) {
        Path path = bundle.resolve("manifest.json");
        Manifest manifest;
        try {
            manifest = GSON.fromJson(Files.readString(path), Manifest.class);
        } catch (IOException | JsonParseException error) {
            throw new BundleException("not a bundle of phimoe-export: " + path + " cannot be read (" + error + ")", error);
        }
        if (manifest == null || manifest.formatVersion != FORMAT_VERSION) {
            String found = manifest == null ? "missing" : String.valueOf(manifest.formatVersion);
            throw new BundleException(path + ": format_version is " + found + ", this release reads " + FORMAT_VERSION + "; upgrade phimoe");
        }
        if (!"text-generation".equals(manifest.task)) {
            throw new BundleException(bundle + ": is a bundle for " + manifest.task + ", expected one for text-generation");
        }
        if (!manifest.complete()) {
            throw new BundleException(path + ": is damaged, its decoding section or file list has gaps; export the bundle again");
        }
        manifest.files.forEach((name, entry) -> check(bundle.resolve(name), entry));
        return manifest;
    }

    private boolean complete() {
        if (Stream.of(target, graphs, files, decoding).anyMatch(part -> part == null) || decoding.cache == null) {
            return false;
        }
        CacheShape cache = decoding.cache;
        return Stream.of(decoding.eosTokenIds, decoding.hiddenTokens, cache.type()).allMatch(part -> part != null)
                && IntStream.of(decoding.vocabSize, decoding.context, decoding.prefillChunk, cache.numHiddenLayers,
                        cache.numKeyValueHeads, cache.headDim).allMatch(count -> count > 0);
    }

    private static void check(Path path, Entry expected) {
        try {
            if (!Files.isRegularFile(path)) {
                throw new BundleException(path + ": is missing; the bundle is incomplete, copy or export it again");
            }
            long size = Files.size(path);
            if (size != expected.size) {
                throw new BundleException(
                        path + ": has " + size + " bytes, the manifest says " + expected.size + "; copy or export the bundle again");
            }
            if (size <= HASH_LIMIT && !sha256(path).equals(expected.sha256)) {
                throw new BundleException(
                        path + ": its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again");
            }
        } catch (IOException error) {
            throw new BundleException(path + ": cannot be read (" + error + ")", error);
        }
    }

    private static String sha256(Path path) throws IOException {
        try (InputStream file = Files.newInputStream(path)) {
            DigestInputStream digest = new DigestInputStream(file, MessageDigest.getInstance("SHA-256"));
            byte[] block = new byte[1 << 20];
            while (digest.read(block) >= 0) {}
            return HexFormat.of().formatHex(digest.getMessageDigest().digest());
        } catch (NoSuchAlgorithmException error) {
            throw new AssertionError("every Java has SHA-256", error);
        }
    }

    /** The first graph that ONNX Runtime `installed` loads from Java, where it takes no values for optional inputs. */
    Graph chooseGraph(String installed) {
        List<Graph> usable = graphs.stream().filter(graph -> graph.optionalInputs.isEmpty()).toList();
        if (usable.isEmpty()) {
            throw new DeviceException("the bundle, exported for " + target + ", has no graph for Java; export it with --target cpu");
        }
        return usable.stream().filter(graph -> Arrays.compare(release(graph.minimumOnnxruntime), release(installed)) <= 0).findFirst()
                .orElseThrow(() -> new DeviceException("the bundle needs ONNX Runtime " + usable.get(0).minimumOnnxruntime
                        + " or newer, installed is " + installed));
    }

    private static int[] release(String version) {
        return Pattern.compile("\\d+").matcher(version).results().limit(3).map(MatchResult::group).mapToInt(Integer::parseInt).toArray();
    }
}
