package phimoe;

import java.util.List;

/** What is to be continued: a text, a chat that asks for the assistant's next answer, or token ids. */
public sealed interface Prompt {
    /**
     * A text.
     *
     * @param text at least one character
     */
    record Text(String text) implements Prompt {}

    /**
     * A chat.
     *
     * @param messages its turns, the last one usually the user's
     */
    record Chat(List<Message> messages) implements Prompt {}

    /**
     * Token ids.
     *
     * @param tokenIds each from 0 to the vocabulary's size - 1
     */
    record Tokens(List<Integer> tokenIds) implements Prompt {}
}
