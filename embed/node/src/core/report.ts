import { UNITS } from "./thresholds.js";

/** How far one model's logits are from another's, over all tokens that were run. */
export interface Comparison {
  tokens: number;
  /** Of the differences without their signs, in standard deviations of the logits. */
  mean_difference: number;
  max_difference: number;
  /** The mean divergence of a token, in nats. */
  kl: number;
  /** The share of tokens after which both find the same one most likely. */
  top1_agreement: number;
}

/** A figure beside its limit. */
export interface Check {
  name: string;
  measured: number;
  limit: number;
  /** Whether the figure is a number and no more than the limit. */
  passed: boolean;
}

/** What holding a bundle against a golden file found. */
export interface Report {
  /** Its folder. */
  bundle: string;
  /** The checkpoint and the file. */
  reference: string;
  tokens: number;
  /** How many tokens each window has. */
  windows: number[];
  /** What a user of the bundle sees. */
  bundle_to_reference: Comparison;
  /** The kernels alone, against PyTorch over the stored weights; null where the file does not know these. */
  bundle_to_stored: Comparison | null;
  /** The rounding of the weights alone, as it was when the file was saved; null as before. */
  stored_to_reference: Comparison | null;
  /** The share of choices of experts that it leaves unchanged, likewise. */
  routing_agreement: number | null;
  /** Of "reference", "stored" and "bundle", as far as it is known. */
  perplexity: Record<string, number>;
  /** How both continue the beginning of the first window, and how many of how many tokens are equal from the start. */
  greedy: { reference: string; bundle: string; agreeing: number; new_tokens: number };
  /** What else a reader must know. */
  notes: string[];
  checks: Check[];
  /** What is past its limit, in words. */
  failures: string[];
  passed: boolean;
}

/** The report for people, as phimoe-verify prints it. */
export function reportText(report: Report): string {
  const { greedy, checks } = report;
  const row = (name: string, cells: string[], widths: number[]) =>
    [name, ...cells.map((cell, place) => cell.padStart(widths[place]))].join("  ");
  const compared = (name: string, of: Comparison | null) => {
    if (!of) return [];
    const cells = [of.mean_difference, of.max_difference, of.kl].map(scientific);
    return [row(name.padEnd(27), [...cells, percent(of.top1_agreement)], [13, 12, 8, 10])];
  };
  return [
    `${report.bundle} against ${report.reference}`,
    `${report.tokens} tokens in ${report.windows.length} windows of up to ${Math.max(...report.windows)}`,
    "",
    row(" ".repeat(27), ["mean |d|, std", "max |d|, std", "KL, nats", "same top-1"], [13, 12, 8, 10]),
    ...compared("bundle to reference", report.bundle_to_reference),
    ...compared("bundle to stored weights", report.bundle_to_stored),
    ...compared("stored weights to reference", report.stored_to_reference),
    "",
    `perplexity: ${Object.entries(report.perplexity)
      .map(([name, value]) => `${name} ${value.toFixed(4)}`)
      .join(", ")}`,
    ...(report.routing_agreement === null
      ? []
      : [`choices of experts that the stored weights leave unchanged: ${percent(report.routing_agreement)}`]),
    ...report.notes,
    `greedy continuations, ${greedy.agreeing} of ${greedy.new_tokens} tokens equal`,
    `  reference: ${greedy.reference}`,
    `  bundle:    ${greedy.bundle}`,
    "",
    `${row("threshold".padEnd(16), ["measured", "limit"], [8, 5])}  unit`,
    ...checks.map(({ name, measured, limit, passed }) => {
      const cells = row(name.padEnd(16), [brief(measured), brief(limit)], [8, 5]);
      return `${cells}  ${UNITS[name].padEnd(5)}  ${passed ? "passed" : "FAILED"}`;
    }),
    "",
    report.passed ? "passed" : "FAILED",
  ].join("\n");
}

/** Three digits: 0.0123, 1.23e-05. */
export function brief(number: number): string {
  if (!Number.isFinite(number)) return String(number);
  const [digits, exponent] = number.toExponential(2).split("e");
  if (number !== 0 && (+exponent < -4 || +exponent >= 3)) return `${Number(digits)}e${twoDigits(exponent)}`;
  return String(Number(number.toPrecision(3)));
}

function scientific(number: number): string {
  if (!Number.isFinite(number)) return String(number);
  const [digits, exponent] = number.toExponential(2).split("e");
  return `${digits}e${twoDigits(exponent)}`;
}

function twoDigits(exponent: string): string {
  return exponent[0] + exponent.slice(1).padStart(2, "0");
}

function percent(share: number): string {
  return `${(100 * share).toFixed(2)}%`;
}
