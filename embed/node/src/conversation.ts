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
  #model: Model;
  #id: number;
  #system: string | undefined;
  #answering = false;

  /** @internal */
  constructor(model: Model, id: number, system?: string) {
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
  stream(content: string, options?: CallOptions): ReadableStream<Piece> {
    if (!content) throw new GenerationError("the message is empty; give at least one character");
    if (this.#answering) throw new GenerationError("the conversation is still answering; wait for the end of its answer, or cancel it");
    const messages = [...this.messages, { role: "user", content }];
    let answer = "";
    const pieces = this.#model.start(messages, options, {
      conversation: this.#id,
      piece: ({ text }) => {
        answer += text;
        this.messages = [...messages, { role: "assistant", content: answer }];
      },
      ended: () => {
        this.#answering = false;
      },
    });
    this.#answering = true;
    return pieces;
  }

  /** Frees the cache; closing the model does so, too. */
  close(): void {
    this.#model.forget(this.#id);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
