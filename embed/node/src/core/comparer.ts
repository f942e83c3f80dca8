import type { Golden } from "./golden.js";
import type { Comparison } from "./report.js";

/** Compares logits with those that a golden file keeps, token by token; the formulas are those of spec/golden.md. */
export class Comparer {
  private readonly ids: ArrayLike<number>;
  private readonly best: (token: number) => number;
  private readonly top: ArrayLike<number>;
  private readonly sampled: ArrayLike<number>;
  private readonly sums: ArrayLike<number>;
  private readonly isTop: Uint8Array;
  private tokens = 0;
  private same = 0;
  private difference = 0;
  private largest = 0;
  private kl = 0;

  /** `kind` is "" for the reference, "stored_" for PyTorch over stored weights. */
  constructor({ arrays, config }: Golden, kind: "" | "stored_") {
    this.ids = arrays.top_ids.numbers;
    this.top = arrays[`${kind}top_logits`].numbers;
    this.sampled = arrays[`${kind}sampled_logits`].numbers;
    this.sums = arrays[`${kind}logsumexp`].numbers;
    this.isTop = new Uint8Array(config.vocab_size);
    const count = this.ids.length / this.sums.length;
    this.best = kind ? (token) => arrays.stored_best.numbers[token] : (token) => this.ids[token * count];
  }

  /** Takes in the logits [V] after the next token of the file; `sum` is their logsumexp, `scale` the window's. */
  add(logits: Float32Array, sum: number, scale: number): void {
    const token = this.tokens++;
    const count = this.ids.length / this.sums.length;
    let [terms, kept, others] = [0, 0, 0];
    for (let index = token * count; index < (token + 1) * count; index++) {
      const id = this.ids[index];
      this.isTop[id] = 1;
      const logP = this.top[index] - this.sums[token];
      kept += Math.exp(logP);
      terms += Math.exp(logP) * (logP - logits[id] + sum);
      this.largest = Math.max(this.largest, Math.abs(logits[id] - this.top[index]) / scale);
    }
    for (let id = 0; id < logits.length; id++) if (!this.isTop[id]) others += Math.exp(logits[id] - sum);
    this.kl += terms + 1 - kept - others + this.addSampled(token, logits, sum, scale);
    this.isTop.fill(0);
    if (best(logits) === this.best(token)) this.same++;
  }

  /** The estimate of what is not among the top ones. */
  private addSampled(token: number, logits: Float32Array, sum: number, scale: number): number {
    const count = this.sampled.length / this.sums.length;
    let [terms, apart] = [0, 0];
    for (let place = 0; place < count; place++) {
      const id = (token + place * Math.floor(logits.length / count)) % logits.length;
      const expected = this.sampled[token * count + place];
      const difference = Math.abs(logits[id] - expected) / scale;
      apart += difference;
      this.largest = Math.max(this.largest, difference);
      if (this.isTop[id]) continue;
      const [logP, logQ] = [expected - this.sums[token], logits[id] - sum];
      terms += Math.exp(logP) * (logP - logQ - 1) + Math.exp(logQ);
    }
    this.difference += apart / count;
    return (terms * logits.length) / count;
  }

  /** Of all that was taken in. */
  result(): Comparison {
    const { tokens } = this;
    return {
      tokens,
      mean_difference: this.difference / tokens,
      max_difference: this.largest,
      kl: this.kl / tokens,
      top1_agreement: this.same / tokens,
    };
  }
}

/** The first of the largest logits. */
export function best(logits: Float32Array): number {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

/** The logarithm of the sum of the logits' exponentials. */
export function logSumExp(logits: Float32Array): number {
  const largest = logits[best(logits)];
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return largest + Math.log(sum);
}
