import { resolve } from "node:path";
import { Worker } from "node:worker_threads";

import type { Manifest } from "./bundle.js";
import { Model } from "./model.js";

export type { Manifest } from "./bundle.js";
export type { Message } from "./chat.js";
export type { Conversation } from "./conversation.js";
export { BundleError, DeviceError, GenerationError, PhiMoEError } from "./errors.js";
export type { Generation, Options, Piece } from "./generate.js";
export type { CallOptions } from "./model.js";
export type { Prompt } from "./protocol.js";

/** How a bundle is loaded. */
export interface LoadOptions {
  /** Threads for one operator; left to ONNX Runtime, which takes one a physical core, if not given. */
  threads?: number;
}

/** A bundle loaded for generation, with a thread of its own; `PhiMoE.load` makes one. */
export class PhiMoE extends Model {
  /** The bundle's manifest. */
  manifest!: Manifest;

  /**
   * Loads a bundle that phimoe-export wrote.
   *
   * @param bundle - its folder.
   * @throws BundleError: the folder is no bundle, or a file of it is missing or changed.
   * @throws DeviceError: onnxruntime-node cannot run the bundle.
   */
  static async load(bundle: string, { threads }: LoadOptions = {}): Promise<PhiMoE> {
    const worker = new Worker(new URL("./worker.js", import.meta.url), { workerData: { folder: resolve(bundle), threads } });
    const model = new PhiMoE(worker);
    worker.on("message", (message) => model.receive(message));
    worker.on("error", (error: Error) => model.fail(error));
    model.manifest = await model.loaded;
    return model;
  }
}
