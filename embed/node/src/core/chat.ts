import type { ChatFormat } from "./bundle.js";
import { GenerationError } from "./errors.js";
import { shown } from "./schema.js";

export interface Message {
  /** "system", "user" or "assistant". */
  role: string;
  content: string;
}

/**
 * The prompt that asks for the assistant's next answer.
 *
 * @throws GenerationError: the bundle has no chat format, or a message is no { role, content } or has an unknown role.
 */
export function render(format: ChatFormat | null, messages: readonly Message[]): string {
  if (!format) throw new GenerationError("the bundle has no chat format; give the prompt as a string");
  const turns = Array.from(messages, (message, place) => {
    if (typeof message !== "object" || message === null)
      throw new GenerationError(`message ${place} is ${shown(message)}, expected { role, content }`);
    const { role, content } = message;
    if (typeof role !== "string" || !Object.hasOwn(format.turns, role)) {
      const known = Object.keys(format.turns).join(", ");
      throw new GenerationError(`message ${place}: its role is ${shown(role)}, expected one of ${known}`);
    }
    if (typeof content !== "string") {
      const found = `message ${place} of role ${shown(role)}: its content is ${shown(content)}`;
      throw new GenerationError(`${found}, expected a string`);
    }
    const [prefix, suffix] = format.turns[role];
    return content === "" && format.skipped_when_empty.includes(role) ? "" : prefix + content + suffix;
  });
  return turns.join("") + format.generation;
}
