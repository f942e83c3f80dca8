package phimoe;

import java.util.Collection;
import java.util.HashSet;
import java.util.List;
import java.util.stream.Stream;

/**
 * Whether a tokenizer.json is one that the native library reads the same each time and survives: where its tokenizers 0.21
 * panics, the whole process ends.
 */
final class TokenizerFile {
    private TokenizerFile() {}

    /**
     * Holds the parts of a file against what is known to panic, and its ids against having two texts.
     *
     * @throws BundleException there is such a part or id
     */
    static void check(Json file) {
        Json model = file.get("model");
        model.find("continuing_subword_prefix").flatMap(Json::unlessNull).ifPresent(TokenizerFile::checkEmpty);
        Json vocabulary = model.get("vocab");
        Collection<Integer> ids = vocabulary.map(id -> id.number(0)).values();
        if (new HashSet<>(ids).size() < ids.size()) {
            throw vocabulary.unlike("another id for each token");
        }
        parts(file, "normalizer").forEach(part -> {
            if (part.get("type").text().equals("Precompiled")) {
                throw part.get("type").unlike("another normalizer");
            }
        });
        parts(file, "post_processor").filter(part -> part.get("type").text().equals("TemplateProcessing"))
                .forEach(TokenizerFile::checkTemplate);
        parts(file, "decoder").filter(part -> part.get("type").text().equals("Strip"))
                .map(part -> part.get("stop")).forEach(TokenizerFile::checkZero);
    }

    /** A part of the file, or all those inside where it is a sequence. */
    private static Stream<Json> parts(Json file, String name) {
        return file.find(name).flatMap(Json::unlessNull).stream().flatMap(part -> flat(part, name));
    }

    private static Stream<Json> flat(Json part, String name) {
        if (!part.get("type").text().equals("Sequence")) {
            return Stream.of(part);
        }
        String inner = name.equals("post_processor") ? "processors" : name + "s";
        return part.get(inner).list(each -> each).stream().flatMap(each -> flat(each, name));
    }

    private static void checkEmpty(Json text) {
        if (!text.text().isEmpty()) {
            throw text.unlike("none");
        }
    }

    private static void checkZero(Json number) {
        if (!number.value().toString().equals("0")) {
            throw number.unlike("0");
        }
    }

    /** The special tokens that a template puts around a text are defined. */
    private static void checkTemplate(Json template) {
        for (String name : List.of("single", "pair")) {
            for (Json piece : template.get(name).list(each -> each)) {
                piece.find("SpecialToken").ifPresent(token -> template.get("special_tokens").get(token.get("id").text()));
            }
        }
    }
}
