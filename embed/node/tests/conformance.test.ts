/** The cases that hold every language's runtime to Python's, token for token. */
import assert from "node:assert/strict";
import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { sample } from "../src/core/sampler.js";
import { TextStream, type Tokenizer } from "../src/core/tokenizer.js";
import { readManifest, readTokenizer } from "../src/files.js";
import { type Generation, PhiMoE } from "../src/index.js";
import { BUNDLE, SUITE } from "./bundle.js";
import { changedBundle } from "./changes.mjs";

const CASES = JSON.parse(readFileSync(join(SUITE, "cases.json"), "utf-8"));

let model: PhiMoE;
let tokenizer: Tokenizer;
before(async () => {
  model = await PhiMoE.load(BUNDLE);
  tokenizer = await readTokenizer(BUNDLE, await readManifest(BUNDLE));
});
after(() => model.close());

function plain({ prompt_tokens, token_ids, text, finish_reason }: Generation) {
  return { prompt_tokens, token_ids, text, finish_reason };
}

/** The error that `run` ends with, checked against the case's kind and the names that its message must hold. */
async function fails(run: Promise<unknown>, expected: { error: string; names: string[] }): Promise<void> {
  await assert.rejects(run, (error: Error) => {
    assert.equal(error.name, expected.error, error.message);
    assert.deepEqual(
      expected.names.filter((name) => !error.message.includes(name)),
      [],
      error.message,
    );
    return true;
  });
}

describe("generation", () => {
  for (const { name, prompt, batch, options, expected } of CASES.cases.filter(
    (each: any) => each.expected && !each.bundle,
  )) {
    test(name, async () => {
      const generated = await model.generate(batch ?? prompt, options);
      assert.deepEqual([generated].flat().map(plain), [expected].flat());
      const streamed: string[] = [expected].flat().map(() => "");
      for await (const piece of model.stream(batch ?? prompt, options)) streamed[piece.row] += piece.text;
      assert.deepEqual(
        streamed,
        [expected].flat().map(({ text }) => text),
      );
    });
  }
});

describe("bad prompts and options", () => {
  for (const each of CASES.cases.filter((each: any) => each.error && !each.bundle)) {
    test(each.name, () => fails(model.generate(each.batch ?? each.prompt, each.options), each));
  }
});

describe("changed bundles", () => {
  for (const each of CASES.cases.filter((each: any) => each.bundle)) {
    test(each.name, async (context) => {
      const folder = changedBundle(BUNDLE, each.bundle);
      context.after(() => rmSync(folder, { recursive: true }));
      if (each.error) return fails(PhiMoE.load(folder, each.load), each);
      const changed = await PhiMoE.load(folder, each.load);
      context.after(() => changed.close());
      assert.deepEqual(
        [await changed.generate(each.batch ?? each.prompt, each.options)].flat().map(plain),
        [each.expected].flat(),
      );
    });
  }
});

test("encodings", () => {
  for (const { text, token_ids } of CASES.encodings)
    assert.deepEqual(tokenizer.encode(text), token_ids, JSON.stringify(text));
});

test("streams", () => {
  for (const { prompt, token_ids, pieces } of CASES.streams) {
    const characters = new TextStream(tokenizer, prompt);
    assert.deepEqual(
      token_ids.map((id: number) => characters.add(id)),
      pieces,
    );
  }
});

test("draws", () => {
  for (const { logits, options, token_ids } of CASES.draws) {
    const sampling = {
      temperature: 0,
      top_k: 0,
      top_p: 1,
      min_p: 0,
      repetition_penalty: 1,
      ...options,
      seed: BigInt(options.seed),
    };
    assert.deepEqual(
      token_ids.map((_: number, step: number) => sample(Float32Array.from(logits), sampling, step)),
      token_ids,
    );
  }
});
