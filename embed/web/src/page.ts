import { type Device, PhiMoE } from "./phimoe.js";

function element<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

const [log, speed] = [element("log"), element("speed")];
const content = element<HTMLTextAreaElement>("content");
const send = element<HTMLButtonElement>("send");
const megabytes = (bytes: number) => (bytes / 1e6).toFixed(1);

/** Adds a message to the log; `kind` is its class. */
function say(kind: "user" | "assistant" | "error", text: string): HTMLParagraphElement {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  log.append(line);
  log.scrollTop = log.scrollHeight;
  return line;
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

/** Answers every message that is sent; the button stops an answer. */
function converse(model: PhiMoE): void {
  const conversation = model.chat();
  let control: AbortController | undefined;
  const number = (id: string) => element<HTMLInputElement>(id).valueAsNumber;

  element<HTMLFormElement>("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (control) return control.abort();
    say("user", content.value);
    const answer = say("assistant", "");
    control = new AbortController();
    const options = {
      temperature: number("temperature"),
      max_new_tokens: number("max_new_tokens"),
      signal: control.signal,
    };
    const question = content.value;
    content.value = "";
    setStop(true);
    const start = performance.now();
    let [first, count] = [start, 0];
    try {
      for await (const { text } of conversation.stream(question, options)) {
        answer.textContent += text;
        log.scrollTop = log.scrollHeight;
        const now = performance.now();
        if (!count++) first = now;
        else speed.textContent = `${((1000 * (count - 1)) / (now - first)).toFixed(1)} tokens/s, ${count} tokens`;
      }
    } catch (error) {
      if (!control.signal.aborted) say("error", (error as Error).message);
      else speed.textContent += ", stopped";
    }
    control = undefined;
    setStop(false);
    content.focus();
  });
  content.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!control) element<HTMLFormElement>("form").requestSubmit();
  });
  send.disabled = false;
  content.focus();
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
