import type { Manifest } from "./bundle.js";
import { Conversation } from "./conversation.js";
import { DeviceError, GenerationError, receivedError } from "./errors.js";
import { collect, type Generation, type Piece } from "./generation.js";
import type { FromWorker, Progress, ToWorker } from "./protocol.js";
import type { Report } from "./report.js";
import { type CallOptions, checkOptions, isBatch, type Prompt } from "./request.js";

/** A worker of Node or of a browser; Node's lets the program end while it is not to be waited for. */
export interface WorkerLike {
  postMessage(message: ToWorker): void;
  ref?(): void;
  unref?(): void;
}

type Reply = { piece: Piece } | { progress: Progress } | { report: Report } | { done: true } | { error: unknown };

/** How a comparison with a golden file is made. */
export interface VerifyOptions {
  /** Is told as windows of tokens are run. */
  progress?: ((progress: Progress) => void) | null;
  /** Ends it; its promise then fails with the signal's reason. */
  signal?: AbortSignal | null;
}

/** The application's side of a loaded bundle: asks the thread that computes. Calls may overlap; they take turns. */
export class Model {
  /** The bundle's manifest. */
  readonly manifest: Manifest;
  readonly #worker: WorkerLike;
  readonly #inboxes = new Map<number, Inbox>();
  readonly #closed: Promise<void>;
  #setClosed!: () => void;
  #ended?: Error;
  #lastId = 0;

  /** For the platform: a worker with an Engine that is ready. */
  constructor(worker: WorkerLike, manifest: Manifest) {
    this.manifest = manifest;
    this.#worker = worker;
    this.#closed = new Promise((resolve) => (this.#setClosed = resolve));
    worker.unref?.();
  }

  /**
   * Continues one prompt, or each prompt of a batch exactly as if it were alone.
   *
   * @param prompt - a string, a list of messages or a list of token ids; a list of any of these is a batch.
   * @param options - of generation, and a signal to end it.
   * @returns the whole text and what led to it; a list of them for a batch.
   * @throws GenerationError: a prompt is empty or does not fit the context, or an option is out of range.
   */
  generate(prompt: Prompt, options?: CallOptions): Promise<Generation>;
  generate(prompt: readonly Prompt[], options?: CallOptions): Promise<Generation[]>;
  async generate(prompt: Prompt | readonly Prompt[], options?: CallOptions): Promise<Generation | Generation[]> {
    const results = await collect(this.stream(prompt, options));
    return isBatch(prompt) ? results : results[0];
  }

  /**
   * As `generate`, piece by piece; leaving the loop that reads them ends the generation. Errors of the prompt and the
   * options come before the first piece.
   */
  stream(prompt: Prompt | readonly Prompt[], options?: CallOptions): AsyncGenerator<Piece, void, undefined> {
    return this.answer(prompt, options);
  }

  /** A conversation that keeps its cache from turn to turn, opened by a system message if one is given. */
  chat(system?: string | null): Conversation {
    const id = ++this.#lastId;
    return new Conversation(
      (messages, options) => this.answer(messages, options, id),
      () => this.forget(id),
      system ?? undefined,
    );
  }

  /** Ends all generations and frees the memory. */
  close(): Promise<void> {
    if (!this.#ended) {
      this.end(new GenerationError("the model was closed; load the bundle again"));
      this.#worker.ref?.();
      this.#worker.postMessage({ close: true });
    }
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** As `stream`, with the cache of a conversation if one is given. */
  private async *answer(
    prompt: Prompt | readonly Prompt[],
    callOptions?: CallOptions | null,
    conversation?: number,
  ): AsyncGenerator<Piece, void, undefined> {
    if (this.#ended) throw this.#ended;
    checkOptions(callOptions ?? {}, ["signal"]);
    const { signal, ...options } = callOptions ?? {};
    for await (const reply of this.ask((id) => ({ call: { id, prompt, options, conversation } }), signal))
      if ("piece" in reply) yield reply.piece;
  }

  /** For the platform: holds the bundle against a golden file's bytes; `path` and `bundle` are their names. */
  protected async verify(
    data: Uint8Array,
    path: string,
    bundle: string,
    options: VerifyOptions | null | undefined,
  ): Promise<Report> {
    let report: Report;
    for await (const reply of this.ask((id) => ({ verify: { id, data, path, bundle } }), options?.signal)) {
      if ("progress" in reply) options?.progress?.(reply.progress);
      else if ("report" in reply) report = reply.report;
    }
    return report!;
  }

  /** Sends a request under a number of its own, and yields the replies to its end. */
  private async *ask(
    request: (id: number) => ToWorker,
    signal: AbortSignal | null | undefined,
  ): AsyncGenerator<Reply, void, undefined> {
    if (this.#ended) throw this.#ended;
    if (signal != null && typeof signal.throwIfAborted !== "function")
      throw new GenerationError("signal is no AbortSignal, such as new AbortController().signal");
    signal?.throwIfAborted();
    const id = ++this.#lastId;
    const inbox = new Inbox();
    const abort = () => inbox.push({ error: signal?.reason });
    signal?.addEventListener("abort", abort);
    this.#inboxes.set(id, inbox);
    this.#worker.ref?.();
    try {
      this.send(request(id));
      for (;;) {
        const reply = await inbox.next();
        if ("error" in reply) throw reply.error;
        if ("done" in reply) return;
        yield reply;
      }
    } finally {
      this.#worker.postMessage({ cancel: id }); // where it is not at its end
      signal?.removeEventListener("abort", abort);
      this.#inboxes.delete(id);
      if (!this.#inboxes.size && !this.#ended) this.#worker.unref?.();
    }
  }

  /** Sends what came from the application, which may be anything. */
  private send(message: ToWorker): void {
    try {
      this.#worker.postMessage(message);
    } catch (error) {
      throw new GenerationError(
        `the prompt holds what is no data (${(error as Error).message}), expected a string, messages or token ids`,
      );
    }
  }

  /** Frees a conversation's cache. */
  private forget(conversation: number): void {
    if (!this.#ended) this.#worker.postMessage({ forget: conversation });
  }

  /** For the platform: takes a message of the worker. */
  receive(message: FromWorker): void {
    if ("closed" in message) this.#setClosed();
    else if ("id" in message) {
      this.#inboxes.get(message.id)?.push("error" in message ? { error: receivedError(message.error) } : message);
    }
  }

  /** The worker is no more, or soon will be. */
  private end(error: Error): void {
    this.#ended ??= error;
    for (const inbox of this.#inboxes.values()) inbox.push({ error });
  }

  /** For the platform: the worker ended by itself. */
  fail(error: Error): void {
    this.end(error);
    this.#setClosed();
  }
}

/** Throws DeviceError where an option of loading is not one of `known`. */
export function checkLoadOptions(options: object | null | undefined, known: readonly string[]): void {
  for (const name of Object.keys(options ?? {})) {
    if (!known.includes(name))
      throw new DeviceError(`${name} is no option of load; known ones are ${known.join(", ")}`);
  }
}

/** Replies that nobody has read yet. */
class Inbox {
  readonly #replies: Reply[] = [];
  #wake = () => {};

  push(reply: Reply): void {
    this.#replies.push(reply);
    this.#wake();
  }

  async next(): Promise<Reply> {
    while (!this.#replies.length) await new Promise<void>((resolve) => (this.#wake = resolve));
    return this.#replies.shift()!;
  }
}
