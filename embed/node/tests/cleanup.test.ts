import assert from "node:assert/strict";
import { test } from "node:test";

import { CleanUp, cleanUp } from "../src/core/cleanup.js";
import { uniform } from "../src/core/sampler.js";
import { readManifest, readTokenizer } from "../src/files.js";
import { PhiMoE } from "../src/index.js";
import { BUNDLE } from "./bundle.js";
import { changedBundle } from "./changes.mjs";

// what transformers 4.57 makes of them
for (const [text, cleaned] of [
  ["Hello , world ! Is it ? Yes .", "Hello, world! Is it? Yes."],
  ["do n't , I 'm , he 's , we 've , they 're", "don't, I'm, he's, we've, they're"],
  ["a ' b", "a'b"],
  ["do n ' t", "don't"],
  ["I  ' m", "I'm"],
  ["...  .  . ", "... . . "],
]) {
  test(JSON.stringify(text), () => assert.equal(cleanUp(text), cleaned));
}

test("a stream is the whole text, however it is cut", () => {
  const parts = [" ", "'", "n", "t", ".", ",", "?", "!", "m", "s", "ve", "re", "a", " n't", " ' ", "  ' s", " n ' t"];
  for (let seed = 0; seed < 2000; seed++) {
    const pieces = Array.from({ length: 12 }, (_, step) => parts[Math.floor(uniform(BigInt(seed), step) * parts.length)]);
    const stream = new CleanUp();
    const streamed = pieces.map((piece) => stream.add(piece)).join("") + stream.finish();
    assert.equal(streamed, cleanUp(pieces.join("")), JSON.stringify(pieces));
  }
});

test("a bundle that asks for it", async (context) => {
  const folder = changedBundle(BUNDLE, [["set", "/decoding/clean_up_tokenization_spaces", true]]);
  const tokenizer = await readTokenizer(folder, await readManifest(folder));
  assert.equal(tokenizer.decode(tokenizer.encode("Emma , I said .")), "Emma, I said.");
  const model = await PhiMoE.load(folder, { threads: 1 });
  context.after(() => model.close());
  const plain = await PhiMoE.load(BUNDLE, { threads: 1 });
  context.after(() => plain.close());
  // "her , and his" again and again; a repetition that the small model takes up
  const prompt = "her , and his . her , and his . her , and his . her , and";
  const options = { max_new_tokens: 24 };
  const spaced = await plain.generate(prompt, options);
  const { text, token_ids } = await model.generate(prompt, options);
  assert.deepEqual(token_ids, spaced.token_ids);
  assert.equal(text, cleanUp(spaced.text));
  assert.notEqual(text, spaced.text);
  let streamed = "";
  for await (const piece of model.stream(prompt, options)) streamed += piece.text;
  assert.equal(streamed, text);
  const stop = text.slice(text.search(/\w[.,]/), text.search(/\w[.,]/) + 2); // a letter and what lost its space
  const stopped = await model.generate(prompt, { ...options, stop });
  assert.equal(stopped.finish_reason, "stop");
  assert.equal(stopped.text, text.slice(0, text.indexOf(stop)));
});
