import { BinaryReader, BinaryWriter } from "@bufbuild/protobuf/wire";

// of onnx.proto
const MODEL_GRAPH = 7;
const GRAPH_INITIALIZER = 5;
const TENSOR_NAME = 8;

/**
 * The bytes of an ONNX model without the defaults of the inputs called `names`: onnxruntime-web (1.30) offers only inputs that
 * have none. A default is an initializer of the input's name.
 */
export function withoutDefaults(model: Uint8Array, names: readonly string[]): Uint8Array {
  const isDefault = (tensor: Uint8Array) => {
    let found = false;
    edit(tensor, TENSOR_NAME, (name) => {
      found = names.includes(new TextDecoder().decode(name));
      return name;
    });
    return found;
  };
  return edit(model, MODEL_GRAPH, (graph) => edit(graph, GRAPH_INITIALIZER, (tensor) => (isDefault(tensor) ? undefined : tensor)));
}

/** A message with another content in every field of a number, or without the field where `change` gives none. */
function edit(message: Uint8Array, number: number, change: (content: Uint8Array) => Uint8Array | undefined): Uint8Array {
  const reader = new BinaryReader(message);
  const writer = new BinaryWriter();
  while (reader.pos < reader.len) {
    const [field, type] = reader.tag();
    if (field !== number) {
      writer.tag(field, type).raw(reader.skip(type));
      continue;
    }
    const content = change(reader.bytes());
    if (content) writer.tag(field, type).bytes(content);
  }
  return writer.finish();
}
