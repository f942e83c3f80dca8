/** Who imports whom in src: no circles, and nothing of Node in the core, which runs in browsers, too. */
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { test } from "node:test";

const SOURCE = join(import.meta.dirname, "../../src");
const FILES = readdirSync(SOURCE, { recursive: true, encoding: "utf-8" }).filter((file) => file.endsWith(".ts"));

/** What each file of src imports or exports from, types included; of src's own files the name there. */
const IMPORTS = new Map(
  FILES.map((file) => {
    const found = readFileSync(join(SOURCE, file), "utf-8").matchAll(/^(?:import|export)[^;]*? from "(.+)";$/gm);
    return [
      file,
      Array.from(found, ([, name]) => (name.startsWith(".") ? join(dirname(file), name).replace(/js$/, "ts") : name)),
    ];
  }),
);

test("no module imports itself in a circle", () => {
  const visit = (file: string, path: readonly string[]): void => {
    assert.ok(!path.includes(file), [...path, file].join(" -> "));
    for (const next of IMPORTS.get(file) ?? []) visit(next, [...path, file]);
  };
  assert.ok(IMPORTS.get("core/engine.ts")!.includes("core/decoder.ts"));
  for (const file of FILES) visit(file, []);
});

test("the core imports itself and the tokenizer alone", () => {
  const core = FILES.filter((file) => dirname(file) === "core");
  const outside = core.flatMap((file) => IMPORTS.get(file)!).filter((name) => dirname(name) !== "core");
  assert.deepEqual([...new Set(outside)], ["@huggingface/tokenizers"]);
});

test("the package exports its core", async () => {
  const { Engine } = await import("phimoe-onnx/core/engine");
  assert.equal(Engine, (await import("../src/core/engine.js")).Engine);
});
