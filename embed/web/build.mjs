// Puts everything that the page needs into dist/: its scripts, index.html and ONNX Runtime's files.
import { copyFile, rm } from "node:fs/promises";
import { fileURLToPath } from "node:url";

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
