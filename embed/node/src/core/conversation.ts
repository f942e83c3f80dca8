import type { Message } from "./chat.js";
import { GenerationError } from "./errors.js";
import { collect, type Generation, type Piece } from "./generation.js";
import type { CallOptions } from "./request.js";

/** Answers messages with a cache of the conversation's own, which a function beside it frees. */
type Answer = (messages: readonly Message[], options?: CallOptions) => AsyncGenerator<Piece, void, undefined>;

/**
 * What was said so far; `PhiMoE.chat` makes one.
 *
 * Every turn renders the whole conversation, and the longest prefix of it that is cached already is not computed again.
 */
export class Conversation {
  /** The turns; may be edited between answers. */
  messages: Message[] = [];
  readonly #answer: Answer;
  readonly #forget: () => void;
  readonly #system: string | undefined;
  #answering = false;

  /** @internal */
  constructor(answer: Answer, forget: () => void, system: string | undefined) {
    this.#answer = answer;
    this.#forget = forget;
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
   * As `send`, piece by piece. The message and its answer are kept once the answer has begun, as far as it came if the
   * stream is left early.
   */
  async *stream(content: string, options?: CallOptions): AsyncGenerator<Piece, void, undefined> {
    if (!content) throw new GenerationError("the message is empty; give at least one character");
    if (this.#answering)
      throw new GenerationError("the conversation is still answering; wait for the end of its answer, or leave it");
    const messages = [...this.messages, { role: "user", content }];
    let answer = "";
    this.#answering = true;
    try {
      for await (const piece of this.#answer(messages, options)) {
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
    this.#forget();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
