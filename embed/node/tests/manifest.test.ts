/**
 * What the conformance cases cannot say of manifests and graphs: JSON of its own kind, names that JavaScript gives a
 * meaning.
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";

import { checkGraph } from "../src/core/agreement.js";
import { parseManifest } from "../src/core/bundle.js";
import type { BundleError } from "../src/core/errors.js";
import { readOnnx } from "../src/core/onnx.js";
import { chooseGraph } from "../src/core/session.js";
import { BUNDLE } from "./bundle.js";

const GRAPH = "model.branches.onnx";
const BYTES = readFileSync(join(BUNDLE, GRAPH));

/** A manifest of version 2 for the suite's bundle, as `change` leaves it. */
function manifest(change: (manifest: any) => unknown = () => {}): string {
  const raw = JSON.parse(readFileSync(join(BUNDLE, "manifest.json"), "utf-8"));
  raw.format_version = 2;
  raw.graphs = [{ file: GRAPH, devices: { cpu: "1.29" }, optional_inputs: [] }];
  change(raw);
  return JSON.stringify(raw);
}

const parsed = (change?: (manifest: any) => unknown) => parseManifest(manifest(change), "b/manifest.json");

function breaks(kind: BundleError["name"], message: RegExp, run: () => unknown): void {
  assert.throws(run, (error: Error) => {
    assert.equal(error.name, kind, error.stack);
    assert.match(error.message, message);
    return true;
  });
}

describe("bad manifests", () => {
  const json = (text: string) => JSON.parse(text);
  for (const [key, change] of [
    ["format_version", (raw) => (raw.format_version = "2")],
    ["format_version", (raw) => (raw.format_version = true)],
    ["format_version", (raw) => delete raw.format_version],
    ["task", (raw) => (raw.task = ["text-generation"])],
    ["graphs", (raw) => (raw.graphs = [])],
    ["graphs", (raw) => (raw.graphs = { 0: raw.graphs[0] })],
    ["graphs\\[0\\]", (raw) => (raw.graphs = [null])],
    ["graphs\\[0\\].devices", (raw) => (raw.graphs[0].devices = {})],
    ["graphs\\[0\\].devices.cpu", (raw) => (raw.graphs[0].devices = { cpu: "1.x" })],
    ["graphs\\[0\\].optional_inputs", (raw) => delete raw.graphs[0].optional_inputs],
    ["graphs\\[0\\].requires", (raw) => (raw.graphs[0].requires = null)],
    ["graphs\\[0\\].file", (raw) => (raw.graphs[0].file = "../model.onnx")],
    ["files has no constructor", (raw) => (raw.graphs[0].file = "constructor")],
    ["files has no __proto__", (raw) => (raw.graphs[0].file = "__proto__")],
    ["files has no tokenizer.json", (raw) => delete raw.files["tokenizer.json"]],
    ["files: a name", (raw) => (raw.files["a/b"] = raw.files["model.data"])],
    ["files: a name", (raw) => (raw.files["a\0"] = raw.files["model.data"])],
    ["files: a name", (raw) => (raw.files["C:a"] = raw.files["model.data"])],
    ["files.model.data.size", (raw) => (raw.files["model.data"].size = 2 ** 53)],
    ["files.model.data.size", (raw) => (raw.files["model.data"].size = -1)],
    ["files.model.data.sha256", (raw) => (raw.files["model.data"].sha256 = "A".repeat(64))],
    ["files.__proto__", (raw) => (raw.files = json('{"__proto__": {"size": "1"}}'))],
    [
      "decoding.cache is missing",
      (raw) => (raw.decoding = json(JSON.stringify(raw.decoding).replace('"cache":', '"__proto__":'))),
    ],
    ["decoding.vocab_size", (raw) => (raw.decoding.vocab_size = 2 ** 31)],
    ["decoding.rope_boundary", (raw) => delete raw.decoding.rope_boundary],
    ["decoding.eos_token_ids\\[1\\]", (raw) => (raw.decoding.eos_token_ids[1] = -1)],
    ["decoding.hidden_tokens.toString", (raw) => (raw.decoding.hidden_tokens = { toString: 0.5 })],
    ["decoding.sampling_graph", (raw) => (raw.decoding.sampling_graph = "..")],
    ["decoding.cache.dtype", (raw) => (raw.decoding.cache.dtype = "constructor")],
    ["decoding.cache.shared", (raw) => (raw.decoding.cache.shared = 1)],
    ["chat.turns.user", (raw) => (raw.chat.turns.user = ["a", "b", "c"])],
    ["chat.turns.__proto__", (raw) => (raw.chat.turns = json('{"__proto__": ["a", 1]}'))],
    ["chat.generation is missing", (raw) => delete raw.chat.generation],
  ] as [string, (raw: any) => unknown][]) {
    test(`${key}, ${change}`, () =>
      breaks("BundleError", new RegExp(`^b/manifest\\.json: .*${key}`), () => parsed(change)));
  }

  test("JSON that is very deep or has very long numbers", () => {
    const deep = "[".repeat(100_000) + "]".repeat(100_000);
    breaks("BundleError", /manifest\.json/, () => parseManifest(deep, "manifest.json"));
    breaks("BundleError", /manifest\.json/, () =>
      parseManifest(manifest().replace("{", `{"unknown": ${deep}, `), "manifest.json"),
    );
    const long = manifest().replace(/"vocab_size":\d+/, `"vocab_size":${"9".repeat(5000)}`);
    breaks("BundleError", /manifest\.json: .*decoding\.vocab_size is Infinity/, () =>
      parseManifest(long, "manifest.json"),
    );
    for (const text of ["", "null", "[]", "3", '"x"', "{}", "\ufeff{}"])
      breaks("BundleError", /manifest\.json/, () => parseManifest(text, "manifest.json"));
  });
});

test("unknown keys are ignored at every level, also where JavaScript gives them a meaning", () => {
  const unknown = JSON.parse('{"__proto__": 1, "constructor": [], "unknown": {}}');
  const found = parsed((raw) => {
    for (const parent of [raw, raw.graphs[0], raw.decoding, raw.decoding.cache, raw.files["model.data"], raw.chat]) {
      for (const key of Object.keys(unknown))
        Object.defineProperty(parent, key, { value: unknown[key], enumerable: true });
    }
  });
  assert.deepEqual(found, parsed());
});

test("names that JavaScript gives a meaning are names as any other", () => {
  const found = parsed((raw) => {
    const entry = raw.files["model.data"];
    raw.files = { ...raw.files, ...JSON.parse(`{"__proto__": ${JSON.stringify(entry)}}`), constructor: entry };
    raw.graphs[0].file = "__proto__";
    raw.chat.turns = JSON.parse('{"__proto__": ["<", ">"]}');
  });
  assert.ok(Object.hasOwn(found.files, "__proto__") && Object.hasOwn(found.files, "constructor"));
  assert.deepEqual(Object.entries(found.chat!.turns), [["__proto__", ["<", ">"]]]);
});

test("a manifest of version 1 is read as one of version 2", () => {
  const version1 = (target: string) => (raw: any) => {
    raw.format_version = 1;
    raw.target = target;
    raw.weights = { experts: "int4, block 32", router: "float32", embeddings: "int8, block 32" };
    raw.graphs = [{ file: GRAPH, minimum_onnxruntime: "1.29", optional_inputs: [] }];
  };
  for (const target of ["cpu", "portable"])
    assert.deepEqual(
      parsed(version1(target)),
      parsed((raw) => (raw.target = target)),
    );
  breaks("DeviceError", /is for cuda, not for cpu/, () => chooseGraph(parsed(version1("cuda")), "1.30.0", true, null));
  breaks("DeviceError", /is for __proto__, not for cpu/, () =>
    chooseGraph(parsed(version1("__proto__")), "1.30.0", true, null),
  );
});

describe("the choice of a graph", () => {
  const graphs = (...graphs: [file: string, devices: object, requires?: string[], optional_inputs?: string[]][]) =>
    parsed((raw) => {
      for (const [file] of graphs) raw.files[file] = raw.files["model.data"];
      raw.graphs = graphs.map(([file, devices, requires, optional_inputs = []]) => ({
        file,
        devices,
        requires,
        optional_inputs,
      }));
    });
  const choose = (manifest: ReturnType<typeof graphs>, optional = true) =>
    chooseGraph(manifest, "1.30.0", optional, null).file;

  test("the first that fits", () => {
    const all = graphs(
      ["a", { cuda: "1.1" }],
      ["b", { cpu: "1.31" }],
      ["c", { cpu: "1.9" }, ["operators/1"]],
      ["d", { cpu: "1.9" }, [], ["x"]],
      ["e", { cpu: "1.30" }],
    );
    assert.equal(choose(all), "d");
    assert.equal(choose(all, false), "e");
  });
  for (const [message, manifest] of [
    [/is for cuda, not for cpu/, graphs(["a", { cuda: "99" }, ["operators/1"]])],
    [
      /requires operators\/1, operators\/2/,
      graphs(["a", { cpu: "99" }, ["operators/1"]], ["b", { cpu: "1" }, ["operators/1", "operators/2"]]),
    ],
    [
      /needs ONNX Runtime 1\.31 or newer/,
      graphs(["a", { cpu: "1.131" }], ["b", { cpu: "1.31" }], ["c", { cpu: "1.1" }, ["operators/1"]]),
    ],
  ] as const) {
    test(String(message), () => breaks("DeviceError", message, () => choose(manifest)));
  }
});

describe("a graph and its manifest", () => {
  const check = (bytes: Uint8Array, change?: (manifest: any) => unknown) => {
    const found = parsed(change);
    return checkGraph(found.graphs[0], bytes, found, "b/manifest.json");
  };
  const renamed = (old: string, text: string) => Buffer.from(BYTES.toString("latin1").replace(old, text), "latin1");

  test("the files of the weights", () => {
    assert.deepEqual(check(BYTES).sort(), ["model.data", "model.scales.data"]);
    for (const name of ["../el.data", "/tmp/a.dat", "other.data", "MODEL.DATA", "model.dat\0", "./odel.dat"]) {
      breaks("BundleError", /^b\/manifest\.json: files has no "/, () => check(renamed("model.data", name)));
    }
  });
  test("external data anywhere in a model", () => {
    const field = (number: number, ...parts: Buffer[]) => {
      const [body, varint] = [
        Buffer.concat(parts),
        (value: number): number[] => (value < 128 ? [value] : [(value & 127) | 128, ...varint(value >> 7)]),
      ];
      return Buffer.concat([Buffer.from([...varint(number * 8 + 2), ...varint(body.length)]), body]);
    };
    const text = (number: number, value: string) => field(number, Buffer.from(value));
    const tensor = (name: string) =>
      Buffer.concat([field(13, text(1, "length"), text(2, "8")), field(13, text(1, "location"), text(2, name))]);
    const node = (...attribute: Buffer[]) => field(1, field(5, ...attribute));
    const model = Buffer.concat([
      field(7, field(5, tensor("initializer")), field(15, field(1, tensor("values")), field(2, tensor("indices")))),
      field(
        7,
        node(field(5, tensor("t"))),
        node(field(10, tensor("tensors"))),
        node(field(22, field(1, tensor("sparse")))),
      ),
      field(
        7,
        node(field(6, field(5, tensor("subgraph")))),
        node(field(11, node(field(23, field(2, tensor("deep")))))),
      ),
      field(25, field(7, field(5, field(5, tensor("function")))), field(11, field(5, tensor("default")))),
    ]);
    const expected = [
      "initializer",
      "values",
      "indices",
      "t",
      "tensors",
      "sparse",
      "subgraph",
      "deep",
      "function",
      "default",
    ];
    assert.deepEqual([...readOnnx(model).locations], expected);
    let nested = field(5, tensor("x"));
    for (let level = 0; level < 60; level++) nested = node(field(6, nested));
    breaks("Error", /inside each other/, () => readOnnx(field(7, nested)));
  });
  test("bytes that are no graph", () => {
    for (const bytes of [[255], [0x3a, 5, 1], [0x7b], [0x80, 0x80, 0x80, 0x80, 0x80, 1]]) {
      assert.throws(() => readOnnx(Uint8Array.from(bytes)), Error);
      assert.deepEqual(check(Uint8Array.from(bytes)), []); // ONNX Runtime's to refuse
    }
    for (const bytes of [BYTES.subarray(0, -1), BYTES.subarray(1)])
      breaks("BundleError", /is no ONNX graph/, () => check(bytes));
  });
  for (const [message, change] of [
    [/num_hidden_layers is 1000000000, the graph has 4/, (raw) => (raw.decoding.cache.num_hidden_layers = 1e9)],
    [/num_hidden_layers is 3, the graph has 4/, (raw) => (raw.decoding.cache.num_hidden_layers = 3)],
    [
      /has 2 in dimension 1 .* decoding\.cache\.num_key_value_heads/,
      (raw) => (raw.decoding.cache.num_key_value_heads = 4),
    ],
    [/has 32 in dimension 3 .* decoding\.cache\.head_dim/, (raw) => (raw.decoding.cache.head_dim = 2 ** 31 - 1)],
    [
      /is float32 in the graph, expected bfloat16, decoding\.cache\.dtype/,
      (raw) => (raw.decoding.cache.dtype = "bfloat16"),
    ],
    [/logits has 2048 .* decoding\.vocab_size/, (raw) => (raw.decoding.vocab_size = 2047)],
    [
      /optional_inputs has rope_length, which has no default/,
      (raw) => (raw.graphs[0].optional_inputs = ["rope_length"]),
    ],
  ] as [RegExp, (raw: any) => unknown][]) {
    test(String(message), () =>
      breaks("BundleError", new RegExp(`^b/manifest\\.json: .*${message.source}`), () => check(BYTES, change)),
    );
  }
  test("inputs and outputs of other names", () => {
    breaks("BundleError", /inputs lack attention_mask/, () =>
      check(Buffer.from(BYTES.toString("latin1").replaceAll("attention_mask", "attention_masc"), "latin1")),
    );
    breaks("BundleError", /outputs lack present\.0\.key/, () =>
      check(Buffer.from(BYTES.toString("latin1").replaceAll("present.0.key", "presenT.0.key"), "latin1")),
    );
  });
});
