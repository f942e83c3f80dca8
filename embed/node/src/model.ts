import type { Manifest } from "./bundle.js";
import { Conversation } from "./conversation.js";
import { GenerationError, receivedError } from "./errors.js";
import type { Generation, Options, Piece } from "./generate.js";
import { type FromWorker, isBatch, type Prompt, type ToWorker } from "./protocol.js";

/** Options, and a signal that ends the generation; its promise or stream then fails with the signal's reason. */
export interface CallOptions extends Options {
  signal?: AbortSignal;
}

/** What a conversation has to do with a call. */
export interface Hooks {
  conversation?: number;
  piece?(piece: Piece): void;
  ended?(): void;
}

/** A worker of Node or of a browser; the first can let a program end while it is idle. */
interface WorkerLike {
  postMessage(message: ToWorker): void;
  ref?(): void;
  unref?(): void;
}

interface Call {
  pieces: ReadableStreamDefaultController<Piece>;
  hooks: Hooks;
  leave(): void;
}

/** The application's side of a loaded bundle: asks the thread that computes. Calls may run at the same time; they take turns. */
export class Model {
  #worker: WorkerLike;
  #calls = new Map<number, Call>();
  #lastId = 0;
  #ended?: Error;
  #load!: { resolve(manifest: Manifest): void; reject(error: Error): void };
  #closed?: () => void;
  #closing?: Promise<void>;
  /** Resolves when the bundle is loaded. */
  protected readonly loaded: Promise<Manifest>;

  constructor(worker: WorkerLike) {
    this.#worker = worker;
    this.loaded = new Promise((resolve, reject) => {
      this.#load = { resolve, reject };
    });
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
   * As `generate`, piece by piece: `for await` reads the stream, and leaving the loop ends the generation. What `generate`
   * throws comes before the first piece.
   */
  stream(prompt: Prompt | readonly Prompt[], options?: CallOptions): ReadableStream<Piece> {
    return this.start(prompt, options, {});
  }

  /** A conversation that keeps its cache from turn to turn, opened by a system message if one is given. */
  chat(system?: string): Conversation {
    return new Conversation(this, ++this.#lastId, system);
  }

  /** Ends all generations and frees the memory; the model cannot be used after. */
  close(): Promise<void> {
    this.#closing ??= new Promise((resolve) => {
      this.#closed = resolve;
      if (this.#ended) return resolve();
      this.#worker.ref?.();
      this.#worker.postMessage({ close: true });
      this.#end(new GenerationError("the model was closed; load the bundle again"));
    });
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** @internal */
  start(prompt: Prompt | readonly Prompt[], { signal, ...options }: CallOptions = {}, hooks: Hooks): ReadableStream<Piece> {
    const id = ++this.#lastId;
    const cancel = () => {
      this.#calls.get(id)?.leave();
      this.#worker.postMessage({ cancel: id });
    };
    return new ReadableStream<Piece>({
      start: (pieces) => {
        if (this.#ended) throw this.#ended;
        signal?.throwIfAborted();
        this.#worker.postMessage({ id, prompt, options, conversation: hooks.conversation });
        const abort = () => {
          cancel();
          pieces.error(signal?.reason);
        };
        signal?.addEventListener("abort", abort);
        const leave = () => {
          signal?.removeEventListener("abort", abort);
          this.#calls.delete(id);
          if (!this.#calls.size) this.#worker.unref?.();
          hooks.ended?.();
        };
        this.#calls.set(id, { pieces, hooks, leave });
        this.#worker.ref?.();
      },
      cancel,
    });
  }

  /** @internal */
  forget(conversation: number): void {
    if (!this.#ended) this.#worker.postMessage({ forget: conversation });
  }

  /** Takes a message of the worker. */
  protected receive(message: FromWorker): void {
    if ("ready" in message) {
      this.#worker.unref?.();
      this.#load.resolve(message.ready);
    } else if ("failed" in message) this.fail(receivedError(message.failed));
    else if ("closed" in message) this.#closed?.();
    else {
      const call = this.#calls.get(message.id);
      if (!call) return; // it was cancelled
      if ("piece" in message) {
        call.hooks.piece?.(message.piece);
        call.pieces.enqueue(message.piece);
        return;
      }
      call.leave();
      if ("error" in message) call.pieces.error(receivedError(message.error));
      else call.pieces.close();
    }
  }

  /** The worker ended by itself. */
  protected fail(error: Error): void {
    this.#load.reject(error);
    this.#end(error);
    this.#closed?.();
  }

  #end(error: Error): void {
    this.#ended ??= error;
    for (const { pieces, leave } of [...this.#calls.values()]) {
      leave();
      pieces.error(error);
    }
  }
}

/** The results of a stream, by row. */
export async function collect(pieces: ReadableStream<Piece>): Promise<Generation[]> {
  const results: Generation[] = [];
  for await (const { row, result } of pieces) if (result) results[row] = result;
  return results;
}
