import { HASH_LIMIT, type Manifest, parseManifest } from "../../node/src/bundle.js";
import { BundleError } from "../../node/src/errors.js";

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
  return parseManifest(await (await get(path)).text(), path);
}

/**
 * Fetches files of a bundle and holds them against the manifest: the size always; the SHA-256 up to `HASH_LIMIT`, and only
 * where the browser computes it, which is on https and on this machine.
 *
 * @throws BundleError: a file is missing, or is not the one that was exported.
 */
export async function fetchFiles(
  bundle: string,
  manifest: Manifest,
  names: readonly string[],
  progress: (progress: Progress) => void,
): Promise<Map<string, Uint8Array<ArrayBuffer>>> {
  const expected = (name: string) => {
    if (!manifest.files[name]) throw new BundleError(`${bundle}manifest.json: its files section has no ${name}; export the bundle again`);
    return manifest.files[name];
  };
  const total = names.reduce((sum, name) => sum + expected(name).size, 0);
  const files = new Map<string, Uint8Array<ArrayBuffer>>();
  let before = 0;
  for (const name of names) {
    const { size, sha256 } = expected(name);
    const data = new Uint8Array(size);
    let found = 0;
    const reader = (await get(bundle + name)).body!.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (found + part.value.length <= size) data.set(part.value, found);
      found += part.value.length;
      progress({ loaded: before + Math.min(found, size), total });
    }
    if (found !== size) throw new BundleError(`${bundle}${name}: has ${found} bytes, the manifest says ${size}; copy or export the bundle again`);
    if (size <= HASH_LIMIT && crypto.subtle && (await hash(data)) !== sha256) {
      throw new BundleError(`${bundle}${name}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again`);
    }
    files.set(name, data);
    before += size;
  }
  return files;
}

async function get(path: string): Promise<Response> {
  let response;
  try {
    response = await fetch(path);
  } catch (error) {
    throw new BundleError(`${path}: cannot be fetched (${(error as Error).message}); is the server running?`);
  }
  if (!response.ok) throw new BundleError(`${path}: is missing, the server says ${response.status}; copy or export the bundle again`);
  return response;
}

async function hash(data: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
