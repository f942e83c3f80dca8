// Prints what a bundle costs in Node, as JSON: node benchmark.mjs BUNDLE [THREADS]
import { PhiMoE } from "phimoe-onnx";

const [bundle, threads] = process.argv.slice(2);
const ids = Array.from({ length: 512 }, (_, place) => 3 + ((7 * place) % 2000));
const now = () => performance.now() / 1000;
const resident = () => process.memoryUsage.rss();

let start = now();
const model = await PhiMoE.load(bundle, { threads: threads && Number(threads) });
const load_s = now() - start;
const speeds = [];
let prefill = Infinity;
for (let run = 0; run < 3; run++) {
  start = now();
  await model.generate(ids, { max_new_tokens: 1 });
  prefill = Math.min(prefill, now() - start);
  speeds.push((await model.generate(ids.slice(0, 16), { max_new_tokens: 65 })).tokens_per_second);
}
const figures = { load_s, rss_bytes: resident(), decode_tokens_per_s: Math.max(...speeds), prefill_tokens_per_s: ids.length / prefill };
console.log(JSON.stringify(figures));
await model.close();
