package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** Changed tokenizers: the ids and texts of the library tokenizers 0.22, which ../csharp/tests wrote down, or an error. */
class TokenizerMutationTest {
    private static final JsonObject RECORDED = Conformance.read(Path.of("../csharp/tests/PhiMoE.Onnx.Tests/tokenizers.json"));
    private static final List<String> TEXTS = Conformance.strings(RECORDED.get("texts"));
    @TempDir
    private Path folder;

    @Test
    void aChangedOneGivesTheLibrarysIdsOrAnError() throws IOException {
        List<String> wrong = new ArrayList<>();
        int read = 0;
        for (JsonElement each : RECORDED.getAsJsonArray("mutants")) {
            JsonObject mutant = each.getAsJsonObject();
            JsonElement expected = mutant.has("results") ? mutant.get("results") : RECORDED.get("results");
            JsonObject tokenizer = RECORDED.getAsJsonObject("tokenizer").deepCopy();
            mutant.getAsJsonArray("steps").forEach(step -> change(tokenizer, step.getAsJsonArray()));
            try {
                JsonElement found = results(tokenizer);
                read++;
                if (!found.equals(expected)) {
                    wrong.add(mutant.get("steps") + "\n  " + found + "\n  " + expected);
                }
            } catch (BundleException error) {
                assertTrue(error.getMessage().contains("tokenizer.json"), error.getMessage());
            } catch (RuntimeException error) {
                wrong.add(mutant.get("steps") + ": " + error);
            }
        }
        assertEquals(List.of(), wrong);
        assertTrue(read > 200, read + " were read"); // the others are refused
    }

    private static void change(JsonElement tokenizer, JsonArray step) {
        JsonArray path = step.get(1).getAsJsonArray();
        JsonElement parent = tokenizer;
        for (JsonElement key : path.asList().subList(0, path.size() - 1)) {
            parent = parent instanceof JsonArray array ? array.get(key.getAsInt()) : parent.getAsJsonObject().get(key.getAsString());
        }
        JsonElement last = path.get(path.size() - 1);
        boolean removes = step.get(0).getAsString().equals("remove");
        if (parent instanceof JsonArray array) {
            if (removes) {
                array.remove(last.getAsInt());
            } else {
                array.set(last.getAsInt(), step.get(2));
            }
        } else if (removes) {
            parent.getAsJsonObject().remove(last.getAsString());
        } else {
            parent.getAsJsonObject().add(last.getAsString(), step.get(2));
        }
    }

    /** Each text's ids without and with the template, and the text of the former. */
    private JsonElement results(JsonObject json) throws IOException {
        Path file = folder.resolve("tokenizer.json");
        Files.writeString(file, json.toString());
        JsonArray results = new JsonArray();
        results.add(new JsonArray());
        results.add(new JsonArray());
        results.add(new JsonArray());
        try (Tokenizer tokenizer = new Tokenizer(file, Set.of(), false)) {
            for (String text : TEXTS) {
                List<Integer> plain = tokenizer.encode(text, false);
                results.get(0).getAsJsonArray().add(array(plain));
                results.get(1).getAsJsonArray().add(array(tokenizer.encode(text, true)));
                results.get(2).getAsJsonArray().add(tokenizer.decode(plain));
            }
        }
        return results;
    }

    private static JsonArray array(List<Integer> ids) {
        JsonArray array = new JsonArray();
        ids.forEach(array::add);
        return array;
    }
}
