import { availableParallelism } from "node:os";
import { resolve } from "node:path";
import { Worker } from "node:worker_threads";

import { BundleError, GoldenError, receivedError } from "./core/errors.js";
import { checkLoadOptions, Model, type VerifyOptions } from "./core/model.js";
import type { FromWorker } from "./core/protocol.js";
import type { Report } from "./core/report.js";
import { shown } from "./core/schema.js";
import { checkThreads } from "./core/session.js";
import { readGoldenBytes } from "./files.js";
import { findOperators } from "./operators.js";

export { BundleError, DeviceError, GenerationError, GoldenError, PhiMoEError } from "./core/errors.js";
export { reportText } from "./core/report.js";
export type { Manifest } from "./core/bundle.js";
export type { Message } from "./core/chat.js";
export type { Conversation } from "./core/conversation.js";
export type { Generation, Piece } from "./core/generation.js";
export type { VerifyOptions } from "./core/model.js";
export type { Check, Comparison, Report } from "./core/report.js";
export type { CallOptions, Options, Prompt } from "./core/request.js";

/** How a bundle is loaded. */
export interface LoadOptions {
  /** Threads for one operator, from 1 to 256, or to the number of processors where that is more. */
  threads?: number | null;
  /**
   * The path of the native operators' library, for bundles that need it; by default that of PHIMOE_OPERATORS in the
   * environment, else the package's own.
   */
  operators?: string | null;
}

/** A bundle loaded for generation, with a thread of its own; `PhiMoE.load` makes one. */
export class PhiMoE extends Model {
  #bundle = "";

  /**
   * Loads a bundle that phimoe-export wrote.
   *
   * @param bundle - its folder.
   * @throws BundleError: the folder is no bundle, or a file of it is missing or changed.
   * @throws DeviceError: the installed ONNX Runtime cannot run the bundle, `threads` is no number of threads, or
   *   `operators` is no file.
   */
  static async load(bundle: string, options?: LoadOptions | null): Promise<PhiMoE> {
    if (typeof bundle !== "string") throw new BundleError(`the bundle is ${shown(bundle)}, expected its folder's path`);
    checkLoadOptions(options, ["threads", "operators"]);
    const { threads, operators } = options ?? {};
    checkThreads(threads, availableParallelism());
    const workerData = { folder: resolve(bundle), threads, operators: findOperators(operators) };
    // without the program's own flags of Node, of which some fail in a worker
    const worker = new Worker(new URL("./worker.js", import.meta.url), { workerData, execArgv: [] });
    return new Promise((loaded, failed) => {
      let model: PhiMoE;
      worker.on("message", (message: FromWorker) => {
        if ("failed" in message) failed(receivedError(message.failed));
        else if ("ready" in message) {
          model = new PhiMoE(worker, message.ready);
          model.#bundle = bundle;
          loaded(model);
        } else model.receive(message);
      });
      worker.on("error", (error: Error) => (model ? model.fail(error) : failed(error)));
    });
  }

  /**
   * Holds the bundle against what phimoe-verify --save-golden kept of the checkpoint that it came from: runs the same
   * tokens, and judges by the limits of the bundle's precision. Neither the checkpoint nor Python is needed.
   *
   * @param golden - the file, saved with this bundle or with another of the same checkpoint.
   * @throws GoldenError: it is missing, damaged, or another checkpoint's.
   * @throws BundleError: the manifest does not say how the weights are stored.
   */
  async verifyGolden(golden: string, options?: VerifyOptions | null): Promise<Report> {
    if (typeof golden !== "string") throw new GoldenError(`the golden file is ${shown(golden)}, expected its path`);
    return this.verify(await readGoldenBytes(golden), golden, this.#bundle, options);
  }
}
