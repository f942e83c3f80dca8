const LEAST = 0.6; // how alike two names are at the least, of 1

/** The known name that is most like this one, if any is; for errors. */
export function nearest(name: string, known: readonly string[]): string | undefined {
  const likely = known.map((each) => [likeness(name.slice(0, 80), each), each] as const);
  const [most, best] = likely.reduce((a, b) => (b[0] > a[0] ? b : a));
  return most >= LEAST ? best : undefined;
}

/** Twice the length of the longest common subsequence, over both lengths. */
function likeness(a: string, b: string): number {
  let row = new Array<number>(b.length + 1).fill(0);
  for (const character of a) {
    const next = [0];
    for (let place = 0; place < b.length; place++)
      next.push(b[place] === character ? row[place] + 1 : Math.max(row[place + 1], next[place]));
    row = next;
  }
  return (2 * row[b.length]) / (a.length + b.length);
}
