import * as ort from "onnxruntime-web/wasm";

import type { Graph, Value } from "../../node/src/cache.js";
import { DeviceError } from "../../node/src/errors.js";

/** The release of ONNX Runtime, as "1.30.0". */
export const RELEASE = ort.env.versions.web as string;

/**
 * Opens a graph in WebAssembly.
 *
 * @param name - of the graph, for errors.
 * @param graph - the bytes of its file.
 * @param weights - the files that its weights lie in, by name.
 * @param threads - undefined leaves it to ONNX Runtime; where the page is not cross-origin isolated there is one.
 * @throws DeviceError: ONNX Runtime refuses the graph, or `threads` is no number of threads.
 */
export async function openSession(
  name: string,
  graph: Uint8Array,
  weights: Map<string, Uint8Array>,
  threads: number | undefined,
): Promise<Graph> {
  if (threads !== undefined && !(Number.isInteger(threads) && threads >= 1)) {
    throw new DeviceError(`threads is ${threads}, expected an integer, 1 or more, or undefined for ONNX Runtime's own choice`);
  }
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href; // the build puts ONNX Runtime's files beside this one
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  let session: ort.InferenceSession;
  try {
    const externalData = Array.from(weights, ([path, data]) => ({ path, data }));
    session = await ort.InferenceSession.create(graph, { externalData, executionProviders: ["wasm"], logSeverityLevel: 3 });
  } catch (error) {
    throw new DeviceError(`${name}: ONNX Runtime ${RELEASE} cannot load it: ${(error as Error).message}`);
  }
  return {
    inPlace: false, // outputs that are given are ignored
    async run(inputs, outputs) {
      await turn();
      const results = await session.run(tensors(inputs), Object.keys(outputs));
      for (const [output, value] of Object.entries(outputs)) value.data = results[output].data as Value["data"];
    },
  };
}

function tensors(values: Record<string, Value>): Record<string, ort.Tensor> {
  return Object.fromEntries(Object.entries(values).map(([name, { type, data, dims }]) => [name, new ort.Tensor(type, data, dims)]));
}

const { port1, port2 } = new MessageChannel();
port1.start();

/** Lets messages in, such as the one that cancels: a run of the graph leaves the event loop no time. */
function turn(): Promise<unknown> {
  return new Promise((resolve) => {
    port1.addEventListener("message", resolve, { once: true });
    port2.postMessage(null);
  });
}
