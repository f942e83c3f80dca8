/** spec/golden: a golden file, changes to it, and what every language finds with them. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { brief } from "../src/core/report.js";
import { thresholds } from "../src/core/thresholds.js";
import { type Comparison, PhiMoE, type Report } from "../src/index.js";
import { BUNDLE, SUITE } from "./bundle.js";
import { changedBundle } from "./changes.mjs";

const FILE = join(SUITE, "golden/austen.golden");
const { tolerance, limits, cases } = JSON.parse(readFileSync(join(SUITE, "golden/cases.json"), "utf-8"));

let model: PhiMoE;
let folder: string;
before(async () => {
  model = await PhiMoE.load(BUNDLE, { threads: 1 });
  folder = mkdtempSync(join(tmpdir(), "golden-"));
});
after(async () => {
  await model.close();
  rmSync(folder, { recursive: true });
});

/** The golden file with the changes that spec/golden.md describes. */
function changed(changes: [string, ...any[]][]): string {
  let data: Buffer = readFileSync(FILE);
  for (const [step, first, second] of changes) {
    if (step === "replace") data = replaced(data, first, second);
    else if (step === "truncate") data = data.subarray(0, first);
    else if (step === "invert") data[first] ^= 0xff;
    else if (step === "sign") {
      const end = 8 + Number(data.readBigUInt64LE());
      const { golden, sha256 } = JSON.parse(data.toString("utf-8", 8, end)).__metadata__;
      data = replaced(data, sha256, createHash("sha256").update(golden).update(data.subarray(end)).digest("hex"));
    } else assert.fail(step);
  }
  const path = join(folder, "golden");
  writeFileSync(path, data);
  return path;
}

function replaced(data: Buffer, old: string, text: string): Buffer {
  const content = data.toString("latin1"); // a character a byte
  assert.ok(content.includes(old), old);
  const result = Buffer.from(
    content.replace(old, () => text),
    "latin1",
  );
  result.writeBigUInt64LE(result.readBigUInt64LE() + BigInt(text.length - old.length));
  return result;
}

function near(found: number, expected: number, name: string): void {
  assert.ok(Math.abs(found - expected) <= tolerance * expected, `${name} is ${found}, expected ${expected}`);
}

function compared(found: Comparison | null, expected: Comparison | null): void {
  if (!found || !expected) return assert.equal(found, expected);
  assert.equal(found.tokens, expected.tokens);
  for (const name of ["mean_difference", "max_difference", "kl", "top1_agreement"] as const)
    near(found[name], expected[name], name);
}

function check(found: Report, expected: Report): void {
  const { greedy } = found;
  assert.deepEqual([found.tokens, found.windows], [expected.tokens, expected.windows]);
  compared(found.bundle_to_reference, expected.bundle_to_reference);
  compared(found.bundle_to_stored, expected.bundle_to_stored);
  compared(found.stored_to_reference, expected.stored_to_reference);
  assert.deepEqual(Object.keys(found.perplexity), Object.keys(expected.perplexity));
  for (const [name, value] of Object.entries(found.perplexity)) near(value, expected.perplexity[name], name);
  assert.deepEqual({ agreeing: greedy.agreeing, new_tokens: greedy.new_tokens }, expected.greedy);
  const judged = ({ checks }: Report) => checks.map(({ name, passed }) => [name, passed]);
  assert.deepEqual(judged(found), judged(expected));
  for (const [place, { name, measured, limit }] of found.checks.entries()) {
    near(measured, expected.checks[place].measured, name);
    near(limit, expected.checks[place].limit, name);
  }
  assert.equal(found.passed, expected.checks.every(({ passed }) => passed));
}

describe("what Python finds", () => {
  for (const { name, changes, bundle, expected, notes = [] } of cases.filter((each: any) => each.expected)) {
    test(name, async (context) => {
      let other = model;
      if (bundle) {
        const copy = changedBundle(BUNDLE, bundle, folder);
        other = await PhiMoE.load(copy, { threads: 1 });
        context.after(() => other.close());
      }
      const report = await other.verifyGolden(changed(changes));
      check(report, expected);
      assert.deepEqual(
        notes.filter((note: string) => !report.notes.includes(note)),
        [],
      );
    });
  }
});

describe("files that are refused", () => {
  for (const { name, changes, error } of cases.filter((each: any) => each.error)) {
    test(name, async () => {
      const path = changed(changes);
      await assert.rejects(model.verifyGolden(path), (found: Error) => {
        assert.equal(found.name, "GoldenError", found.message);
        assert.ok(found.message.startsWith(`${path}: `), found.message);
        for (const word of error) assert.ok(found.message.includes(word), found.message);
        return true;
      });
    });
  }

  test("a folder, nothing, and no path", async () => {
    for (const [path, words] of [
      [folder, "cannot be read (it is no regular file)"],
      [join(folder, "nowhere"), "cannot be read (ENOENT)"],
      [null, "the golden file is null"],
    ] as [string, string][])
      await assert.rejects(model.verifyGolden(path), (found: Error) => {
        assert.equal(found.name, "GoldenError");
        return found.message.includes(words);
      });
  });
});

test("limits", () => {
  for (const { dtypes, cache, limits: expected } of limits) {
    const found = thresholds(dtypes, cache)!;
    assert.deepEqual(Object.keys(found).sort(), Object.keys(expected).sort());
    for (const [name, limit] of Object.entries(found)) near(limit, expected[name], name);
  }
  assert.equal(thresholds([], "float32"), undefined);
  assert.equal(thresholds(["float32", "odd"], "float32"), undefined);
});

for (const change of [["set", "/weights", 0], ["remove", "/dtype"]]) {
  test(`a manifest that does not say its weights: ${change}`, async (context) => {
    const other = await PhiMoE.load(changedBundle(BUNDLE, [change], folder), { threads: 1 });
    context.after(() => other.close());
    await assert.rejects(other.verifyGolden(FILE), { name: "BundleError", message: /how the weights are stored/ });
  });
}

test("a signal ends it", async () => {
  const control = new AbortController();
  const run = model.verifyGolden(FILE, { signal: control.signal, progress: () => control.abort() });
  await assert.rejects(run, { name: "AbortError" });
  assert.ok((await model.verifyGolden(FILE)).passed);
});

test("figures of three digits, as Python writes them", () => {
  const numbers = [0, 0.1, 0.0430256, 1e-6, 1.2345e-5, 0.00099999, 1970.8, 999.6, 1.05, 100];
  assert.deepEqual(numbers.map(brief), [
    ...["0", "0.1", "0.043", "1e-06", "1.23e-05", "0.001", "1.97e+03", "1e+03", "1.05", "100"],
  ]);
});

test("the command", () => {
  const cli = join(import.meta.dirname, "../src/cli.js");
  const run = (...words: string[]) => spawnSync(process.execPath, [cli, BUNDLE, ...words], { encoding: "utf-8" });
  const passed = run("--golden", FILE);
  assert.deepEqual([passed.status, passed.stderr], [0, ""]);
  for (const line of [
    "40 tokens in 2 windows of up to 34",
    "bundle to reference               5.15e-02      3.12e-01  2.36e-02      90.00%",
    "perplexity: reference 40.2418, stored 40.7871, bundle 41.14",
    "choices of experts that the stored weights leave unchanged: 91.25%",
    "greedy continuations, 9 of 10 tokens equal",
    "kl                  0.0236    0.1  nats   passed",
    "\npassed\n",
  ])
    assert.ok(passed.stdout.includes(line), `${line}\n${passed.stdout}`);
  const failed = run("--golden", changed(cases.find(({ name }: any) => /a third/.test(name)).changes));
  assert.equal(failed.status, 1);
  assert.match(failed.stdout, /\nFAILED\n$/);
  assert.match(failed.stderr, /^phimoe-generate: .*: perplexity_ratio is 3\.07, allowed is 1\.05\n$/);
  assert.equal(run("a prompt", "--golden", FILE).status, 2);
});
