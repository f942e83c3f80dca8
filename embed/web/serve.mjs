// Serves the page and one bundle on this machine: node serve.mjs BUNDLE [PORT]
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const DIST = fileURLToPath(new URL("dist", import.meta.url));
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
// these two make the page cross-origin isolated, without which WebAssembly has one thread
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cache-Control": "no-cache", // ask each time whether a file has changed
};
// what the build writes beside a file, the smallest first
const ENCODINGS = { br: ".br", gzip: ".gz" };

/** A server of the page, with the bundle in the folder `bundle` under /bundle/. */
export function pageServer(bundle) {
  return createServer(async (request, response) => {
    const file = fileOf(request.url, bundle);
    const whole = await lookAt(file);
    if (request.method !== "GET" || !whole) return response.writeHead(404, HEADERS).end("not found\n");
    const { encoding, path, size, mtimeMs } = await smallest(file, whole, request.headers["accept-encoding"] ?? "");
    const headers = { ...HEADERS, Vary: "Accept-Encoding", ETag: `"${size}-${mtimeMs}"` };
    if (request.headers["if-none-match"] === headers.ETag) return response.writeHead(304, headers).end();
    headers["Content-Type"] = TYPES[extname(file)] ?? "application/octet-stream";
    headers["Content-Length"] = size;
    if (encoding) headers["Content-Encoding"] = encoding;
    response.writeHead(200, headers);
    createReadStream(path).pipe(response);
  });
}

async function lookAt(file) {
  const found = await stat(file).catch(() => undefined);
  return found?.isFile() ? found : undefined;
}

/** The file, or the smallest of its compressed forms that the browser takes. */
async function smallest(file, whole, accepted) {
  const takes = accepted.split(",").map((each) => each.split(";")[0].trim());
  for (const [encoding, ending] of Object.entries(ENCODINGS)) {
    const found = takes.includes(encoding) && file.startsWith(DIST) && (await lookAt(file + ending));
    if (found) return { encoding, path: file + ending, size: found.size, mtimeMs: found.mtimeMs };
  }
  return { path: file, size: whole.size, mtimeMs: whole.mtimeMs };
}

function fileOf(url, bundle) {
  try {
    const path = normalize(decodeURIComponent(new URL(url, "http://localhost").pathname)); // never above "/"
    if (path.startsWith("/bundle/")) return join(bundle, path.slice("/bundle".length));
    return join(DIST, path === "/" ? "index.html" : path);
  } catch {
    return ""; // no address
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [bundle, port = "8000"] = process.argv.slice(2);
  if (!bundle) {
    console.error("usage: node serve.mjs BUNDLE [PORT]");
    process.exit(2);
  }
  pageServer(resolve(bundle)).listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${port}`));
}
