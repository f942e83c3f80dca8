import { statSync } from "node:fs";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";

import { DeviceError } from "./core/errors.js";
import { shown } from "./core/schema.js";

const VARIABLE = "PHIMOE_OPERATORS";
const LIBRARIES: Partial<Record<NodeJS.Platform, string>> = {
  darwin: "libphimoe_operators.dylib",
  win32: "phimoe_operators.dll",
};
const LIBRARY = LIBRARIES[process.platform] ?? "libphimoe_operators.so";

/** Where the package has the library of the native operators, if they were built before it. */
export const PACKAGED = fileURLToPath(
  new URL(`../../native/${process.platform}-${process.arch}/${LIBRARY}`, import.meta.url),
);

/** How a DeviceError about their lack ends. */
export const NO_OPERATORS =
  `which this package was built without; name their library by the option operators or by ${VARIABLE}, or export ` +
  "again with --operators stock";

/**
 * The library of the native operators: the file that is given, else the one that PHIMOE_OPERATORS in the environment
 * names, else the package's; undefined where there is none.
 *
 * @throws DeviceError: there is no file where one is named.
 */
export function findOperators(given: string | null | undefined): string | undefined {
  const named = given ?? (process.env[VARIABLE] || undefined);
  if (named === undefined) return isFile(PACKAGED) ? PACKAGED : undefined;
  if (typeof named === "string" && isFile(named)) return resolve(named);
  const [name, found] = [given == null ? VARIABLE : "operators", typeof named === "string" ? named : shown(named)];
  throw new DeviceError(
    `${name} is ${found}, where there is no file; expected the path of the native operators' library, ${LIBRARY}`,
  );
}

function isFile(path: string): boolean {
  try {
    return statSync(path).isFile();
  } catch {
    return false;
  }
}
