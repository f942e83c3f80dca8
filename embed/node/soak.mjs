// 10,000 short generations of every kind on one model; fails if they cost memory: node soak.mjs BUNDLE
import { PhiMoE } from "phimoe-onnx";

const COUNT = 10_000;
const WARM = 3_000; // by then the heap has its size
const ALLOWED = 1.05; // of the resident memory after the warm-up

const model = await PhiMoE.load(process.argv[2], { threads: 1 });
const options = { max_new_tokens: 4, temperature: 0.8 };
let warm = 0;
for (let count = 1; count <= COUNT; count++) {
  const text = `It was the ${count}th morning`;
  if (count % 4 === 0) await model.generate([text, "Emma"], options);
  else if (count % 4 === 1) await model.generate(text, options);
  else if (count % 4 === 2) {
    for await (const _ of model.stream(text, { ...options, max_new_tokens: 100 })) break;
  } else {
    const conversation = model.chat();
    await conversation.send(text, options);
    conversation.close();
  }
  if (count % 1000 === 0) {
    const resident = process.memoryUsage.rss();
    console.log(`${count} generations, ${(resident / 1e6).toFixed(0)} MB resident`);
    if (count === WARM) warm = resident;
    if (count > WARM && resident > ALLOWED * warm) process.exitCode = 1;
  }
}
await model.close();
