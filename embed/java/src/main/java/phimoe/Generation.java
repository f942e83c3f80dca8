package phimoe;

import java.time.Duration;
import java.util.List;

/**
 * What one prompt led to.
 *
 * @param text the new text, without special tokens and without the stop string
 * @param tokenIds the new tokens, with the one that ended the text
 * @param finishReason why it ended
 * @param promptTokens the length of the prompt
 * @param firstToken the time from the call to the first token
 * @param total the time from the call to the last token
 */
public record Generation(
        String text, List<Integer> tokenIds, FinishReason finishReason, int promptTokens, Duration firstToken, Duration total) {}
