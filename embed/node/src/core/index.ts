/** What a bundle's runtime is but for its platform: one that reads files, opens a session and has a thread for `Engine`. */
export { checkGraph } from "./agreement.js";
export { type File, HASH_LIMIT, type Manifest, parseManifest } from "./bundle.js";
export type { Message } from "./chat.js";
export type { Conversation } from "./conversation.js";
export { Engine } from "./engine.js";
export { BundleError, DeviceError, GenerationError, PhiMoEError, receivedError, sentError } from "./errors.js";
export type { Generation, Piece } from "./generation.js";
export { Model } from "./model.js";
export type { FromWorker, ToWorker } from "./protocol.js";
export type { CallOptions, Options, Prompt } from "./request.js";
export { checkThreads, chooseGraph, ELEMENT_TYPES, type Session, type Value } from "./session.js";
export { Tokenizer } from "./tokenizer.js";
