import type { Manifest } from "./bundle.js";
import { best, Comparer, logSumExp } from "./comparer.js";
import type { Decoder } from "./decoder.js";
import { BundleError, GoldenError } from "./errors.js";
import { type Golden, SAMPLED, type Stored, TOP } from "./golden.js";
import { brief, type Check, type Report } from "./report.js";
import { type Limits, thresholds } from "./thresholds.js";
import type { Tokenizer } from "./tokenizer.js";

const PROMPT = 32; // tokens, of the greedy continuation
const MEASURES = ["mean_difference", "max_difference", "kl", "kernel_kl", "perplexity_ratio"];

/** How many tokens a cache must hold for a golden file; throws GoldenError where the bundle's context has fewer. */
export function longest({ path, windows, arrays }: Golden, { decoding }: Manifest): number {
  const length = windows.reduce(
    (most, each) => Math.max(most, each),
    Math.min(PROMPT, windows[0]) + arrays.greedy.numbers.length,
  );
  if (length <= decoding.context) return length;
  throw new GoldenError(
    `${path}: has texts of ${length} tokens, the bundle's context is ${decoding.context}; give the golden file of this ` +
      "bundle's checkpoint",
  );
}

/**
 * Holds a bundle against a golden file, as spec/golden.md says.
 *
 * @param decoder - of one row, with room for `longest`.
 * @param bundle - its name in the report.
 * @param progress - is told how many windows were run, of how many.
 * @throws BundleError: the manifest does not say how the weights are stored.
 */
export async function verifyGolden(
  decoder: Decoder,
  tokenizer: Tokenizer,
  manifest: Manifest,
  golden: Golden,
  bundle: string,
  progress: (done: number, total: number) => void,
): Promise<Report> {
  const limits = thresholds(manifest.dtypes, manifest.decoding.cache.dtype);
  if (!limits) {
    throw new BundleError(
      "manifest.json does not say how the weights are stored (weights, dtype), so there are no limits to hold the " +
        "figures against; export the bundle again",
    );
  }
  const stored = ofThisBundle(golden, manifest);
  const toReference = new Comparer(golden, "");
  const toStored = stored && new Comparer(golden, "stored_");
  const perplexity = await compare(decoder, golden, toReference, toStored, progress);
  const expected = Array.from(golden.arrays.greedy.numbers);
  const prompt = Array.from(golden.arrays.token_ids.numbers.subarray(0, Math.min(PROMPT, golden.windows[0])));
  const continuation = await continued(decoder, prompt, expected.length);
  const parting = continuation.findIndex((id, place) => id !== expected[place]);
  const [reference, kernels] = [toReference.result(), toStored?.result() ?? null];
  const measured: Record<string, number | undefined> = {
    ...reference,
    kernel_kl: kernels?.kl,
    perplexity_ratio: perplexity / golden.perplexity,
  };
  const checks = judge(measured, limits);
  const failures = checks
    .filter(({ passed }) => !passed)
    .map(({ name, measured, limit }) => `${name} is ${brief(measured)}, allowed is ${brief(limit)}`);
  return {
    bundle,
    reference: `${golden.checkpoint} in ${golden.path}`,
    tokens: reference.tokens,
    windows: golden.windows,
    bundle_to_reference: reference,
    bundle_to_stored: kernels,
    stored_to_reference: stored && stored.to_reference,
    routing_agreement: stored && stored.routing_agreement,
    perplexity: {
      reference: golden.perplexity,
      ...(stored && { stored: stored.perplexity }),
      bundle: perplexity,
    },
    greedy: {
      reference: tokenizer.decode(expected),
      bundle: tokenizer.decode(continuation),
      agreeing: parting < 0 ? continuation.length : parting,
      new_tokens: expected.length,
    },
    notes: notes(golden, limits, stored),
    checks,
    failures,
    passed: !failures.length,
  };
}

/** What the file knows of stored weights, if they are the bundle's. */
function ofThisBundle({ stored }: Golden, { files }: Manifest): Stored | null {
  const weights = Object.entries(files).filter(([name]) => name.endsWith(".data"));
  const same =
    stored &&
    Object.keys(stored.files).length === weights.length &&
    weights.every(([name, { sha256 }]) => Object.hasOwn(stored.files, name) && stored.files[name] === sha256);
  return same ? stored : null;
}

/** Runs the windows; returns the bundle's perplexity. */
async function compare(
  decoder: Decoder,
  { arrays, windows, scales, stored }: Golden,
  toReference: Comparer,
  toStored: Comparer | null,
  progress: (done: number, total: number) => void,
): Promise<number> {
  let [loss, first] = [0, 0];
  progress(0, windows.length);
  for (const [number, length] of windows.entries()) {
    const window = Array.from(arrays.token_ids.numbers.subarray(first, first + length));
    let place = 0;
    for await (const logits of decoder.logits(window)) {
      const sum = logSumExp(logits);
      toReference.add(logits, sum, scales[number]);
      toStored?.add(logits, sum, stored!.scales[number]);
      if (++place < length) loss += sum - logits[window[place]];
    }
    first += length;
    progress(number + 1, windows.length);
  }
  return Math.exp(loss / (first - windows.length));
}

/** The bundle's own most likely tokens after the prompt; none follows logits that are not finite. */
async function continued(decoder: Decoder, prompt: readonly number[], count: number): Promise<number[]> {
  const tokens: number[] = [];
  while (tokens.length < count) {
    const logits = tokens.length
      ? (await decoder.step([tokens[tokens.length - 1]]))[0]
      : await decoder.prefill(0, prompt);
    if (!Number.isFinite(logSumExp(logits))) break;
    tokens.push(best(logits));
  }
  return tokens;
}

function judge(measured: Record<string, number | undefined>, limits: Limits): Check[] {
  return MEASURES.flatMap((name) => {
    const [value, limit] = [measured[name], limits[name]];
    if (value === undefined || limit === undefined) return [];
    return [{ name, measured: value, limit, passed: value <= limit }];
  });
}

function notes(golden: Golden, limits: Limits, stored: Stored | null): string[] {
  const { vocab_size } = golden.config;
  const adapter = golden.adapter_sha256 === null ? "" : `, with an adapter of SHA-256 ${golden.adapter_sha256}`;
  const found = [
    `the checkpoint's SHA-256 is ${golden.checkpoint_sha256}${adapter}`,
    `the golden file keeps ${Math.min(TOP, vocab_size)} top and ${Math.min(SAMPLED, vocab_size)} other logits of ` +
      `${vocab_size} a token: KL and mean |d| are estimates, max |d| is a lower bound; perplexity and top-1 agreement ` +
      "are exact",
  ];
  if (!stored && limits.kernel_kl !== undefined)
    found.push("not checked: kernel_kl; the golden file was saved with a bundle of other stored weights");
  return found;
}
