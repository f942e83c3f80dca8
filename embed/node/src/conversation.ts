import type { Message } from "./chat.js";
import { GenerationError } from "./errors.js";
import type { Generation, Piece } from "./generate.js";
import { type CallOptions, collect, type Model } from "./model.js";

/**
 * What was said so far; `PhiMoE.chat` makes one.
 *
 * Every turn renders the whole conversation, and the longest prefix of it that is cached already is not computed again.
 */
export class Conversation {
  /** The turns; may be edited between answers. */
  messages: Message[] = [];
  readonly #model: Model;
  readonly #id: number;
  readonly #system: string | undefined;
  #answering = false;

  /** @internal */
  constructor(model: Model, id: number, system: string | undefined) {
    this.#model = model;
    this.#id = id;
    this.#system = system;
    this.reset();
  }

  /** Forgets every turn but the system message. */
  reset(): void {
    this.messages = this.#system === undefined ? [] : [{ role: "system", content: this.#system }];
  }

  /** Answers the user's next message; options, results and errors as for `PhiMoE.generate`. */
  async send(content: string, options?: CallOptions): Promise<Generation> {
    return (await collect(this.stream(content, options)))[0];
  }

  /**
   * As `send`, piece by piece. The message and its answer are kept once the answer has begun, as far as it came if the stream
   * is left early.
   */
  async *stream(content: string, options?: CallOptions): AsyncGenerator<Piece, void, undefined> {
    if (!content) throw new GenerationError("the message is empty; give at least one character");
    if (this.#answering) throw new GenerationError("the conversation is still answering; wait for the end of its answer, or leave it");
    const messages = [...this.messages, { role: "user", content }];
    let answer = "";
    this.#answering = true;
    try {
      for await (const piece of this.#model.answer(messages, options, this.#id)) {
        answer += piece.text;
        this.messages = [...messages, { role: "assistant", content: answer }];
        yield piece;
      }
    } finally {
      this.#answering = false;
    }
  }

  /** Frees the cache; closing the model does so, too. */
  close(): void {
    this.#model.forget(this.#id);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
