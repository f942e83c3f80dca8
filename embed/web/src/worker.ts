/** The thread that fetches a bundle and runs its graph. */
import { chooseGraph } from "../../node/src/bundle.js";
import { Engine } from "../../node/src/engine.js";
import { DeviceError, sentError } from "../../node/src/errors.js";
import type { FromWorker, ToWorker } from "../../node/src/protocol.js";
import { Tokenizer } from "../../node/src/tokenizer.js";
import { fetchFiles, fetchManifest, type Progress } from "./files.js";
import { bestDevice, type Device, loadRuntime, openSession } from "./session.js";

/** The first message: what to load. */
export interface Load {
  /** The folder's address, with a "/" at its end. */
  bundle: string;
  threads: number | undefined;
  device: Device | undefined;
}

/** What comes back. */
export type FromWebWorker = FromWorker | { progress: Progress } | { device: Device };

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
  const { file } = chooseGraph(manifest, ort.env.versions.web!, false);
  const weights = Object.keys(manifest.files).filter((name) => name.endsWith(".data"));
  const files = await fetchFiles(bundle, manifest, ["tokenizer.json", file, ...weights], (progress) => post({ progress }));
  const take = (name: string) => {
    const data = files.get(name)!;
    files.delete(name);
    return data;
  };
  const text = new TextDecoder().decode(take("tokenizer.json"));
  const tokenizer = new Tokenizer(text, `${bundle}tokenizer.json`, Object.values(manifest.decoding.hidden_tokens));
  const graph = await openSession(ort, device, bundle + file, take(file), files, threads);
  engine = new Engine(graph, manifest, tokenizer, post);
  post({ device });
  post({ ready: manifest });
}
