/** Limits by name; phimoe_onnx/parity/thresholds.py says where the numbers come from. */
export type Limits = Record<string, number>;

const DEFAULTS: [bits: number, limits: Limits][] = [
  [32, { mean_difference: 1e-4, max_difference: 1e-3 }],
  [16, { kl: 1e-3, kernel_kl: 1e-6, perplexity_ratio: 1.001 }],
  [8, { kl: 1e-2, kernel_kl: 1e-2, perplexity_ratio: 1.005 }],
  [0, { kl: 1e-1, kernel_kl: 1e-2, perplexity_ratio: 1.05 }],
];

// what a cache of integers may add
const CACHES: Record<string, Limits> = {
  int8: { kl: 1e-2, kernel_kl: 1e-3, perplexity_ratio: 5e-3 },
  uint8: { kl: 2e-1, kernel_kl: 3e-2, perplexity_ratio: 5e-2 },
};

/** What a figure is counted in. */
export const UNITS: Record<string, string> = {
  mean_difference: "std",
  max_difference: "std",
  kl: "nats",
  kernel_kl: "nats",
  perplexity_ratio: "ratio",
};

/**
 * The most that the figures may be of a bundle with matrices and activations of these dtypes, and a cache of that one;
 * undefined where a dtype is none, or there are none.
 */
export function thresholds(dtypes: readonly string[], cache: string): Limits | undefined {
  const bits = Math.min(...dtypes.map((dtype) => Number(/^[a-z]+(\d{1,2})$/.exec(dtype)?.[1] ?? NaN)));
  if (!Number.isFinite(bits)) return undefined;
  const [, known] = DEFAULTS.find(([least]) => least <= bits)!;
  const added = CACHES[cache];
  if (!added) return known;
  const before = (name: string) => known[name] ?? (name === "perplexity_ratio" ? 1 : 0);
  return Object.fromEntries(Object.entries(added).map(([name, more]) => [name, before(name) + more]));
}
