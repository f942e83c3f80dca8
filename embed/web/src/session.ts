import type { InferenceSession, Tensor } from "onnxruntime-web/wasm";
import { DeviceError } from "phimoe-onnx/core/errors";
import type { Session, Value } from "phimoe-onnx/core/session";

/** What runs a graph: "webgpu" leaves to WebAssembly the operators that it does not have. */
export type Device = "wasm" | "webgpu";

/** ONNX Runtime's build for a device; the one with WebGPU is twice as large. */
export type Runtime = typeof import("onnxruntime-web/wasm");

interface Adapter {
  isFallbackAdapter?: boolean;
  info?: { isFallbackAdapter?: boolean };
}

/**
 * WebGPU where there is a graphics processor for it, else WebAssembly: a processor that plays one is slower than that.
 */
export async function bestDevice(): Promise<Device> {
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<Adapter | null> } };
  const adapter = await gpu?.requestAdapter();
  return adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter) ? "webgpu" : "wasm";
}

/** Fetches ONNX Runtime for a device. */
export function loadRuntime(device: Device): Promise<Runtime> {
  return device === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm");
}

/**
 * Opens a graph.
 *
 * @param ort - of loadRuntime.
 * @param device - the same as there.
 * @param name - of the graph, for errors.
 * @param graph - the bytes of its file.
 * @param weights - the files that its weights lie in, by name.
 * @param threads - undefined leaves it to ONNX Runtime; where the page is not cross-origin isolated there is one.
 * @throws DeviceError: ONNX Runtime refuses the graph.
 */
export async function openSession(
  ort: Runtime,
  device: Device,
  name: string,
  graph: Uint8Array,
  weights: Map<string, Uint8Array>,
  threads: number | undefined,
): Promise<Session> {
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href; // the build puts ONNX Runtime's files beside this one
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const refused = (what: string, error: unknown) =>
    new DeviceError(
      `${name}: ONNX Runtime ${ort.env.versions.web} cannot ${what} it on ${device}: ${(error as Error).message}`,
    );
  let session: InferenceSession;
  try {
    const externalData = Array.from(weights, ([path, data]) => ({ path, data }));
    session = await ort.InferenceSession.create(graph, {
      externalData,
      executionProviders: [device],
      logSeverityLevel: 3,
      extra: { session: { load_model_format: "ONNX", intra_op: { spin_duration_us: "50" } } },
    });
  } catch (error) {
    throw refused("load", error);
  }
  return {
    inPlace: false, // outputs that are given are ignored
    async run(inputs, outputs) {
      await turn();
      const results = await session.run(tensors(ort, inputs), Object.keys(outputs)).catch((error) => {
        throw refused("run", error);
      });
      for (const [output, value] of Object.entries(outputs)) value.data = numbers(results[output]);
    },
  };
}

/** A tensor's numbers; of float16 the bits, also where the browser has numbers of that type. */
function numbers({ type, data }: Tensor): Value["data"] {
  if (type !== "float16") return data as Value["data"];
  const { buffer, byteOffset, length } = data as Uint16Array;
  return new Uint16Array(buffer, byteOffset, length);
}

function tensors(ort: Runtime, values: Record<string, Value>): InferenceSession.FeedsType {
  type Type = Exclude<Value["type"], "bfloat16">; // a graph of bfloat16 was refused
  return Object.fromEntries(
    Object.entries(values).map(([name, { type, data, dims }]) => [name, new ort.Tensor(type as Type, data, dims)]),
  );
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
