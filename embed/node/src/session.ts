import { join } from "node:path";
import { setImmediate } from "node:timers/promises";

import { chooseGraph, type Manifest } from "./bundle.js";
import type { Graph } from "./cache.js";
import { DeviceError } from "./errors.js";
import { type Handle, OnnxRuntime } from "./ort.js";

const ERRORS_ONLY = 3; // ONNX Runtime's log severity
const [DEVICE_ALLOCATOR, DEFAULT_MEMORY] = [0, 0];

/** An open graph, and how to free it. */
export interface Session extends Graph {
  release(): void;
}

/**
 * Opens the first graph of the manifest that the installed ONNX Runtime can load.
 *
 * @param folder - the bundle's.
 * @param threads - for one operator; undefined leaves it to ONNX Runtime, which takes one a physical core.
 * @throws DeviceError: the bundle is for another device, or ONNX Runtime is too old for it or refuses its graph.
 */
export function openSession(folder: string, manifest: Manifest, threads: number | undefined): Session {
  if (threads !== undefined && !(Number.isInteger(threads) && threads >= 1)) {
    throw new DeviceError(`threads is ${threads}, expected an integer, 1 or more, or undefined for ONNX Runtime's own choice`);
  }
  const ort = loadLibrary();
  const path = join(folder, chooseGraph(manifest, ort.version, true).file);
  const env = ort.create("CreateEnv", ERRORS_ONLY, "phimoe-onnx");
  const options = ort.create("CreateSessionOptions");
  let session: Handle;
  try {
    ort.call("SetSessionLogSeverityLevel", options, ERRORS_ONLY);
    ort.call("SetIntraOpNumThreads", options, threads ?? 0);
    session = ort.create("CreateSession", env, path, options);
  } catch (error) {
    ort.release("Env", env);
    throw new DeviceError(`${path}: ONNX Runtime ${ort.version} cannot load it: ${(error as Error).message}`);
  } finally {
    ort.release("SessionOptions", options);
  }
  const memory = ort.create("CreateCpuMemoryInfo", DEVICE_ALLOCATOR, DEFAULT_MEMORY);
  return {
    inPlace: true,
    async run(inputs, outputs) {
      await setImmediate(); // lets messages in, such as the one that cancels
      ort.run(session, memory, inputs, outputs);
    },
    release() {
      ort.release("MemoryInfo", memory);
      ort.release("Session", session);
      ort.release("Env", env);
    },
  };
}

function loadLibrary(): OnnxRuntime {
  try {
    return new OnnxRuntime();
  } catch (error) {
    const platform = `${process.platform}-${process.arch}`;
    throw new DeviceError(`onnxruntime-node's library for ${platform} cannot be loaded: ${(error as Error).message}`);
  }
}
