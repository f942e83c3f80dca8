// Puts everything that the page needs into dist/: its scripts, index.html and ONNX Runtime's files, and beside each its
// compressed forms, .br and .gz.
import { copyFile, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { brotliCompress, constants, gzip } from "node:zlib";

import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const runtime = ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"].flatMap((name) => [
  `${name}.mjs`,
  `${name}.wasm`,
]); // the second has WebGPU

await rm(`${here}dist`, { recursive: true, force: true });
await build({
  absWorkingDir: here,
  entryPoints: ["src/page.ts", "src/phimoe.ts", "src/worker.ts"],
  bundle: true,
  splitting: true,
  format: "esm",
  target: "es2022",
  outdir: "dist",
  minify: true,
  keepNames: true,
  sourcemap: true,
  conditions: ["onnxruntime-web-use-extern-wasm"],
  nodePaths: ["node_modules"], // embed/node's sources find their libraries here
});
await copyFile(`${here}src/index.html`, `${here}dist/index.html`);
for (const file of runtime) await copyFile(`${here}node_modules/onnxruntime-web/dist/${file}`, `${here}dist/${file}`);

const { BROTLI_PARAM_QUALITY, BROTLI_PARAM_LGWIN, BROTLI_PARAM_SIZE_HINT } = constants;
for (const file of await readdir(`${here}dist`)) {
  if (!/\.(html|js|mjs|wasm)$/.test(file)) continue;
  const bytes = await readFile(`${here}dist/${file}`);
  // 6 of 11: the last levels take a minute for a tenth less
  const params = { [BROTLI_PARAM_QUALITY]: 6, [BROTLI_PARAM_LGWIN]: 24, [BROTLI_PARAM_SIZE_HINT]: bytes.length };
  await writeFile(`${here}dist/${file}.br`, await promisify(brotliCompress)(bytes, { params }));
  await writeFile(`${here}dist/${file}.gz`, await promisify(gzip)(bytes, { level: 9 }));
}
