import type { Decoding, Manifest } from "./bundle.js";
import { type Message, render } from "./chat.js";
import { GenerationError } from "./errors.js";
import { nearest } from "./nearest.js";
import type { Sampling } from "./sampler.js";
import { shown } from "./schema.js";
import { checkCharacters, type Tokenizer } from "./tokenizer.js";

/** A text, messages of a chat, or token ids. */
export type Prompt = string | readonly Message[] | readonly number[];

/** Each may be left out; null is the same. */
export interface Options {
  /** Where to end at the latest; 1024 or the end of the context if not given. */
  max_new_tokens?: number | null;
  /** 0, the default, and what is less than 2^-126 takes the most likely token; more draws one. */
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
const COLDEST = 2 ** -126; // of temperatures that are no 0: below, a logit divided by it may be no number
const CHARACTERS_PER_TOKEN = 8; // far more than any text has

type Range = [holds: (value: number) => boolean, expected: string];
const RANGES: Record<string, Range> = {
  max_new_tokens: [(value) => Number.isSafeInteger(value) && value >= 1, "an integer, 1 or more"],
  temperature: [(value) => value >= 0 && value < Infinity, "0 (greedy) or more"],
  top_k: [(value) => Number.isSafeInteger(value) && value >= 0, "an integer, 0 (off) or more"],
  top_p: [(value) => value > 0 && value <= 1, "more than 0 and at most 1 (off)"],
  min_p: [(value) => value >= 0 && value <= 1, "between 0 (off) and 1"],
  repetition_penalty: [(value) => value >= 1e-30 && value <= 1e30, "1e-30 to 1e30; 1 is off"],
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
  checkOptions(options);
  const ids = encode(prompt, name, manifest, tokenizer);
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
    temperature: (options.temperature ?? 0) < COLDEST ? 0 : options.temperature!,
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
    throw new GenerationError(
      `${name} is ${shown(prompt)}, expected a string, a list of messages or a list of token ids`,
    );
  }
  if (!prompt.length)
    throw new GenerationError(`${name} or the batch is empty; give at least one character, message, token or prompt`);
  if (typeof prompt === "string") return encodeText(prompt, true, name, decoding, tokenizer);
  if (typeof prompt[0] === "object")
    return encodeText(render(chat, prompt as Message[]), false, name, decoding, tokenizer);
  return checkIds(prompt as number[], name, decoding);
}

/** A text of far more tokens than the context has is refused by its beginning: all of it might take a minute. */
function encodeText(
  text: string,
  special: boolean,
  name: string,
  decoding: Decoding,
  tokenizer: Tokenizer,
): readonly number[] {
  checkCharacters(text, name);
  const beginning = text.slice(0, CHARACTERS_PER_TOKEN * decoding.context);
  if (beginning.length < text.length && tokenizer.encode(beginning).length > decoding.context) {
    throw new GenerationError(
      `${name} has ${text.length} characters, of which the first ${beginning.length} are more tokens than the ` +
        `context of ${decoding.context}; shorten it`,
    );
  }
  return checkIds(tokenizer.encode(text, special), name, decoding);
}

function checkIds(ids: readonly number[], name: string, { vocab_size }: Decoding): readonly number[] {
  const wrong = ids.findIndex((id) => !(Number.isInteger(id) && id >= 0 && id < vocab_size));
  if (wrong < 0) return ids;
  throw new GenerationError(`${name} holds ${shown(ids[wrong])}, expected token ids from 0 to ${vocab_size - 1}`);
}

/**
 * Refuses options that are unknown or out of range; `others` are known ones that are not looked at.
 *
 * @throws GenerationError: names the option, what was found and what was expected.
 */
export function checkOptions(options: Options, others: readonly string[] = []): void {
  if (typeof options !== "object" || Array.isArray(options))
    throw new GenerationError(`the options are ${shown(options)}, expected an object such as { temperature: 0.8 }`);
  for (const [option, value] of Object.entries(options)) {
    if (option === "stop" || others.includes(option)) continue;
    if (!Object.hasOwn(RANGES, option)) {
      const known = [...Object.keys(RANGES), "stop", ...others];
      const likely = nearest(option, known);
      const hint = likely ? `did you mean ${likely}?` : `known ones are ${known.join(", ")}`;
      throw new GenerationError(`${option} is no option; ${hint}`);
    }
    const [holds, expected] = RANGES[option];
    const fits = option === "seed" || typeof value === "number";
    if (value != null && !(fits && holds(value as number)))
      throw new GenerationError(`${option} is ${shown(value)}, expected ${expected}`);
  }
  checkStop(options.stop);
}

function checkStop(stop: unknown): void {
  if (stop != null && typeof stop !== "string" && !Array.isArray(stop))
    throw new GenerationError(`stop is ${shown(stop)}, expected a string or several`);
  for (const each of stopStrings({ stop: stop as Options["stop"] })) {
    if (typeof each !== "string") throw new GenerationError(`stop holds ${shown(each)}, expected strings`);
    if (!each) throw new GenerationError("stop holds an empty string, which would end the text before it began");
    checkCharacters(each, "stop");
  }
}

function stopStrings({ stop }: Options): readonly string[] {
  return typeof stop === "string" ? [stop] : (stop ?? []);
}
