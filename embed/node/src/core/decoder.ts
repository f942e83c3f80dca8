import type { Decoding } from "./bundle.js";
import type { GrowingCache, SharedCache } from "./cache.js";

/**
 * What the rows of a batch hold in their caches, and how they go on: prefill one row, or step all rows by a token.
 *
 * A sequence that passes `rope_boundary` rotates every position by other factors, so its cached keys are then worth
 * nothing and the row is prefilled again: longrope's change of factors is handled here and nowhere above.
 */
export class Decoder {
  /** The tokens that each row has in its cache. */
  readonly tokens: number[][];
  /** Ends a prefill between two chunks, and a step before it. */
  signal?: AbortSignal;
  private readonly long: boolean[]; // whether the row's keys were rotated by the long factors

  constructor(
    private readonly cache: SharedCache | GrowingCache,
    private readonly decoding: Decoding,
    rows: number,
  ) {
    this.tokens = Array.from({ length: rows }, () => []);
    this.long = this.tokens.map(() => false);
  }

  /**
   * Makes the row hold `ids`, computing only what follows the prefix that it holds already.
   *
   * @param ropeLength - the length that chooses between longrope's factors.
   * @returns the logits after the last token, float32 [vocab_size], valid until the next pass.
   */
  async prefill(row: number, ids: readonly number[], ropeLength = ids.length): Promise<Float32Array> {
    const held = this.tokens[row];
    const long = this.isLong(ropeLength);
    let same = 0;
    if (this.long[row] === long) while (same < held.length && held[same] === ids[same]) same++;
    held.length = Math.min(same, ids.length - 1); // the last token always runs: its logits are wanted
    this.long[row] = long;
    let logits: Float32Array;
    do {
      this.signal?.throwIfAborted();
      const chunk = ids.slice(held.length, held.length + this.decoding.prefill_chunk);
      logits = await this.cache.runRow(row, chunk, held.length, ropeLength);
      for (const id of chunk) held.push(id);
    } while (held.length < ids.length);
    return logits;
  }

  /**
   * The logits after each of the tokens, in order, float32 [vocab_size] each, valid until the next pass; row 0 holds
   * the tokens then.
   */
  async *logits(ids: readonly number[]): AsyncGenerator<Float32Array, void, undefined> {
    const { vocab_size, prefill_chunk } = this.decoding;
    const held = (this.tokens[0] = [] as number[]);
    this.long[0] = this.isLong(ids.length);
    while (held.length < ids.length) {
      this.signal?.throwIfAborted();
      const chunk = ids.slice(held.length, held.length + prefill_chunk);
      const logits = await this.cache.runRow(0, chunk, held.length, ids.length, chunk.length);
      for (const place of chunk.keys()) yield logits.subarray(place * vocab_size, (place + 1) * vocab_size);
      held.push(...chunk);
    }
  }

  /**
   * Appends one token to every row; returns the logits after it, float32 [vocab_size] a row, valid until the next pass.
   */
  async step(ids: readonly number[]): Promise<Float32Array[]> {
    for (const [row, held] of this.tokens.entries()) {
      if (this.isLong(held.length + 1) !== this.long[row]) await this.prefill(row, [...held], held.length + 1);
    }
    this.signal?.throwIfAborted();
    const logits = await this.cache.runStep(
      ids,
      this.tokens.map((held) => held.length),
    );
    for (const [row, held] of this.tokens.entries()) held.push(ids[row]);
    return logits;
  }

  /** Forgets a row; the last row takes its number. */
  drop(row: number): void {
    this.cache.drop(row);
    for (const list of [this.tokens, this.long]) {
      list[row] = list[list.length - 1];
      list.pop();
    }
  }

  /** Makes room for `capacity` tokens in every row, keeping what is cached. */
  reserve(capacity: number): void {
    this.cache.reserve(capacity);
  }

  private isLong(length: number): boolean {
    const boundary = this.decoding.rope_boundary;
    return boundary !== null && length > boundary;
  }
}
