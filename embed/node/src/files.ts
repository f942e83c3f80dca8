import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";

import { HASH_LIMIT, type Manifest, parseManifest } from "./bundle.js";
import { BundleError } from "./errors.js";
import { Tokenizer } from "./tokenizer.js";

/**
 * Reads `folder`/manifest.json and holds every file against it: its size always, its SHA-256 up to `HASH_LIMIT`.
 *
 * @throws BundleError: there is no bundle here, a file is missing, or it is not the one that was exported.
 */
export async function readBundle(folder: string): Promise<{ manifest: Manifest; tokenizer: Tokenizer }> {
  const manifest = parseManifest(await readText(join(folder, "manifest.json")), join(folder, "manifest.json"));
  for (const [name, expected] of Object.entries(manifest.files)) {
    const path = join(folder, name);
    const found = await stat(path).catch(() => undefined);
    if (!found?.isFile()) throw new BundleError(`${path}: is missing; the bundle is incomplete, copy or export it again`);
    if (found.size !== expected.size) {
      throw new BundleError(`${path}: has ${found.size} bytes, the manifest says ${expected.size}; copy or export the bundle again`);
    }
    if (found.size <= HASH_LIMIT && (await sha256(path)) !== expected.sha256) {
      throw new BundleError(`${path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again`);
    }
  }
  const path = join(folder, "tokenizer.json");
  return { manifest, tokenizer: new Tokenizer(await readText(path), path, Object.values(manifest.decoding.hidden_tokens)) };
}

async function readText(path: string): Promise<string> {
  return readFile(path, "utf-8").catch((error) => {
    throw new BundleError(`not a bundle of phimoe-export: ${path}: cannot be read (${error.code ?? error.message})`);
  });
}

async function sha256(path: string): Promise<string> {
  const digest = createHash("sha256");
  for await (const block of createReadStream(path, { highWaterMark: 2 ** 20 })) digest.update(block);
  return digest.digest("hex");
}
