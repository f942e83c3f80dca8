import type { Manifest } from "./core/bundle.js";
import type { Tokenizer } from "./core/tokenizer.js";
import { checkFiles, readTokenizer, unchanged } from "./files.js";
import { type NativeSession, openSession } from "./session.js";

/** What a bundle is once it is open. */
export interface Bundle {
  manifest: Manifest;
  session: NativeSession;
  tokenizer: Tokenizer;
  /** Frees the session. */
  release(): void;
}

/** Opens the bundle in a folder, all of it of one bundle; throws as PhiMoE.load does. */
export function loadBundle(
  folder: string,
  threads: number | null | undefined,
  operators?: string,
): Promise<Bundle> {
  return unchanged(folder, async (manifest) => {
    await checkFiles(folder, manifest);
    const tokenizer = await readTokenizer(folder, manifest);
    const session = await openSession(folder, manifest, threads, operators);
    return { manifest, session, tokenizer, release: () => session.release() };
  });
}
