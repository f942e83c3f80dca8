import type { Manifest } from "./bundle.js";
import type { SentError } from "./errors.js";
import type { Piece } from "./generation.js";
import type { Options, Prompt } from "./request.js";

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
