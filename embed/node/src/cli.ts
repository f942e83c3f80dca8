#!/usr/bin/env node
/** Continues a text, or answers a question, on the command line; prints the pieces as they come. */
import { parseArgs } from "node:util";

import { nearest } from "./core/nearest.js";
import { checkOptions } from "./core/request.js";
import { type Options, PhiMoE, PhiMoEError, reportText } from "./index.js";

type Flag = { value?: string; help: string; multiple?: boolean };

const FLAGS: Record<string, Flag> = {
  chat: { help: "give the prompt as a user's message" },
  system: { value: "TEXT", help: "a system message before it; with it the prompt is a message, too" },
  "max-new-tokens": { value: "N", help: "end after so many tokens; 1024 or the end of the context by default" },
  temperature: { value: "N", help: "0, the default, takes the most likely token; more draws one" },
  "top-k": { value: "N", help: "draw from the N most likely tokens; 0, the default, is off" },
  "top-p": { value: "N", help: "draw from the fewest tokens whose probabilities reach N; 1, the default, is off" },
  "min-p": { value: "N", help: "draw from tokens N times as likely as the most likely one; 0, the default, is off" },
  "repetition-penalty": { value: "N", help: "divide the positive logits of seen tokens by N; 1, the default, is off" },
  seed: { value: "N", help: "the same seed gives the same text; a fresh one by default" },
  stop: { value: "TEXT", help: "end before this text; may be given several times", multiple: true },
  golden: { value: "FILE", help: "hold the bundle against a file of phimoe-verify --save-golden, without a prompt" },
  threads: { value: "N", help: "threads of the processor; by default as many as serve" },
  operators: { value: "PATH", help: "the library of the native operators, for bundles that need it" },
  help: { help: "print this" },
};
const USAGE = `usage: phimoe-generate BUNDLE PROMPT [OPTIONS]
       phimoe-generate BUNDLE --golden FILE`;
const HELP = `${USAGE}

Continues a text with a bundle of phimoe-export, or answers it as a message. With --golden it holds the bundle against
what was kept of its checkpoint, and exits with 1 if a figure is past its limit.

  BUNDLE                    a folder that phimoe-export wrote
  PROMPT                    the text to continue

${Object.entries(FLAGS)
  .map(([name, { value, help }]) => `  ${`--${name}${value ? ` ${value}` : ""}`.padEnd(25)} ${help}`)
  .join("\n")}

  phimoe-generate austen-int4 "It was a fine morning" --max-new-tokens 60
  phimoe-generate austen-int4 "Who is Emma?" --chat --temperature 0.8 --seed 1
  phimoe-generate austen-int4 --golden austen.golden

PHIMOE_OPERATORS in the environment names that library, too; by default it is the package's own, if there is one.
ORT_DISABLE_TELEMETRY=0 in the environment turns ONNX Runtime's telemetry on; it is off otherwise.
`;

class UsageError extends Error {}

interface Arguments {
  bundle: string;
  prompt: string;
  chat: boolean;
  system?: string;
  threads?: number;
  operators?: string;
  golden?: string;
  options: Options;
}

/** What is asked for, or undefined for --help. */
function parse(): Arguments | undefined {
  const { values, positionals } = parseWords();
  if (values.help) return undefined;
  const golden = values.golden as string | undefined;
  if (golden !== undefined && positionals.length !== 1)
    throw new UsageError(`${positionals.length} arguments, expected one with --golden: a bundle`);
  if (golden === undefined && positionals.length !== 2)
    throw new UsageError(`${positionals.length} arguments, expected two: a bundle and a prompt`);
  const [bundle, prompt] = positionals;
  const number = (name: string) => readNumber(name, values[name] as string | undefined);
  return {
    bundle,
    prompt,
    chat: values.chat === true,
    system: values.system as string | undefined,
    threads: number("threads"),
    operators: values.operators as string | undefined,
    golden,
    options: {
      max_new_tokens: number("max-new-tokens"),
      temperature: number("temperature"),
      top_k: number("top-k"),
      top_p: number("top-p"),
      min_p: number("min-p"),
      repetition_penalty: number("repetition-penalty"),
      seed: readSeed(values.seed as string | undefined),
      stop: values.stop as string[] | undefined,
    },
  };
}

function parseWords() {
  const options = Object.fromEntries(
    Object.entries(FLAGS).map(([name, { value, multiple = false }]) => [
      name,
      { type: value ? ("string" as const) : ("boolean" as const), multiple },
    ]),
  );
  try {
    return parseArgs({ options, allowPositionals: true });
  } catch (error) {
    const { code, message } = error as { code: string; message: string };
    const [, unknown] = /^Unknown option '-*([^']*)'/.exec(message) ?? [];
    const likely = code === "ERR_PARSE_ARGS_UNKNOWN_OPTION" && nearest(unknown, Object.keys(FLAGS));
    throw new UsageError(likely ? `unknown option --${unknown}; did you mean --${likely}?` : message);
  }
}

function readNumber(name: string, text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  if (text.trim() === "" || Number.isNaN(Number(text)))
    throw new UsageError(`--${name} is ${JSON.stringify(text)}, expected a number`);
  return Number(text);
}

function readSeed(text: string | undefined): bigint | undefined {
  if (text === undefined) return undefined;
  if (!/^[+-]?\d{1,20}$/.test(text))
    throw new UsageError(`--seed is ${JSON.stringify(text.slice(0, 80))}, expected an integer of 64 bits`);
  return BigInt(text.replace("+", ""));
}

async function main(): Promise<void> {
  const given = parse();
  if (!given) return void process.stdout.write(HELP);
  const { bundle, prompt, chat, system, threads, operators, golden, options } = given;
  checkOptions(options);
  const model = await PhiMoE.load(bundle, { threads, operators });
  if (golden !== undefined) return verify(model, bundle, golden);
  const message = chat || system !== undefined;
  for await (const { text } of message ? model.chat(system).stream(prompt, options) : model.stream(prompt, options))
    process.stdout.write(text);
  process.stdout.write("\n");
  await model.close();
}

/** Prints the figures of a golden file; the exit code says whether all are within their limits. */
async function verify(model: PhiMoE, bundle: string, golden: string): Promise<void> {
  const { isTTY } = process.stderr;
  const report = await model.verifyGolden(golden, {
    progress({ done, total }) {
      if (isTTY) process.stderr.write(`\rran ${done} of ${total} windows${done === total ? "\n" : ""}`);
    },
  });
  process.stdout.write(`${reportText(report)}\n`);
  await model.close();
  if (report.passed) return;
  process.stderr.write(`phimoe-generate: ${bundle}: ${report.failures.join("; ")}\n`);
  process.exitCode = 1;
}

// whoever reads may stop, as `head` does, and a disk may be full
process.stdout.on("error", ({ code, message }: NodeJS.ErrnoException) => {
  if (code !== "EPIPE") process.stderr.write(`phimoe-generate: standard output cannot be written (${message})\n`);
  process.exit(1);
});
try {
  await main();
} catch (error) {
  if (!(error instanceof PhiMoEError || error instanceof UsageError)) throw error;
  process.stderr.write(`phimoe-generate: ${error.message}\n`);
  if (error instanceof UsageError) process.stderr.write(`${USAGE}\n`);
  process.exitCode = error instanceof UsageError ? 2 : 1;
}
