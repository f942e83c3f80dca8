import type { Manifest } from "./bundle.js";
import { type Message, render } from "./chat.js";
import { GenerationError } from "./errors.js";
import type { Sampling } from "./sampler.js";
import type { Tokenizer } from "./tokenizer.js";

/** A text, messages of a chat, or token ids. */
export type Prompt = string | readonly Message[] | readonly number[];

/** Each may be left out; null is the same. */
export interface Options {
  /** Where to end at the latest; 1024 or the end of the context if not given. */
  max_new_tokens?: number | null;
  /** 0, the default, takes the most likely token; more draws one. */
  temperature?: number | null;
  /** Draws from the k most likely tokens; 0, the default, is off. */
  top_k?: number | null;
  /** Draws from the fewest most likely tokens whose probabilities reach top_p; 1, the default, is off. */
  top_p?: number | null;
  /** Draws from tokens at least min_p times as likely as the most likely one; 0, the default, is off. */
  min_p?: number | null;
  /** Divides the positive logits of seen tokens and multiplies the others; 1, the default, is off. */
  repetition_penalty?: number | null;
  /** The same seed gives the same text; a fresh one for each row if not given. Any integer, taken modulo 2^64. */
  seed?: number | bigint | null;
  /** A string or several at which the text ends, themselves left out. */
  stop?: string | readonly string[] | null;
}

/** Options, and a signal that ends the generation; its promise or stream then fails with the signal's reason. */
export interface CallOptions extends Options {
  signal?: AbortSignal;
}

/** Whether this is several prompts: a list whose first item is itself a string or a list. */
export function isBatch(prompt: Prompt | readonly Prompt[]): prompt is readonly Prompt[] {
  return Array.isArray(prompt) && (typeof prompt[0] === "string" || Array.isArray(prompt[0]));
}

/** One prompt, how many tokens may follow it, and how they are chosen and ended. */
export interface Request {
  prompt: readonly number[];
  max_new_tokens: number;
  sampling: Sampling;
  stop: readonly string[];
}

const DEFAULT_NEW_TOKENS = 1024; // where max_new_tokens is not given

type Range = [holds: (value: number) => boolean, expected: string];
const RANGES: Record<string, Range> = {
  max_new_tokens: [(value) => Number.isSafeInteger(value) && value >= 1, "an integer, 1 or more"],
  temperature: [(value) => value >= 0 && value < Infinity, "0 (greedy) or more"],
  top_k: [(value) => Number.isSafeInteger(value) && value >= 0, "an integer, 0 (off) or more"],
  top_p: [(value) => value > 0 && value <= 1, "more than 0 and at most 1 (off)"],
  min_p: [(value) => value >= 0 && value <= 1, "between 0 (off) and 1"],
  repetition_penalty: [(value) => value > 0 && value < Infinity, "more than 0; 1 is off"],
  seed: [
    (value) => typeof value === "bigint" || Number.isSafeInteger(value),
    "a bigint or an integer that a number holds exactly",
  ],
};

/**
 * A request whose options are in range and whose tokens fit the context; `name` is the prompt's in errors.
 *
 * @throws GenerationError: the prompt is none, an option is unknown or out of range, or both together do not fit the
 *   context.
 */
export function makeRequest(
  prompt: Prompt,
  name: string,
  options: Options,
  manifest: Manifest,
  tokenizer: Tokenizer,
): Request {
  const ids = encode(prompt, name, manifest, tokenizer);
  checkOptions(options);
  const { context } = manifest.decoding;
  if (ids.length >= context) {
    throw new GenerationError(
      `${name} has ${ids.length} tokens, which leaves no room in the context of ${context}; shorten it`,
    );
  }
  const room = context - ids.length;
  const max_new_tokens = options.max_new_tokens ?? Math.min(DEFAULT_NEW_TOKENS, room);
  if (max_new_tokens > room) {
    const found = `${name} has ${ids.length} tokens and max_new_tokens is ${max_new_tokens}`;
    throw new GenerationError(`${found}, together more than the context of ${context}; at most ${room} new tokens fit`);
  }
  const sampling: Sampling = {
    temperature: options.temperature ?? 0,
    top_k: options.top_k ?? 0,
    top_p: options.top_p ?? 1,
    min_p: options.min_p ?? 0,
    repetition_penalty: options.repetition_penalty ?? 1,
    seed: BigInt(options.seed ?? crypto.getRandomValues(new BigUint64Array(1))[0]),
  };
  return { prompt: ids, max_new_tokens, sampling, stop: stopStrings(options) };
}

/** The token ids of a prompt. */
function encode(prompt: Prompt, name: string, { chat, decoding }: Manifest, tokenizer: Tokenizer): readonly number[] {
  if (typeof prompt !== "string" && !Array.isArray(prompt)) {
    throw new GenerationError(`${name} is ${prompt}, expected a string, a list of messages or a list of token ids`);
  }
  if (!prompt.length)
    throw new GenerationError(`${name} or the batch is empty; give at least one character, message, token or prompt`);
  if (typeof prompt === "string") return tokenizer.encode(prompt);
  if (typeof prompt[0] === "object") return tokenizer.encode(render(chat, prompt as Message[]), false);
  const last = decoding.vocab_size - 1;
  const wrong = (prompt as number[]).findIndex((id) => !(Number.isInteger(id) && id >= 0 && id <= last));
  if (wrong >= 0) throw new GenerationError(`${name} holds ${prompt[wrong]}, expected token ids from 0 to ${last}`);
  return prompt as number[];
}

function checkOptions(options: Options): void {
  const { stop: _, ...numbers } = options;
  for (const [option, value] of Object.entries(numbers)) {
    if (!Object.hasOwn(RANGES, option))
      throw new GenerationError(`unknown option ${option}, expected one of ${Object.keys(RANGES).join(", ")}, stop`);
    const [holds, expected] = RANGES[option];
    const fits = option === "seed" || typeof value === "number";
    if (value != null && !(fits && holds(value as number)))
      throw new GenerationError(`${option} is ${value}, expected ${expected}`);
  }
  if (!stopStrings(options).every((each) => typeof each === "string" && each)) {
    throw new GenerationError(
      "stop holds an empty string, which would end the text before it began, or something that is no string",
    );
  }
}

function stopStrings({ stop }: Options): readonly string[] {
  return typeof stop === "string" ? [stop] : (stop ?? []);
}
