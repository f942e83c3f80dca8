package phimoe;

/**
 * One turn of a chat.
 *
 * @param role "user", "assistant" or, where the bundle's chat format has it, "system"
 * @param content what was said
 */
public record Message(String role, String content) {}
