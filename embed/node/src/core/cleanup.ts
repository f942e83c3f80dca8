/** Spaces that decoded text loses before punctuation, where the manifest asks for it, also in a stream. */

// done one after the other over the whole text
const REPLACEMENTS = [
  [" .", "."],
  [" ?", "?"],
  [" !", "!"],
  [" ,", ","],
  [" ' ", "'"],
  [" n't", "n't"],
  [" 'm", "'m"],
  [" 's", "'s"],
  [" 've", "'ve"],
  [" 're", "'re"],
] as const;
// what a replacement may change: the strings themselves, and those that become one by " ' " losing its spaces
const SPANS = [...REPLACEMENTS.map(([old]) => old), " n ' t", "  ' m", "  ' s", "  ' ve", "  ' re"];
const STARTS = new Set(
  SPANS.flatMap((span) => Array.from({ length: span.length - 1 }, (_, size) => span.slice(0, size + 1))),
);
const LONGEST = Math.max(...SPANS.map(({ length }) => length)) - 1;

/** The text without the spaces. */
export function cleanUp(text: string): string {
  return REPLACEMENTS.reduce((cleaned, [old, replaced]) => cleaned.replaceAll(old, replaced), text);
}

/** The same in a stream: what the next text may still change is held back. */
export class CleanUp {
  private held = "";

  /** The text that is now certain. */
  add(text: string): string {
    const held = this.held + text;
    let size = Math.min(LONGEST, held.length);
    while (size > 0 && !STARTS.has(held.slice(held.length - size))) size--;
    let end = held.length - size;
    // nor may the cut go through what is changed already: of those characters alone it may lie among
    while (end > 0 && end < held.length && " 'n".includes(held[end - 1])) end--;
    this.held = held.slice(end);
    return cleanUp(held.slice(0, end));
  }

  /** What was held back, now that no more text comes. */
  finish(): string {
    const text = cleanUp(this.held);
    this.held = "";
    return text;
  }
}
