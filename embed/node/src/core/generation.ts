/** What one prompt led to. */
export interface Generation {
  /** The new text, without special tokens and without the stop string. */
  text: string;
  /** The new tokens, with the one that ended the text. */
  token_ids: number[];
  /** "eos" (an end token of the model), "stop" (a stop string) or "length" (max_new_tokens). */
  finish_reason: "eos" | "stop" | "length";
  /** The length of the prompt. */
  prompt_tokens: number;
  /** From the call to the row's first token. */
  first_token_seconds: number;
  /** From the call to the row's last token. */
  seconds: number;
  /** The speed after the first token; 0 where there is no second one. */
  tokens_per_second: number;
}

/** One new token of a stream. */
export interface Piece {
  /** Which prompt of the batch; 0 for a single one. */
  row: number;
  token_id: number;
  /** The text that became certain with it; empty while a character is incomplete or a stop string may have begun. */
  text: string;
  /** On the row's last piece, all of it; else null. */
  result: Generation | null;
}

/** The results of a stream, by row. */
export async function collect(pieces: AsyncIterable<Piece>): Promise<Generation[]> {
  const results: Generation[] = [];
  for await (const { row, result } of pieces) if (result) results[row] = result;
  return results;
}
