import { GenerationError } from "./errors.js";

/** How the next token is chosen; spec/sampling.md of the repository says the same without code. */
export interface Sampling {
  /** Divides the logits; 0 takes the most likely token. */
  temperature: number;
  /** Keeps the k most likely tokens; 0 keeps all. */
  top_k: number;
  /** Keeps the fewest most likely tokens whose probabilities reach top_p (nucleus sampling, arXiv 1904.09751). */
  top_p: number;
  /** Keeps tokens at least min_p times as likely as the most likely one (arXiv 2407.01082). */
  min_p: number;
  /**
   * Divides the positive logits of seen tokens and multiplies the others (CTRL, arXiv 1909.05858); 1 changes nothing.
   */
  repetition_penalty: number;
  /** Of the draw, taken modulo 2^64. */
  seed: bigint;
}

/**
 * The next token.
 *
 * @param logits - float32 [vocab_size]; seen tokens' logits are penalised in place.
 * @param sampling - how to choose.
 * @param step - how many tokens were generated before this one; with the seed it fixes the random number.
 * @param seen - the distinct tokens of the prompt and of what was generated, for the repetition penalty.
 * @throws GenerationError: the logits are not finite, so the graph computed nonsense.
 */
export function sample(logits: Float32Array, sampling: Sampling, step: number, seen: Iterable<number> = []): number {
  const likeliest = argmax(logits);
  if (!Number.isFinite(logits[likeliest]))
    throw new GenerationError("the graph's logits are not finite; check the bundle with phimoe-verify");
  if (sampling.repetition_penalty === 1 && sampling.temperature === 0) return likeliest;
  const penalty = Math.fround(sampling.repetition_penalty);
  if (penalty !== 1) for (const id of seen) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return sampling.temperature === 0 ? argmax(logits) : draw(logits, sampling, uniform(sampling.seed, step));
}

/** The first of the largest numbers, or of the NaN. */
function argmax(logits: Float32Array): number {
  let best = 0;
  for (let id = 0; id < logits.length; id++) {
    if (logits[id] > logits[best]) best = id;
    else if (logits[id] !== logits[id]) return id;
  }
  return best;
}

/** The token at `u` in [0, 1) of the cumulative probabilities of the kept tokens, most likely first. */
function draw(logits: Float32Array, { temperature, top_k, top_p, min_p }: Sampling, u: number): number {
  const order = mostLikely(logits, top_k || logits.length);
  const cumulative = new Float64Array(order.length);
  const largest = logits[order[0]] / temperature;
  let total = 0;
  let kept = 0;
  for (const [place, id] of order.entries()) {
    const weight = Math.exp(logits[id] / temperature - largest);
    total += weight;
    cumulative[place] = total;
    if (weight >= min_p) kept = place + 1;
  }
  if (top_p < 1) kept = Math.min(kept, cumulative.findIndex((sum) => sum >= top_p * total) + 1);
  const chosen = cumulative.findIndex((sum) => sum > u * cumulative[kept - 1]);
  return order[chosen < 0 ? kept - 1 : Math.min(chosen, kept - 1)];
}

/** The ids of the `count` largest logits (all, if there are fewer), largest first, ties by lower id. */
export function mostLikely(logits: Float32Array, count: number): Uint32Array {
  // one integer a token, its logit's bits made to sort downwards above its id: much faster than a comparison function
  const keys = new BigUint64Array(logits.length);
  const halves = new Uint32Array(keys.buffer);
  const bits = new Uint32Array(Float32Array.from(logits, (logit) => logit + 0).buffer); // + 0 makes -0 equal to 0
  for (let id = 0; id < bits.length; id++) {
    halves[2 * id] = id;
    halves[2 * id + 1] = bits[id] >>> 31 ? bits[id] : bits[id] ^ 0x7fffffff;
  }
  keys.sort();
  return halves.filter((_, place) => place % 2 === 0).subarray(0, count);
}

/**
 * A number in [0, 1): the top 53 bits of the output number `step` (from 0) of SplitMix64 started at `seed`
 * (Steele, Lea and Flood, OOPSLA 2014).
 */
export function uniform(seed: bigint, step: number): number {
  const wrap = (value: bigint) => BigInt.asUintN(64, value);
  let z = wrap(seed + BigInt(step + 1) * 0x9e3779b97f4a7c15n);
  z = wrap((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = wrap((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  return Number((z ^ (z >> 31n)) >> 11n) / 2 ** 53;
}
