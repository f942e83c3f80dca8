/**
 * What a bundle's reader must know of an ONNX file before ONNX Runtime opens it, read from its bytes.
 *
 * The file is a message of Protocol Buffers (https://protobuf.dev/programming-guides/encoding/) with the fields of
 * onnx.proto3.
 */

/** A graph's input or output; `dims` has undefined where it has no number. */
export interface Declared {
  name: string;
  /** One of ELEMENT_TYPES, or another of TensorProto.DataType; 0 where it is no tensor. */
  type: number;
  dims: (number | undefined)[];
}

export interface OnnxFile {
  inputs: Declared[];
  outputs: Declared[];
  /** The names of the main graph's initializers; an input that is one has a default. */
  initializers: Set<string>;
  /** The files that tensors lie in, those of subgraphs and functions, too. */
  locations: Set<string>;
}

// the fields of each message that lead to external data
const TO_TENSORS: Record<string, Record<number, string>> = {
  Model: { 7: "Graph", 25: "Function" },
  Graph: { 1: "Node", 5: "Tensor", 15: "SparseTensor" },
  Function: { 7: "Node", 11: "Attribute" },
  Node: { 5: "Attribute" },
  Attribute: { 5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor" },
  SparseTensor: { 1: "Tensor", 2: "Tensor" },
  Tensor: { 13: "Entry" },
};
const [MODEL_GRAPH, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, TENSOR_NAME] = [7, 5, 11, 12, 8];
const [ENTRY_KEY, ENTRY_VALUE] = [1, 2]; // StringStringEntryProto
const [VALUE_NAME, VALUE_TYPE] = [1, 2]; // ValueInfoProto
const [TYPE_TENSOR, TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE] = [1, 1, 2, 1, 1]; // TypeProto and below
const DEEPEST = 100; // messages inside messages, as for Protocol Buffers' own parsers
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/**
 * Reads a ModelProto.
 *
 * @throws Error: the bytes are none.
 */
export function readOnnx(bytes: Uint8Array): OnnxFile {
  const file: OnnxFile = { inputs: [], outputs: [], initializers: new Set(), locations: new Set() };
  addLocations(bytes, "Model", DEEPEST, file.locations);
  for (const graph of messages(bytes, MODEL_GRAPH)) {
    for (const tensor of messages(graph, GRAPH_INITIALIZER)) file.initializers.add(lastText(tensor, TENSOR_NAME));
    file.inputs.push(...messages(graph, GRAPH_INPUT).map(declared));
    file.outputs.push(...messages(graph, GRAPH_OUTPUT).map(declared));
  }
  return file;
}

function addLocations(bytes: Uint8Array, message: string, levels: number, locations: Set<string>): void {
  if (!levels) throw new Error(`more than ${DEEPEST} messages inside each other`);
  visitFields(bytes, TO_TENSORS[message], (value, inner) => {
    if (typeof value === "number") return;
    if (inner !== "Entry") addLocations(value, inner, levels - 1, locations);
    else if (lastText(value, ENTRY_KEY) === "location") locations.add(lastText(value, ENTRY_VALUE));
  });
}

function declared(value: Uint8Array): Declared {
  const [tensor] = messages(value, VALUE_TYPE).flatMap((type) => messages(type, TYPE_TENSOR));
  const shape = tensor ? messages(tensor, TENSOR_SHAPE) : [];
  const dims = shape.flatMap((each) => messages(each, SHAPE_DIM)).map((dim) => lastNumber(dim, DIM_VALUE));
  return { name: lastText(value, VALUE_NAME), type: (tensor && lastNumber(tensor, TENSOR_ELEMENT)) ?? 0, dims };
}

/** The values of a repeated field that are messages or texts. */
function messages(bytes: Uint8Array, field: number): Uint8Array[] {
  const found: Uint8Array[] = [];
  visitFields(bytes, { [field]: true }, (value) => typeof value !== "number" && found.push(value));
  return found;
}

/** The text of a field; where there are several, the last counts. */
function lastText(bytes: Uint8Array, field: number): string {
  const texts = messages(bytes, field);
  return texts.length ? UTF8.decode(texts[texts.length - 1]) : "";
}

function lastNumber(bytes: Uint8Array, field: number): number | undefined {
  let last: number | undefined;
  visitFields(bytes, { [field]: true }, (value) => typeof value === "number" && (last = value));
  return last;
}

/** Visits the fields of a message whose numbers are in `wanted`: with its value, a 0 for one of fixed width. */
function visitFields<T>(
  bytes: Uint8Array,
  wanted: Record<number, T>,
  visit: (value: number | Uint8Array, wanted: T) => void,
): void {
  let place = 0;
  const varint = (most: number) => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (place >= bytes.length) throw new Error("a number ends behind its message");
      const byte = bytes[place++];
      value += (byte & 127) * scale;
      if (value > most) throw new Error(`a number above ${most}`);
      if (byte < 128) return value;
    }
  };
  while (place < bytes.length) {
    const key = varint(2 ** 32 - 1);
    const [field, wire] = [wanted[key >>> 3], key & 7];
    let value: number | Uint8Array = 0;
    if (wire === 0) value = varint(2 ** 64);
    else if (wire === 1 || wire === 2 || wire === 5) {
      const size = wire === 2 ? varint(2 ** 31) : wire === 1 ? 8 : 4;
      if (size > bytes.length - place) throw new Error("a field ends behind its message");
      if (wire === 2 && field !== undefined) value = bytes.subarray(place, place + size);
      place += size;
    } else throw new Error(`a field of the wire type ${wire}`);
    if (field !== undefined) visit(value, field);
  }
}
