/** The thread that fetches a bundle and runs its graph. */
import { checkGraph } from "phimoe-onnx/core/agreement";
import { Engine } from "phimoe-onnx/core/engine";
import { DeviceError, sentError } from "phimoe-onnx/core/errors";
import type { FromWorker, ToWorker } from "phimoe-onnx/core/protocol";
import { chooseGraph } from "phimoe-onnx/core/session";
import { Tokenizer } from "phimoe-onnx/core/tokenizer";

import { fetchFiles, fetchManifest, type Progress } from "./files.js";
import { bestDevice, type Device, loadRuntime, openSession } from "./session.js";

/** The first message: what to load. */
export interface Load {
  /** The folder's address, with a "/" at its end. */
  bundle: string;
  threads: number | null | undefined;
  device: Device | null | undefined;
}

/** What comes back. */
export type FromWebWorker = FromWorker | { fetched: Progress } | { device: Device };

const post = (message: FromWebWorker) => postMessage(message);
let engine: Engine;

addEventListener("message", async ({ data }: MessageEvent<Load | ToWorker>) => {
  if ("bundle" in data) await load(data).catch((error) => post({ failed: sentError(error) }));
  else await engine.receive(data);
  if (!("close" in data)) return;
  post({ closed: true });
  close(); // frees the session's memory
});

async function load({ bundle, threads, device: wanted }: Load): Promise<void> {
  const manifest = await fetchManifest(bundle);
  const device = wanted ?? (await bestDevice());
  if (device !== "wasm" && device !== "webgpu") throw new DeviceError(`device is ${device}, expected wasm or webgpu`);
  const ort = await loadRuntime(device);
  const withoutNative = "which no browser can run; export it again with --operators stock";
  const graph = chooseGraph(manifest, ort.env.versions.web!, false, withoutNative);
  const first = ["tokenizer.json", graph.file];
  const before = first.reduce((sum, name) => sum + manifest.files[name].size, 0);
  const files = await fetchFiles(bundle, manifest, first, (fetched) => post({ fetched }));
  const bytes = files.get(graph.file)!;
  const names = checkGraph(graph, bytes, manifest, `${bundle}manifest.json`); // only the graph says where its weights are
  const weights = await fetchFiles(bundle, manifest, names, ({ loaded, total }) =>
    post({ fetched: { loaded: before + loaded, total: before + total } }),
  );
  const text = new TextDecoder().decode(files.get("tokenizer.json"));
  const tokenizer = new Tokenizer(text, `${bundle}tokenizer.json`, manifest.decoding);
  const session = await openSession(ort, device, bundle + graph.file, bytes, weights, threads ?? undefined);
  engine = new Engine(session, manifest, tokenizer, post);
  post({ device });
  post({ ready: manifest });
}
