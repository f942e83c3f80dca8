import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { open, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";

import { HASH_LIMIT, type Manifest, parseManifest } from "./core/bundle.js";
import { BundleError, GoldenError } from "./core/errors.js";
import { checkBeginning, GOLDEN_BEGINNING, SAVE_GOLDEN } from "./core/golden.js";
import { Tokenizer } from "./core/tokenizer.js";

/**
 * Reads `folder`/manifest.json.
 *
 * @throws BundleError: there is no bundle here, or its manifest is damaged.
 */
export async function readManifest(folder: string): Promise<Manifest> {
  const path = join(folder, "manifest.json");
  const found = await stat(path).catch(unreadable(path));
  if (!found.isFile()) throw new BundleError(`not a bundle of phimoe-export: ${path}: is no file`); // a pipe never ends
  return parseManifest(await readFile(path, "utf-8").catch(unreadable(path)), path);
}

/**
 * The manifest, for a function that opens the bundle's files by their names: they are all of one bundle then.
 *
 * @throws BundleError: as `readManifest`; or by the end of `open` other files have these names, and whatever it threw
 *   may come of that.
 */
export async function unchanged<T extends { release(): void }>(
  folder: string,
  open: (manifest: Manifest) => Promise<T>,
): Promise<T> {
  const manifest = await readManifest(folder);
  const before = await identities(folder, manifest);
  const check = async () => {
    const now = await readManifest(folder).catch(() => undefined);
    const same = isDeepStrictEqual(now?.files, manifest.files); // other keys may have changed meanwhile
    if (!same || !isDeepStrictEqual(await identities(folder, manifest), before))
      throw new BundleError(`${folder}: was changed while it was read; load it again`);
  };
  const opened = await open(manifest).catch(async (error) => {
    await check();
    throw error;
  });
  await check().catch((error) => {
    opened.release();
    throw error;
  });
  return opened;
}

/** What tells each of the manifest's files from another of the same name; null for none. */
async function identities(folder: string, { files }: Manifest): Promise<(bigint[] | null)[]> {
  const found = [];
  for (const name of Object.keys(files)) {
    const status = await stat(join(folder, name), { bigint: true }).catch(() => null);
    found.push(status && [status.dev, status.ino, status.size, status.mtimeNs]);
  }
  return found;
}

/**
 * Holds every file against the manifest: its size always, its SHA-256 up to `HASH_LIMIT`.
 *
 * @throws BundleError: a file is missing, or it is not the one that was exported.
 */
export async function checkFiles(folder: string, { files }: Manifest): Promise<void> {
  for (const [name, expected] of Object.entries(files)) {
    const path = join(folder, name);
    const found = await stat(path).catch(() => undefined);
    if (!found?.isFile())
      throw new BundleError(`${path}: is missing; the bundle is incomplete, copy or export it again`);
    if (found.size !== expected.size) {
      throw new BundleError(
        `${path}: has ${found.size} bytes, the manifest says ${expected.size}; copy or export the bundle again`,
      );
    }
    if (found.size <= HASH_LIMIT && (await sha256(path)) !== expected.sha256) {
      throw new BundleError(
        `${path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again`,
      );
    }
  }
}

/** Reads `folder`/tokenizer.json; throws BundleError where it is none. */
export async function readTokenizer(folder: string, { decoding }: Manifest): Promise<Tokenizer> {
  const path = join(folder, "tokenizer.json");
  return new Tokenizer(await readFile(path, "utf-8").catch(unreadable(path)), path, decoding);
}

/** Reads a graph's file; throws BundleError where it cannot be read. */
export function readGraph(path: string): Promise<Uint8Array> {
  return readFile(path).catch(unreadable(path));
}

/** The bytes of a golden file, whose beginning is looked at before all of it is read; throws GoldenError. */
export async function readGoldenBytes(path: string): Promise<Uint8Array> {
  const failed = (error: NodeJS.ErrnoException): never => {
    throw new GoldenError(`${path}: cannot be read (${error.code ?? error.message}); give a file of ${SAVE_GOLDEN}`);
  };
  const found = await stat(path).catch(failed);
  if (!found.isFile()) return failed(new Error("it is no regular file")); // a pipe never ends
  const file = await open(path).catch(failed);
  try {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(GOLDEN_BEGINNING), 0, GOLDEN_BEGINNING, 0);
    checkBeginning(buffer.subarray(0, bytesRead), path);
    return await readFile(path);
  } catch (error) {
    if (error instanceof GoldenError) throw error;
    return failed(error as NodeJS.ErrnoException);
  } finally {
    await file.close();
  }
}

function unreadable(path: string) {
  return (error: NodeJS.ErrnoException): never => {
    throw new BundleError(`not a bundle of phimoe-export: ${path}: cannot be read (${error.code ?? error.message})`);
  };
}

async function sha256(path: string): Promise<string> {
  const digest = createHash("sha256");
  try {
    for await (const block of createReadStream(path, { highWaterMark: 2 ** 20 })) digest.update(block);
  } catch (error) {
    return unreadable(path)(error as NodeJS.ErrnoException);
  }
  return digest.digest("hex");
}
