import type { Manifest } from "./bundle.js";
import { type Graph, GrowingCache, SharedCache } from "./cache.js";
import { type Message, render } from "./chat.js";
import { Decoder } from "./decoder.js";
import { GenerationError, sentError } from "./errors.js";
import { generate, makeRequest, type Options, type Request } from "./generate.js";
import { type Call, type FromWorker, isBatch, type Prompt, type ToWorker } from "./protocol.js";
import type { Tokenizer } from "./tokenizer.js";

/** The side of a loaded bundle that computes, on a thread of its own; model.ts is the other side. */
export class Engine {
  private readonly eos: ReadonlySet<number>;
  private readonly running = new Map<number, { control: AbortController; ended: Promise<void> }>();
  private readonly conversations = new Map<number, { decoder: Decoder; idle: Promise<void> }>();

  /** `post` sends an answer back. */
  constructor(
    private readonly graph: Graph,
    private readonly manifest: Manifest,
    private readonly tokenizer: Tokenizer,
    private readonly post: (message: FromWorker) => void,
  ) {
    this.eos = new Set(manifest.decoding.eos_token_ids);
  }

  /** Takes a message. After "close" the graph is at rest when this resolves. */
  async receive(message: ToWorker): Promise<void> {
    if ("call" in message) {
      const { call } = message;
      const control = new AbortController();
      const ended = this.answer(call, control.signal)
        .then(() => this.post({ id: call.id, done: true }))
        .catch((error) => this.post({ id: call.id, error: sentError(error) }))
        .finally(() => this.running.delete(call.id));
      this.running.set(call.id, { control, ended });
    } else if ("cancel" in message) this.running.get(message.cancel)?.control.abort();
    else if ("forget" in message) this.conversations.delete(message.forget);
    else {
      for (const { control } of this.running.values()) control.abort();
      await Promise.all([...this.running.values()].map(({ ended }) => ended));
    }
  }

  private async answer({ id, prompt, options, conversation }: Call, signal: AbortSignal): Promise<void> {
    const requests = isBatch(prompt)
      ? prompt.map((each, row) => this.request(each, `prompt ${row}`, options))
      : [this.request(prompt, conversation === undefined ? "the prompt" : "the conversation", options)];
    const room = Math.max(...requests.map((request) => request.prompt.length + request.max_new_tokens));
    const run = async (decoder: Decoder) => {
      decoder.signal = signal;
      for await (const piece of generate(decoder, this.tokenizer, this.eos, requests)) this.post({ id, piece });
    };
    if (conversation === undefined) return run(this.newDecoder(requests.length, room));
    const kept = this.conversations.get(conversation) ?? { decoder: this.newDecoder(1, 0), idle: Promise.resolve() };
    this.conversations.set(conversation, kept);
    // an answer that was cancelled may still be at its last step
    const answer = kept.idle.then(() => {
      kept.decoder.reserve(room);
      return run(kept.decoder);
    });
    kept.idle = answer.catch(() => {});
    return answer;
  }

  private newDecoder(rows: number, capacity: number): Decoder {
    const { decoding } = this.manifest;
    const shared = decoding.cache.shared && this.graph.inPlace;
    const cache = shared ? new SharedCache(this.graph, decoding, rows, capacity) : new GrowingCache(this.graph, decoding, rows);
    return new Decoder(cache, decoding, rows);
  }

  private request(prompt: Prompt, name: string, options: Options): Request {
    return makeRequest(this.encode(prompt, name), this.manifest.decoding.context, name, options);
  }

  /** The token ids of a prompt; `name` is its name in errors. */
  private encode(prompt: Prompt, name: string): readonly number[] {
    if (typeof prompt !== "string" && !Array.isArray(prompt)) {
      throw new GenerationError(`${name} is ${prompt}, expected a string, a list of messages or a list of token ids`);
    }
    if (!prompt.length) throw new GenerationError(`${name} or the batch is empty; give at least one character, message, token or prompt`);
    if (typeof prompt === "string") return this.tokenizer.encode(prompt);
    if (typeof prompt[0] === "object") return this.tokenizer.encode(render(this.manifest.chat, prompt as Message[]), false);
    const last = this.manifest.decoding.vocab_size - 1;
    const wrong = (prompt as number[]).findIndex((id) => !(Number.isInteger(id) && id >= 0 && id <= last));
    if (wrong >= 0) throw new GenerationError(`${name} holds ${prompt[wrong]}, expected token ids from 0 to ${last}`);
    return prompt as number[];
  }
}
