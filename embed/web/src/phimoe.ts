import { receivedError } from "phimoe-onnx/core/errors";
import { checkLoadOptions, Model } from "phimoe-onnx/core/model";
import { checkThreads } from "phimoe-onnx/core/session";

import type { Progress } from "./files.js";
import type { Device } from "./session.js";
import type { FromWebWorker, Load } from "./worker.js";

export { BundleError, DeviceError, GenerationError, PhiMoEError } from "phimoe-onnx/core/errors";
export type { Conversation } from "phimoe-onnx/core/conversation";
export type { Device } from "./session.js";

/** How a bundle is loaded. */
export interface LoadOptions {
  /** Threads for one operator; if not given, ONNX Runtime takes half of the processor's, at most 4. */
  threads?: number | null;
  /** What runs the graph; if not given, WebGPU where there is one, else WebAssembly. */
  device?: Device | null;
  /** Is told as the bundle comes. */
  progress?: ((progress: Progress) => void) | null;
}

/** A bundle loaded for generation, with a worker of its own; `PhiMoE.load` makes one. */
export class PhiMoE extends Model {
  /** What runs the graph. */
  device: Device = "wasm";

  /**
   * Loads a bundle that phimoe-export wrote.
   *
   * @param bundle - the address of its folder, relative to the page.
   * @throws BundleError: there is no bundle, or a file of it is missing or changed.
   * @throws DeviceError: onnxruntime-web cannot run the bundle, or `threads` or `device` is none.
   */
  static async load(bundle: string, options?: LoadOptions | null): Promise<PhiMoE> {
    checkLoadOptions(options, ["threads", "device", "progress"]);
    const { threads, device, progress } = options ?? {};
    checkThreads(threads, navigator.hardwareConcurrency);
    const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    const folder = new URL(bundle.endsWith("/") ? bundle : `${bundle}/`, document.baseURI).href;
    return new Promise((loaded, failed) => {
      let model: PhiMoE;
      let chosen: Device;
      worker.addEventListener("message", ({ data }: MessageEvent<FromWebWorker>) => {
        if ("fetched" in data) progress?.(data.fetched);
        else if ("device" in data) chosen = data.device;
        else if ("failed" in data) {
          worker.terminate();
          failed(receivedError(data.failed));
        } else if ("ready" in data) {
          model = new PhiMoE(worker, data.ready);
          model.device = chosen;
          loaded(model);
        } else model.receive(data);
      });
      worker.addEventListener("error", ({ message }) => {
        const error = new Error(`the worker ended: ${message}`);
        if (model) model.fail(error);
        else failed(error);
      });
      worker.postMessage({ bundle: folder, threads, device } satisfies Load);
    });
  }
}
