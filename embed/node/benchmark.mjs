// One line of JSON for benchmarks/compare_languages.py: node benchmark.mjs BUNDLE THREADS PROMPT_TOKENS NEW_TOKENS
import { PhiMoE } from "phimoe-onnx";

const [bundle, ...numbers] = process.argv.slice(2);
const [threads, promptTokens, newTokens] = numbers.map(Number);
const ids = Array.from({ length: promptTokens }, (_, place) => 300 + ((place * 7) % 1000));
const start = performance.now();
const model = await PhiMoE.load(bundle, { threads });
const load = (performance.now() - start) / 1000;
await model.generate(ids, { max_new_tokens: newTokens }); // warm
const { first_token_seconds, tokens_per_second, token_ids } = await model.generate(ids, { max_new_tokens: newTokens });
const figures = {
  load,
  prefill: promptTokens / first_token_seconds,
  decode: tokens_per_second,
  new_tokens: token_ids.length,
  resident: Math.floor(process.memoryUsage.rss() / 2 ** 20),
};
console.log(JSON.stringify(figures));
await model.close();
