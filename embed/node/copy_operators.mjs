// Puts the library of the native operators into the package, where `cargo build --release` in native/ has made it.
import { copyFileSync, existsSync, mkdirSync, rmSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import { PACKAGED } from "./dist/src/operators.js";

const built = join(fileURLToPath(new URL("../../native/target/release", import.meta.url)), basename(PACKAGED));
if (existsSync(built)) {
  mkdirSync(dirname(PACKAGED), { recursive: true });
  rmSync(PACKAGED, { force: true }); // a program may have the old file mapped
  copyFileSync(built, PACKAGED);
} else console.log(`no native operators: ${built} was not built`);
