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
  "Cache-Control": "no-cache",
};

/** A server of the page, with the bundle in the folder `bundle` under /bundle/. */
export function pageServer(bundle) {
  return createServer(async (request, response) => {
    const file = fileOf(request.url, bundle);
    const found = await stat(file).catch(() => undefined);
    if (request.method !== "GET" || !found?.isFile()) return response.writeHead(404, HEADERS).end("not found\n");
    const type = TYPES[extname(file)] ?? "application/octet-stream";
    response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
    createReadStream(file).pipe(response);
  });
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
