// The page of `llamagen serve --ui`: asks for images, shows them while they are drawn.

import { chosenModel, editImage, fill, isComplete, request, showModels } from "./form.js";
import { addRun, openGallery } from "./gallery.js";
import { hasKey, listModels, ServerError, setKey, startImages } from "./server.js";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const keyForm = byId("key-form");
const draw = byId("draw");
const stop = byId("stop");
const results = byId("results");

const say = (text) => byId("status").replaceChildren(text);
const images = (count) => (count === 1 ? "1 image" : `${count} images`);

// Ends the request that is under way.
let running = null;

async function start() {
  try {
    const models = await listModels();
    keyForm.hidden = true;
    // The key may have been asked for again later.
    if (chosenModel()) return;
    await openGallery({
      again: async (entry) => (await reuse(entry, false)) && generate(),
      use: async (entry) => (await reuse(entry, true)) && draw.focus(),
      edit: async (entry) => (await editImage(entry)) && byId("edit-kind").focus(),
    });
    showModels(models);
  } catch (error) {
    showError("Could not read the models", error);
  }
}

async function generate() {
  if (running || !isComplete()) return;
  running = new AbortController();
  const card = chosenModel();
  const progress = new Progress(Number(byId("count").value), card.rows);
  let run = null;
  setBusy(true);
  try {
    const body = await request();
    const events = await startImages(body, running.signal);
    run = addRun(body, card);
    reveal();
    for await (const event of events) {
      run.show(event);
      progress.show(event);
    }
    const { ready, count } = progress;
    if (ready < count) throw new ServerError("the server ended before the images were ready");
    say(`${images(count)} ready.`);
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped. ${images(progress.ready)} ready.`);
    else showError("Could not draw", error);
  } finally {
    run?.end();
    running = null;
    setBusy(false);
  }
}

// Shows how far a request is: a bar for the eyes, a few words for the ears.
class Progress {
  constructor(count, rows) {
    Object.assign(this, { count, rows, done: Array(count).fill(0), ready: 0 });
    byId("bar").removeAttribute("value");
    byId("progress-text").textContent = "Waiting for the first part";
    say(`Drawing ${images(count)}.`);
  }

  show(event) {
    const completed = event.type.endsWith("completed");
    this.done[event.index] = completed ? 1 : event.rows / this.rows;
    this.ready += completed;
    const share = this.done.reduce((sum, each) => sum + each, 0) / this.count;
    byId("bar").value = share;
    const percent = Math.floor(100 * share);
    byId("progress-text").textContent = `Drawing ${images(this.count)} · ${percent}%`;
    if (completed) say(`${this.ready} of ${this.count} ready.`);
  }
}

function setBusy(busy) {
  const stopFocused = document.activeElement === stop;
  byId("progress").hidden = !busy;
  document.body.classList.toggle("busy", busy);
  // It keeps the focus; a button that is disabled would lose it.
  draw.setAttribute("aria-disabled", busy);
  draw.textContent = busy ? "Drawing …" : "Draw";
  if (busy) byId("error").textContent = "";
  if (stopFocused) draw.focus({ preventScroll: true });
}

async function reuse(entry, withSeed) {
  if (running) {
    say("Wait until the images are ready, or stop them.");
    return false;
  }
  if (await fill(entry, { withSeed })) return true;
  showError("Could not use these settings", new ServerError(`${entry.model} is not served here`));
  return false;
}

// On a phone the images are below the form; and earlier ones are below these.
function reveal() {
  const { top } = results.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) results.scrollIntoView();
}

function showError(what, error) {
  const place = byId("error");
  if (error.status === 401) {
    place.textContent = hasKey() ? "The server does not take this key." : "";
    keyForm.hidden = false;
    byId("key").focus();
    return;
  }
  if (!(error instanceof ServerError)) console.error(error);
  const why = error instanceof ServerError ? error.message : "the page has failed";
  place.textContent = `${what}: ${why}${/[.?!]$/.test(why) ? "" : "."}`;
  place.scrollIntoView({ block: "nearest" });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  byId("error").textContent = "";
  start();
});

stop.addEventListener("click", () => running?.abort());

start();
