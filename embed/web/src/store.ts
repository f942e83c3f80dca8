/** A bundle's files in the browser's own storage, by their hashes, so that a reload fetches the manifest alone. */
import type { File } from "phimoe-onnx/core/bundle";

const NAME = "phimoe-onnx";

/** What an earlier load kept of a file, if it is still what the manifest says. */
export async function recall(path: string, file: File): Promise<Uint8Array<ArrayBuffer> | undefined> {
  try {
    const response = await (await open())?.match(key(path, file));
    if (!response) return undefined;
    const data = new Uint8Array(await response.arrayBuffer());
    return (await hash(data)) === file.sha256 ? data : undefined;
  } catch {
    return undefined; // storage is a help, and no more
  }
}

/** Keeps a file that has the manifest's hash, in place of an earlier one of its name; a full storage keeps nothing. */
export async function keep(path: string, file: File, data: Uint8Array<ArrayBuffer>): Promise<void> {
  try {
    const cache = await open();
    for (const { url } of (await cache?.keys()) ?? []) if (url.split("?")[0] === path) await cache!.delete(url);
    await cache?.put(key(path, file), new Response(data));
  } catch {
    // most likely a QuotaExceededError; the next load fetches the file again
  }
}

/** Browsers have it on https and on this machine, and some windows have not even there. */
async function open(): Promise<Cache | undefined> {
  return "caches" in globalThis ? caches.open(NAME) : undefined;
}

function key(path: string, { sha256 }: File): string {
  return `${path}?sha256=${sha256}`;
}

/** The SHA-256 in hexadecimal. */
export async function hash(data: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
