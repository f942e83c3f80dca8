import type { Manifest } from "./bundle.js";
import { GoldenError } from "./errors.js";
import type { Comparison } from "./report.js";
import { finite, integer, list, Mismatch, mismatch, nullable, object, type Reader, record, string } from "./schema.js";

/** What writes golden files. */
export const SAVE_GOLDEN = "phimoe-verify --save-golden";
/** How many logits are kept of each token: the largest ones. */
export const TOP = 64;
/** And so many that are spread over the vocabulary. */
export const SAMPLED = 32;

const FORMAT_VERSION = 1;
const TASK = "text-generation";
const MARK = '{"__metadata__":{"written_by":"phimoe-verify"';
/** Bytes, in which it shows whether a file is a golden file. */
export const GOLDEN_BEGINNING = 8 + MARK.length;
const ARRAYS = { F64: Float64Array, F32: Float32Array, I32: Int32Array, I16: Int16Array };
const LARGEST = 2 ** 31 - 1;

type Numbers = InstanceType<(typeof ARRAYS)[keyof typeof ARRAYS]>;
interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: number[];
}

/** What is known of PyTorch over the weights that one bundle stores; `files` are their names and SHA-256. */
export interface Stored {
  files: Record<string, string>;
  scales: number[];
  perplexity: number;
  routing_agreement: number;
  to_reference: Comparison;
}

/** A golden file; docs/golden.md of the repository says what each part means. */
export interface Golden {
  path: string;
  task: string;
  checkpoint: string;
  checkpoint_sha256: string;
  adapter_sha256: string | null;
  config: { vocab_size: number; num_hidden_layers: number };
  /** How many tokens each window has. */
  windows: number[];
  /** Of each window. */
  scales: number[];
  perplexity: number;
  stored: Stored | null;
  /** By name. */
  arrays: Record<string, { entry: Entry; numbers: Numbers }>;
}

const count = integer(1, LARGEST);
const readHeader = object<Omit<Golden, "path" | "arrays">>({
  task: string(),
  checkpoint: string(),
  checkpoint_sha256: string(),
  adapter_sha256: nullable(string()),
  config: object<Golden["config"]>({ vocab_size: count, num_hidden_layers: count }),
  windows: list(count, 1),
  scales: list(finite),
  perplexity: finite,
  stored: nullable(
    object<Stored>({
      files: record(string()),
      scales: list(finite),
      perplexity: finite,
      routing_agreement: finite,
      to_reference: object<Comparison>({
        tokens: count,
        mean_difference: finite,
        max_difference: finite,
        kl: finite,
        top1_agreement: finite,
      }),
    }),
  ),
});
const readEntry = object<Entry>({
  dtype: string(Object.keys(ARRAYS).join(", "), (name) => Object.hasOwn(ARRAYS, name)),
  shape: list(integer(0, LARGEST)),
  data_offsets: list(integer(0, LARGEST), 2),
});
const readMetadata = object<{ golden: string; sha256: string }>({ golden: string(), sha256: string() });

/** Throws GoldenError where the first bytes of a file are not those of a golden file. */
export function checkBeginning(bytes: Uint8Array, path: string): void {
  const text = new TextDecoder("latin1").decode(bytes.subarray(0, GOLDEN_BEGINNING));
  if (text.startsWith("version https://git-lfs")) {
    throw new GoldenError(`${path}: is a Git LFS pointer, not the file itself; run \`git lfs pull\` in that folder`);
  }
  if (!text.startsWith(MARK, 8)) throw new GoldenError(`${path}: is no golden file; ${SAVE_GOLDEN} writes one`);
}

/**
 * Reads a golden file's bytes for a bundle.
 *
 * @param path - its name in errors.
 * @throws GoldenError: it is damaged, of a newer format, no golden file, or another checkpoint's.
 */
export async function readGolden(bytes: Uint8Array, path: string, manifest: Manifest): Promise<Golden> {
  checkBeginning(bytes, path);
  try {
    const golden = await parse(bytes, path);
    checkCheckpoint(golden, manifest);
    return golden;
  } catch (error) {
    if (!(error instanceof Mismatch || error instanceof SyntaxError)) throw error;
    throw new GoldenError(`${path}: is damaged (${error.message}); save it again with ${SAVE_GOLDEN}`);
  }
}

async function parse(bytes: Uint8Array, path: string): Promise<Golden> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = 8 + Number(view.getBigUint64(0, true));
  if (end > bytes.length) throw new Mismatch(`its header ends at ${end} of ${bytes.length} bytes`);
  const header = readObject(new TextDecoder().decode(bytes.subarray(8, end)));
  const { __metadata__, ...entries } = header;
  const { golden: text, sha256 } = readMetadata(__metadata__, "__metadata__");
  const raw = readObject(text);
  if (raw.format_version !== FORMAT_VERSION) {
    const found = JSON.stringify(raw.format_version)?.slice(0, 80);
    throw new GoldenError(
      `${path}: format_version is ${found}, this release reads ${FORMAT_VERSION}; upgrade phimoe-onnx`,
    );
  }
  const numbers = bytes.subarray(end);
  if ((await digest(new TextEncoder().encode(text), numbers)) !== sha256)
    throw new Mismatch("its SHA-256 is not the one that it says");
  const generates = raw.task === TASK; // others have other figures, and are refused in the end
  const golden: Golden = {
    ...readHeader(generates ? raw : { ...raw, perplexity: 0, stored: null }, ""),
    path,
    arrays: record((value, key) => array(readEntry(value, key), key, numbers))(entries, "header"),
  };
  if (generates) checkArrays(golden);
  return golden;
}

function readObject(text: string): Record<string, unknown> {
  const any: Reader<unknown> = (value) => value;
  return record(any)(JSON.parse(text), "its header");
}

async function digest(...parts: Uint8Array[]): Promise<string> {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let start = 0;
  for (const part of parts) {
    whole.set(part, start);
    start += part.length;
  }
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", whole));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function array(entry: Entry, key: string, numbers: Uint8Array): Golden["arrays"][string] {
  const Kind = ARRAYS[entry.dtype as keyof typeof ARRAYS];
  const [first, last] = entry.data_offsets;
  const size = entry.shape.reduce((product, length) => product * length, Kind.BYTES_PER_ELEMENT);
  if (last - first !== size || last > numbers.length)
    throw new Mismatch(`${key} has bytes ${first} to ${last} of ${numbers.length}, for ${shape(entry)}`);
  return { entry, numbers: new Kind(numbers.slice(first, last).buffer) }; // a copy begins where its numbers may
}

function shape({ dtype, shape }: Entry): string {
  return `${dtype} [${shape}]`;
}

/** Holds each array against the sizes that the header tells. */
function checkArrays({ arrays, config, windows, scales, perplexity, stored }: Golden): void {
  const tokens = windows.reduce((sum, length) => sum + length);
  const { vocab_size } = config;
  const find = (name: string) => {
    if (!Object.hasOwn(arrays, name)) throw new Mismatch(`${name} is missing`);
    return arrays[name];
  };
  const expect = (name: string, dtype: string, ...lengths: number[]) => {
    const expected = shape({ dtype, shape: lengths, data_offsets: [] });
    const found = shape(find(name).entry);
    if (found !== expected) throw new Mismatch(`${name} is ${found}, expected ${expected}`);
  };
  expect("token_ids", "I32", tokens);
  expect("routing", "I16", config.num_hidden_layers, tokens, 2);
  expect("top_ids", "I32", tokens, Math.min(TOP, vocab_size));
  expect("greedy", "I32", find("greedy").entry.shape[0]);
  for (const kind of stored ? ["", "stored_"] : [""]) {
    expect(`${kind}top_logits`, "F32", tokens, Math.min(TOP, vocab_size));
    expect(`${kind}sampled_logits`, "F32", tokens, Math.min(SAMPLED, vocab_size));
    expect(`${kind}logsumexp`, "F64", tokens);
  }
  if (stored) expect("stored_best", "I32", tokens);
  for (const name of ["token_ids", "top_ids", "greedy", ...(stored ? ["stored_best"] : [])]) {
    if (!arrays[name].numbers.every((id) => id >= 0 && id < vocab_size))
      throw new Mismatch(`${name} holds ids outside the vocabulary of ${vocab_size}`);
  }
  for (const given of [scales, ...(stored ? [stored.scales] : [])]) {
    if (given.length !== windows.length || !given.every((scale) => scale > 0))
      throw new Mismatch(`scales are [${given.slice(0, 4)}], expected ${windows.length} positive numbers`);
  }
  if (!(perplexity > 0)) throw mismatch("perplexity", perplexity, "a positive number");
}

/** Holds that the file is of the bundle's checkpoint, as far as the manifest knows that. */
function checkCheckpoint({ path, task, checkpoint, checkpoint_sha256, config }: Golden, { decoding }: Manifest): void {
  const { vocab_size, cache } = decoding;
  let what;
  if (task !== TASK) what = `the task ${task}, not ${TASK}`;
  else if (config.vocab_size !== vocab_size) what = `vocab_size ${config.vocab_size}, not ${vocab_size}`;
  else if (config.num_hidden_layers !== cache.num_hidden_layers)
    what = `num_hidden_layers ${config.num_hidden_layers}, not ${cache.num_hidden_layers}`;
  if (!what) return;
  throw new GoldenError(
    `${path}: is of the checkpoint ${checkpoint} (SHA-256 ${checkpoint_sha256}), whose bundle has ${what} as this one ` +
      `has; give the golden file of this bundle's checkpoint`,
  );
}
