/**
 * A JSON value of unknown origin, made a value of a known type.
 *
 * @param key - where it stands, such as "decoding.cache.dtype".
 * @throws Mismatch: it is of another type or out of range.
 */
export type Reader<T> = (value: unknown, key: string) => T;

/** What a reader throws. */
export class Mismatch extends Error {}

/** Names the key, what was found there, and what was expected. */
export function mismatch(key: string, value: unknown, expected: string): Mismatch {
  return new Mismatch(`${key} is ${shown(value)}, expected ${expected}`);
}

export const boolean: Reader<boolean> = (value, key) => {
  if (typeof value !== "boolean") throw mismatch(key, value, "true or false");
  return value;
};

/** A string, where a test is given one that passes it; `expected` is the test in words. */
export function string(expected = "a string", test: (text: string) => boolean = () => true): Reader<string> {
  return (value, key) => {
    if (typeof value !== "string" || !test(value)) throw mismatch(key, value, expected);
    return value;
  };
}

/** An integer, ends included. */
export function integer(least: number, most: number): Reader<number> {
  return (value, key) => {
    if (!Number.isSafeInteger(value) || (value as number) < least || (value as number) > most) {
      throw mismatch(key, value, `an integer from ${least} to ${most}`);
    }
    return value as number;
  };
}

/** A number that is not infinite, as JSON.parse reads 1e999. */
export const finite: Reader<number> = (value, key) => {
  if (!Number.isFinite(value)) throw mismatch(key, value, "a finite number");
  return value as number;
};

export function oneOf<const T extends string>(values: readonly T[]): Reader<T> {
  return string(values.join(", "), (text) => values.includes(text as T)) as Reader<T>;
}

/** Null, or what `reader` reads. */
export function nullable<T>(reader: Reader<T>): Reader<T | null> {
  return (value, key) => (value === null ? null : reader(value, key));
}

/** What `reader` reads, or `otherwise` where the key is absent. */
export function optional<T>(reader: Reader<T>, otherwise: T): Reader<T> {
  return (value, key) => (value === undefined ? otherwise : reader(value, key));
}

/** A list of at least so many. */
export function list<T>(item: Reader<T>, least = 0): Reader<T[]> {
  return (value, key) => {
    if (!Array.isArray(value) || value.length < least) throw mismatch(key, value, `a list of ${least} or more`);
    return value.map((each, place) => item(each, `${key}[${place}]`));
  };
}

/** An object whose keys are data, each of which `name` reads; at least so many. */
export function record<T>(item: Reader<T>, name: Reader<string> = string(), least = 0): Reader<Record<string, T>> {
  return (value, key) => {
    const entries = Object.entries(asObject(value, key));
    if (entries.length < least) throw mismatch(key, value, `an object of ${least} or more`);
    // fromEntries makes "__proto__" a key as any other; an assignment would not
    return Object.fromEntries(
      entries.map(([each, inner]) => [name(each, `${key}: a name`), item(inner, `${key}.${each}`)]),
    );
  };
}

/** An object with the keys of `readers`; others are left out. */
export function object<T>(readers: { [Key in keyof T]-?: Reader<T[Key]> }): Reader<T> {
  return (value, key) => {
    const found = asObject(value, key);
    const entries = Object.entries<Reader<unknown>>(readers).map(([name, reader]) => {
      const inner = Object.hasOwn(found, name) ? found[name] : undefined; // not what every object inherits
      return [name, reader(inner, key ? `${key}.${name}` : name)];
    });
    return Object.fromEntries(entries) as T;
  };
}

function asObject(value: unknown, key: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw mismatch(key || "it", value, "an object");
  return value as Record<string, unknown>;
}

/** A value in an error: short, however long or deep it is. */
export function shown(value: unknown): string {
  if (value === undefined) return "missing";
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (typeof value === "object" && value !== null) return `an object of ${Object.keys(value).length}`;
  const text = typeof value === "string" ? JSON.stringify(value) : String(value);
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}
