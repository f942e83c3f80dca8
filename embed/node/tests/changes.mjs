// The changes of a bundle that spec/embedding.md describes; embed/web's test makes them, too.
import { createHash } from "node:crypto";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/**
 * A copy of a bundle with these changes, done one after the other.
 *
 * @param {string} bundle - its folder.
 * @param {readonly any[][]} changes - lists of a step's name and what it is done with.
 * @param {string} parent - where to put the copy.
 * @returns {string} the copy's folder.
 */
export function changedBundle(bundle, changes, parent = tmpdir()) {
  const folder = mkdtempSync(join(parent, "bundle-"));
  cpSync(bundle, folder, { recursive: true });
  for (const [step, ...values] of changes) STEPS[step](folder, ...values);
  return folder;
}

const STEPS = {
  delete: (folder, file) => rmSync(join(folder, file)),
  copy: (folder, file, copy) => cpSync(join(folder, file), join(folder, copy)),
  replace: (folder, file, old, text) => editBytes(join(folder, file), old, text, "replace"),
  "replace all": (folder, file, old, text) => editBytes(join(folder, file), old, text, "replaceAll"),
  set: (folder, pointer, value) => editManifest(folder, pointer, (parent, key) => put(parent, key, value)),
  remove: (folder, pointer) => editManifest(folder, pointer, remove),
  list(folder, file) {
    const bytes = readFileSync(join(folder, file));
    const entry = { size: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex") };
    editManifest(folder, "/files/", (files) => put(files, file, entry));
  },
};

function editBytes(path, old, text, method) {
  const [before, after] = [old, text].map((each) => Buffer.from(each).toString("latin1")); // a character a byte
  writeFileSync(
    path,
    readFileSync(path, "latin1")[method](before, () => after),
    "latin1",
  );
}

/**
 * A copy of a JSON value with these changes, done one after the other.
 *
 * @param {any} value
 * @param {readonly any[][]} steps - ["set", path, value] or ["remove", path], a path being keys and places.
 */
export function changedValue(value, steps) {
  const changed = structuredClone(value);
  for (const [step, path, ...values] of steps) {
    const parent = path.slice(0, -1).reduce((inner, key) => inner[key], changed);
    if (step === "set") put(parent, path[path.length - 1], structuredClone(values[0]));
    else remove(parent, path[path.length - 1]);
  }
  return changed;
}

/** `change` is given what holds the place that a JSON pointer (RFC 6901) names, and the place's key there. */
function editManifest(folder, pointer, change) {
  const path = join(folder, "manifest.json");
  const manifest = JSON.parse(readFileSync(path, "utf-8"));
  const keys = pointer
    .split("/")
    .slice(1)
    .map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
  change(
    keys.slice(0, -1).reduce((value, key) => value[key], manifest),
    keys[keys.length - 1],
  );
  writeFileSync(path, JSON.stringify(manifest));
}

function put(parent, key, value) {
  if (Array.isArray(parent)) parent[key === "-" ? parent.length : Number(key)] = value;
  // an assignment would make "__proto__" no key
  else Object.defineProperty(parent, key, { value, enumerable: true, configurable: true, writable: true });
}

function remove(parent, key) {
  if (Array.isArray(parent)) parent.splice(Number(key), 1);
  else delete parent[key];
}
