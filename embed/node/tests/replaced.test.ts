/** A bundle that is replaced while it is loaded: one bundle is loaded, or it is said that it changed. */
import assert from "node:assert/strict";
import fs, { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

import { readManifest, unchanged } from "../src/files.js";
import { loadBundle } from "../src/load.js";
import { BUNDLE } from "./bundle.js";
import { changedBundle } from "./changes.mjs";

const CHANGED = /^.*: was changed while it was read; load it again$/;
const folder = mkdtempSync(join(tmpdir(), "replaced-"));
after(() => rmSync(folder, { recursive: true }));

/** Two bundles that differ in a file, and in how many tokens end a text. */
const OTHER = [
  ["replace", "tokenizer.json", '"version"', '"versioN"'],
  ["list", "tokenizer.json"],
  ["set", "/decoding/eos_token_ids", [1, 2, 3, 4, 5]],
];
const opened = async (bundle: string): Promise<number> => {
  const { manifest, release } = await loadBundle(bundle, 1);
  release();
  return manifest.decoding.eos_token_ids.length;
};

let left = 0;
let call = () => {};
/** Calls a function just before the n-th time from now on that a file is opened or looked at. */
function beforeStep(step: number, what: () => void) {
  left = step;
  call = what;
}
const counted =
  <T extends (...words: any[]) => any>(real: T) =>
  (...words: Parameters<T>): ReturnType<T> => {
    if (left && !--left) call();
    return real(...words);
  };
fs.promises.readFile = counted(fs.promises.readFile) as typeof fs.promises.readFile;
fs.promises.stat = counted(fs.promises.stat) as typeof fs.promises.stat;
fs.createReadStream = counted(fs.createReadStream);
syncBuiltinESMExports();

for (const stays of [true, false]) {
  test(`at any step, while the old one ${stays ? "stays" : "is gone"}`, async () => {
    const counts = { old: 0, new: 0, said: 0 };
    for (let step = 1; ; step++) {
      const parent = mkdtempSync(join(folder, "step-"));
      const output = join(parent, "bundle");
      renameSync(changedBundle(BUNDLE, [], parent), output);
      const other = changedBundle(BUNDLE, OTHER, parent);
      beforeStep(step, () => {
        renameSync(output, join(parent, "aside"));
        renameSync(other, output);
        if (!stays) rmSync(join(parent, "aside"), { recursive: true });
      });
      try {
        counts[(await opened(output)) === 5 ? "new" : "old"]++;
      } catch (error) {
        assert.equal((error as Error).name, "BundleError");
        assert.match((error as Error).message, CHANGED);
        counts.said++;
      }
      rmSync(parent, { recursive: true });
      if (left) break;
    }
    left = 0;
    assert.ok(counts.old >= 1 && counts.new >= 1 && counts.said > 5, JSON.stringify(counts));
  });
}

test("a file that is written over, and gives an error no cause but that", async () => {
  const bundle = changedBundle(BUNDLE, [], folder);
  for (const fails of [false, true]) {
    const load = unchanged(bundle, async () => {
      writeFileSync(join(bundle, "config.json"), "{}");
      if (fails) throw new Error("another");
      return { release() {} };
    });
    if (!fails) await assert.rejects(load, { name: "BundleError", message: CHANGED });
    writeFileSync(join(bundle, "config.json"), " {}");
    if (fails) await assert.rejects(load, { name: "BundleError", message: CHANGED });
  }
});

test("the manifest may be written again meanwhile, as phimoe-verify does", async () => {
  const bundle = changedBundle(BUNDLE, [], folder);
  const found = await unchanged(bundle, async (manifest) => {
    const text = fs.readFileSync(join(bundle, "manifest.json"), "utf-8");
    writeFileSync(join(bundle, "manifest.json"), JSON.stringify({ ...JSON.parse(text), parity: { passed: true } }));
    return { manifest, release() {} };
  });
  assert.deepEqual(found.manifest, await readManifest(bundle));
});

test("an error that has another cause keeps it", async () => {
  const bundle = changedBundle(BUNDLE, [["delete", "tokenizer.json"]], folder);
  await assert.rejects(loadBundle(bundle, 1), { name: "BundleError", message: /tokenizer\.json/ });
});

test("what was opened is freed where the bundle changed", async () => {
  const bundle = changedBundle(BUNDLE, [], folder);
  let freed = 0;
  const load = unchanged(bundle, async () => {
    rmSync(join(bundle, "manifest.json"));
    return { release: () => void freed++ };
  });
  await assert.rejects(load, { message: CHANGED });
  assert.equal(freed, 1);
});
