import type { Manifest } from "./bundle.js";
import { GrowingCache, SharedCache } from "./cache.js";
import { Decoder } from "./decoder.js";
import { sentError } from "./errors.js";
import { generate } from "./generate.js";
import type { Call, FromWorker, ToWorker } from "./protocol.js";
import { isBatch, makeRequest } from "./request.js";
import type { Session } from "./session.js";
import type { Tokenizer } from "./tokenizer.js";

/** The side of a loaded bundle that computes, on a thread of its own; model.ts is the other side. */
export class Engine {
  private readonly eos: ReadonlySet<number>;
  private readonly running = new Map<number, { control: AbortController; ended: Promise<void> }>();
  private readonly conversations = new Map<number, { decoder: Decoder; idle: Promise<void> }>();

  /** `post` sends an answer back. */
  constructor(
    private readonly session: Session,
    private readonly manifest: Manifest,
    private readonly tokenizer: Tokenizer,
    private readonly post: (message: FromWorker) => void,
  ) {
    this.eos = new Set(manifest.decoding.eos_token_ids);
  }

  /** Takes a message. After "close" the session is at rest when this resolves. */
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
    const named = isBatch(prompt)
      ? prompt.map((each, row) => [each, `prompt ${row}`] as const)
      : [[prompt, conversation === undefined ? "the prompt" : "the conversation"] as const];
    const requests = named.map(([each, name]) => makeRequest(each, name, options, this.manifest, this.tokenizer));
    const room = requests
      .map(({ prompt, max_new_tokens }) => prompt.length + max_new_tokens)
      .reduce((most, length) => Math.max(most, length));
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
    const shared = decoding.cache.shared && this.session.inPlace;
    const cache = shared
      ? new SharedCache(this.session, decoding, rows, capacity)
      : new GrowingCache(this.session, decoding, rows);
    return new Decoder(cache, decoding, rows);
  }
}
