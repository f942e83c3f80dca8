import koffi from "koffi";

const VARIABLE = "ORT_DISABLE_TELEMETRY";

/**
 * Keeps ONNX Runtime from writing about this machine; a variable that is set already stays as it is.
 *
 * From 1.29 on its library, once it is loaded, writes a device's id and a queue of events under the user's home on
 * Linux and macOS. It looks at one variable of the process's own environment as it is loaded, and at nothing later. A
 * worker's process.env is a copy, so this asks the system.
 */
export function turnTelemetryOff(): void {
  if (process.platform === "win32") {
    const kernel = koffi.load("kernel32.dll");
    const set = kernel.func("SetEnvironmentVariableW", "int", ["str16", "str16"]);
    if (process.env[VARIABLE] === undefined) set(VARIABLE, "1");
  } else {
    const libc = koffi.load(process.platform === "darwin" ? "libSystem.B.dylib" : "libc.so.6");
    libc.func("setenv", "int", ["str", "str", "int"])(VARIABLE, "1", 0); // 0: an earlier value stays
  }
}
