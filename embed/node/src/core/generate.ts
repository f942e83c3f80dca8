import type { Decoder } from "./decoder.js";
import type { Generation, Piece } from "./generation.js";
import type { Request } from "./request.js";
import { sample } from "./sampler.js";
import { StopStrings } from "./stop.js";
import { TextStream, type Tokenizer } from "./tokenizer.js";

/**
 * Yields every new token of every request, the rows in turn; `decoder` has a row for each, with room for all its
 * tokens.
 */
export async function* generate(
  decoder: Decoder,
  tokenizer: Tokenizer,
  eos: ReadonlySet<number>,
  requests: readonly Request[],
): AsyncGenerator<Piece, void, undefined> {
  const start = performance.now();
  const active = requests.map((request, number) => new Row(number, request, tokenizer, eos, start));
  let logits: Float32Array[] = [];
  for (const [row, request] of requests.entries()) logits.push(await decoder.prefill(row, request.prompt));
  for (;;) {
    for (const [place, row] of active.entries()) {
      yield row.add(sample(logits[place], row.request.sampling, row.token_ids.length, row.seen));
    }
    for (let place = active.length - 1; place >= 0; place--) {
      if (active[place].finished && active.length > 1) {
        decoder.drop(place);
        active[place] = active[active.length - 1];
        active.pop();
      }
    }
    if (active[0].finished) return;
    logits = await decoder.step(active.map((row) => row.token_ids[row.token_ids.length - 1]));
  }
}

/** A request on its way to its end. */
class Row {
  readonly token_ids: number[] = [];
  readonly seen: Set<number>;
  finished = false;
  private first = 0;
  private text = "";
  private readonly characters: TextStream;
  private readonly strings: StopStrings;
  private readonly stopIds: Set<number | undefined>;

  constructor(
    private readonly number: number,
    readonly request: Request,
    tokenizer: Tokenizer,
    private readonly eos: ReadonlySet<number>,
    private readonly start: number,
  ) {
    this.seen = new Set(request.prompt);
    this.characters = new TextStream(tokenizer, request.prompt);
    this.strings = new StopStrings(request.stop);
    // a hidden token has no text that a stop string could be found in
    this.stopIds = new Set(
      request.stop.map((stop) => tokenizer.tokenId(stop)).filter((id) => tokenizer.hidden.has(id!)),
    );
  }

  /** Takes the row's next token. */
  add(token: number): Piece {
    const now = performance.now();
    if (!this.token_ids.length) this.first = now;
    this.token_ids.push(token);
    this.seen.add(token);
    let { text, stopped } = this.strings.add(this.eos.has(token) ? "" : this.characters.add(token));
    let finish_reason: Generation["finish_reason"] | undefined;
    if (this.eos.has(token)) finish_reason = "eos";
    else if (stopped || this.stopIds.has(token)) finish_reason = "stop";
    else if (this.token_ids.length === this.request.max_new_tokens) finish_reason = "length";
    this.finished = finish_reason !== undefined;
    if (this.finished) {
      if (!stopped) {
        const last = this.strings.add(this.characters.finish()); // what waited for what might follow it
        text += last.text;
        if (last.stopped) finish_reason = "stop";
      }
      text += this.strings.finish();
    }
    this.text += text;
    const piece = { row: this.number, token_id: token, text };
    if (!finish_reason) return { ...piece, result: null };
    const result = {
      text: this.text,
      token_ids: this.token_ids,
      finish_reason,
      prompt_tokens: this.request.prompt.length,
      first_token_seconds: (this.first - this.start) / 1000,
      seconds: (now - this.start) / 1000,
      tokens_per_second: (1000 * (this.token_ids.length - 1)) / Math.max(now - this.first, 1e-6),
    };
    return { ...piece, result };
  }
}
