import {
  boolean,
  integer,
  list,
  Mismatch,
  mismatch,
  object,
  oneOf,
  optional,
  type Reader,
  record,
  string,
} from "./schema.js";

/**
 * Holds tokenizer.json against the one kind that is read here: byte-fallback BPE, as PhiMoE's checkpoints have it. The
 * JavaScript library reads other kinds, and damaged files, too, but not all of them as the library of the other
 * languages does, which would give other tokens without a word.
 *
 * @param file - the file's JSON.
 * @throws Mismatch: a part is of another kind or damaged.
 */
export function checkTokenizerFile(file: unknown): void {
  const { model, added_tokens, normalizer, pre_tokenizer, post_processor, decoder } = readFile(file, "");
  const ids = new Map(Object.entries(model.vocab));
  if (new Set(ids.values()).size < ids.size) throw new Mismatch("model.vocab has an id twice");
  for (let byte = 0; byte < 256; byte++) idOf(ids, byteToken(byte), "model.vocab");
  const strange = Object.keys(model.vocab).find((text) => /^<0x..>$/su.test(text) && !BYTE.test(text));
  if (strange !== undefined) throw mismatch("model.vocab: a name", strange, "bytes as <0x00> to <0xFF>");
  checkMerges(model.merges, ids);
  checkNormalizer(normalizer, "normalizer");
  if (pre_tokenizer != null) readMetaspace(pre_tokenizer, "pre_tokenizer");
  checkDecoder(decoder, "decoder");
  checkAdded(added_tokens, ids, normalizer);
  if (post_processor != null) checkTemplate(post_processor, ids);
}

type Replacement = { type: string; pattern: { String: string }; content: string };

const BYTE = /^<0x[0-9A-F]{2}>$/;
const any: Reader<unknown> = (value) => value;
const id = integer(0, 2 ** 31 - 1);
const nothing: Reader<unknown> = (value, key) => {
  if (value != null && value !== "" && value !== false && value !== 0) throw mismatch(key, value, "null");
  return value;
};
const character = string("one character", (text) => text.length === 1);

function exactly(expected: number | boolean): Reader<unknown> {
  return (value, key) => {
    if (value !== expected) throw mismatch(key, value, String(expected));
    return value;
  };
}

const readFile = object({
  model: object({
    type: oneOf(["BPE"]),
    byte_fallback: exactly(true),
    dropout: nothing,
    continuing_subword_prefix: nothing,
    end_of_word_suffix: nothing,
    ignore_merges: nothing,
    vocab: record(id),
    merges: list(any),
  }),
  added_tokens: list(
    object({
      id,
      content: string("a text", (text) => text !== ""),
      single_word: exactly(false),
      lstrip: boolean,
      rstrip: boolean,
      normalized: boolean,
    }),
  ),
  normalizer: any,
  pre_tokenizer: any,
  post_processor: any,
  decoder: any,
});
const readType = object({ type: string() });
const readMetaspace = object({
  type: oneOf(["Metaspace"]),
  split: exactly(false),
  replacement: character,
  prepend_scheme: oneOf(["always", "first", "never"]),
  str_rep: nothing,
});
const readReplacement = object<Replacement>({
  type: oneOf(["Replace"]),
  pattern: object({ String: string("a text", (text) => text !== "") }),
  content: string('a text without "$"', (text) => !text.includes("$")), // which JavaScript's replaceAll would read
});
const readStrip = object({ content: character, start: exactly(1), stop: exactly(0) });
const readTemplate = object({
  type: oneOf(["TemplateProcessing"]),
  single: list(object({ SpecialToken: optional(object({ id: string() }), undefined), Sequence: any })),
  special_tokens: record(object({ ids: list(id) })),
});

function byteToken(byte: number): string {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
}

function idOf(ids: ReadonlyMap<string, number>, text: string, key: string): number {
  const found = ids.get(text);
  if (found === undefined) throw new Mismatch(`${key} has ${JSON.stringify(text.slice(0, 80))}, which has no id`);
  return found;
}

/** A merge is a pair, or in older files a text with a space between; one form for all. */
function checkMerges(merges: readonly unknown[], ids: ReadonlyMap<string, number>): void {
  const pairs = typeof merges[0] !== "string";
  for (const [place, merge] of merges.entries()) {
    const key = `model.merges[${place}]`;
    const pair = pairs ? list(string())(merge, key) : string()(merge, key).split(" ");
    if (pair.length !== 2) throw mismatch(key, merge, "a pair");
    for (const text of [...pair, pair.join("")]) idOf(ids, text, key);
    // the library makes bytes of characters after the merges, others before them
    if (pair.some((text) => BYTE.test(text))) throw mismatch(key, merge, "characters, not bytes");
  }
}

function checkNormalizer(value: unknown, key: string): void {
  if (value == null) return;
  const { type } = readType(value, key);
  if (type === "Sequence") {
    const { normalizers } = object({ normalizers: list(any) })(value, key);
    for (const [place, each] of normalizers.entries()) {
      if (each == null) throw mismatch(`${key}.normalizers[${place}]`, each, "a normalizer");
      checkNormalizer(each, `${key}.normalizers[${place}]`);
    }
  } else if (type === "Prepend") object({ prepend: string() })(value, key);
  else if (type === "Replace") readReplacement(value, key);
  else throw mismatch(`${key}.type`, type, "Sequence, Prepend, Replace");
}

function checkDecoder(value: unknown, key: string): void {
  const { type } = readType(value, key);
  if (type === "Sequence") {
    const { decoders } = object({ decoders: list(any) })(value, key);
    for (const [place, each] of decoders.entries()) checkDecoder(each, `${key}.decoders[${place}]`);
  } else if (type === "Replace") readReplacement(value, key);
  else if (type === "Strip") readStrip(value, key);
  else if (type !== "ByteFallback" && type !== "Fuse")
    throw mismatch(`${key}.type`, type, "Sequence, Replace, ByteFallback, Fuse, Strip");
}

/** The library takes their ids from the file; others give them the vocabulary's, or the next free one. */
function checkAdded(
  added: readonly { id: number; content: string; lstrip: boolean; rstrip: boolean; normalized: boolean }[],
  ids: Map<string, number>,
  normalizer: unknown,
): void {
  const size = ids.size;
  let highest = -1;
  const seen = new Set<string>();
  for (const [place, token] of added.entries()) {
    const key = `added_tokens[${place}]`;
    if (seen.has(token.content)) throw mismatch(`${key}.content`, token.content, "each token once");
    seen.add(token.content);
    const expected = ids.get(token.content) ?? Math.max(highest + 1, size);
    if (token.id !== expected) throw mismatch(`${key}.id`, token.id, String(expected));
    ids.set(token.content, expected);
    highest = Math.max(highest, expected);
    if ((token.lstrip || token.rstrip) && !token.content.trim())
      throw mismatch(`${key}.content`, token.content, "no white space where it strips white space");
    // releases of the library disagree on such a file
    if (token.normalized && normalized(token.content, normalizer) !== token.content)
      throw mismatch(`${key}.normalized`, true, "false, as the normalizer changes the token");
  }
}

function normalized(text: string, normalizer: any): string {
  if (normalizer == null) return text;
  if (normalizer.type === "Prepend") return normalizer.prepend + text;
  if (normalizer.type === "Replace") return text.replaceAll(normalizer.pattern.String, normalizer.content);
  return normalizer.normalizers.reduce(normalized, text);
}

/** The library finds a template's tokens by their texts, others by the ids beside them. */
function checkTemplate(value: unknown, ids: ReadonlyMap<string, number>): void {
  const { single, special_tokens } = readTemplate(value, "post_processor");
  let texts = 0;
  for (const [place, { SpecialToken, Sequence }] of single.entries()) {
    const key = `post_processor.single[${place}]`;
    if (SpecialToken) {
      const found = Object.hasOwn(special_tokens, SpecialToken.id) ? special_tokens[SpecialToken.id].ids : [];
      if (found.length !== 1 || found[0] !== ids.get(SpecialToken.id))
        throw mismatch(`${key}.SpecialToken.id`, SpecialToken.id, "a token with its one id in special_tokens");
    } else {
      object({ id: oneOf(["A"]) })(Sequence, `${key}.Sequence`);
      texts++;
    }
  }
  if (texts !== 1) throw mismatch("post_processor.single", single, "a template with one text");
}
