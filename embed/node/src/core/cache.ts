import { type CacheShape, type CacheType, cacheNames, type Decoding } from "./bundle.js";
import { GenerationError } from "./errors.js";
import type { Session, Value } from "./session.js";

const ARRAYS = {
  float32: Float32Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  int8: Int8Array,
  uint8: Uint8Array,
};

/**
 * The KV cache of a batch and one pass of the graph over it, in one fixed buffer [B, K, capacity, D] per layer and part
 * that is past and present at once; GroupQueryAttention writes in place.
 *
 * The kernel takes several new tokens over a past for one row only, so a prefill runs each row alone, on the slice of
 * the buffers that is the row's own memory; a step runs all rows together. decoder.ts says which tokens a row holds,
 * this only where the keys and values lie. B rows, S new tokens, P cached tokens, T = P + S, K num_key_value_heads, D
 * head_dim.
 */
export class SharedCache {
  private buffers: Value[];
  private step?: Value[];

  constructor(
    private readonly session: Session,
    private readonly decoding: Decoding,
    rows: number,
    capacity: number,
  ) {
    this.buffers = zeros(decoding.cache, rows, roundUp(capacity));
  }

  /**
   * Runs S new tokens of one row after its first `past` ones.
   *
   * @param past - how many cached tokens count; later ones are overwritten.
   * @param ropeLength - the length that chooses between longrope's factors, if it is more than P + S.
   * @param keep - for how many of the last tokens logits are wanted.
   * @returns their logits, float32 [keep, vocab_size].
   */
  async runRow(
    row: number,
    ids: readonly number[],
    past: number,
    ropeLength: number,
    keep = 1,
  ): Promise<Float32Array> {
    const slices = this.slices(row, 1);
    return (await pass(this.session, this.decoding, [ids], [past + ids.length], ropeLength, keep, slices, slices))[0];
  }

  /** Runs one new token of every row, after `lengths` cached ones each; returns float32 [vocab_size] a row. */
  runStep(ids: readonly number[], lengths: readonly number[]): Promise<Float32Array[]> {
    this.step ??= this.slices(0, ids.length);
    const [tokens, totals] = [ids.map((id) => [id]), lengths.map((length) => length + 1)];
    return pass(this.session, this.decoding, tokens, totals, 0, 1, this.step, this.step);
  }

  /** Forgets a row; the last row takes its number. */
  drop(row: number): void {
    for (const { dims, data } of this.buffers) {
      const size = dims[1] * dims[2] * dims[3];
      dims[0]--;
      data.copyWithin(row * size, dims[0] * size, (dims[0] + 1) * size);
    }
    this.step = undefined;
  }

  /** Makes room for `capacity` tokens a row, keeping what is cached. */
  reserve(capacity: number): void {
    if (capacity <= this.buffers[0].dims[2]) return;
    this.buffers = this.buffers.map((buffer) => resized(buffer, roundUp(capacity)));
    this.step = undefined;
  }

  /** Rows first .. first + rows of every buffer. */
  private slices(first: number, rows: number): Value[] {
    return this.buffers.map(({ type, dims: [, ...row], data }) => {
      const size = row[0] * row[1] * row[2];
      return { type, dims: [rows, ...row], data: data.subarray(first * size, (first + rows) * size) };
    });
  }
}

/**
 * As SharedCache, for graphs of standard operators: each row's own [1, K, P, D], which every pass replaces by [1, K, T,
 * D].
 */
export class GrowingCache {
  private readonly rows: Value[][];

  constructor(
    private readonly session: Session,
    private readonly decoding: Decoding,
    rows: number,
  ) {
    this.rows = Array.from({ length: rows }, () => zeros(decoding.cache, 1, 0));
  }

  /** As SharedCache.runRow. */
  async runRow(
    row: number,
    ids: readonly number[],
    past: number,
    ropeLength: number,
    keep = 1,
  ): Promise<Float32Array> {
    const cached = this.rows[row].map((value) => (value.dims[2] > past ? resized(value, past) : value));
    const total = past + ids.length;
    const present = zeros(this.decoding.cache, 1, total);
    const [logits] = await pass(this.session, this.decoding, [ids], [total], ropeLength, keep, cached, present);
    this.rows[row] = present;
    return logits;
  }

  /** As SharedCache.runStep, one row after the other. */
  async runStep(ids: readonly number[], lengths: readonly number[]): Promise<Float32Array[]> {
    const logits = [];
    for (const [row, id] of ids.entries()) logits.push(await this.runRow(row, [id], lengths[row], 0));
    return logits;
  }

  /** As SharedCache.drop. */
  drop(row: number): void {
    this.rows[row] = this.rows[this.rows.length - 1];
    this.rows.pop();
  }

  /** As SharedCache.reserve; there is nothing to do. */
  reserve(): void {}
}

/** A conversation grows by little; its buffers then grow now and then only. */
function roundUp(capacity: number): number {
  return Math.ceil(capacity / 256) * 256;
}

/** The cache's values [rows, K, length, D]; the pages of a long buffer cost no memory before they are written. */
function zeros(shape: CacheShape, rows: number, length: number): Value[] {
  const dims = [rows, shape.num_key_value_heads, length, shape.head_dim];
  return cacheNames(shape.num_hidden_layers, "").map(() => ({
    type: shape.dtype,
    dims: [...dims],
    data: array(shape.dtype, dims),
  }));
}

/** The value [rows, K, length, D] with another length, keeping what fits. */
function resized({ type, dims: [rows, heads, before, size], data }: Value, length: number): Value {
  const dims = [rows, heads, length, size];
  const result = array(type as CacheType, dims);
  const kept = Math.min(before, length) * size;
  for (let head = 0; head < rows * heads; head++) {
    result.set(data.subarray(head * before * size, head * before * size + kept) as typeof result, head * length * size);
  }
  return { type, dims, data: result };
}

/** @throws GenerationError: there is no room for it. */
function array(type: CacheType, dims: readonly number[]): InstanceType<(typeof ARRAYS)[CacheType]> {
  try {
    return new ARRAYS[type](dims.reduce((product, dim) => product * dim));
  } catch {
    throw new GenerationError(
      `a cache of ${type} [${dims}] finds no memory; give fewer prompts, shorter ones, or a smaller max_new_tokens`,
    );
  }
}

/**
 * One run of the graph: new `tokens` [B, S], each row's `totals` T, and its cache; the logits of the last `keep` tokens,
 * float32 [keep, V] a row.
 */
async function pass(
  session: Session,
  { vocab_size, cache }: Decoding,
  tokens: readonly (readonly number[])[],
  totals: readonly number[],
  ropeLength: number,
  keep: number,
  past: Value[],
  present: Value[],
): Promise<Float32Array[]> {
  const rows = tokens.length;
  const width = Math.max(...totals);
  const mask = int64([rows, width], []);
  for (const [row, total] of totals.entries()) (mask.data as BigInt64Array).fill(1n, row * width, row * width + total);
  const inputs: Record<string, Value> = {
    input_ids: int64([rows, tokens[0].length], tokens.flat()),
    attention_mask: mask,
    logits_to_keep: int64([1], [keep]),
    rope_length: int64([1], [ropeLength]),
  };
  const outputs: Record<string, Value> = {
    logits: { type: "float32", dims: [rows, keep, vocab_size], data: new Float32Array(rows * keep * vocab_size) },
  };
  for (const [index, name] of cacheNames(cache.num_hidden_layers, "past_key_values").entries())
    inputs[name] = past[index];
  for (const [index, name] of cacheNames(cache.num_hidden_layers, "present").entries()) outputs[name] = present[index];
  await session.run(inputs, outputs);
  const logits = outputs.logits.data as Float32Array;
  const size = keep * vocab_size;
  return tokens.map((_, row) => logits.subarray(row * size, (row + 1) * size));
}

function int64(dims: number[], numbers: readonly number[]): Value {
  const data = new BigInt64Array(dims.reduce((product, dim) => product * dim));
  for (const [place, number] of numbers.entries()) data[place] = BigInt(number);
  return { type: "int64", dims, data };
}
