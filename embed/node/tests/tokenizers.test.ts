/**
 * Changed tokenizers: the ids and texts of the library tokenizers, which embed/csharp/tests/make_tokenizers.py wrote
 * down, or an error of this package.
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

import { BundleError } from "../src/core/errors.js";
import { Tokenizer } from "../src/core/tokenizer.js";
import { SUITE } from "./bundle.js";
import { changedValue } from "./changes.mjs";

const FILE = join(SUITE, "../embed/csharp/tests/PhiMoE.Onnx.Tests/tokenizers.json");
const RECORDED = JSON.parse(readFileSync(FILE, "utf-8"));
const PLAIN = { hidden_tokens: {}, clean_up_tokenization_spaces: false };

/** Each text's ids without and with the template, and the texts of the former. */
function results(file: unknown): unknown {
  const tokenizer = new Tokenizer(JSON.stringify(file), "b/tokenizer.json", PLAIN);
  const plain = RECORDED.texts.map((text: string) => tokenizer.encode(text, false));
  const full = RECORDED.texts.map((text: string) => tokenizer.encode(text));
  return [plain, full, plain.map((ids: number[]) => tokenizer.decode(ids))];
}

test("the whole one is read as the library does", () => {
  assert.deepEqual(results(RECORDED.tokenizer), RECORDED.results);
});

test(`${RECORDED.mutants.length} changed ones give the library's ids or an error`, () => {
  let read = 0;
  for (const { steps, results: other } of RECORDED.mutants) {
    const what = JSON.stringify(steps);
    let found;
    try {
      found = results(changedValue(RECORDED.tokenizer, steps));
    } catch (error) {
      assert.ok(error instanceof BundleError, `${what}: ${error}`);
      assert.match(error.message, /^b\/tokenizer\.json: /);
      continue;
    }
    read++;
    // what the library refuses may be read here as if it were whole, since some of it has no use here
    assert.deepEqual(found, other ?? RECORDED.results, what);
  }
  assert.ok(read > 100, `${read} were read`);
});

test("an id that the tokenizer has not is no text", () => {
  const tokenizer = new Tokenizer(JSON.stringify(RECORDED.tokenizer), "b/tokenizer.json", PLAIN);
  const ids = tokenizer.encode("the cat", false);
  assert.equal(tokenizer.decode([...ids, 5000]), "the cat");
  assert.equal(tokenizer.decode([5000]), "");
});
