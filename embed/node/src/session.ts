import { join } from "node:path";
import { setImmediate } from "node:timers/promises";

import { checkGraph } from "./core/agreement.js";
import { type Manifest, NATIVE_OPERATORS } from "./core/bundle.js";
import { DeviceError } from "./core/errors.js";
import { chooseGraph, type Session } from "./core/session.js";
import { readGraph } from "./files.js";
import { NO_OPERATORS } from "./operators.js";
import { type Handle, OnnxRuntime } from "./ort.js";

const ERRORS_ONLY = 3; // ONNX Runtime's log severity
// in microseconds: threads that wait longer take the processor from each other on a busy machine
const SPIN = "50";
const SMALL_PASS = 8_000_000; // bytes of weights times tokens; too short to be worth waking other threads
const [DEVICE_ALLOCATOR, DEFAULT_MEMORY] = [0, 0];

/** A session, and how to free it. */
export interface NativeSession extends Session {
  release(): void;
}

/**
 * Opens the first graph of the manifest that the installed ONNX Runtime can load.
 *
 * @param folder - the bundle's.
 * @param threads - for one operator; by default small passes of small models run in one, others in as many as ONNX
 *   Runtime chooses, one a physical core.
 * @param operators - the path of the native operators' library, where there is one.
 * @throws DeviceError: the bundle is for another device or needs operators that are not here, or ONNX Runtime is too
 *   old for it or refuses its graph.
 * @throws BundleError: a file is missing or changed, or the manifest does not describe the graph.
 */
export async function openSession(
  folder: string,
  manifest: Manifest,
  threads: number | null | undefined,
  operators?: string,
): Promise<NativeSession> {
  const ort = loadLibrary();
  const graph = chooseGraph(manifest, ort.version, true, operators === undefined ? NO_OPERATORS : null);
  const library = graph.requires.includes(NATIVE_OPERATORS) ? operators : undefined;
  const path = join(folder, graph.file);
  checkGraph(graph, await readGraph(path), manifest, join(folder, "manifest.json"));
  const weights = Object.entries(manifest.files)
    .filter(([name]) => name.endsWith(".data"))
    .reduce((sum, [, { size }]) => sum + size, 0);
  const session = open(ort, path, threads ?? 0, library);
  if (threads != null || weights > SMALL_PASS) return session;
  return eachByItsSize(session, open(ort, path, 1, library), weights);
}

/** Runs small passes in a session of one thread; a cache is no session's own, and the numbers are the same. */
function eachByItsSize(large: NativeSession, small: NativeSession, weights: number): NativeSession {
  return {
    inPlace: true,
    run(inputs, outputs) {
      const { length } = inputs.input_ids.data;
      return (length * weights <= SMALL_PASS ? small : large).run(inputs, outputs);
    },
    release() {
      large.release();
      small.release();
    },
  };
}

/** A session with so many threads, of which 0 is ONNX Runtime's own choice, and with a library's operators if given. */
function open(ort: OnnxRuntime, path: string, threads: number, operators: string | undefined): NativeSession {
  const env = ort.create("CreateEnv", ERRORS_ONLY, "phimoe-onnx");
  const options = ort.create("CreateSessionOptions");
  let session: Handle;
  try {
    ort.call("SetSessionLogSeverityLevel", options, ERRORS_ONLY);
    // by any name: onnx.ts knows this one
    ort.call("AddSessionConfigEntry", options, "session.load_model_format", "ONNX");
    ort.call("AddSessionConfigEntry", options, "session.intra_op.spin_duration_us", SPIN);
    ort.call("SetIntraOpNumThreads", options, threads);
    if (operators !== undefined) ort.call("RegisterCustomOpsLibrary_V2", options, operators);
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
      try {
        ort.run(session, memory, inputs, outputs);
      } catch (error) {
        throw new DeviceError(`${path}: ONNX Runtime ${ort.version} cannot run it: ${(error as Error).message}`);
      }
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
