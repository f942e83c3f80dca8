import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { after, before, test } from "node:test";

import { Engine } from "../src/core/engine.js";
import type { Session } from "../src/core/session.js";
import { readManifest, readTokenizer } from "../src/files.js";
import { GenerationError, type Piece, PhiMoE } from "../src/index.js";
import { openSession } from "../src/session.js";
import { BUNDLE } from "./bundle.js";

const PROMPT = "It was a fine morning, and Elizabeth";

let model: PhiMoE;
before(async () => {
  model = await PhiMoE.load(BUNDLE, { threads: 1 });
});
after(() => model.close());

/** Ids of no text in particular. */
function ids(length: number): number[] {
  return Array.from({ length }, (_, place) => 300 + ((7 * place) % 1500));
}

async function all(pieces: AsyncIterable<Piece>): Promise<Piece[]> {
  const list = [];
  for await (const piece of pieces) list.push(piece);
  return list;
}

test("a stream is the generation piece by piece", async () => {
  const generation = await model.generate(PROMPT, { max_new_tokens: 12 });
  const pieces = await all(model.stream(PROMPT, { max_new_tokens: 12 }));
  assert.deepEqual(
    pieces.map((piece) => piece.token_id),
    generation.token_ids,
  );
  assert.deepEqual(
    pieces.map(({ result }) => result?.text),
    [...Array(11).fill(undefined), generation.text],
  );
  assert.ok(generation.seconds >= generation.first_token_seconds && generation.tokens_per_second > 0);
});

test("calls that overlap answer as if alone", async () => {
  const prompts = [PROMPT, ids(300), ids(7)];
  const options = { max_new_tokens: 20, temperature: 0.8, seed: 3n };
  const alone = [];
  for (const prompt of prompts) alone.push((await model.generate(prompt, options)).token_ids);
  const together = await Promise.all(prompts.map((prompt) => model.generate(prompt, options)));
  assert.deepEqual(
    together.map((each) => each.token_ids),
    alone,
  );
});

test("the event loop turns while a prompt is computed", async () => {
  let turns = 0;
  const timer = setInterval(() => turns++, 1);
  await model.generate(ids(1000), { max_new_tokens: 1 });
  clearInterval(timer);
  assert.ok(turns >= 3, `${turns} turns`); // two chunks would leave room for one or two
});

test("without a seed each row has its own", async () => {
  const options = { max_new_tokens: 16, temperature: 100 }; // so hot that two draws never agree by chance
  const [first, second] = await model.generate(["a", "a"], options);
  assert.notDeepEqual(first.token_ids, second.token_ids);
});

test("a signal ends a generation with its reason", async () => {
  const control = new AbortController();
  const reason = new Error("enough");
  const pieces: Piece[] = [];
  await assert.rejects(async () => {
    for await (const piece of model.stream(PROMPT, { max_new_tokens: 900, signal: control.signal })) {
      if (pieces.push(piece) === 3) control.abort(reason);
    }
  }, reason);
  assert.ok(pieces.length < 900);
  await assert.rejects(model.generate(PROMPT, { signal: AbortSignal.abort() }), { name: "AbortError" });
  assert.equal((await model.generate(PROMPT, { max_new_tokens: 2 })).token_ids.length, 2);
});

test("a conversation answers as its messages would, and keeps what was said", async () => {
  const conversation = model.chat("Be brief.");
  const options = { max_new_tokens: 12 };
  const first = await conversation.send("Who is Emma?", options);
  const messages = [...conversation.messages, { role: "user", content: "And Anne?" }];
  assert.deepEqual(messages[2], { role: "assistant", content: first.text });
  const [second, same] = await Promise.all([
    conversation.send("And Anne?", options),
    model.generate(messages, options),
  ]);
  assert.equal(second.text, same.text);
  assert.equal(second.prompt_tokens, same.prompt_tokens);

  conversation.reset();
  assert.deepEqual(conversation.messages, [{ role: "system", content: "Be brief." }]);
  let answer = "";
  for await (const piece of conversation.stream("Who is Emma?", { max_new_tokens: 300 })) {
    await assert.rejects(conversation.send("And now?"), /still answering/);
    answer += piece.text;
    if (answer.length > 9) break;
  }
  assert.deepEqual(conversation.messages.at(-1), { role: "assistant", content: answer });
  conversation.reset();
  assert.equal((await conversation.send("Who is Emma?", options)).text, first.text);
  await assert.rejects(conversation.send(""), GenerationError);
  conversation.close();
});

test("a cache that grows gives what one that is written in place gives", async () => {
  const manifest = await readManifest(BUNDLE);
  const tokenizer = await readTokenizer(BUNDLE, manifest);
  const session = await openSession(BUNDLE, manifest, 1);
  const answers = async (session: Session) => {
    const tokens: number[][] = [];
    let done = () => {};
    const engine = new Engine(session, manifest, tokenizer, (message) => {
      if ("piece" in message) (tokens[message.piece.row] ??= []).push(message.piece.token_id);
      else done();
    });
    // the last call goes back in its conversation, behind the first prompt's common part
    const prompts = [[ids(250), ids(3), ids(256)], ids(40), [...ids(30), 5, 6, 7]];
    for (const [id, prompt] of prompts.entries()) {
      const ended = new Promise<void>((resolve) => (done = resolve));
      engine.receive({ call: { id, prompt, options: { max_new_tokens: 9 }, conversation: id ? 1 : undefined } });
      await ended;
    }
    return tokens;
  };
  const inPlace = await answers(session);
  assert.deepEqual(
    inPlace.map((row) => row.length),
    [27, 9, 9],
  );
  assert.deepEqual(await answers({ ...session, inPlace: false }), inPlace);
  session.release();
});

test("logits that are not finite are an error", async () => {
  const manifest = await readManifest(BUNDLE);
  const tokenizer = await readTokenizer(BUNDLE, manifest);
  const session: Session = {
    inPlace: true,
    run: async (_, outputs) => void (outputs.logits.data as Float32Array).fill(NaN),
  };
  const reply = new Promise((post) =>
    new Engine(session, manifest, tokenizer, post).receive({ call: { id: 1, prompt: "a", options: {} } }),
  );
  const message = "the graph's logits are not finite; check the bundle with phimoe-verify";
  assert.deepEqual(await reply, { id: 1, error: { name: "GenerationError", message } });
});

for (const [name, prompt, options, message] of [
  ["an unknown option", "a", { maxNewTokens: 1 }, /maxNewTokens.*max_new_tokens/],
  ["an option that is no number", "a", { temperature: "0.8" }, /temperature is "0.8"/],
  ["a stop that is no string", "a", { stop: [3] }, /stop/],
  ["a seed that a number does not hold", "a", { seed: 2 ** 60 }, /seed.*bigint/],
  ["no prompt", undefined, {}, /the prompt is missing/],
  ["a role that the format does not know", [{ role: "tool", content: "x" }], {}, /"tool".*system, user, assistant/],
  ["a message without content", [{ role: "user" }], {}, /user.*content/],
] as const) {
  test(name, () => assert.rejects(model.generate(prompt as any, options as any), { name: "GenerationError", message }));
}

test("a closed model ends what is running and says so", async () => {
  const other = await PhiMoE.load(BUNDLE, { threads: 1 });
  const running = other.generate(PROMPT, { max_new_tokens: 900 });
  running.catch(() => {});
  await other.close();
  await assert.rejects(running, /closed/);
  await assert.rejects(other.generate(PROMPT), /closed/);
  await other.close();
});

test("a program ends without a close", () => {
  const program = `
    const { PhiMoE } = await import(${JSON.stringify(new URL("../src/index.js", import.meta.url))});
    const model = await PhiMoE.load(${JSON.stringify(BUNDLE)});
    console.log((await model.generate("a", { max_new_tokens: 2 })).token_ids.length);`;
  assert.equal(execFileSync(process.execPath, ["--input-type=module", "-e", program], { encoding: "utf-8" }), "2\n");
});
