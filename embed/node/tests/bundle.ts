import { join } from "node:path";

/** spec of the repository. */
export const SUITE = join(import.meta.dirname, "../../../../spec");
export const BUNDLE = join(SUITE, "bundle");
