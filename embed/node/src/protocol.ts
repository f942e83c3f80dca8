import type { Manifest } from "./bundle.js";
import type { Message } from "./chat.js";
import type { SentError } from "./errors.js";
import type { Options, Piece } from "./generate.js";

/** A text, messages of a chat, or token ids. */
export type Prompt = string | readonly Message[] | readonly number[];

/** Asks for a generation; the cache of a `conversation` is kept for its next call. */
export interface Call {
  id: number;
  prompt: Prompt | readonly Prompt[];
  options: Options;
  conversation?: number;
}

/** What an application's thread tells the thread that runs the graph. */
export type ToWorker = { call: Call } | { cancel: number } | { forget: number } | { close: true };

/** What comes back. */
export type FromWorker =
  | { ready: Manifest }
  | { failed: SentError }
  | { id: number; piece: Piece }
  | { id: number; done: true }
  | { id: number; error: SentError }
  | { closed: true };

/** Whether this is several prompts: a list whose first item is itself a string or a list. */
export function isBatch(prompt: Prompt | readonly Prompt[]): prompt is readonly Prompt[] {
  return Array.isArray(prompt) && (typeof prompt[0] === "string" || Array.isArray(prompt[0]));
}
