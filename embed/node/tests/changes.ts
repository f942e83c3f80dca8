import { createHash } from "node:crypto";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** spec of the repository. */
export const SUITE = join(import.meta.dirname, "../../../../spec");
export const BUNDLE = join(SUITE, "bundle");

/** A change to a bundle, as spec/embedding.md describes it. */
export type Change = [step: string, ...values: any[]];

/** A copy of the conformance suite's bundle with these changes, done one after the other. */
export function changedBundle(changes: readonly Change[]): string {
  const folder = mkdtempSync(join(tmpdir(), "bundle-"));
  cpSync(BUNDLE, folder, { recursive: true });
  for (const [step, ...values] of changes) STEPS[step](folder, ...values);
  return folder;
}

const STEPS: Record<string, (folder: string, ...values: any[]) => void> = {
  delete: (folder, file) => rmSync(join(folder, file)),
  copy: (folder, file, copy) => cpSync(join(folder, file), join(folder, copy)),
  replace: (folder, file, old, text) => replaceBytes(false, join(folder, file), old, text),
  "replace all": (folder, file, old, text) => replaceBytes(true, join(folder, file), old, text),
  set: (folder, pointer, value) => editManifest(folder, pointer, (parent, key) => put(parent, key, value)),
  remove: (folder, pointer) => editManifest(folder, pointer, remove),
  list(folder, file) {
    const bytes = readFileSync(join(folder, file));
    const entry = { size: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex") };
    editManifest(folder, `/files/${file.replaceAll("~", "~0").replaceAll("/", "~1")}`, (parent, key) => put(parent, key, entry));
  },
};

function replaceBytes(everywhere: boolean, path: string, old: string, text: string): void {
  const [before, after] = [old, text].map((each) => Buffer.from(each).toString("latin1")); // a character a byte
  const content = readFileSync(path, "latin1");
  writeFileSync(path, everywhere ? content.replaceAll(before, () => after) : content.replace(before, () => after), "latin1");
}

/** `change` sees what holds the place that a JSON pointer (RFC 6901) names, and the place's key there. */
function editManifest(folder: string, pointer: string, change: (parent: any, key: string) => void): void {
  const path = join(folder, "manifest.json");
  const manifest = JSON.parse(readFileSync(path, "utf-8"));
  const keys = pointer.split("/").slice(1).map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
  change(keys.slice(0, -1).reduce((value, key) => value[key], manifest), keys[keys.length - 1]);
  writeFileSync(path, JSON.stringify(manifest));
}

/** An assignment would make "__proto__" no key; "-" is the place behind a list's last. */
function put(parent: any, key: string, value: unknown): void {
  if (Array.isArray(parent)) parent[key === "-" ? parent.length : Number(key)] = value;
  else Object.defineProperty(parent, key, { value, enumerable: true, configurable: true, writable: true });
}

function remove(parent: any, key: string): void {
  if (Array.isArray(parent)) parent.splice(Number(key), 1);
  else delete parent[key];
}
