package phimoe;

import java.util.List;
import java.util.Map;

/**
 * A chat template as plain strings: a turn is prefix + content + suffix, and `generation` opens the answer.
 *
 * @param turns a role's prefix and suffix
 * @param skippedWhenEmpty the roles that have no turn where the content is empty
 */
record ChatFormat(Map<String, List<String>> turns, String generation, List<String> skippedWhenEmpty) {
    static ChatFormat of(Json chat) {
        return new ChatFormat(
                chat.get("turns").map(ChatFormat::turn),
                chat.get("generation").text(),
                chat.find("skipped_when_empty").map(roles -> roles.list(Json::text)).orElse(List.of()));
    }

    private static List<String> turn(Json value) {
        List<String> turn = value.list(Json::text);
        if (turn.size() != 2) {
            throw value.unlike("two strings");
        }
        return turn;
    }

    /** The chat as a text; `name` is the prompt's name in errors. */
    String render(String name, List<Message> messages) {
        StringBuilder text = new StringBuilder();
        for (Message message : messages) {
            if (message == null || message.role() == null || message.content() == null) {
                String what = message == null ? "a message" : message.role() == null ? "a message's role" : "a message's content";
                throw new GenerationException(name + ": " + what + " is null; give each message a role and a content");
            }
            List<String> turn = turns.get(message.role());
            if (turn == null) {
                throw new GenerationException(
                        name + " has a message of the role " + message.role() + ", expected one of " + turns.keySet());
            }
            if (!message.content().isEmpty() || !skippedWhenEmpty.contains(message.role())) {
                text.append(turn.get(0)).append(message.content()).append(turn.get(1));
            }
        }
        return text.append(generation).toString();
    }
}
