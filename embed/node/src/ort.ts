import { createRequire } from "node:module";
import { dirname, join } from "node:path";

import koffi from "koffi";

import { ELEMENT_TYPES, type Value } from "./core/session.js";
import { turnTelemetryOff } from "./telemetry.js";

/** A pointer to one of ONNX Runtime's objects. */
export type Handle = bigint;

const LIBRARIES: Partial<Record<NodeJS.Platform, string>> = {
  darwin: "libonnxruntime.1.dylib",
  linux: "libonnxruntime.so.1",
  win32: "onnxruntime.dll",
};
const API_VERSION = 17; // the oldest that has all that is called here; the table below only grows
const OUT: any = koffi.out(koffi.pointer("void *"));
const PATH = process.platform === "win32" ? "str16" : "str";

// by name, as in onnxruntime_c_api.h: the place in the table OrtApi, and the parameters; each returns a status
const FUNCTIONS = {
  CreateEnv: [3, "int", "str", OUT],
  CreateSession: [7, "void *", PATH, "void *", OUT],
  Run: [9, "void *", "void *", "str *", "void **", "size_t", "str *", "size_t", "void **"],
  CreateSessionOptions: [10, OUT],
  SetSessionLogSeverityLevel: [22, "void *", "int"],
  SetIntraOpNumThreads: [24, "void *", "int"],
  CreateTensorWithDataAsOrtValue: [49, "void *", "void *", "size_t", "int64_t *", "size_t", "int", OUT],
  CreateCpuMemoryInfo: [69, "int", "int", OUT],
  AddSessionConfigEntry: [130, "void *", "str", "str"],
  RegisterCustomOpsLibrary_V2: [228, "void *", PATH],
} as const;
const RELEASES = { Env: 92, Status: 93, MemoryInfo: 94, Session: 95, Value: 96, SessionOptions: 100 };
const GET_ERROR_MESSAGE = 2;

/**
 * ONNX Runtime's C API, as far as a generation loop needs it, in the library that the package onnxruntime-node brings.
 *
 * The package's own binding (1.30) writes into outputs that it is given, but returns a copy of each besides: of the
 * whole cache in every step. It also takes no values for inputs that have a default.
 */
export class OnnxRuntime {
  /** The release, as "1.30.0". */
  readonly version: string;
  private readonly functions: Record<string, (...parameters: unknown[]) => any> = {};

  /** Loads the library; throws where there is none for this platform. */
  constructor() {
    turnTelemetryOff();
    const folder = dirname(createRequire(import.meta.url).resolve("onnxruntime-node/package.json"));
    const library = koffi.load(
      join(folder, "bin/napi-v6", process.platform, process.arch, LIBRARIES[process.platform] ?? "none"),
    );
    // kept, or koffi would unload the library
    this.functions.OrtGetApiBase = library.func("OrtGetApiBase", "void *", []);
    const [getApi, getVersion] = koffi.decode(this.functions.OrtGetApiBase(), koffi.array("void *", 2)) as Handle[];
    this.version = koffi.call(getVersion, koffi.proto("str", []));
    const api: Handle = koffi.call(getApi, koffi.proto("void *", ["uint32_t"]), API_VERSION);
    const define = (name: string, place: number, result: string, parameters: any[]) => {
      const pointer = koffi.decode(api, place * koffi.sizeof("void *"), "void *");
      this.functions[name] = koffi.decode(pointer, koffi.proto(result, parameters));
    };
    define("GetErrorMessage", GET_ERROR_MESSAGE, "str", ["void *"]);
    for (const [name, [place, ...parameters]] of Object.entries(FUNCTIONS)) define(name, place, "void *", parameters);
    for (const [kind, place] of Object.entries(RELEASES)) define(`Release${kind}`, place, "void", ["void *"]);
  }

  /** Calls a function; throws an Error with ONNX Runtime's text if it fails. */
  call(name: keyof typeof FUNCTIONS, ...parameters: unknown[]): void {
    const status = this.functions[name](...parameters);
    if (!status) return;
    const message = this.functions.GetErrorMessage(status);
    this.release("Status", status);
    throw new Error(message);
  }

  /** Calls a function that makes an object. */
  create(name: keyof typeof FUNCTIONS, ...parameters: unknown[]): Handle {
    const result: Handle[] = [0n];
    this.call(name, ...parameters, result);
    return result[0];
  }

  release(kind: keyof typeof RELEASES, object: Handle): void {
    this.functions[`Release${kind}`](object);
  }

  /** Runs a session; `memory` is that of the CPU. The outputs are written in place and may be inputs as well. */
  run(session: Handle, memory: Handle, inputs: Record<string, Value>, outputs: Record<string, Value>): void {
    const tensors = new Map<Value, Handle>();
    const tensor = (value: Value): Handle => {
      const { type, dims, data } = value;
      const known = tensors.get(value);
      if (known) return known;
      const size = data.byteLength;
      const made = this.create(
        "CreateTensorWithDataAsOrtValue",
        memory,
        data,
        size,
        dims,
        dims.length,
        ELEMENT_TYPES[type],
      );
      tensors.set(value, made);
      return made;
    };
    try {
      const given = Object.values(inputs).map(tensor);
      const wanted = Object.values(outputs).map(tensor);
      this.call(
        "Run",
        session,
        null,
        Object.keys(inputs),
        given,
        given.length,
        Object.keys(outputs),
        wanted.length,
        wanted,
      );
    } finally {
      for (const made of tensors.values()) this.release("Value", made);
    }
  }
}
