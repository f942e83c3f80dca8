/** Bundles of the native operators, docs/native.md of the repository. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { after, describe, test } from "node:test";

import { chooseGraph } from "../src/core/session.js";
import { readManifest } from "../src/files.js";
import { type Generation, PhiMoE } from "../src/index.js";
import { PACKAGED } from "../src/operators.js";
import { BUNDLE, SUITE } from "./bundle.js";
import { changedBundle } from "./changes.mjs";

const NATIVE = join(SUITE, "native/bundle");
const { cases } = JSON.parse(readFileSync(join(SUITE, "native/cases.json"), "utf-8"));
const PACKAGE = join(import.meta.dirname, "../..");
const unbuilt = existsSync(PACKAGED) ? false : "the native operators were not built: cargo build --release in native/";
const folder = mkdtempSync(join(tmpdir(), "native-"));
after(() => rmSync(folder, { recursive: true }));

function plain({ prompt_tokens, token_ids, text, finish_reason }: Generation) {
  return { prompt_tokens, token_ids, text, finish_reason };
}

/** What the model gives for every case is what is expected. */
async function holds(model: PhiMoE): Promise<void> {
  for (const { name, prompt, batch, options, expected } of cases)
    assert.deepEqual([await model.generate(batch ?? prompt, options)].flat().map(plain), [expected].flat(), name);
}

/** The command of a package beside which no library lies. */
function run(words: string[], environment: NodeJS.ProcessEnv = {}) {
  const bare = join(folder, "package");
  if (!existsSync(bare)) {
    cpSync(join(PACKAGE, "dist/src"), join(bare, "dist/src"), { recursive: true });
    cpSync(join(PACKAGE, "package.json"), join(bare, "package.json"));
    symlinkSync(join(PACKAGE, "node_modules"), join(bare, "node_modules"), "junction");
  }
  const { PHIMOE_OPERATORS: _, ...rest } = process.env;
  const program = join(bare, "dist/src/cli.js");
  return spawnSync(process.execPath, [program, ...words], { encoding: "utf-8", env: { ...rest, ...environment } });
}

describe("with the library", { skip: unbuilt }, () => {
  for (const threads of [1, 2, undefined]) {
    test(`the cases, with threads ${threads}`, async (context) => {
      const model = await PhiMoE.load(NATIVE, { threads });
      context.after(() => model.close());
      await holds(model);
    });
  }
  test("the graph without optional inputs", async (context) => {
    const { graphs } = await readManifest(NATIVE);
    assert.deepEqual(
      graphs.map(({ optional_inputs }) => optional_inputs.length),
      [2, 0],
    );
    const changed = changedBundle(NATIVE, [["remove", "/graphs/0"]], folder);
    const model = await PhiMoE.load(changed, { threads: 1 });
    context.after(() => model.close());
    await holds(model);
  });
  test("two models at once, and one after them", async () => {
    const models = await Promise.all([PhiMoE.load(NATIVE, { threads: 1 }), PhiMoE.load(NATIVE)]);
    await Promise.all(models.map(holds));
    await models[0].close();
    await holds(models[1]);
    await models[1].close();
    await using last = await PhiMoE.load(NATIVE, { operators: PACKAGED });
    await holds(last);
  });
  test("the command, with a library that is named", () => {
    const words = [NATIVE, "Emma", "--max-new-tokens", "3"];
    const option = run([...words, "--operators", PACKAGED]);
    assert.deepEqual([option.status, option.stderr], [0, ""]);
    const variable = run(words, { PHIMOE_OPERATORS: PACKAGED });
    assert.deepEqual([variable.status, variable.stdout], [0, option.stdout]);
    // the option goes before the variable
    assert.equal(run([...words, "--operators", PACKAGED], { PHIMOE_OPERATORS: "nowhere.so" }).stdout, option.stdout);
  });
});

test("without a library it is said in a sentence", () => {
  const { status, stdout, stderr } = run([NATIVE, "Emma"]);
  assert.deepEqual([status, stdout], [1, ""]);
  assert.match(
    stderr,
    /^phimoe-generate: the bundle needs the native operators, which [^\n]*; [^\n]* again with --operators stock\n$/,
  );
  assert.equal(run([BUNDLE, "Emma", "--max-new-tokens", "3"]).status, 0);
});

test("a library that is named and is none", async () => {
  const text = join(folder, "text.so");
  writeFileSync(text, "no library");
  await assert.rejects(PhiMoE.load(NATIVE, { operators: text }), {
    name: "DeviceError",
    message: new RegExp(`model\\.onnx: ONNX Runtime .* cannot load it: .*${basename(text)}`),
  });
  for (const operators of [join(folder, "nowhere.so"), folder, "", "\0", 3, {}, () => 1] as any[]) {
    await assert.rejects(PhiMoE.load(NATIVE, { operators }), {
      name: "DeviceError",
      message: /^operators is .*, where there is no file; expected the path of .*phimoe_operators\./s,
    });
  }
  const { status, stderr } = run([NATIVE, "Emma"], { PHIMOE_OPERATORS: "nowhere.so" });
  assert.equal(status, 1);
  assert.match(stderr, /^phimoe-generate: PHIMOE_OPERATORS is nowhere\.so, where there is no file; [^\n]*\n$/);
});

test("the choice of a graph", async () => {
  const manifest = await readManifest(NATIVE);
  const [first, plain] = manifest.graphs;
  const choose = (optional: boolean, without: string | null, graphs = manifest.graphs) =>
    chooseGraph({ ...manifest, graphs }, "1.30.0", optional, without);
  const why = (words: RegExp) => ({ name: "DeviceError", message: words });
  assert.equal(choose(true, null), first);
  assert.equal(choose(false, null), plain);
  assert.throws(() => choose(true, "it rains"), why(/^the bundle needs the native operators, it rains$/));
  assert.throws(() => choose(false, "it rains"), why(/^the bundle needs the native operators, it rains$/));
  const stock = { ...plain, requires: [] };
  assert.equal(choose(true, "it rains", [first, stock]), stock);
  const newer = { ...first, requires: ["phimoe.native.1", "phimoe.native.2"] };
  assert.equal(choose(true, null, [newer, first]), first);
  assert.throws(() => choose(true, null, [newer]), why(/^the bundle requires phimoe\.native\.2, which this release/));
  assert.throws(() => choose(true, "it rains", [newer]), why(/requires phimoe\.native\.1, phimoe\.native\.2, which/));
});
