import type { Decoder } from "./decoder.js";
import { GenerationError } from "./errors.js";
import { type Sampling, sample } from "./sampling.js";
import { StopStrings } from "./stop.js";
import { TextStream, type Tokenizer } from "./tokenizer.js";

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

/** What one prompt led to. */
export interface Generation {
  /** The new text, without special tokens and without the stop string. */
  text: string;
  /** The new tokens, with the one that ended the text. */
  token_ids: number[];
  /** "eos" (an end token of the model), "stop" (a stop string) or "length" (max_new_tokens). */
  finish_reason: "eos" | "stop" | "length";
  /** The length of the prompt. */
  prompt_tokens: number;
  /** From the call to the row's first token. */
  first_token_seconds: number;
  /** From the call to the row's last token. */
  seconds: number;
  /** The speed after the first token; 0 where there is no second one. */
  tokens_per_second: number;
}

/** One new token of a stream. */
export interface Piece {
  /** Which prompt of the batch; 0 for a single one. */
  row: number;
  token_id: number;
  /** The text that became certain with it; empty while a character is incomplete or a stop string may have begun. */
  text: string;
  /** On the row's last piece, all of it; else null. */
  result: Generation | null;
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
  seed: [(value) => typeof value === "bigint" || Number.isSafeInteger(value), "a bigint or an integer that a number holds exactly"],
};

/**
 * A request whose options are in range and whose tokens fit a `context` of so many; `name` is the prompt's in errors.
 *
 * @throws GenerationError: an option is unknown or out of range, or the prompt and the new tokens do not fit the context.
 */
export function makeRequest(prompt: readonly number[], context: number, name: string, options: Options): Request {
  const { stop, ...numbers } = options;
  for (const [option, value] of Object.entries(numbers)) {
    if (!Object.hasOwn(RANGES, option)) throw new GenerationError(`unknown option ${option}, expected one of ${Object.keys(RANGES).join(", ")}, stop`);
    const [holds, expected] = RANGES[option];
    const fits = option === "seed" || typeof value === "number";
    if (value != null && !(fits && holds(value as number))) throw new GenerationError(`${option} is ${value}, expected ${expected}`);
  }
  const stops = typeof stop === "string" ? [stop] : (stop ?? []);
  if (!stops.every((each) => typeof each === "string" && each)) {
    throw new GenerationError("stop holds an empty string, which would end the text before it began, or something that is no string");
  }
  if (prompt.length >= context) {
    throw new GenerationError(`${name} has ${prompt.length} tokens, which leaves no room in the context of ${context}; shorten it`);
  }
  const room = context - prompt.length;
  const max_new_tokens = options.max_new_tokens ?? Math.min(DEFAULT_NEW_TOKENS, room);
  if (max_new_tokens > room) {
    const together = `${name} has ${prompt.length} tokens and max_new_tokens is ${max_new_tokens}, together more than the context of ${context}`;
    throw new GenerationError(`${together}; at most ${room} new tokens fit`);
  }
  const sampling: Sampling = {
    temperature: options.temperature ?? 0,
    top_k: options.top_k ?? 0,
    top_p: options.top_p ?? 1,
    min_p: options.min_p ?? 0,
    repetition_penalty: options.repetition_penalty ?? 1,
    seed: BigInt(options.seed ?? crypto.getRandomValues(new BigUint64Array(1))[0]),
  };
  return { prompt, max_new_tokens, sampling, stop: stops };
}

/** Yields every new token of every request, the rows in turn; `decoder` has a row for each, with room for all its tokens. */
export async function* generate(
  decoder: Decoder,
  tokenizer: Tokenizer,
  eos: ReadonlySet<number>,
  requests: readonly Request[],
): AsyncGenerator<Piece, void, undefined> {
  const start = performance.now();
  const active = requests.map((request, number) => new Row(number, request, tokenizer, eos, start));
  let logits: Float32Array[] = [];
  for (const [row, request] of requests.entries()) logits.push(await decoder.prefill(row, request.prompt));
  for (;;) {
    for (const [place, row] of active.entries()) {
      yield row.add(sample(logits[place], row.request.sampling, row.token_ids.length, row.seen));
    }
    for (let place = active.length - 1; place >= 0; place--) {
      if (active[place].finished && active.length > 1) {
        decoder.drop(place);
        active[place] = active[active.length - 1];
        active.pop();
      }
    }
    if (active[0].finished) return;
    logits = await decoder.step(active.map((row) => row.token_ids[row.token_ids.length - 1]));
  }
}

/** A request on its way to its end. */
class Row {
  readonly token_ids: number[] = [];
  readonly seen: Set<number>;
  finished = false;
  private first = 0;
  private text = "";
  private readonly characters: TextStream;
  private readonly strings: StopStrings;
  private readonly stopIds: Set<number | undefined>;

  constructor(
    private readonly number: number,
    readonly request: Request,
    tokenizer: Tokenizer,
    private readonly eos: ReadonlySet<number>,
    private readonly start: number,
  ) {
    this.seen = new Set(request.prompt);
    this.characters = new TextStream(tokenizer, request.prompt);
    this.strings = new StopStrings(request.stop);
    // a hidden token has no text that a stop string could be found in
    this.stopIds = new Set(request.stop.map((stop) => tokenizer.tokenId(stop)).filter((id) => tokenizer.hidden.has(id!)));
  }

  /** Takes the row's next token. */
  add(token: number): Piece {
    const now = performance.now();
    if (!this.token_ids.length) this.first = now;
    this.token_ids.push(token);
    this.seen.add(token);
    let { text, stopped } = this.strings.add(this.eos.has(token) ? "" : this.characters.add(token));
    let finish_reason: Generation["finish_reason"] | undefined;
    if (this.eos.has(token)) finish_reason = "eos";
    else if (stopped || this.stopIds.has(token)) finish_reason = "stop";
    else if (this.token_ids.length === this.request.max_new_tokens) finish_reason = "length";
    this.finished = finish_reason !== undefined;
    if (this.finished) text += this.strings.finish();
    this.text += text;
    const piece = { row: this.number, token_id: token, text };
    if (!finish_reason) return { ...piece, result: null };
    const result = {
      text: this.text,
      token_ids: this.token_ids,
      finish_reason,
      prompt_tokens: this.request.prompt.length,
      first_token_seconds: (this.first - this.start) / 1000,
      seconds: (now - this.start) / 1000,
      tokens_per_second: (1000 * (this.token_ids.length - 1)) / Math.max(now - this.first, 1e-6),
    };
    return { ...piece, result };
  }
}
