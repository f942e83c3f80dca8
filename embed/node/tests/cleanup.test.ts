import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { test } from "node:test";

import { CleanUp, cleanUp } from "../src/core/cleanup.js";
import { Engine } from "../src/core/engine.js";
import type { Generation } from "../src/core/generation.js";
import type { Options } from "../src/core/request.js";
import { uniform } from "../src/core/sampler.js";
import type { Session } from "../src/core/session.js";
import { readManifest, readTokenizer } from "../src/files.js";
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
    const choose = (step: number) => parts[Math.floor(uniform(BigInt(seed), step) * parts.length)];
    const pieces = Array.from({ length: 12 }, (_, step) => choose(step));
    const stream = new CleanUp();
    const streamed = pieces.map((piece) => stream.add(piece)).join("") + stream.finish();
    assert.equal(streamed, cleanUp(pieces.join("")), JSON.stringify(pieces));
  }
});

test("a bundle that asks for it", async (context) => {
  const folder = changedBundle(BUNDLE, [["set", "/decoding/clean_up_tokenization_spaces", true]]);
  context.after(() => rmSync(folder, { recursive: true }));
  const manifest = await readManifest(folder);
  const tokenizer = await readTokenizer(folder, manifest);
  assert.equal(tokenizer.decode(tokenizer.encode("Emma , I said .")), "Emma, I said.");

  const spaced = ` said , "I ' m sure , Emma ! is n't she  ' s" . `;
  const ids = tokenizer.encode(spaced, false);
  const { hidden } = tokenizer;
  assert.ok(ids.length > 20 && !ids.some((id) => hidden.has(id)));
  /** The text of these tokens, which a graph chooses one after the other, by its pieces and as a whole. */
  const answer = async (options: Options): Promise<[string, Generation]> => {
    let place = 0;
    let last: Generation | undefined;
    const pieces: string[] = [];
    const session: Session = {
      inPlace: true,
      run: async (_, { logits }) => void ((logits.data as Float32Array).fill(0)[ids[place++]] = 1),
    };
    await new Promise<void>((end) =>
      new Engine(session, manifest, tokenizer, (message) => {
        if (!("piece" in message)) return end();
        pieces.push(message.piece.text);
        last = message.piece.result ?? undefined;
      }).receive({ call: { id: 1, prompt: "He", options } }),
    );
    return [pieces.join(""), last!];
  };
  const whole = tokenizer.decode([...tokenizer.encode("He", false), ...ids]).slice(2);
  for (let most = 1; most <= ids.length; most++) {
    const [streamed, { text, finish_reason }] = await answer({ max_new_tokens: most });
    assert.equal(finish_reason, "length");
    assert.equal(streamed, text);
    assert.equal(text, tokenizer.decode([...tokenizer.encode("He", false), ...ids.slice(0, most)]).slice(2));
  }
  for (const stop of ["said,", "I'm", "sure, ", "Emma!", "isn't", "she's", '".']) {
    const [streamed, { text, finish_reason }] = await answer({ max_new_tokens: ids.length, stop });
    assert.deepEqual([text, finish_reason], [whole.slice(0, whole.indexOf(stop)), "stop"]);
    assert.equal(streamed, text);
  }
});
