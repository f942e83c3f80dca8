package phimoe;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import com.google.gson.Strictness;
import com.google.gson.stream.JsonReader;
import com.google.gson.stream.JsonToken;
import java.io.IOException;
import java.io.Reader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.function.Function;
import java.util.regex.Pattern;

/**
 * A value of a JSON file that nobody has checked yet, and its place there. What is asked of it and does not hold is an
 * error that names file and place; keys that nobody asks for are ignored.
 *
 * @param damaged the error that the file is damaged in the way that it is given
 */
record Json(Path file, String place, JsonElement value, Function<String, PhiMoEException> damaged) {
    private static final long LARGEST = Integer.MAX_VALUE;
    private static final long LARGEST_SIZE = 1L << 53; // what a double, JSON's number in other languages, holds exactly
    private static final int SHOWN = 60; // characters of a value in an error
    // possessive: Java's matcher would take a stack frame for every repetition
    private static final Pattern RELEASE = Pattern.compile("[0-9]{1,9}+(?:\\.[0-9]{1,9}+)*+");
    private static final Pattern SHA256 = Pattern.compile("[0-9a-f]{64}");
    private static final Pattern FILE_NAME = Pattern.compile("(?!\\.{1,2}\\z)[^/\\\\:\\x00\\p{Cs}]++");

    /** The object that a file holds; throws BundleException where it holds none. */
    static Json read(Path file) {
        if (!Files.isRegularFile(file)) { // a pipe would be waited for, a device has no end
            String what = Files.exists(file) ? " is no regular file" : " is missing";
            throw new BundleException("not a bundle of phimoe-export: " + file + what);
        }
        try (Reader text = Files.newBufferedReader(file)) {
            Function<String, PhiMoEException> damaged = what -> new BundleException(
                    file + ": is damaged (" + what + "); copy or export the bundle again");
            return parse(file, text, damaged).orElseThrow(
                    () -> new BundleException("not a bundle of phimoe-export: " + file + " is not a JSON object"));
        } catch (IOException | JsonParseException error) {
            throw new BundleException(
                    "not a bundle of phimoe-export: " + file + " cannot be read (" + error + ")", error);
        }
    }

    /** The object that is all of a text from a file, if it is one; throws JsonParseException where it is no JSON. */
    static Optional<Json> parse(Path file, Reader text, Function<String, PhiMoEException> damaged) throws IOException {
        JsonReader reader = new JsonReader(text);
        reader.setStrictness(Strictness.STRICT);
        JsonElement value = JsonParser.parseReader(reader);
        boolean whole = reader.peek() == JsonToken.END_DOCUMENT && value.isJsonObject();
        return whole ? Optional.of(new Json(file, "", value, damaged)) : Optional.empty();
    }

    /** The value of a key of this object. */
    Json get(String key) {
        return find(key).orElseThrow(() -> damaged.apply(inside(key) + " is missing"));
    }

    /** The value of a key of this object, if it is there. */
    Optional<Json> find(String key) {
        JsonElement inner = object().get(key);
        return inner == null ? Optional.empty() : Optional.of(new Json(file, inside(key), inner, damaged));
    }

    /** This value, if it is not null. */
    Optional<Json> unlessNull() {
        return value.isJsonNull() ? Optional.empty() : Optional.of(this);
    }

    /** A number from `least` to 2147483647. */
    int number(int least) {
        return (int) number(least, LARGEST);
    }

    /** A finite number. */
    double decimal() {
        if (value instanceof JsonPrimitive primitive && primitive.isNumber() && Double.isFinite(primitive.getAsDouble())) {
            return primitive.getAsDouble();
        }
        throw unlike("a finite number");
    }

    /** A number of bytes. */
    long size() {
        return number(0, LARGEST_SIZE);
    }

    String text() {
        if (value instanceof JsonPrimitive primitive && primitive.isString()) {
            return primitive.getAsString();
        }
        throw unlike("a string");
    }

    boolean flag() {
        if (value instanceof JsonPrimitive primitive && primitive.isBoolean()) {
            return primitive.getAsBoolean();
        }
        throw unlike("true or false");
    }

    /** Numbers with dots between. */
    String release() {
        return matching(RELEASE, "a release such as \"1.31\"");
    }

    String sha256() {
        return matching(SHA256, "64 digits from 0 to f");
    }

    /** The name of a file in the bundle's folder. */
    String fileName() {
        return matching(FILE_NAME, "a plain file name");
    }

    /** This array, each of its values by `item`. */
    <T> List<T> list(Function<Json, T> item) {
        if (!(value instanceof JsonArray array)) {
            throw unlike("an array");
        }
        List<T> items = new ArrayList<>();
        for (JsonElement each : array) {
            items.add(item.apply(new Json(file, place + "[" + items.size() + "]", each, damaged)));
        }
        return List.copyOf(items);
    }

    /** This object, each of its values by `item`, in the file's order. */
    <T> Map<String, T> map(Function<Json, T> item) {
        Map<String, T> items = new LinkedHashMap<>();
        for (String key : object().keySet()) {
            items.put(key, item.apply(get(key)));
        }
        return items;
    }

    /** The keys of this object, each as a value. */
    List<Json> keys() {
        return object().keySet().stream()
                .map(key -> new Json(file, "a name of " + place, new JsonPrimitive(key), damaged)).toList();
    }

    /** The error that this value is not `expected`. */
    PhiMoEException unlike(String expected) {
        return damaged.apply(place + " is " + shown() + ", expected " + expected);
    }

    private JsonObject object() {
        if (value instanceof JsonObject object) {
            return object;
        }
        throw unlike("an object");
    }

    private String inside(String key) {
        return place.isEmpty() ? key : place + "." + shown(key);
    }

    private long number(long least, long most) {
        if (value instanceof JsonPrimitive primitive && primitive.isNumber()) {
            double number = primitive.getAsDouble(); // exact up to LARGEST_SIZE, and cheap for 1e999999999 too
            if (number >= least && number <= most && number == Math.rint(number)) {
                return (long) number;
            }
        }
        throw unlike("a whole number from " + least + " to " + most);
    }

    private String matching(Pattern pattern, String expected) {
        if (pattern.matcher(text()).matches()) {
            return text();
        }
        throw unlike(expected);
    }

    /** This value as text, its beginning where it is long. */
    String shown() {
        return shown(value.toString());
    }

    private static String shown(String text) {
        return text.length() <= SHOWN ? text : text.substring(0, SHOWN) + "...";
    }
}
