/** What people hand in: refused by name exactly where spec/embedding.md says, or tokens, the same ones each time. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import { uniform } from "../src/core/sampler.js";
import { GenerationError, type Options, PhiMoE } from "../src/index.js";
import { BUNDLE } from "./bundle.js";

const MUTANTS = 300;
const PROMPT = "It was a fine morning, and";
const NUMBERS = [
  ...[0, -0, 1, 0.5, 0.999, 2, 100, 1e-9, 1e-45, 1e-300, 1e-308, 5e-324, 2 ** -126, 1e-30, 9e-31, 1e30, 2e30, 1e308],
  ...[-1, -1e-300, NaN, Infinity, -Infinity, 2048, 2 ** 31, 2 ** 53, null, undefined, "1", true, 3n, [], {}],
];
const STOPS = ["very", ".", " ", "\n", "<|end|>", "\0", "e\u0301", "\ud800", "", null, 3, ["x"]];
const RANGES: Record<string, (value: any) => boolean> = {
  max_new_tokens: (value) => Number.isSafeInteger(value) && value >= 1 && value <= 900,
  temperature: (value) => value >= 0 && value < Infinity,
  top_k: (value) => Number.isSafeInteger(value) && value >= 0,
  top_p: (value) => value > 0 && value <= 1,
  min_p: (value) => value >= 0 && value <= 1,
  repetition_penalty: (value) => value >= 1e-30 && value <= 1e30,
};

let model: PhiMoE;
before(async () => {
  model = await PhiMoE.load(BUNDLE, { threads: 1 });
});
after(() => model.close());

/** One or two options with values of any kind, and the names of those that are wrong. */
function mutant(seed: number): { options: Options; wrong: string[] } {
  let step = 0;
  const choose = <T>(list: readonly T[]): T => list[Math.floor(uniform(BigInt(seed), step++) * list.length)];
  const options: Record<string, unknown> = { max_new_tokens: 3, seed };
  const wrong = new Set<string>();
  for (let count = choose([1, 1, 2]); count > 0; count--) {
    const name = choose([...Object.keys(RANGES), "stop", ...(choose([0, 0, 1]) ? ["unknown"] : [])]);
    const value = name === "stop" ? choose([choose(STOPS), [choose(STOPS)], ["very", choose(STOPS)]]) : choose(NUMBERS);
    options[name] = name === "max_new_tokens" && value == null ? 3 : value;
    wrong.delete(name);
    if (name === "unknown") wrong.add(name);
    else if (name === "stop") {
      const good = (each: unknown) => typeof each === "string" && each !== "" && each !== "\ud800";
      if (value !== null && !(typeof value === "string" ? good(value) : Array.isArray(value) && value.every(good)))
        wrong.add(name);
    } else if (options[name] != null && !(typeof options[name] === "number" && RANGES[name](options[name])))
      wrong.add(name);
  }
  return { options: options as Options, wrong: [...wrong] };
}

test(`${MUTANTS} options`, async () => {
  let refused = 0;
  for (let seed = 1; seed <= MUTANTS; seed++) {
    const { options, wrong } = mutant(seed);
    const what = `mutant ${seed}, wrong: ${wrong}`;
    let found;
    try {
      found = await model.generate(PROMPT, options);
    } catch (error) {
      assert.ok(error instanceof GenerationError, `${what}: ${error}`);
      assert.ok(
        wrong.some((name) => (error as Error).message.includes(name)),
        `${what}: ${error}`,
      );
      refused++;
      continue;
    }
    assert.deepEqual(wrong, [], what);
    assert.ok(found.token_ids.every((id) => id >= 0 && id < 2048) && !found.text.includes("undefined"));
    assert.deepEqual((await model.generate(PROMPT, options)).token_ids, found.token_ids, what);
  }
  assert.ok(refused > 60 && refused < MUTANTS - 60, `${refused} refused`);
});

test("a temperature near nothing is the greedy choice", async () => {
  const greedy = (await model.generate(PROMPT, { max_new_tokens: 20 })).token_ids;
  for (const temperature of [1e-308, 5e-324, 1e-300, 1e-39]) {
    const options = { max_new_tokens: 20, temperature, seed: 3 };
    assert.deepEqual((await model.generate(PROMPT, options)).token_ids, greedy);
    assert.deepEqual((await model.generate(PROMPT, { ...options, top_p: 0.5, min_p: 1, top_k: 9 })).token_ids, greedy);
  }
});

test("null and undefined are as if the option were not given", async () => {
  const expected = (await model.generate(PROMPT, { max_new_tokens: 5 })).token_ids;
  const off = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "signal"];
  for (const value of [null, undefined]) {
    const options = { max_new_tokens: 5, ...Object.fromEntries(off.map((name) => [name, value])) } as Options;
    assert.deepEqual((await model.generate(PROMPT, options)).token_ids, expected);
  }
  assert.equal((await model.generate([5, 6], null as any)).prompt_tokens, 2);
});

describe("what is refused", () => {
  for (const [name, prompt, options, message] of [
    ["an option of another package", "a", { max_tokens: 3 }, /^max_tokens is no option; did you mean max_new_tokens\?/],
    ["one that is like none", "a", { zzz: 3 }, /^zzz is no option; known ones are .*stop/],
    ["options that are none", "a", [], /^the options are a list of 0/],
    ["options that are a number", "a", 3, /^the options are 3/],
    ["a signal that is none", "a", { signal: 3 }, /^signal/],
    ["NaN", "a", { temperature: NaN }, /^temperature is NaN, expected 0/],
    ["a small penalty", "a", { repetition_penalty: 1e-45 }, /^repetition_penalty is 1e-45, expected 1e-30 to 1e30/],
    ["a number as stop", "a", { stop: 3 }, /^stop is 3, expected a string or several/],
    ["an object as stop", "a", { stop: {} }, /^stop is an object/],
    ["null in stop", "a", { stop: ["x", null] }, /^stop holds null, expected strings/],
    ["half a character in stop", "a", { stop: "ab\udc00" }, /^stop holds U\+DC00 at character 2, which is half/],
    ["half a character", "Emma \ud83d", {}, /^the prompt holds U\+D83D at character 5, which is half a character/],
    ["in a row", ["Emma", "\ud83d"], {}, /^prompt 1 holds U\+D83D at character 0/],
    ["in a message", [{ role: "user", content: "\udc12" }], {}, /^the prompt holds U\+DC12/],
    ["null", null, {}, /^the prompt is null, expected a string/],
    ["a number", 3, {}, /^the prompt is 3, expected a string/],
    ["an object", {}, {}, /^the prompt is an object/],
    ["bytes", new Uint8Array([1, 2]), {}, /^the prompt is an object/],
    ["a function", () => 1, {}, /^the prompt holds what is no data/],
    ["a symbol in a batch", ["a", Symbol("x")], {}, /^the prompt holds what is no data/],
    ["null in a batch", ["a", null], {}, /^prompt 1 is null, expected a string/],
    ["null first in a batch", [null, "a"], {}, /^message 0 is null, expected \{ role, content \}/],
    ["null in a row", [[5], [null]], {}, /^message 0 is null/],
    ["null in messages", [{ role: "user", content: "a" }, null], {}, /^message 1 is null, expected \{ role, content/],
    ["null as content", [{ role: "user", content: null }], {}, /^message 0 of role "user": its content is null/],
    ["null as role", [{ role: null, content: "a" }], {}, /^message 0: its role is null, expected one of/],
    ["a role that every object has", [{ role: "toString", content: "a" }], {}, /its role is "toString"/],
    ["an id beyond the rows", [5, 2048], {}, /^the prompt holds 2048, expected token ids from 0 to 2047/],
    ["a negative id", [5, -1], {}, /^the prompt holds -1/],
    ["a large id", [50_000_000], {}, /^the prompt holds 50000000/],
    ["half an id", [1.5], {}, /^the prompt holds 1.5/],
    ["true as an id", [5, true], {}, /^the prompt holds true/],
    ["a hole", [5, , 6], {}, /^the prompt holds missing/],
    ["a row of a batch", [[5], [2048]], {}, /^prompt 1 holds 2048/],
    ["a text far too long", "Emma ".repeat(2_000_000), {}, /^the prompt has 10000000 characters, .* context of 1024/],
  ] as [string, any, any, RegExp][]) {
    test(name, async () => {
      await assert.rejects(model.generate(prompt, options), { name: "GenerationError", message });
      await assert.rejects(
        async () => {
          for await (const _ of model.stream(prompt, options));
        },
        { name: "GenerationError", message },
      );
    });
  }
});

test("a conversation refuses what generate does, and goes on", async () => {
  const conversation = model.chat(null);
  await assert.rejects(conversation.send("\ud800"), {
    name: "GenerationError",
    message: /^the conversation holds U\+D800/,
  });
  await assert.rejects(conversation.send(null as any), { name: "GenerationError", message: /empty/ });
  await assert.rejects(conversation.send(3 as any), { name: "GenerationError", message: /its content is 3/ });
  await assert.rejects(conversation.send("a", { top_q: 1 } as any), { message: /did you mean top_[pk]/ });
  assert.deepEqual(conversation.messages, []);
  assert.ok((await conversation.send("Who is Emma?", { max_new_tokens: 3 })).token_ids.length > 0);
});

for (const threads of [0, -1, 1.5, NaN, 257, 10_000, 1e9, "2", true, 3n, {}, () => 1]) {
  test(`threads ${String(threads)}`, () =>
    assert.rejects(PhiMoE.load(BUNDLE, { threads: threads as any }), {
      name: "DeviceError",
      message: /^threads is .*, expected an integer from 1 to (256|\d{4})/,
    }));
}

test("an option of loading that is none", () =>
  assert.rejects(PhiMoE.load(BUNDLE, { thread: 1 } as any), { name: "DeviceError", message: /^thread is no option/ }));

for (const bundle of [null, undefined, 3, ""]) {
  test(`the folder ${JSON.stringify(bundle)}`, () =>
    assert.rejects(PhiMoE.load(bundle as any), { name: "BundleError" }));
}
