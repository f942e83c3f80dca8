/**
 * The manifest is an untrusted file: whatever stands in it, a bundle gives its own tokens or one of the library's
 * errors.
 */
import assert from "node:assert/strict";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";

import { Engine } from "../src/core/engine.js";
import type { FromWorker } from "../src/core/protocol.js";
import { uniform } from "../src/core/sampler.js";
import { loadBundle } from "../src/load.js";
import { BUNDLE } from "./bundle.js";
import { changedBundle } from "./changes.mjs";

const MUTANTS = Number(process.env.PHIMOE_MUTANTS ?? 100);
const SEED = 12n;
const KINDS = ["BundleError", "DeviceError", "GenerationError"];
const TEXT = readFileSync(join(BUNDLE, "manifest.json"), "utf-8");
const VALUES = [
  ...[null, true, false, 0, 1, -1, 0.5, 1e9, 2 ** 31 - 1, 2 ** 31, 2 ** 53, 1e308, -0],
  ...["", "1", "cpu", "cuda", "int8", "bfloat16", "1.0", "99.9", "é", "\0", "x".repeat(10_000), "0".repeat(64)],
  ...[".", "..", "../model.data", "/etc/passwd", "a\\b", "config.json", "__proto__", "constructor", "hasOwnProperty"],
  ...[
    [],
    {},
    [[]],
    [null],
    ["x"],
    [0, 1, 2],
    { x: 1 },
    JSON.parse('{"__proto__": 1}'),
    JSON.parse("[".repeat(500) + "]".repeat(500)),
  ],
];
const WORDS = ["9".repeat(5000), "[".repeat(100_000), "{", "}", ",", ":", '"', "NaN", "-", "1e999", "\\u0000", "null"];

const folder = changedBundle(BUNDLE, []);
after(() => rmSync(folder, { recursive: true }));

/** What the bundle in `folder` makes of a prompt, or the name of the error that it ends with. */
async function outcome(): Promise<number[] | string> {
  const tokens: number[] = [];
  try {
    const { manifest, session, tokenizer } = await loadBundle(folder, 1);
    const last = await new Promise<FromWorker>((end) => {
      const engine = new Engine(session, manifest, tokenizer, (message) =>
        "piece" in message ? tokens.push(message.piece.token_id) : end(message),
      );
      engine.receive({
        call: { id: 1, prompt: "It was a fine morning, and Elizabeth", options: { max_new_tokens: 5 } },
      });
    });
    session.release();
    return "error" in last ? last.error.name : tokens;
  } catch (error) {
    return (error as Error).name;
  }
}

/** The choices of one mutant, the same in every run. */
function choices(mutant: number): <T>(list: readonly T[]) => T {
  let step = 0;
  return (list) => list[Math.floor(uniform(SEED + BigInt(mutant), step++) * list.length)];
}

/** The manifest's text with a place of its values changed. */
function mutatedValue(choose: <T>(list: readonly T[]) => T): string {
  const manifest = JSON.parse(TEXT);
  const places: [parent: any, key: string][] = [];
  const visit = (value: any) => {
    if (typeof value !== "object" || value === null) return;
    for (const key of Object.keys(value)) {
      places.push([value, key]);
      visit(value[key]);
    }
  };
  visit(manifest);
  const [parent, key] = choose(places);
  const value = choose([
    () => choose(VALUES),
    () => choose(VALUES),
    () => ((other) => other[0][other[1]])(choose(places)),
    () => undefined,
  ])();
  const name = choose([key, key, key, "__proto__", "constructor", "unknown"]);
  if (name !== key || value === undefined) delete parent[key];
  if (value !== undefined) Object.defineProperty(parent, name, { value, enumerable: true });
  return JSON.stringify(manifest);
}

/** The manifest's text with a place of its characters changed. */
function mutatedText(choose: <T>(list: readonly T[]) => T): string {
  const starts = Array.from(TEXT.matchAll(/[\w"{}[\]:,]+/g), ({ index }) => index);
  const start = choose(starts);
  return TEXT.slice(0, start) + choose(["", ...WORDS]) + TEXT.slice(start + choose([0, 1, 2, 20]));
}

test(`${MUTANTS} mutants`, async () => {
  const expected = await outcome();
  assert.equal(expected.length, 5, String(expected));
  const counts: Record<string, number> = {};
  for (let mutant = 0; mutant < MUTANTS; mutant++) {
    const choose = choices(mutant);
    let text: string;
    try {
      text = choose([mutatedValue, mutatedValue, mutatedValue, mutatedText])(choose);
    } catch {
      continue; // a value that came to hold itself
    }
    writeFileSync(join(folder, "manifest.json"), text);
    const found = await outcome();
    const what = typeof found === "string" ? found : "tokens";
    counts[what] = (counts[what] ?? 0) + 1;
    if (typeof found === "string")
      assert.ok(KINDS.includes(found), `mutant ${mutant} ends in ${found}: ${text.slice(0, 2000)}`);
    else assert.deepEqual(found, expected, `mutant ${mutant}: ${text.slice(0, 2000)}`);
  }
  for (const what of ["tokens", "BundleError"]) assert.ok(counts[what] > 0, JSON.stringify(counts));
});
