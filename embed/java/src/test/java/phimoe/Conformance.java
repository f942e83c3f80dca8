package phimoe;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;

/** spec/cases.json and its bundle, and JSON values as this library's. */
final class Conformance {
    static final Path FOLDER = Path.of("../../spec");
    static final Path BUNDLE = FOLDER.resolve("bundle");
    private static final JsonObject ALL = read(FOLDER.resolve("cases.json"));

    private Conformance() {}

    static JsonObject read(Path path) {
        try {
            return JsonParser.parseString(Files.readString(path)).getAsJsonObject();
        } catch (IOException error) {
            throw new AssertionError(error);
        }
    }

    static Stream<JsonObject> section(String name) {
        return elements(ALL.get(name)).map(JsonElement::getAsJsonObject);
    }

    static Stream<JsonElement> elements(JsonElement array) {
        return StreamSupport.stream(array.getAsJsonArray().spliterator(), false);
    }

    static List<Integer> ints(JsonElement array) {
        return elements(array).map(JsonElement::getAsInt).toList();
    }

    static List<String> strings(JsonElement array) {
        return elements(array).map(JsonElement::getAsString).toList();
    }

    static List<Prompt> prompts(JsonObject test) {
        return test.has("batch") ? elements(test.get("batch")).map(Conformance::prompt).toList() : List.of(prompt(test.get("prompt")));
    }

    private static Prompt prompt(JsonElement value) {
        if (value.isJsonPrimitive()) {
            return new Prompt.Text(value.getAsString());
        }
        JsonArray items = value.getAsJsonArray();
        if (items.isEmpty() || items.get(0).isJsonPrimitive()) {
            return new Prompt.Tokens(ints(items));
        }
        return new Prompt.Chat(elements(items).map(JsonElement::getAsJsonObject)
                .map(message -> new Message(message.get("role").getAsString(), message.get("content").getAsString())).toList());
    }

    static Options options(JsonObject values) {
        Options options = Options.GREEDY;
        for (Map.Entry<String, JsonElement> entry : values.entrySet()) {
            JsonElement value = entry.getValue();
            options = switch (entry.getKey()) {
                case "max_new_tokens" -> options.maxNewTokens(value.getAsInt());
                case "temperature" -> options.temperature(value.getAsDouble());
                case "top_k" -> options.topK(value.getAsInt());
                case "top_p" -> options.topP(value.getAsDouble());
                case "min_p" -> options.minP(value.getAsDouble());
                case "repetition_penalty" -> options.repetitionPenalty(value.getAsDouble());
                case "seed" -> options.seed(value.getAsLong());
                case "stop" -> value.isJsonArray()
                        ? options.stop(strings(value).toArray(String[]::new))
                        : options.stop(value.getAsString());
                default -> throw new AssertionError(entry.getKey());
            };
        }
        return options;
    }
}
