import { BundleError } from "./errors.js";
import {
  boolean,
  integer,
  list,
  Mismatch,
  mismatch,
  nullable,
  object,
  oneOf,
  optional,
  type Reader,
  record,
  string,
} from "./schema.js";

/** What a graph of the native operators requires: their domain and its version. */
export const NATIVE_OPERATORS = "phimoe.native.1";

/** One graph file over the bundle's weights. */
export interface GraphFile {
  file: string;
  /** The devices that it runs on, "cpu" and "cuda", each with the least ONNX Runtime release that loads it there. */
  devices: Record<string, string>;
  /** Inputs that have a default. */
  optional_inputs: string[];
  /** What it needs beyond an ONNX Runtime release. */
  requires: string[];
}

/** The chat template as plain strings: a turn is prefix + content + suffix, and `generation` opens the answer. */
export interface ChatFormat {
  /** By role. */
  turns: Record<string, [prefix: string, suffix: string]>;
  generation: string;
  /** The roles that have no turn where the content is empty. */
  skipped_when_empty: string[];
}

const CACHE_TYPES = ["float32", "float16", "bfloat16", "int8", "uint8"] as const;

/** A dtype that a cache may have. */
export type CacheType = (typeof CACHE_TYPES)[number];

/**
 * One of the cache's arrays is [batch, num_key_value_heads, length, head_dim] of `dtype`; there are two a layer, key
 * and value.
 */
export interface CacheShape {
  num_hidden_layers: number;
  num_key_value_heads: number;
  head_dim: number;
  dtype: CacheType;
  /** Whether past and present may be one buffer of any greater length; else `present` is past + new. */
  shared: boolean;
}

/** What a generation loop must know; spec/embedding.md of the repository says how it is used. */
export interface Decoding {
  /** The logits' width. */
  vocab_size: number;
  /** The most tokens of a sequence, the prompt's and the new ones. */
  context: number;
  /** The length beyond which longrope rotates every position by other factors; null without longrope. */
  rope_boundary: number | null;
  /** How many tokens of a prompt run at once. */
  prefill_chunk: number;
  /** The tokens that end a text. */
  eos_token_ids: number[];
  /** The special tokens that are no text, by their own. */
  hidden_tokens: Record<string, number>;
  /** The file of the graph that draws tokens on a device; null on the CPU. */
  sampling_graph: string | null;
  /** Whether decoded text loses the spaces before punctuation. */
  clean_up_tokenization_spaces: boolean;
  cache: CacheShape;
}

/** A file's size in bytes and its SHA-256 in hexadecimal. */
export interface File {
  size: number;
  sha256: string;
}

/** manifest.json, as far as a generation loop reads it. */
export interface Manifest {
  /** What it was exported from; for people, as the next two. */
  source: string;
  /** What it was exported for. */
  target: string;
  /** "none", "fp16", "int8" or "int4". */
  quantize: string;
  task: string;
  /** In order of preference. */
  graphs: GraphFile[];
  decoding: Decoding;
  /** By name. */
  files: Record<string, File>;
  chat: ChatFormat | null;
  /** Of stored matrices and of activations; empty where the manifest does not say them. */
  dtypes: string[];
}

/** Larger files are not hashed: reading 20 GB takes longer than loading them. Bytes. */
export const HASH_LIMIT = 256 * 2 ** 20;

const FORMAT_VERSIONS = [1, 2];
const TASK = "text-generation";
const LARGEST = 2 ** 31 - 1; // of any number but a file's size
const DEEPEST = 1000; // levels of a manifest; what a reader knows has six

const positive = integer(1, LARGEST);
const tokenId = integer(0, LARGEST);
const forPeople: Reader<string> = (value) => (typeof value === "string" ? value : "");
const fileName = string(
  'the name of a file in the bundle, without "/", "\\" and ":"',
  (name) => !/^$|^\.\.?$|[/\\:\0\p{Surrogate}]/u.test(name),
);
const release = string('a release such as "1.31"', (text) => /^\d{1,9}(\.\d{1,9})*$/.test(text));
const turn: Reader<[string, string]> = (value, key) => {
  const texts = list(string())(value, key);
  if (texts.length !== 2) throw mismatch(key, value, "a prefix and a suffix");
  return texts as [string, string];
};
const readManifest = object<Omit<Manifest, "dtypes">>({
  source: forPeople,
  target: forPeople,
  quantize: forPeople,
  task: oneOf([TASK]),
  graphs: list(
    object<GraphFile>({
      file: fileName,
      devices: record(release, string(), 1),
      optional_inputs: list(string()),
      requires: optional(list(string()), []),
    }),
    1,
  ),
  decoding: object<Decoding>({
    vocab_size: positive,
    context: positive,
    rope_boundary: nullable(positive),
    prefill_chunk: positive,
    eos_token_ids: list(tokenId),
    hidden_tokens: record(tokenId),
    sampling_graph: optional(nullable(fileName), null),
    clean_up_tokenization_spaces: optional(boolean, false),
    cache: object<CacheShape>({
      num_hidden_layers: positive,
      num_key_value_heads: positive,
      head_dim: positive,
      dtype: oneOf(CACHE_TYPES),
      shared: boolean,
    }),
  }),
  files: record(
    object<File>({
      size: integer(0, Number.MAX_SAFE_INTEGER),
      sha256: string("64 digits from 0 to f", (text) => /^[0-9a-f]{64}$/.test(text)),
    }),
    fileName,
  ),
  chat: optional(
    nullable(
      object<ChatFormat>({
        turns: record(turn),
        generation: string(),
        skipped_when_empty: list(string()),
      }),
    ),
    null,
  ),
});

/**
 * Reads the text of manifest.json, which lies at `path`; keys that nobody here knows are left out.
 *
 * @throws BundleError: it is damaged, of a newer format or for another task.
 */
export function parseManifest(text: string, path: string): Manifest {
  const raw = parse(text, path);
  const version = raw?.format_version as number;
  if (!FORMAT_VERSIONS.includes(version)) {
    const found = mismatch("format_version", version, FORMAT_VERSIONS.join(" or ")).message;
    throw new BundleError(`${path}: ${found}, which this release reads; upgrade phimoe-onnx`);
  }
  if (typeof raw.task === "string" && raw.task !== TASK) {
    throw new BundleError(`${path}: is a bundle for ${raw.task.slice(0, 80)}, expected one for ${TASK}`);
  }
  try {
    const manifest = readManifest(version === 1 ? upgraded(raw) : raw, "");
    for (const name of [
      "tokenizer.json",
      ...manifest.graphs.map(({ file }) => file),
      manifest.decoding.sampling_graph,
    ]) {
      if (name !== null && !Object.hasOwn(manifest.files, name)) throw new Mismatch(`files has no ${name}`);
    }
    return { ...manifest, dtypes: readDtypes(raw) };
  } catch (error) {
    if (!(error instanceof Mismatch)) throw error;
    throw new BundleError(`${path}: is damaged (${error.message}); export the bundle again`);
  }
}

/** Running a bundle takes none of this, so nothing is wrong with a manifest that says it in other ways or not at all. */
function readDtypes({ format_version, weights, dtype }: any): string[] {
  const version1: Reader<string> = (value, key) => string()(value, key).split(",")[0]; // such as "int4, block 32"
  try {
    const stored =
      format_version === 1
        ? Object.values(record(version1)(weights, "weights"))
        : list(object<{ dtype: string }>({ dtype: string() }))(weights, "weights").map((group) => group.dtype);
    return [...new Set([string()(dtype, "dtype"), ...stored])];
  } catch (error) {
    if (!(error instanceof Mismatch)) throw error;
    return [];
  }
}

function parse(text: string, path: string): any {
  let raw;
  try {
    raw = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`not a bundle of phimoe-export: ${path}: is not JSON (${(error as Error).message})`);
  }
  if (!isFlat(raw, DEEPEST))
    throw new BundleError(`not a bundle of phimoe-export: ${path}: has more than ${DEEPEST} levels`);
  return raw;
}

/** Whether the value has at most so many levels. */
function isFlat(value: unknown, levels: number): boolean {
  if (typeof value !== "object" || value === null) return true;
  return levels > 0 && Object.values(value).every((each) => isFlat(each, levels - 1));
}

/** A manifest of version 1 as one of version 2: its one target stood for what the graphs' devices say now. */
function upgraded(raw: any): any {
  const target = string()(raw.target, "target");
  const device = target === "portable" ? "cpu" : target;
  const graphs = list(
    object<{ file: unknown; minimum_onnxruntime: string; optional_inputs: unknown }>({
      file: (value) => value,
      minimum_onnxruntime: release,
      optional_inputs: (value) => value,
    }),
  )(raw.graphs, "graphs");
  return {
    ...raw,
    graphs: graphs.map(({ minimum_onnxruntime, ...graph }) => ({
      ...graph,
      devices: { [device]: minimum_onnxruntime },
    })),
  };
}

/** The cache's names in graph order; `prefix` is "past_key_values" or "present". */
export function cacheNames(layers: number, prefix: string): string[] {
  return Array.from({ length: 2 * layers }, (_, index) => `${prefix}.${index >> 1}.${index % 2 ? "value" : "key"}`);
}
