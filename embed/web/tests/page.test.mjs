// The page in a headless Chromium, against what the Python runtime gives. CHROMIUM names another than `chromium`;
// SCREENSHOT a file to write a picture of the page to.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { appendFileSync, cpSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { get } from "node:http";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { after, before, describe, test } from "node:test";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

import { changedBundle } from "../../node/tests/changes.mjs";
import { pageServer } from "../serve.mjs";

const SUITE = new URL("../../../spec/", import.meta.url);
const BUNDLE = fileURLToPath(new URL("bundle", SUITE));
const { cases } = JSON.parse(readFileSync(new URL("cases.json", SUITE), "utf-8"));
const executablePath = find(process.env.CHROMIUM ?? "chromium");
// Chromium's own renderer, on the processor, in the place of a graphics processor
const SOFTWARE_GPU = [
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
  "--enable-features=Vulkan",
  "--use-vulkan=swiftshader",
];

function find(program) {
  try {
    return execFileSync("which", [program], { encoding: "utf-8" }).trim();
  } catch {
    return undefined;
  }
}

function plain({ prompt_tokens, token_ids, text, finish_reason }) {
  return { prompt_tokens, token_ids, text, finish_reason };
}

/** In the page: what a bundle gives, or the error that it ends with. */
async function outcome({ bundle, load, prompt, options }) {
  const { PhiMoE } = await import("/phimoe.js");
  try {
    const model = await PhiMoE.load(bundle, load);
    const generations = await model.generate(prompt ?? "a", options);
    await model.close();
    return { generations };
  } catch ({ name, message }) {
    return { error: name, message };
  }
}

describe("the page", { skip: executablePath ? false : "no chromium here; name one in CHROMIUM" }, () => {
  const server = pageServer(BUNDLE);
  let browser, page, address;
  const errors = [];

  before(async () => {
    await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
    address = `http://127.0.0.1:${server.address().port}/`;
    browser = await chromium.launch({ executablePath, args: ["--no-sandbox", ...SOFTWARE_GPU] });
    page = await newPage({ viewport: { width: 900, height: 640 } });
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(error.message));
    await page.goto(address);
    await page.locator("#send:enabled").waitFor();
  });
  after(async () => {
    await browser?.close();
    server.close();
    assert.deepEqual(errors, []);
  });

  /** A page that a slow machine, too, has time to load. */
  async function newPage(options) {
    const made = await browser.newPage(options);
    made.setDefaultTimeout(300_000);
    return made;
  }

  /** Sends a message with so many new tokens at most; leaves the answer on its way. */
  async function ask(content, tokens) {
    await page.locator("#max_new_tokens").fill(String(tokens));
    await page.locator("#content").fill(content);
    await page.locator("#send").click();
  }

  test("it is cross-origin isolated, and has several threads", async () => {
    assert.equal(await page.evaluate(() => crossOriginIsolated), true);
    assert.match(await page.locator("#machine").textContent(), /^phimoe-austen, int4, loaded .* WebAssembly, threads$/);
  });

  test("it answers as the Python runtime does", async () => {
    const { prompt, options, expected } = cases.find(({ name }) => name === "a chat");
    await ask(prompt[0].content, options.max_new_tokens);
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.equal(await page.locator(".assistant p").last().textContent(), expected.text);
    assert.match(await page.locator("#speed").textContent(), /^\d+\.\d tokens\/s, 16 tokens$/);
  });

  test("stop ends an answer", async () => {
    await ask("Continue this passage: She had been", 700);
    await page
      .locator(".assistant p")
      .last()
      .filter({ hasText: /\w+ \w+/ })
      .waitFor();
    await page.getByRole("button", { name: "Stop" }).click();
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.match(await page.locator("#speed").textContent(), /stopped$/);
    if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT });
    const { prompt, options } = cases.find(({ name }) => name === "a chat");
    await ask(prompt[0].content, options.max_new_tokens);
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.equal(await page.locator(".assistant").count(), 3);
  });

  test("a screen reader hears who speaks, whole answers and errors", async () => {
    const conversation = page.getByRole("log", { name: "Conversation" });
    assert.equal(await conversation.locator("div").count(), 6);
    const said = (await conversation.innerText()).split(/\n+/);
    assert.deepEqual([said[0], said[2]], ["You", "Model"]);
    assert.equal(await conversation.getAttribute("aria-busy"), null); // it was set while the answer came
    assert.match(await page.getByRole("status").innerText(), /phimoe-austen/);
    for (const name of ["Send", "New chat"]) assert.equal(await page.getByRole("button", { name }).count(), 1);
    for (const name of ["Message", "Temperature", "New tokens"])
      assert.equal(await page.getByLabel(name, { exact: true }).count(), 1);

    await ask("And now?", 5000);
    const alert = page.getByRole("alert");
    assert.match(await alert.innerText(), /^Error\s+the conversation has .* max_new_tokens is 5000, .* of 1024/);
    assert.match(await conversation.ariaSnapshot(), /alert:\s+- text: Error/);
    await page.getByRole("button", { name: "Send" }).waitFor();
    await ask("And now?", 300);
    await page.getByRole("button", { name: "Stop" }).waitFor();
    assert.equal(await conversation.getAttribute("aria-busy"), "true");
  });

  test("new chat stops the answer, and forgets what was said", async () => {
    await page.getByRole("button", { name: "New chat" }).click();
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.equal(await page.locator("#log").innerText(), "");
    assert.equal(await page.locator("#speed").textContent(), "");
    assert.equal(await page.evaluate(() => document.activeElement.id), "content");
    const { prompt, options, expected } = cases.find(({ name }) => name === "a chat");
    await ask(prompt[0].content, options.max_new_tokens);
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.deepEqual(await page.locator(".assistant p").allTextContents(), [expected.text]);
  });

  test("an empty field is the option's default", async () => {
    await page.getByRole("button", { name: "New chat" }).click();
    await page.locator("#temperature").fill("");
    const { prompt, options, expected } = cases.find(({ name }) => name === "a chat");
    await ask(prompt[0].content, options.max_new_tokens);
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.deepEqual(await page.locator(".assistant p").allTextContents(), [expected.text]);
  });

  test("WebAssembly comes compressed", async () => {
    const name = "ort-wasm-simd-threaded.wasm";
    const whole = statSync(new URL(`../dist/${name}`, import.meta.url)).size;
    const fetched = async (accepted) => {
      const headers = { "Accept-Encoding": accepted };
      const response = await new Promise((resolve, reject) =>
        get(address + name, { headers }, resolve).on("error", reject),
      );
      response.resume();
      return response.headers;
    };
    const found = [];
    for (const accepted of ["gzip, deflate, br, zstd", "gzip", "", "identity"]) {
      const headers = await fetched(accepted);
      assert.equal(headers["content-type"], "application/wasm");
      assert.equal(headers.vary, "Accept-Encoding");
      found.push([headers["content-encoding"], Number(headers["content-length"]) < whole / 3]);
    }
    assert.deepEqual(found, [["br", true], ["gzip", true], [undefined, false], [undefined, false]]);
    const { encodedBodySize, decodedBodySize } = await page.evaluate(async (name) => {
      await (await fetch(name, { cache: "reload" })).arrayBuffer();
      const entry = performance.getEntriesByType("resource").findLast((each) => each.name.endsWith(name));
      return { encodedBodySize: entry.encodedBodySize, decodedBodySize: entry.decodedBodySize };
    }, name);
    assert.equal(decodedBodySize, whole);
    assert.ok(encodedBodySize < whole / 4, `${encodedBodySize} of ${whole}`);
  });

  test("a reload fetches what has changed, and no more", async (context) => {
    const folder = changedBundle(BUNDLE, []);
    context.after(() => rmSync(folder, { recursive: true }));
    const asked = [];
    const other = pageServer(folder);
    other.on("request", ({ url }, response) => response.on("close", () => asked.push([url, response.statusCode])));
    await new Promise((resolve) => other.listen(0, "127.0.0.1", resolve));
    context.after(() => other.close());
    const home = `http://127.0.0.1:${other.address().port}/`;
    const tab = await newPage();
    context.after(() => tab.close());
    const load = async () => {
      asked.length = 0;
      await tab.goto(home);
      await tab.locator("#send:enabled").waitFor();
      const bundle = asked.filter(([url, status]) => url.startsWith("/bundle/") && status === 200).map(([url]) => url);
      const other = asked.filter(([url]) => !url.startsWith("/bundle/"));
      return { bundle: bundle.map((url) => url.slice("/bundle/".length)).sort(), other };
    };
    const kept = () =>
      tab.evaluate(async () => (await (await caches.open("phimoe-onnx")).keys()).map(({ url }) => url));

    const first = await load();
    assert.ok(first.bundle.length >= 4, String(first.bundle)); // manifest, tokenizer, graph, weights
    const second = await load();
    assert.deepEqual(second.bundle, []); // the manifest, too, is as it was: 304
    assert.ok(second.other.length > 3);
    assert.deepEqual(second.other.filter(([, status]) => status !== 304), []);
    const before = await kept();
    assert.equal(before.length, first.bundle.length - 1);

    appendFileSync(join(folder, "tokenizer.json"), "\n");
    const changed = changedBundle(folder, [["list", "tokenizer.json"]]);
    cpSync(changed, folder, { recursive: true });
    rmSync(changed, { recursive: true });
    assert.deepEqual((await load()).bundle, ["manifest.json", "tokenizer.json"]);
    const after = await kept();
    assert.equal(after.length, before.length); // the old tokenizer is gone
    assert.equal(after.filter((url) => !before.includes(url)).length, 1);

    // what lies in the storage is held against the manifest, too
    const damage = async (url) => (await caches.open("phimoe-onnx")).put(url, new Response("damage"));
    await tab.evaluate(damage, after.at(-1));
    await load();
    assert.ok(asked.some(([url]) => after.at(-1).split("?")[0].endsWith(url)), String(asked));
  });

  test("a full storage is no error", async (context) => {
    const other = pageServer(BUNDLE);
    await new Promise((resolve) => other.listen(0, "127.0.0.1", resolve));
    context.after(() => other.close());
    const origin = `http://127.0.0.1:${other.address().port}`;
    const tab = await newPage();
    context.after(() => tab.close());
    const client = await tab.context().newCDPSession(tab);
    await client.send("Storage.overrideQuotaForOrigin", { origin, quotaSize: 1000 });
    await tab.goto(origin);
    await tab.locator("#send:enabled").waitFor();
    const kept = await tab.evaluate(async () => (await (await caches.open("phimoe-onnx")).keys()).length);
    assert.equal(kept, 0);
  });

  test("every generation of the conformance suite", async () => {
    const generations = cases.filter((each) => each.expected && !each.bundle);
    const answers = await page.evaluate(async (generations) => {
      const { PhiMoE } = await import("/phimoe.js");
      const model = await PhiMoE.load("bundle");
      const answers = [];
      for (const { prompt, batch, options } of generations)
        answers.push(await model.generate(batch ?? prompt, options));
      await model.close();
      return answers;
    }, generations);
    for (const [index, { name, expected }] of generations.entries()) {
      assert.deepEqual([answers[index]].flat().map(plain), [expected].flat(), name);
    }
  });

  test("every changed bundle of the conformance suite", async (context) => {
    // it fetches the graph that it runs, and of the other files those that the graph names
    const unread = ["config.json", "model.onnx"];
    const read = ({ bundle }) =>
      bundle &&
      !(bundle.length && bundle.every(([step, file]) => ["delete", "replace"].includes(step) && unread.includes(file)));
    const changed = cases.filter(read);
    assert.ok(changed.length > 50);
    const bundles = mkdtempSync(join(tmpdir(), "bundles-"));
    const other = pageServer(bundles);
    context.after(() => rmSync(bundles, { recursive: true }));
    context.after(() => other.close());
    await new Promise((resolve) => other.listen(0, "127.0.0.1", resolve));
    const tab = await newPage();
    await tab.goto(`http://127.0.0.1:${other.address().port}/phimoe.js`);
    for (const { name, bundle, load, batch, prompt, options, expected, error, names } of changed) {
      const folder = changedBundle(BUNDLE, bundle, bundles);
      const answer = await tab.evaluate(outcome, {
        bundle: `/bundle/${basename(folder)}`,
        load,
        prompt: batch ?? prompt,
        options,
      });
      rmSync(folder, { recursive: true });
      if (expected)
        assert.deepEqual([answer.generations].flat().map(plain), [expected].flat(), `${name}: ${answer.message}`);
      else {
        assert.equal(answer.error, error, `${name}: ${answer.message}`);
        assert.deepEqual(
          names.filter((each) => !answer.message.includes(each)),
          [],
          `${name}: ${answer.message}`,
        );
      }
    }
    await tab.close();
  });

  test("WebGPU gives the same tokens", async (context) => {
    if (!(await page.evaluate(async () => navigator.gpu?.requestAdapter().then(Boolean))))
      return context.skip("no WebGPU here");
    const { prompt, options, expected } = cases.find(({ name }) => name === "newlines");
    const answer = async ({ prompt, options }) => {
      const { PhiMoE } = await import("/phimoe.js");
      const model = await PhiMoE.load("bundle", { device: "webgpu" });
      const { token_ids } = await model.generate(prompt, options);
      await model.close();
      return [model.device, token_ids];
    };
    assert.deepEqual(await page.evaluate(answer, { prompt, options }), ["webgpu", expected.token_ids]);
  });

  test("a bundle of native operators is refused in a sentence, before its weights come", async (context) => {
    const asked = [];
    const other = pageServer(fileURLToPath(new URL("native/bundle", SUITE)));
    other.on("request", ({ url }) => asked.push(url));
    await new Promise((resolve) => other.listen(0, "127.0.0.1", resolve));
    context.after(() => other.close());
    const tab = await newPage();
    context.after(() => tab.close());
    await tab.goto(`http://127.0.0.1:${other.address().port}/`);
    assert.equal(
      await tab.locator(".error p").textContent(),
      "the bundle needs the native operators, which no browser can run; export it again with --operators stock",
    );
    assert.deepEqual(asked.filter((url) => url.startsWith("/bundle/")), ["/bundle/manifest.json"]);
  });

  test("what is wrong with a bundle is said", async () => {
    const other = await newPage();
    await other.goto(`${address}?bundle=nowhere/`);
    assert.match(
      await other.locator(".error p").textContent(),
      /nowhere\/manifest\.json: is missing, the server says 404/,
    );
    await other.goto(`${address}?device=abacus`);
    assert.match(await other.locator(".error p").textContent(), /device is abacus, expected wasm or webgpu/);
    await other.close();
  });
});
