/** The cases that hold every language's runtime to Python's, token for token. */
import assert from "node:assert/strict";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { readBundle } from "../src/files.js";
import { type Generation, PhiMoE } from "../src/index.js";
import { sample } from "../src/sampling.js";
import { TextStream, Tokenizer } from "../src/tokenizer.js";
import { BUNDLE, SUITE } from "./bundle.js";

const CASES = JSON.parse(readFileSync(join(SUITE, "cases.json"), "utf-8"));

let model: PhiMoE;
let tokenizer: Tokenizer;
before(async () => {
  model = await PhiMoE.load(BUNDLE);
  ({ tokenizer } = await readBundle(BUNDLE));
});
after(() => model.close());

function plain({ prompt_tokens, token_ids, text, finish_reason }: Generation) {
  return { prompt_tokens, token_ids, text, finish_reason };
}

/** The error that `run` ends with, checked against the case's kind and the names that its message must hold. */
async function fails(run: Promise<unknown>, expected: { error: string; names: string[] }): Promise<void> {
  await assert.rejects(run, (error: Error) => {
    assert.equal(error.name, expected.error, error.message);
    assert.deepEqual(expected.names.filter((name) => !error.message.includes(name)), [], error.message);
    return true;
  });
}

describe("generation", () => {
  for (const { name, prompt, batch, options, expected } of CASES.cases.filter((each: any) => each.expected)) {
    test(name, async () => {
      const generated = await model.generate(batch ?? prompt, options);
      assert.deepEqual([generated].flat().map(plain), [expected].flat());
      const streamed: string[] = [expected].flat().map(() => "");
      for await (const piece of model.stream(batch ?? prompt, options)) streamed[piece.row] += piece.text;
      assert.deepEqual(streamed, [expected].flat().map(({ text }) => text));
    });
  }
});

describe("bad prompts and options", () => {
  for (const each of CASES.cases.filter((each: any) => each.error && !each.bundle)) {
    test(each.name, () => fails(model.generate(each.batch ?? each.prompt, each.options), each));
  }
});

describe("bad bundles", () => {
  for (const each of CASES.cases.filter((each: any) => each.bundle)) {
    test(each.name, async (context) => {
      const folder = mkdtempSync(join(tmpdir(), "bundle-"));
      context.after(() => rmSync(folder, { recursive: true }));
      cpSync(BUNDLE, folder, { recursive: true });
      const { delete: deleted, replace, manifest } = each.bundle;
      if (deleted) rmSync(join(folder, deleted));
      if (replace) edit(join(folder, replace[0]), (text) => text.replace(replace[1], replace[2]));
      if (manifest) edit(join(folder, "manifest.json"), (text) => JSON.stringify({ ...JSON.parse(text), ...manifest }));
      await fails(PhiMoE.load(folder, each.load), each);
    });
  }
});

function edit(path: string, change: (text: string) => string): void {
  writeFileSync(path, change(readFileSync(path, "utf-8")));
}

test("encodings", () => {
  for (const { text, token_ids } of CASES.encodings) assert.deepEqual(tokenizer.encode(text), token_ids, JSON.stringify(text));
});

test("streams", () => {
  for (const { prompt, token_ids, pieces } of CASES.streams) {
    const characters = new TextStream(tokenizer, prompt);
    assert.deepEqual(token_ids.map((id: number) => characters.add(id)), pieces);
  }
});

test("draws", () => {
  for (const { logits, options, token_ids } of CASES.draws) {
    const sampling = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, ...options, seed: BigInt(options.seed) };
    assert.deepEqual(token_ids.map((_: number, step: number) => sample(Float32Array.from(logits), sampling, step)), token_ids);
  }
});
