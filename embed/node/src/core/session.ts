import { type CacheType, type GraphFile, type Manifest, NATIVE_OPERATORS } from "./bundle.js";
import { DeviceError } from "./errors.js";
import { shown } from "./schema.js";

/** A tensor; its numbers lie in row-major order. */
export interface Value {
  type: CacheType | "int64";
  dims: number[];
  data: Numbers;
}

export type Numbers = Float32Array | Uint16Array | Int8Array | Uint8Array | BigInt64Array;

/** The numbers of the types in ONNX (TensorProto.DataType), and in ONNX Runtime. */
export const ELEMENT_TYPES = { float32: 1, uint8: 2, int8: 3, int64: 7, float16: 10, bfloat16: 16 };

/** An open graph of ONNX Runtime, whichever package runs it. */
export interface Session {
  /** Whether the outputs' data are written in place; else other data take their place. */
  readonly inPlace: boolean;
  /** Runs it once. */
  run(inputs: Record<string, Value>, outputs: Record<string, Value>): Promise<void>;
}

/**
 * The manifest's first graph for the CPU that ONNX Runtime `installed` ("1.30.0") loads.
 *
 * @param optional - whether inputs that have a default can be given a value.
 * @param withoutNative - how the error ends where the native operators are not here: why, and what to do; null where
 *   they are.
 * @throws DeviceError: no graph is for the CPU, every one requires what is not known here, or needs a newer release.
 */
export function chooseGraph(
  { graphs }: Manifest,
  installed: string,
  optional: boolean,
  withoutNative: string | null,
): GraphFile {
  const here = graphs.filter(({ devices }) => Object.hasOwn(devices, "cpu"));
  if (!here.length) {
    const others = [...new Set(graphs.flatMap(({ devices }) => Object.keys(devices)))].join(", ");
    throw new DeviceError(`the bundle is for ${others}, not for cpu; export it again with --target cpu`);
  }
  const plain = here.filter((graph) => optional || !graph.optional_inputs.length);
  if (!plain.length)
    throw new DeviceError("every graph of the bundle has optional inputs, which cannot be given here; export it again");
  const unknown = ({ requires }: GraphFile) => requires.filter((name) => name !== NATIVE_OPERATORS || withoutNative);
  const fitting = plain.filter((graph) => !unknown(graph).length);
  if (!fitting.length) {
    const missing = [...new Set(plain.flatMap(unknown))].join(", ");
    if (missing === NATIVE_OPERATORS) throw new DeviceError(`the bundle needs the native operators, ${withoutNative}`);
    throw new DeviceError(
      `the bundle requires ${missing}, which this release does not have; upgrade phimoe-onnx, or export again`,
    );
  }
  const graph = fitting.find(({ devices }) => compareReleases(devices.cpu, installed) <= 0);
  if (graph) return graph;
  const needed = fitting.map(({ devices }) => devices.cpu).sort(compareReleases)[0];
  throw new DeviceError(
    `the bundle needs ONNX Runtime ${needed} or newer, installed is ${installed}; use a newer package of it`,
  );
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

const MOST_THREADS = 256; // or the number of processors, where that is more; a million would hang the machine

/** Throws DeviceError unless it is a number of threads that `processors` of them bear, or none is given. */
export function checkThreads(threads: number | null | undefined, processors: number): void {
  const most = Math.max(MOST_THREADS, processors);
  if (threads != null && !(Number.isInteger(threads) && threads >= 1 && threads <= most)) {
    throw new DeviceError(`threads is ${shown(threads)}, expected an integer from 1 to ${most}, or none`);
  }
}
