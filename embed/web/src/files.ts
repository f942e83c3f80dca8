import { type File, HASH_LIMIT, type Manifest, parseManifest } from "phimoe-onnx/core/bundle";
import { BundleError } from "phimoe-onnx/core/errors";

import { hash, keep, recall } from "./store.js";

/** How much of a bundle has come. */
export interface Progress {
  /** Bytes. */
  loaded: number;
  /** Bytes. */
  total: number;
}

/**
 * Fetches and checks manifest.json under `bundle`.
 *
 * @param bundle - the folder's address, with a "/" at its end.
 * @throws BundleError: there is no bundle here.
 */
export async function fetchManifest(bundle: string): Promise<Manifest> {
  const path = `${bundle}manifest.json`;
  const response = await get(path);
  return parseManifest(await response.text().catch(brokenOff(path)), path);
}

/**
 * Fetches files of a bundle and holds them against the manifest, in which they are.
 *
 * @throws BundleError: a file is missing, or is not the one that was exported.
 */
export async function fetchFiles(
  bundle: string,
  { files }: Manifest,
  names: readonly string[],
  progress: (progress: Progress) => void,
): Promise<Map<string, Uint8Array<ArrayBuffer>>> {
  const total = names.reduce((sum, name) => sum + files[name].size, 0);
  const fetched = new Map<string, Uint8Array<ArrayBuffer>>();
  let before = 0;
  for (const name of names) {
    const advance = (loaded: number) => progress({ loaded: before + loaded, total });
    fetched.set(name, await fetchFile(bundle + encodeURIComponent(name), files[name], advance));
    before += files[name].size;
  }
  return fetched;
}

/**
 * A file as the manifest says: the size always; the SHA-256 up to `HASH_LIMIT`, and only where the browser computes it,
 * which is on https and on this machine. It comes from the browser's cache where an earlier load left it there.
 */
async function fetchFile(
  path: string,
  file: File,
  progress: (loaded: number) => void,
): Promise<Uint8Array<ArrayBuffer>> {
  const kept = await recall(path, file);
  if (kept) {
    progress(file.size);
    return kept;
  }
  const { size, sha256 } = file;
  const data = allocate(path, size);
  let found = 0;
  const reader = (await get(path)).body!.getReader();
  const read = () => reader.read().catch(brokenOff(path));
  for (let part = await read(); !part.done; part = await read()) {
    if (found + part.value.length <= size) data.set(part.value, found);
    found += part.value.length;
    progress(Math.min(found, size));
  }
  if (found !== size)
    throw new BundleError(`${path}: has ${found} bytes, the manifest says ${size}; copy or export the bundle again`);
  const same = crypto.subtle ? (await hash(data)) === sha256 : undefined;
  if (size <= HASH_LIMIT && same === false) {
    throw new BundleError(
      `${path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again`,
    );
  }
  if (same) await keep(path, file, data);
  return data;
}

function allocate(path: string, size: number): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(size);
  } catch {
    throw new BundleError(
      `${path}: has ${size} bytes, the manifest says, which is more than a browser holds; take a smaller bundle`,
    );
  }
}

async function get(path: string): Promise<Response> {
  let response;
  try {
    response = await fetch(path);
  } catch (error) {
    throw new BundleError(`${path}: cannot be fetched (${(error as Error).message}); is the server running?`);
  }
  if (!response.ok)
    throw new BundleError(`${path}: is missing, the server says ${response.status}; copy or export the bundle again`);
  return response;
}

function brokenOff(path: string) {
  return (error: Error): never => {
    throw new BundleError(`${path}: its transfer broke off (${error.message}); load the bundle again`);
  };
}
