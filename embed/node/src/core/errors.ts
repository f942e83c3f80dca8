/** Base of every error thrown on purpose; its text says what was found, what was expected and what to do. */
export class PhiMoEError extends Error {
  override name = "PhiMoEError";
}

/** A bundle's files are missing, changed, or written by a newer version. */
export class BundleError extends PhiMoEError {
  override name = "BundleError";
}

/** The device or the ONNX Runtime release cannot run the bundle. */
export class DeviceError extends PhiMoEError {
  override name = "DeviceError";
}

/** A prompt or an option is out of range, or the model was closed. */
export class GenerationError extends PhiMoEError {
  override name = "GenerationError";
}

/** A golden file is missing, damaged, or another checkpoint's. */
export class GoldenError extends PhiMoEError {
  override name = "GoldenError";
}

const KINDS: Record<string, typeof PhiMoEError> = { BundleError, DeviceError, GenerationError, GoldenError };

/** An error on its way from one thread to another, where its class is lost. */
export interface SentError {
  name: string;
  message: string;
}

/** What of an error survives the way. */
export function sentError(error: unknown): SentError {
  return error instanceof Error
    ? { name: error.name, message: error.message }
    : { name: "Error", message: String(error) };
}

/** The error again, of its class if it is one of this file. */
export function receivedError({ name, message }: SentError): Error {
  return new (KINDS[name] ?? Error)(message);
}
