// The server's API: its models, and images while they are drawn.

const KEY = "llamagen-key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // The browser keeps nothing; then the key lasts as long as the page.
}

// A request that was refused or failed; its message is for people.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function hasKey() {
  return key !== "";
}

export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // As above.
  }
}

export async function listModels() {
  const response = await ask("v1/models");
  return (await response.json()).data;
}

// Asks for images; returns their events, to be read with "for await".
export async function startImages(request, signal) {
  const sent = request.image
    ? { body: formOf(request) }
    : { body: JSON.stringify(request), headers: { "Content-Type": "application/json" } };
  const path = request.image ? "v1/images/edits" : "v1/images/generations";
  return events(await ask(path, { method: "POST", ...sent, signal }));
}

function formOf(request) {
  const form = new FormData();
  for (const [name, value] of Object.entries(request)) {
    if (value !== undefined) form.append(name, value);
  }
  return form;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server does not answer");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // No answer of the API itself, but of something on the way to it.
  }
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (in ${wait} s)`;
  return new ServerError(message, response.status);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const { value, done } = await next(reader);
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event?.error) throw new ServerError(event.error.message);
        if (event) yield event;
      }
    }
  } finally {
    // Whoever stops reading wants nothing more drawn.
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the connection to the server broke off");
  }
}

function parse(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  if (lines.length === 0) return null;
  return JSON.parse(lines.map((line) => line.slice("data:".length)).join("\n"));
}
