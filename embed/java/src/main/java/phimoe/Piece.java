package phimoe;

import java.util.Optional;

/**
 * One new token of a stream.
 *
 * @param row which prompt of the batch; 0 for a single one
 * @param tokenId the token
 * @param text the text that became certain with it; empty while a character is incomplete or a stop string may have begun
 * @param result on the row's last piece, all of it
 */
public record Piece(int row, int tokenId, String text, Optional<Generation> result) {}
