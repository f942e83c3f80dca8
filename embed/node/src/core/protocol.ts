import type { Manifest } from "./bundle.js";
import type { SentError } from "./errors.js";
import type { Piece } from "./generation.js";
import type { Report } from "./report.js";
import type { Options, Prompt } from "./request.js";

/** Asks for a generation; the cache of a `conversation` is kept for its next call. */
export interface Call {
  id: number;
  prompt: Prompt | readonly Prompt[];
  options: Options;
  conversation?: number;
}

/** How many windows of tokens were run, and how many there are. */
export interface Progress {
  done: number;
  total: number;
}

/** Asks for a comparison with a golden file; `path` and `bundle` are their names in errors and in the report. */
export interface Verification {
  id: number;
  data: Uint8Array;
  path: string;
  bundle: string;
}

/** What an application's thread tells the thread that runs the graph. */
export type ToWorker = { call: Call } | { verify: Verification } | { cancel: number } | { forget: number } | { close: true };

/** What comes back. */
export type FromWorker =
  | { ready: Manifest }
  | { failed: SentError }
  | { id: number; piece: Piece }
  | { id: number; progress: Progress }
  | { id: number; report: Report }
  | { id: number; done: true }
  | { id: number; error: SentError }
  | { closed: true };
