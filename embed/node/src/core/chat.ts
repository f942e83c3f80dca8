import type { ChatFormat } from "./bundle.js";
import { GenerationError } from "./errors.js";

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
  const turns = messages.map(({ role, content }) => {
    if (typeof content !== "string") throw new GenerationError(`message of role ${role}: its content is no string`);
    if (!Object.hasOwn(format.turns, role)) {
      throw new GenerationError(
        `message of role ${JSON.stringify(role)}: expected one of ${Object.keys(format.turns).join(", ")}`,
      );
    }
    const [prefix, suffix] = format.turns[role];
    return content === "" && format.skipped_when_empty.includes(role) ? "" : prefix + content + suffix;
  });
  return turns.join("") + format.generation;
}
