import { BundleError, DeviceError } from "./errors.js";

/** One graph file over the bundle's weights. */
export interface GraphFile {
  file: string;
  /** The least ONNX Runtime release that loads it. */
  minimum_onnxruntime: string;
  /** Inputs that have a default. */
  optional_inputs: string[];
}

/** The chat template as plain strings: a turn is prefix + content + suffix, and `generation` opens the answer. */
export interface ChatFormat {
  /** By role. */
  turns: Record<string, [prefix: string, suffix: string]>;
  generation: string;
  /** The roles that have no turn where the content is empty. */
  skipped_when_empty: string[];
}

/** One of the cache's arrays is [batch, num_key_value_heads, length, head_dim] of `dtype`; there are two a layer, key and value. */
export interface CacheShape {
  num_hidden_layers: number;
  num_key_value_heads: number;
  head_dim: number;
  /** A type of ONNX Runtime's tensors: "float32", "float16", "int8" or "uint8". */
  dtype: CacheType;
  /** Whether past and present may be one buffer of any greater length; else `present` is past + new. */
  shared: boolean;
}

export type CacheType = "float32" | "float16" | "int8" | "uint8";

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
  cache: CacheShape;
}

/** manifest.json, as far as a generation loop reads it. */
export interface Manifest {
  /** What it was exported from. */
  source: string;
  task: string;
  /** "cpu", "cuda" or "portable". */
  target: string;
  /** "none", "fp16", "int8" or "int4". */
  quantize: string;
  /** In order of preference. */
  graphs: GraphFile[];
  decoding: Decoding;
  /** By name: size in bytes and SHA-256 in hexadecimal. */
  files: Record<string, { size: number; sha256: string }>;
  chat: ChatFormat | null;
}

/** Larger files are not hashed: reading 20 GB takes longer than loading them. Bytes. */
export const HASH_LIMIT = 256 * 2 ** 20;

const FORMAT_VERSION = 1;
const CACHE_TYPES = ["float32", "float16", "int8", "uint8"];

/** The cache's names in graph order; `prefix` is "past_key_values" or "present". */
export function cacheNames(layers: number, prefix: string): string[] {
  return Array.from({ length: 2 * layers }, (_, index) => `${prefix}.${index >> 1}.${index % 2 ? "value" : "key"}`);
}

/**
 * Reads the text of manifest.json, which lies at `path`.
 *
 * @throws BundleError: it is damaged, of a newer format or for another task.
 */
export function parseManifest(text: string, path: string): Manifest {
  const raw = parse(text, path);
  if (raw?.format_version !== FORMAT_VERSION) {
    const found = JSON.stringify(raw?.format_version);
    throw new BundleError(`${path}: format_version is ${found}, this release reads ${FORMAT_VERSION}; upgrade phimoe-onnx`);
  }
  if (raw.task !== "text-generation") throw new BundleError(`${path}: is a bundle for ${raw.task}, expected one for text-generation`);
  try {
    check("graphs", raw.graphs.length > 0 && raw.graphs.every((graph: any) => strings(graph.file, graph.minimum_onnxruntime, ...graph.optional_inputs)));
    check("source", strings(raw.source, raw.quantize));
    check("files", Object.values(raw.files).every((file: any) => count(file.size) && strings(file.sha256)));
    const { cache, ...decoding } = raw.decoding;
    const counts = [decoding.vocab_size, decoding.context, decoding.prefill_chunk, decoding.rope_boundary ?? 1];
    counts.push(cache.num_hidden_layers, cache.num_key_value_heads, cache.head_dim);
    check("decoding", counts.every((number) => count(number) && number > 0));
    check("decoding", [...decoding.eos_token_ids, ...Object.values(decoding.hidden_tokens)].every(count));
    check("decoding.cache", CACHE_TYPES.includes(cache.dtype) && typeof cache.shared === "boolean");
    if (raw.chat) {
      const turns = Object.values<string[]>(raw.chat.turns);
      check("chat", turns.every((turn) => turn.length === 2) && strings(...turns.flat(), raw.chat.generation, ...raw.chat.skipped_when_empty));
    }
  } catch (error) {
    throw new BundleError(`${path}: is damaged (${(error as Error).message}); export the bundle again`);
  }
  return raw;
}

function parse(text: string, path: string): any {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new BundleError(`not a bundle of phimoe-export: ${path}: is not JSON (${(error as Error).message})`);
  }
}

function check(section: string, holds: boolean): void {
  if (!holds) throw new Error(`its ${section} section`);
}

function count(value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function strings(...values: unknown[]): boolean {
  return values.every((value) => typeof value === "string");
}

/**
 * The manifest's first graph that ONNX Runtime `installed` ("1.30.0") loads.
 *
 * @param optional - whether inputs that have a default can be given a value.
 * @throws DeviceError: the bundle is for another device, or every graph needs a newer release.
 */
export function chooseGraph({ graphs, target }: Manifest, installed: string, optional: boolean): GraphFile {
  if (target !== "cpu" && target !== "portable") {
    throw new DeviceError(`the bundle was exported for ${target}, not for cpu; export it again with --target cpu`);
  }
  const fitting = graphs.filter((graph) => optional || !graph.optional_inputs.length);
  if (!fitting.length) throw new DeviceError("every graph of the bundle has optional inputs, which cannot be given here; export it again");
  const graph = fitting.find(({ minimum_onnxruntime }) => compareReleases(minimum_onnxruntime, installed) <= 0);
  if (graph) return graph;
  const needed = fitting.map((each) => each.minimum_onnxruntime).sort(compareReleases)[0];
  throw new DeviceError(`the bundle needs ONNX Runtime ${needed} or newer, installed is ${installed}; use a newer package of it`);
}

/** Number by number: "1.9" is below "1.31". */
function compareReleases(a: string, b: string): number {
  const [left, right] = [a, b].map((version) => version.split(".").map((part) => parseInt(part, 10) || 0));
  for (let place = 0; place < Math.max(left.length, right.length); place++) {
    const difference = (left[place] ?? 0) - (right[place] ?? 0);
    if (difference) return difference;
  }
  return 0;
}
