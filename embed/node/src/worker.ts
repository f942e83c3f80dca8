/** The thread that loads a bundle and runs its graph. */
import { parentPort, workerData } from "node:worker_threads";

import { Engine } from "./core/engine.js";
import { sentError } from "./core/errors.js";
import type { FromWorker, ToWorker } from "./core/protocol.js";
import { loadBundle } from "./load.js";

const port = parentPort!;
const post = (message: FromWorker) => port.postMessage(message);

try {
  const { folder, threads, operators } = workerData;
  const { manifest, session, tokenizer } = await loadBundle(folder, threads, operators);
  const engine = new Engine(session, manifest, tokenizer, post);
  port.on("message", async (message: ToWorker) => {
    await engine.receive(message);
    if (!("close" in message)) return;
    session.release();
    post({ closed: true });
    port.close();
  });
  post({ ready: manifest });
} catch (error) {
  post({ failed: sentError(error) });
}
