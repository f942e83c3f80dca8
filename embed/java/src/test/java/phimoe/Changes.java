package phimoe;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;

/** A copy of the conformance suite's bundle, and the changes to it that spec/embedding.md states. */
final class Changes {
    private final Path bundle;

    private Changes(Path bundle) {
        this.bundle = bundle;
    }

    /** A copy in a new folder inside `parent`, with changes that are done one after the other. */
    static Path copy(Path parent, JsonElement changes) {
        try {
            Path bundle = Files.createTempDirectory(parent, "bundle");
            try (Stream<Path> files = Files.list(Conformance.BUNDLE)) {
                for (Path file : files.toList()) {
                    Files.copy(file, bundle.resolve(file.getFileName()));
                }
            }
            apply(bundle, changes);
            return bundle;
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    /** Does changes one after the other. */
    static void apply(Path bundle, JsonElement changes) throws IOException {
        for (JsonElement change : changes.getAsJsonArray()) {
            new Changes(bundle).apply(change.getAsJsonArray());
        }
    }

    private void apply(JsonArray change) throws IOException {
        String target = change.get(1).getAsString(); // a file, or a place of the manifest
        switch (change.get(0).getAsString()) {
            case "delete" -> Files.delete(bundle.resolve(target));
            case "copy" -> Files.copy(bundle.resolve(target), bundle.resolve(change.get(2).getAsString()));
            case "replace" -> replace(bundle.resolve(target), change, false);
            case "replace all" -> replace(bundle.resolve(target), change, true);
            case "set" -> set(target, change.get(2));
            case "remove" -> set(target, null);
            case "list" -> list(target);
            default -> throw new AssertionError(change);
        }
    }

    private static void replace(Path file, JsonArray change, boolean all) throws IOException {
        String content = Files.readString(file, StandardCharsets.ISO_8859_1); // a character for each byte
        Matcher old = Pattern.compile(Pattern.quote(bytes(change.get(2)))).matcher(content);
        if (!old.find()) {
            throw new AssertionError(file + " does not hold " + change.get(2));
        }
        String value = Matcher.quoteReplacement(bytes(change.get(3)));
        Files.writeString(file, all ? old.replaceAll(value) : old.replaceFirst(value), StandardCharsets.ISO_8859_1);
    }

    private static String bytes(JsonElement text) {
        return new String(text.getAsString().getBytes(StandardCharsets.UTF_8), StandardCharsets.ISO_8859_1);
    }

    /** Sets a place, given as a JSON pointer, of the manifest; removes it where `value` is null. */
    private void set(String pointer, JsonElement value) throws IOException {
        JsonObject manifest = Conformance.read(bundle.resolve(Manifest.FILE));
        List<String> keys = Stream.of(pointer.substring(1).split("/", -1))
                .map(key -> key.replace("~1", "/").replace("~0", "~")).toList();
        JsonElement parent = manifest;
        for (String key : keys.subList(0, keys.size() - 1)) {
            parent = parent instanceof JsonArray array
                    ? array.get(Integer.parseInt(key)) : parent.getAsJsonObject().get(key);
        }
        String last = keys.get(keys.size() - 1);
        if (parent instanceof JsonObject object) {
            if (value == null && !object.has(last)) {
                throw new AssertionError("the manifest has no " + pointer);
            }
            object.remove(last);
            if (value != null) {
                object.add(last, value);
            }
        } else {
            change(parent.getAsJsonArray(), last, value);
        }
        Files.writeString(bundle.resolve(Manifest.FILE), manifest.toString());
    }

    private static void change(JsonArray array, String index, JsonElement value) {
        if (value == null) {
            array.remove(Integer.parseInt(index));
        } else if (index.equals("-") || Integer.parseInt(index) == array.size()) { // RFC 6901: what would come next
            array.add(value);
        } else {
            array.set(Integer.parseInt(index), value);
        }
    }

    private void list(String file) throws IOException {
        try {
            byte[] content = Files.readAllBytes(bundle.resolve(file));
            JsonObject entry = new JsonObject();
            entry.add("size", new JsonPrimitive(content.length));
            byte[] hash = MessageDigest.getInstance("SHA-256").digest(content);
            entry.add("sha256", new JsonPrimitive(HexFormat.of().formatHex(hash)));
            set("/files/" + file.replace("~", "~0").replace("/", "~1"), entry);
        } catch (NoSuchAlgorithmException error) {
            throw new AssertionError(error);
        }
    }
}
