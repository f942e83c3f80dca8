import type { Manifest } from "./bundle.js";
import { type Graph, GrowingCache, SharedCache } from "./cache.js";
import { type Message, render } from "./chat.js";
import { Decoder } from "./decoder.js";
import { GenerationError, sentError } from "./errors.js";
import { generate, makeRequest, type Options, type Request } from "./generate.js";
import { type FromWorker, isBatch, type Prompt, type ToWorker } from "./protocol.js";
import type { Tokenizer } from "./tokenizer.js";

/** The side of a loaded bundle that computes, on a thread of its own; model.ts is the other side. */
export class Engine {
  #manifest: Manifest;
  #tokenizer: Tokenizer;
  #eos: ReadonlySet<number>;
  #newDecoder: (rows: number, capacity: number) => Decoder;
  #post: (message: FromWorker) => void;
  #running = new Map<number, { control: AbortController; ended: Promise<void> }>();
  #conversations = new Map<number, { decoder: Decoder; idle: Promise<void> }>();

  /**
   * @param inPlace - whether the graph writes into the outputs that it is given.
   * @param post - sends an answer back.
   */
  constructor(graph: Graph, manifest: Manifest, tokenizer: Tokenizer, inPlace: boolean, post: (message: FromWorker) => void) {
    const { decoding } = manifest;
    const shared = decoding.cache.shared && inPlace;
    this.#manifest = manifest;
    this.#tokenizer = tokenizer;
    this.#eos = new Set(decoding.eos_token_ids);
    this.#newDecoder = (rows, capacity) => {
      const cache = shared ? new SharedCache(graph, decoding, rows, capacity) : new GrowingCache(graph, decoding, rows);
      return new Decoder(cache, decoding, rows);
    };
    this.#post = post;
  }

  /** Takes a message, but for the last one; answers go through `post`. */
  receive(message: Exclude<ToWorker, { close: true }>): void {
    if ("cancel" in message) this.#running.get(message.cancel)?.control.abort();
    else if ("forget" in message) this.#conversations.delete(message.forget);
    else {
      const { id, prompt, options, conversation } = message;
      const control = new AbortController();
      const ended = this.#answer(id, prompt, options, conversation, control.signal)
        .then(() => this.#post({ id, done: true }))
        .catch((error) => this.#post({ id, error: sentError(error) }))
        .finally(() => this.#running.delete(id));
      this.#running.set(id, { control, ended });
    }
  }

  /** Ends all that is running; the graph is at rest when this resolves. */
  async close(): Promise<void> {
    for (const { control } of this.#running.values()) control.abort();
    await Promise.all([...this.#running.values()].map(({ ended }) => ended));
  }

  async #answer(
    id: number,
    prompt: Prompt | readonly Prompt[],
    options: Options,
    conversation: number | undefined,
    signal: AbortSignal,
  ): Promise<void> {
    const requests = isBatch(prompt)
      ? prompt.map((each, row) => this.#request(each, `prompt ${row}`, options))
      : [this.#request(prompt, conversation === undefined ? "the prompt" : "the conversation", options)];
    const room = Math.max(...requests.map((request) => request.prompt.length + request.max_new_tokens));
    const run = async (decoder: Decoder) => {
      decoder.signal = signal;
      for await (const piece of generate(decoder, this.#tokenizer, this.#eos, requests)) this.#post({ id, piece });
    };
    if (conversation === undefined) return run(this.#newDecoder(requests.length, room));
    const kept = this.#conversations.get(conversation) ?? { decoder: this.#newDecoder(1, 0), idle: Promise.resolve() };
    this.#conversations.set(conversation, kept);
    // an answer that was cancelled may still be at its last step
    const answer = kept.idle.then(() => {
      kept.decoder.reserve(room);
      return run(kept.decoder);
    });
    kept.idle = answer.catch(() => {});
    return answer;
  }

  #request(prompt: Prompt, name: string, options: Options): Request {
    return makeRequest(this.#encode(prompt, name), this.#manifest.decoding.context, name, options);
  }

  /** The token ids of a prompt; `name` is its name in errors. */
  #encode(prompt: Prompt, name: string): number[] {
    if (typeof prompt !== "string" && !Array.isArray(prompt)) {
      throw new GenerationError(`${name} is ${prompt}, expected a string, a list of messages or a list of token ids`);
    }
    if (!prompt.length) throw new GenerationError(`${name} or the batch is empty; give at least one character, message, token or prompt`);
    if (typeof prompt === "string") return this.#tokenizer.encode(prompt);
    if (typeof prompt[0] === "object") return this.#tokenizer.encode(render(this.#manifest.chat, prompt as Message[]), false);
    const last = this.#manifest.decoding.vocab_size - 1;
    const wrong = (prompt as unknown[]).find((id) => !(Number.isInteger(id) && (id as number) >= 0 && (id as number) <= last));
    if (wrong !== undefined) throw new GenerationError(`${name} holds ${wrong}, expected token ids from 0 to ${last}`);
    return [...(prompt as number[])];
  }
}
