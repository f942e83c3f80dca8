import { type Conversation, type Device, PhiMoE } from "./phimoe.js";

function element<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

const [log, speed] = [element("log"), element("speed")];
const content = element<HTMLTextAreaElement>("content");
const [send, renew] = [element<HTMLButtonElement>("send"), element<HTMLButtonElement>("new")];
const megabytes = (bytes: number) => (bytes / 1e6).toFixed(1);

const SPEAKERS = { user: "You", assistant: "Model", error: "Error" };

/**
 * Adds a message to the log, under its speaker's name; `kind` is its class.
 *
 * @returns where its text stands.
 */
function say(kind: keyof typeof SPEAKERS, text: string): HTMLParagraphElement {
  const [message, speaker, line] = ["div", "span", "p"].map((name) => document.createElement(name));
  message.className = kind;
  if (kind === "error") message.role = "alert"; // read out at once
  speaker.className = "speaker";
  speaker.textContent = SPEAKERS[kind];
  line.textContent = text;
  message.append(speaker, line);
  log.append(message);
  log.scrollTop = log.scrollHeight;
  return line as HTMLParagraphElement;
}

async function load(): Promise<PhiMoE> {
  const bar = element<HTMLProgressElement>("progress");
  const query = new URLSearchParams(location.search);
  const bundle = query.get("bundle") ?? "bundle/";
  const start = performance.now();
  const model = await PhiMoE.load(bundle, {
    device: (query.get("device") ?? undefined) as Device | undefined,
    progress({ loaded, total }) {
      [bar.value, bar.max] = [loaded, total];
      element("bytes").textContent =
        loaded < total
          ? `Loading ${megabytes(loaded)} of ${megabytes(total)} MB`
          : `Loaded ${megabytes(total)} MB, starting …`;
    },
  });
  element("loading").hidden = true;
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  const place = model.device === "webgpu" ? "WebGPU" : "WebAssembly";
  const threads = crossOriginIsolated ? "threads" : "one thread, as the page is not cross-origin isolated";
  element("machine").textContent =
    `${model.manifest.source}, ${model.manifest.quantize}, loaded in ${seconds} s; ${place}, ${threads}`;
  return model;
}

/** Answers every message that is sent; one button stops an answer, another begins anew. */
function converse(model: PhiMoE): void {
  const conversation = model.chat();
  let control: AbortController | undefined;
  let ended = Promise.resolve();

  element<HTMLFormElement>("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (control) return control.abort();
    control = new AbortController();
    ended = answer(conversation, control.signal).finally(() => (control = undefined));
  });
  renew.addEventListener("click", async () => {
    control?.abort();
    await ended;
    conversation.reset();
    log.replaceChildren();
    speed.textContent = "";
    content.focus();
  });
  content.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!control) element<HTMLFormElement>("form").requestSubmit();
  });
  send.disabled = renew.disabled = false;
  content.focus();
}

/** Sends what stands in the field, and writes the answer as it comes. */
async function answer(conversation: Conversation, signal: AbortSignal): Promise<void> {
  const question = content.value;
  say("user", question);
  const line = say("assistant", "");
  log.ariaBusy = "true"; // a screen reader reads the whole answer, not each piece of it
  content.value = "";
  setStop(true);
  const start = performance.now();
  let [first, count] = [start, 0];
  try {
    const options = { temperature: number("temperature"), max_new_tokens: number("max_new_tokens"), signal };
    for await (const { text } of conversation.stream(question, options)) {
      line.textContent += text;
      log.scrollTop = log.scrollHeight;
      const now = performance.now();
      if (!count++) first = now;
      else speed.textContent = `${((1000 * (count - 1)) / (now - first)).toFixed(1)} tokens/s, ${count} tokens`;
    }
  } catch (error) {
    if (signal.aborted) speed.textContent += ", stopped";
    else {
      if (!line.textContent) line.parentElement!.remove(); // nothing was answered
      say("error", (error as Error).message);
    }
  }
  log.ariaBusy = null;
  setStop(false);
  content.focus();
}

/** A field's number; an empty one is the default. */
function number(id: string): number | undefined {
  const { valueAsNumber } = element<HTMLInputElement>(id);
  return Number.isNaN(valueAsNumber) ? undefined : valueAsNumber;
}

function setStop(stop: boolean): void {
  send.textContent = stop ? "Stop" : "Send";
  send.classList.toggle("stop", stop);
  content.required = !stop; // an empty message may stop, not send
}

try {
  converse(await load());
} catch (error) {
  element("loading").hidden = true;
  say("error", (error as Error).message);
}
