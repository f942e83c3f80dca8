/** Stop strings in streamed text, also across the borders of its pieces. */
export class StopStrings {
  private held = "";

  constructor(private readonly stops: readonly string[]) {}

  /** The text that is now certain, and whether a stop string was met; it and what follows it are dropped. */
  add(text: string): { text: string; stopped: boolean } {
    const all = this.held + text;
    const found = this.stops.map((stop) => all.indexOf(stop)).filter((place) => place >= 0);
    const stopped = found.length > 0;
    const certain = stopped
      ? found.reduce((first, place) => Math.min(first, place))
      : all.length - this.stops.reduce((longest, stop) => Math.max(longest, overlap(all, stop)), 0);
    this.held = stopped ? "" : all.slice(certain);
    return { text: all.slice(0, certain), stopped };
  }

  /** What was held back, now that no more text comes. */
  finish(): string {
    const text = this.held;
    this.held = "";
    return text;
  }
}

/** The length of the longest proper prefix of `stop` that ends `text`. */
function overlap(text: string, stop: string): number {
  let size = Math.min(text.length, stop.length - 1);
  while (size > 0 && !text.endsWith(stop.slice(0, size))) size--;
  return size;
}
