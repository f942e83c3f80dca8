import { join } from "node:path";

/** tests/conformance of the repository. */
export const SUITE = join(import.meta.dirname, "../../../../tests/conformance");
export const BUNDLE = join(SUITE, "bundle");
