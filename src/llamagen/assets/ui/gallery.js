// The images: those of the latest request large, earlier ones small, one of them alone.

import { KINDS } from "./edit.js";
import { element, label } from "./form.js";
import { forget, forgetAll, keep, keptEntries, MOST } from "./shelf.js";

const byId = (id) => document.getElementById(id);
const latest = byId("latest");
const viewer = byId("viewer");

// Smaller images are enlarged by a whole factor, their pixels kept sharp.
const PIXEL_ART = 128;
const THUMBNAIL = 128;
const ALONE = 384;

// The newest first: entry and URL of its file; card and thumbnail once they are needed.
let pictures = [];
let viewed = null;
// The run that is under way; its cards stay where they are.
let current = null;
let actions = { again() {}, use() {}, edit() {} };

const newestFirst = (a, b) => b.entry.run - a.entry.run || a.entry.index - b.entry.index;
const title = ({ prompt, seed }) => `${prompt}, seed ${seed}`;
// What an image was made of, beside a prompt.
const editOf = ({ edit, keep_rows, below, right, keep, image, mask }) =>
  edit && { edit, keep_rows, below, right, keep, image, mask };
const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// Shows what this browser has kept. The actions are called with an entry.
export async function openGallery(callbacks) {
  actions = callbacks;
  pictures = (await keptEntries()).map(picture).sort(newestFirst);
  arrange();
}

// Room for the images of a request; "show" takes its events, "end" what is unfinished away.
export function addRun(request, card) {
  const run = Date.now();
  const slots = Array.from({ length: request.n }, (_, index) => slot(request, card, run, index));
  current = run;
  latest.replaceChildren(...slots.map(({ card }) => card));
  arrange();
  return {
    show: (event) => slots[event.index].show(event),
    end: () => {
      current = null;
      for (const each of slots) if (!each.done) each.card.remove();
      if (latest.children.length === 0) arrange();
    },
  };
}

function slot(request, card, run, index) {
  const [width, height] = size(request, card);
  const { model, prompt, negative_prompt: negative, blend, blend_share, best_of } = request;
  const shown = newCard({ prompt, width, height }, request.n);
  const self = { card: shown, done: false, show };
  const image = shown.querySelector("img");

  function show(event) {
    self.done = event.type.endsWith("completed");
    shown.dataset.rows = event.rows;
    shown.querySelector(".seed").textContent = `seed ${event.seed}`;
    image.onload = () => {
      image.hidden = false;
      // A little more, lest the grey of the unfinished rows shines through.
      const hidden = self.done || card.order === "random" ? 0 : 100 * (1 - event.rows / card.rows);
      image.style.clipPath = `inset(0 0 ${hidden && `calc(${hidden}% + 1px)`} 0)`;
    };
    if (!self.done) {
      image.alt = `${prompt}, unfinished`;
      image.src = `data:image/png;base64,${event.b64_json}`;
      return;
    }
    const settings = { ...card.settings };
    for (const name in settings) settings[name] = request[name] ?? settings[name];
    const made = picture({
      id: `${run}-${String(index).padStart(4, "0")}`,
      ...{ run, index, model, prompt, negative, seed: event.seed, width, height, settings },
      ...{ blend, blend_share, best_of, edit: editOf(request) },
      file: new Blob([bytes(event.b64_json)], { type: "image/png" }),
    });
    finishCard(made, shown);
    insert(made);
    keep(made.entry);
  }

  return self;
}

// Of the images that are asked for.
function size(request, card) {
  const [width, height] = card.size.split("x").map(Number);
  const { below = 0, right = 0 } = request;
  return [width + (right * width) / card.columns, height + (below * height) / card.rows];
}

function insert(made) {
  pictures = [...pictures, made].sort(newestFirst);
  const here = pictures.filter(({ entry }) => entry.run === made.entry.run).length;
  pictures.splice(Math.max(MOST, here)).forEach(discard);
}

const picture = (entry) => ({ entry, url: URL.createObjectURL(entry.file) });

function discard({ url, card, thumbnail }) {
  URL.revokeObjectURL(url);
  card?.remove();
  thumbnail?.remove();
}

// Puts everything in its place.
function arrange() {
  const run = current ?? pictures[0]?.entry.run;
  const first = pictures.filter(({ entry }) => entry.run === run);
  const rest = pictures.slice(first.length);
  if (!current) {
    for (const each of first) if (!each.card) finishCard(each, newCard(each.entry, first.length));
    latest.replaceChildren(...first.map(({ card }) => card));
  }
  byId("earlier").replaceChildren(...rest.map((each) => (each.thumbnail ??= newThumbnail(each))));
  byId("earlier-part").hidden = rest.length === 0;
  byId("empty").hidden = latest.children.length > 0;
}

function newCard(entry, beside) {
  const card = byId("card").content.firstElementChild.cloneNode(true);
  fit(card, entry, beside <= 2 ? ALONE : beside === 3 ? 256 : 192);
  card.querySelector(".prompt").textContent = entry.prompt;
  return card;
}

// Sets size and sharpness of what shows an image: at most so wide, small ones by a whole factor.
function fit(element, { width, height }, most) {
  const isSmall = width <= PIXEL_ART;
  const side = isSmall ? Math.max(1, Math.floor(most / width)) * width : Math.min(width, most);
  element.style.setProperty("--side", `${side}px`);
  element.style.setProperty("--shape", `${width} / ${height}`);
  element.classList.toggle("pixels", isSmall);
}

function finishCard(made, card) {
  const { entry, url } = made;
  made.card = card;
  card.classList.add("done");
  card.querySelector(".seed").textContent = `seed ${entry.seed}`;
  const [open, image] = [card.querySelector(".picture"), card.querySelector("img")];
  Object.assign(image, { hidden: false, alt: title(entry), src: url });
  Object.assign(open, { disabled: false, onclick: () => view(made) });
  const [download, again, edit] = card.querySelectorAll(".actions > *");
  setDownload(download, made);
  download.ariaLabel = `Download ${title(entry)}`;
  again.ariaLabel = `Again: ${entry.prompt}, with another seed`;
  again.onclick = () => actions.again(entry);
  edit.ariaLabel = `Edit ${title(entry)}`;
  edit.onclick = () => actions.edit(entry);
  card.querySelector(".actions").hidden = false;
}

function newThumbnail(made) {
  const item = byId("thumbnail").content.firstElementChild.cloneNode(true);
  const name = title(made.entry);
  fit(item, made.entry, THUMBNAIL);
  Object.assign(item.querySelector("img"), { src: made.url, alt: name });
  Object.assign(item.querySelector("button"), { title: name, onclick: () => view(made) });
  return item;
}

function view(made) {
  const { entry, url } = made;
  viewed = made;
  Object.assign(byId("viewer-image"), { src: url, alt: title(entry) });
  fit(byId("viewer-image"), entry, ALONE);
  byId("viewer-title").textContent = entry.prompt;
  const facts = [
    ["Avoiding", entry.negative],
    ["Seed", entry.seed],
    ["Model", entry.model],
    ["Size", `${entry.width} × ${entry.height}`],
    ["Edit", entry.edit && KINDS[entry.edit.edit]],
    ["Blended with", entry.blend && `${entry.blend}, ${entry.blend_share}`],
    ["Best of", entry.best_of],
    ...Object.entries(entry.settings).map(([name, value]) => [label(name), value]),
  ];
  byId("viewer-settings").replaceChildren(
    ...facts.filter(([, value]) => value !== undefined && value !== null).map(fact),
  );
  setDownload(byId("viewer-download"), made);
  viewer.showModal();
}

const fact = ([name, value]) =>
  element("div", { className: "title" }, element("dt", {}, name), element("dd", {}, value));

function setDownload(link, { entry, url }) {
  const words = entry.prompt
    .normalize("NFKC")
    .toLowerCase()
    .match(/[\p{L}\p{N}]+/gu) ?? ["image"];
  link.href = url;
  link.download = `${words.join("-").slice(0, 60)}-${entry.seed}.png`;
}

viewer.addEventListener("click", (event) => {
  // What lies around the picture belongs to the dialog itself.
  if (event.target === viewer) viewer.close();
});
// Every button of the viewer closes it first.
for (const [name, act] of Object.entries({
  close() {},
  again: ({ entry }) => actions.again(entry),
  use: ({ entry }) => actions.use(entry),
  edit: ({ entry }) => actions.edit(entry),
  remove({ entry }) {
    forget(entry.id);
    removeWhere((each) => each === viewed);
  },
})) {
  byId(`viewer-${name}`).addEventListener("click", () => {
    viewer.close();
    act(viewed);
  });
}
byId("clear").addEventListener("click", () => {
  const many = pictures.length === 1 ? "the image" : `all ${pictures.length} images`;
  if (!confirm(`Remove ${many} from this browser?`)) return;
  forgetAll();
  removeWhere(() => true);
});

function removeWhere(isGone) {
  pictures.filter(isGone).forEach(discard);
  pictures = pictures.filter((each) => !isGone(each));
  arrange();
  byId("results").focus();
}
