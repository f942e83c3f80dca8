import type { Manifest } from "./bundle.js";
import { GrowingCache, SharedCache } from "./cache.js";
import { Decoder } from "./decoder.js";
import { sentError } from "./errors.js";
import { generate } from "./generate.js";
import { readGolden } from "./golden.js";
import type { Call, FromWorker, ToWorker, Verification } from "./protocol.js";
import { isBatch, makeRequest } from "./request.js";
import type { Session } from "./session.js";
import type { Tokenizer } from "./tokenizer.js";
import { longest, verifyGolden } from "./verify_golden.js";

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
      this.start(message.call.id, (signal) => this.answer(message.call, signal));
    } else if ("verify" in message) {
      this.start(message.verify.id, (signal) => this.verify(message.verify, signal));
    } else if ("cancel" in message) this.running.get(message.cancel)?.control.abort();
    else if ("forget" in message) this.conversations.delete(message.forget);
    else {
      for (const { control } of this.running.values()) control.abort();
      await Promise.all([...this.running.values()].map(({ ended }) => ended));
    }
  }

  private start(id: number, run: (signal: AbortSignal) => Promise<void>): void {
    const control = new AbortController();
    const ended = run(control.signal)
      .then(() => this.post({ id, done: true }))
      .catch((error) => this.post({ id, error: sentError(error) }))
      .finally(() => this.running.delete(id));
    this.running.set(id, { control, ended });
  }

  private async verify({ id, data, path, bundle }: Verification, signal: AbortSignal): Promise<void> {
    const golden = await readGolden(data, path, this.manifest);
    const decoder = this.newDecoder(1, longest(golden, this.manifest));
    decoder.signal = signal;
    const progress = (done: number, total: number) => this.post({ id, progress: { done, total } });
    const report = await verifyGolden(decoder, this.tokenizer, this.manifest, golden, bundle, progress);
    this.post({ id, report });
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
