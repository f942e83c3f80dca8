import { type Decoding, cacheNames, type GraphFile, type Manifest } from "./bundle.js";
import { BundleError } from "./errors.js";
import { type Declared, type OnnxFile, readOnnx } from "./onnx.js";
import { ELEMENT_TYPES } from "./session.js";

/** A disagreement between the graph and a key of the manifest. */
class Disagreement extends Error {}

type Expected = [type: keyof typeof ELEMENT_TYPES, dims: (number | undefined)[]];

/**
 * Holds a graph against the manifest before ONNX Runtime opens it: where its weights lie, and its inputs and outputs.
 *
 * @param bytes - of the graph's file.
 * @param path - of manifest.json, for errors.
 * @returns the files that the weights lie in.
 * @throws BundleError: the graph is damaged, its weights lie in a file that the manifest does not list, or an input or
 *   output is not as it says.
 */
export function checkGraph(graph: GraphFile, bytes: Uint8Array, manifest: Manifest, path: string): string[] {
  let file: OnnxFile;
  try {
    file = readOnnx(bytes);
  } catch (error) {
    // what names no other file can do no harm, and ONNX Runtime says best why it refuses it
    if (!new TextDecoder("latin1").decode(bytes).includes("location")) return [];
    throw new BundleError(
      `${path}: its ${graph.file} is no ONNX graph (${(error as Error).message}); copy or export the bundle again`,
    );
  }
  const locations = [...file.locations];
  const foreign = locations.find((name) => !Object.hasOwn(manifest.files, name));
  if (foreign !== undefined) {
    throw new BundleError(
      `${path}: files has no ${JSON.stringify(foreign)}, where weights of ${graph.file} lie; export the bundle again`,
    );
  }
  try {
    checkInputs(graph, file, manifest.decoding);
    checkOutputs(file, manifest.decoding);
  } catch (error) {
    if (!(error instanceof Disagreement)) throw error;
    throw new BundleError(`${path}: does not describe ${graph.file}: ${error.message}; export the bundle again`);
  }
  return locations;
}

function checkInputs({ optional_inputs }: GraphFile, { inputs, initializers }: OnnxFile, { cache }: Decoding): void {
  // counted before any names are made: a damaged manifest may claim a billion layers
  const layers = inputs.filter(({ name }) => name.startsWith("past_key_values.")).length / 2;
  if (layers !== cache.num_hidden_layers) {
    throw new Disagreement(
      `decoding.cache.num_hidden_layers is ${cache.num_hidden_layers}, the graph has ${layers} layers`,
    );
  }
  const defaults = inputs.map(({ name }) => name).filter((name) => initializers.has(name));
  for (const name of [...defaults, ...optional_inputs]) {
    if (!optional_inputs.includes(name))
      throw new Disagreement(`optional_inputs lacks ${name}, which has a default in the graph`);
    if (!defaults.includes(name))
      throw new Disagreement(`optional_inputs has ${name}, which has no default in the graph`);
  }
  const expected = new Map<string, Expected>([
    ["input_ids", ["int64", [undefined, undefined]]],
    ["attention_mask", ["int64", [undefined, undefined]]],
    ["logits_to_keep", ["int64", [1]]],
    ["rope_length", ["int64", [1]]],
    ...cacheValues(cache, "past_key_values"),
  ]);
  const known = inputs.filter(({ name }) => expected.has(name) || !defaults.includes(name));
  checkValues("inputs", known, expected);
}

function checkOutputs({ outputs }: OnnxFile, { vocab_size, cache }: Decoding): void {
  checkValues(
    "outputs",
    outputs,
    new Map([["logits", ["float32", [undefined, undefined, vocab_size]]], ...cacheValues(cache, "present")]),
  );
}

function cacheValues(cache: Decoding["cache"], prefix: string): [string, Expected][] {
  const dims = [undefined, cache.num_key_value_heads, undefined, cache.head_dim];
  return cacheNames(cache.num_hidden_layers, prefix).map((name) => [name, [cache.dtype, dims]]);
}

function checkValues(kind: "inputs" | "outputs", found: readonly Declared[], expected: Map<string, Expected>): void {
  const names = new Set(found.map(({ name }) => name));
  for (const name of expected.keys()) if (!names.has(name)) throw new Disagreement(`the graph's ${kind} lack ${name}`);
  for (const { name, type, dims } of found) {
    const value = expected.get(name);
    if (!value) throw new Disagreement(`the graph's ${kind} have ${name}, which is not known here`);
    const [dtype, wanted] = value;
    if (type !== ELEMENT_TYPES[dtype]) {
      const has = Object.entries(ELEMENT_TYPES).find(([, number]) => number === type)?.[0] ?? "another type";
      throw new Disagreement(`${name} is ${has} in the graph, expected ${dtype}${keyOf(name, "dtype")}`);
    }
    if (dims.length !== wanted.length)
      throw new Disagreement(`${name} has ${dims.length} dimensions in the graph, expected ${wanted.length}`);
    for (const [axis, size] of wanted.entries()) {
      if (size === undefined || dims[axis] === undefined || dims[axis] === size) continue;
      throw new Disagreement(
        `${name} has ${dims[axis]} in dimension ${axis} of the graph, expected ${size}${keyOf(name, axis)}`,
      );
    }
  }
}

/** The key of the manifest that says so, in words. */
function keyOf(name: string, what: "dtype" | number): string {
  if (name === "logits") return what === 2 ? ", decoding.vocab_size" : "";
  if (!/^(past_key_values|present)\./.test(name)) return "";
  const key = { dtype: "dtype", 1: "num_key_value_heads", 3: "head_dim" }[what];
  return key ? `, decoding.cache.${key}` : "";
}
