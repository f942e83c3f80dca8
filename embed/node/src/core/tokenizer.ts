import { ByteFallbackDecoder, Tokenizer as Library } from "@huggingface/tokenizers";

import type { Decoding } from "./bundle.js";
import { CleanUp, cleanUp } from "./cleanup.js";
import { BundleError, GenerationError } from "./errors.js";
import { checkTokenizerFile } from "./tokenizer_file.js";

const INCOMPLETE = "\u{FFFD}"; // what a decoder makes of half a character

/** Text to token ids and back, from a bundle's tokenizer.json; back also as a stream of whole characters. */
export class Tokenizer {
  /** The ids of the special tokens that are no text. */
  readonly hidden: ReadonlySet<number>;
  /** Whether decoded text loses the spaces before punctuation. */
  readonly cleansUp: boolean;
  private readonly library: Library;
  private readonly anchor: number[];
  private readonly anchorLength: number;

  /**
   * @param text - of tokenizer.json.
   * @param path - where it lies, for errors.
   * @param decoding - of the manifest: the hidden tokens, and whether text is cleaned up.
   * @throws BundleError: the text is no tokenizer, or one of another kind than is read here.
   */
  constructor(
    text: string,
    path: string,
    { hidden_tokens, clean_up_tokenization_spaces }: Pick<Decoding, "hidden_tokens" | "clean_up_tokenization_spaces">,
  ) {
    try {
      const file = JSON.parse(text);
      checkTokenizerFile(file);
      this.library = new Library(file, {});
      const decoder = this.library.decoder as { decoders?: unknown[] } | null;
      for (const each of [decoder, ...(decoder?.decoders ?? [])]) {
        if (each instanceof ByteFallbackDecoder)
          each.text_decoder = new ByteDecoder("utf-8", { fatal: true, ignoreBOM: true });
      }
      this.anchor = this.encode("a", false);
    } catch (error) {
      throw new BundleError(
        `${path}: cannot be read as a tokenizer (${(error as Error).message}); copy or export the bundle again`,
      );
    }
    this.hidden = new Set(Object.values(hidden_tokens));
    this.cleansUp = clean_up_tokenization_spaces;
    this.anchorLength = this.decodePart(this.anchor).length;
  }

  /** The text's token ids; `special` adds those that tokenizer.json puts around a text, such as the first <s>. */
  encode(text: string, special = true): number[] {
    return this.library.encode(text, { add_special_tokens: special }).ids;
  }

  /** The text of the ids, without the hidden tokens. */
  decode(ids: readonly number[]): string {
    const text = this.decodePart(ids);
    return this.cleansUp ? cleanUp(text) : text;
  }

  /** The same of ids that others may follow: spaces stay as they are. */
  decodePart(ids: readonly number[]): string {
    // an id that the model has and the tokenizer has not is no text
    const shown = ids.filter((id) => !this.hidden.has(id) && this.library.id_to_token(id) !== undefined);
    return shown.length
      ? this.library.decode(shown, { skip_special_tokens: false, clean_up_tokenization_spaces: false })
      : "";
  }

  /** The text of the ids where they follow other text: a decoder strips the space before a text's first word only. */
  decodeAfterText(ids: readonly number[]): string {
    return this.decodePart([...this.anchor, ...ids]).slice(this.anchorLength);
  }

  /** The id of a token by its own text. */
  tokenId(token: string): number | undefined {
    return this.library.token_to_id(token);
  }
}

/**
 * Refuses half characters, which no encoding has; `name` is the text's in errors.
 *
 * @throws GenerationError: the text holds one.
 */
export function checkCharacters(text: string, name: string): void {
  const place = text.search(/\p{Surrogate}/u);
  if (place < 0) return;
  const half = text.charCodeAt(place).toString(16).toUpperCase();
  throw new GenerationError(
    `${name} holds U+${half} at character ${place}, which is half a character; expected well-formed Unicode`,
  );
}

/** Bytes as other languages' tokenizers decode them: where they are no text, each is a replacement character. */
class ByteDecoder extends TextDecoder {
  override decode(bytes: Uint8Array): string {
    try {
      return super.decode(bytes);
    } catch {
      return INCOMPLETE.repeat(bytes.length);
    }
  }
}

/**
 * Token ids in, text out: each character once, and only when it is whole.
 *
 * A character may be spread over several byte tokens, so ids wait until they decode without a replacement character.
 * Only those that wait are decoded, so a token costs the same however long the text is. Where spaces are cleaned up,
 * text waits, too, while the next may still change it; `finish` gives what waits at the end.
 */
export class TextStream {
  private waiting: number[] = [];
  private follows: boolean;
  private readonly spaces?: CleanUp;

  /** A stream of the text that continues `prompt`. */
  constructor(
    private readonly tokenizer: Tokenizer,
    prompt: readonly number[],
  ) {
    if (tokenizer.cleansUp) this.spaces = new CleanUp();
    this.follows = prompt.length > 0 && !tokenizer.hidden.has(prompt[prompt.length - 1]);
    // a prompt may end inside a character: its bytes wait for the rest
    let start = prompt.length;
    while (start > 0 && tokenizer.decodePart([prompt[start - 1]]) === INCOMPLETE) start--;
    for (const id of prompt.slice(start)) this.add(id);
  }

  /** The text that this token completes; often none. */
  add(id: number): string {
    if (this.tokenizer.hidden.has(id)) return "";
    this.waiting.push(id);
    const text = this.follows ? this.tokenizer.decodeAfterText(this.waiting) : this.tokenizer.decodePart(this.waiting);
    if (text.endsWith(INCOMPLETE)) return "";
    this.waiting = [];
    this.follows = true;
    return this.spaces ? this.spaces.add(text) : text;
  }

  /** The text that waits for what may follow it, now that nothing does; half a character is left out. */
  finish(): string {
    return this.spaces ? this.spaces.finish() : "";
  }
}
