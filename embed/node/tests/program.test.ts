/** The command, and what a whole process leaves. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, realpathSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";

import { PhiMoE } from "../src/index.js";
import { BUNDLE, SUITE } from "./bundle.js";

const CLI = join(import.meta.dirname, "../src/cli.js");
const CASES = JSON.parse(readFileSync(join(SUITE, "cases.json"), "utf-8")).cases;

function run(words: string[], environment: NodeJS.ProcessEnv = process.env) {
  return spawnSync(process.execPath, [CLI, ...words], { encoding: "utf-8", env: environment });
}

function scratch(context: TestContext): string {
  const folder = mkdtempSync(join(tmpdir(), "phimoe-"));
  context.after(() => rmSync(folder, { recursive: true }));
  return folder;
}

test("--help names every option", () => {
  const { status, stdout, stderr } = run(["--help"]);
  assert.deepEqual([status, stderr], [0, ""]);
  assert.match(stdout, /^usage: phimoe-generate BUNDLE PROMPT/);
  for (const name of ["chat", "system", "max-new-tokens", "temperature", "top-k", "top-p", "min-p", "seed", "stop"])
    assert.match(stdout, new RegExp(`--${name} `));
});

test("it writes what generate gives", () => {
  const { prompt, options, expected } = CASES.find(({ name }: any) => name === "a chat");
  const words = [BUNDLE, prompt[0].content, "--chat", "--max-new-tokens", String(options.max_new_tokens)];
  assert.deepEqual(run(words).stdout, `${expected.text}\n`);
});

test("--system is a system message", () => {
  const { prompt, options, expected } = CASES.find(({ name }: any) => name === "a chat with a system message");
  const [system, user] = prompt;
  const words = [BUNDLE, user.content, "--system", system.content, `--max-new-tokens=${options.max_new_tokens}`];
  assert.deepEqual(run(words).stdout, `${expected.text}\n`);
});

for (const [words, status, message] of [
  [["--threads"], 2, /'--threads <value>' argument missing/],
  [["--stop"], 2, /'--stop <value>' argument missing/],
  [["--system"], 2, /'--system <value>' argument missing/],
  [["--max-tokens", "3"], 2, /unknown option --max-tokens; did you mean --max-new-tokens\?/],
  [["--zzz"], 2, /Unknown option '--zzz'/],
  [["--temperature", "warm"], 2, /--temperature is "warm", expected a number/],
  [["--seed", "1.5"], 2, /--seed is "1.5", expected an integer/],
  [["more"], 2, /3 arguments, expected two/],
  [["--temperature=-1"], 1, /temperature is -1, expected 0/],
  [["--threads", "1000000"], 1, /threads is 1000000, expected an integer from 1 to/],
] as [string[], number, RegExp][]) {
  test(words.join(" "), () => {
    const done = run([BUNDLE, "Emma", ...words]);
    assert.deepEqual([done.status, done.stdout], [status, ""]);
    assert.match(done.stderr, message);
    assert.doesNotMatch(done.stderr, /\n {4}at /);
  });
}

test("a full disk is said", { skip: process.platform !== "linux" }, () => {
  const command = `"${process.execPath}" "${CLI}" "${BUNDLE}" Emma --max-new-tokens 3 > /dev/full`;
  const { status, stderr } = spawnSync("sh", ["-c", command], { encoding: "utf-8" });
  assert.equal(status, 1);
  assert.match(stderr, /^phimoe-generate: standard output cannot be written \(ENOSPC[^\n]*\n$/);
});

test("a reader that leaves ends it quietly", { skip: process.platform === "win32" }, () => {
  const command = `"${process.execPath}" "${CLI}" "${BUNDLE}" Emma --max-new-tokens 300 | head -c 1`;
  assert.deepEqual(spawnSync("sh", ["-c", command], { encoding: "utf-8" }).stderr, "");
});

for (const [setting, leaves] of [
  [undefined, []],
  ["0", [".cache"]], // the user's own wish; and what shows that a file would appear
] as const) {
  test(`a home with ORT_DISABLE_TELEMETRY=${setting}`, { skip: process.platform !== "linux" }, (context) => {
    const home = scratch(context);
    // no CI, GITHUB_ACTIONS or the like: where one is set, ONNX Runtime keeps its telemetry off by itself
    const environment = { PATH: process.env.PATH, HOME: home, ...(setting && { ORT_DISABLE_TELEMETRY: setting }) };
    // it is written in the background, and a run may end before
    for (let runs = 0; runs < 20 && (!runs || readdirSync(home).length !== leaves.length); runs++)
      assert.equal(run([BUNDLE, "Emma", "--max-new-tokens", "3"], environment).status, 0);
    assert.deepEqual(readdirSync(home), leaves);
  });
}

test("a bundle of links, as a hub's cache has it", async (context) => {
  const folder = scratch(context);
  for (const name of readdirSync(BUNDLE)) symlinkSync(realpathSync(join(BUNDLE, name)), join(folder, name));
  const { prompt, options, expected } = CASES.find(({ name }: any) => name === "greedy");
  const model = await PhiMoE.load(folder, { threads: 1 });
  context.after(() => model.close());
  assert.deepEqual((await model.generate(prompt, options)).token_ids, expected.token_ids);
});
