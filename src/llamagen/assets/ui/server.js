// The server's API: its models, and images while they are drawn.

const KEY = "llamagen-key";
const kept = storage();

// A request that was refused or failed; its message is for people.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => Boolean(kept[KEY]);
export const setKey = (value) => Object.assign(kept, { [KEY]: value });

function storage() {
  try {
    return sessionStorage;
  } catch {
    // The browser keeps nothing; then the key lasts as long as the page.
    return {};
  }
}

export const listModels = async () => (await (await ask("v1/models")).json()).data;

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
  if (hasKey()) headers.Authorization = `Bearer ${kept[KEY]}`;
  const answer = fetch(path, { ...options, headers, cache: "no-store" });
  const response = await connected(answer, "the server does not answer");
  if (response.ok) return response;
  // Without JSON it is no answer of the API itself, but of something on the way to it.
  const said = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  throw new ServerError(
    (said?.error?.message ?? `the server answered ${response.status}`) +
      (wait ? ` (in ${wait} s)` : ""),
    response.status,
  );
}

async function connected(work, failure) {
  try {
    return await work;
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(failure);
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const broken = "the connection to the server broke off";
      const { value, done } = await connected(reader.read(), broken);
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const data = block.match(/^data:(.*)$/m);
        if (!data) continue;
        const event = JSON.parse(data[1]);
        if (event.error) throw new ServerError(event.error.message);
        yield event;
      }
    }
  } finally {
    // Whoever stops reading wants nothing more drawn.
    reader.cancel().catch(() => {});
  }
}
