#!/usr/bin/env node
/** Continues a text, or answers a question, on the command line; prints the pieces as they come. */
import { parseArgs } from "node:util";

import { type Options, PhiMoE, PhiMoEError } from "./index.js";

const NUMBERS = ["max-new-tokens", "temperature", "top-k", "top-p", "min-p", "repetition-penalty"];
const FLAGS = ["[--chat] [--threads N] [--seed N] [--stop TEXT]...", ...NUMBERS.map((name) => `[--${name} N]`)];
const USAGE = `usage: phimoe-generate BUNDLE PROMPT ${FLAGS.join(" ")}`;

class UsageError extends Error {}

function parse(): { bundle: string; prompt: string; chat: boolean; threads: number | undefined; options: Options } {
  try {
    const string = { type: "string" } as const;
    const numbers = Object.fromEntries(NUMBERS.map((name) => [name, string]));
    const { values, positionals } = parseArgs({
      options: {
        ...numbers,
        seed: string,
        threads: string,
        stop: { ...string, multiple: true },
        chat: { type: "boolean" },
      },
      allowPositionals: true,
    });
    if (positionals.length !== 2) throw new Error(`${positionals.length} arguments, expected a bundle and a prompt`);
    const given = values as Record<string, string | undefined>;
    const options = Object.fromEntries(NUMBERS.map((name) => [name.replaceAll("-", "_"), number(name, given[name])]));
    const seed = given.seed === undefined ? undefined : BigInt(given.seed);
    const [bundle, prompt] = positionals;
    return {
      bundle,
      prompt,
      chat: values.chat ?? false,
      threads: number("threads", given.threads),
      options: { ...options, seed, stop: values.stop },
    };
  } catch (error) {
    throw new UsageError(`${(error as Error).message}\n${USAGE}`);
  }
}

function number(name: string, text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  if (text.trim() === "" || Number.isNaN(Number(text)))
    throw new Error(`--${name} is ${JSON.stringify(text)}, expected a number`);
  return Number(text);
}

try {
  const { bundle, prompt, chat, threads, options } = parse();
  const model = await PhiMoE.load(bundle, { threads });
  for await (const { text } of model.stream(chat ? [{ role: "user", content: prompt }] : prompt, options))
    process.stdout.write(text);
  process.stdout.write("\n");
  await model.close();
} catch (error) {
  if (!(error instanceof PhiMoEError || error instanceof UsageError)) throw error;
  process.stderr.write(`phimoe-generate: ${error.message}\n`);
  process.exitCode = error instanceof UsageError ? 2 : 1;
}
