// What to draw: the form, as the chosen model wants it.

import { checkEdit, edit, fillEdit, setImage, setModel } from "./edit.js";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const model = byId("model");
const count = byId("count");
const seed = byId("seed");
const negative = byId("negative");
const blend = byId("blend");
const share = byId("blend_share");
const SETTINGS = ["guidance_scale", "temperature", "top_k", "top_p"];
const IDEAS = 6;
const MOST_PARTIAL_IMAGES = 64;

let cards = [];
let card = null;

// Shows the form for some models, the first of them chosen.
export function showModels(models) {
  cards = models;
  model.replaceChildren(...cards.map(({ id }) => new Option(id, id)));
  byId("model-field").hidden = cards.length < 2;
  choose(cards[0].id);
  // Only where the button below stays in sight.
  byId("settings").open = matchMedia("(min-width: 60rem) and (min-height: 52rem)").matches;
  form.hidden = false;
}

export function chosenModel() {
  return card;
}

// Whether everything is filled in; if not, the browser says what is missing.
export function isComplete() {
  for (const field of [prompt(), negative, blend]) field.value = field.value.trim();
  checkEdit();
  return form.reportValidity();
}

// What is asked for: fields of the request, the files of an edit among them.
export async function request() {
  const body = {
    model: card.id,
    prompt: prompt().value,
    negative_prompt: (card.kind === "text" && negative.value) || undefined,
    n: number(count),
    seed: number(seed),
    stream: true,
    partial_images: Math.min(card.rows - 1, MOST_PARTIAL_IMAGES),
  };
  for (const name of SETTINGS) body[name] = number(byId(name));
  if (!card.edits) return body;
  if (blend.value) Object.assign(body, { blend: blend.value, blend_share: number(share) });
  return { ...body, best_of: number(byId("best_of")), ...(await edit()) };
}

// Fills in what an image was made of; false if its model is no longer served.
export async function fill(entry, { withSeed }) {
  if (!cards.some(({ id }) => id === entry.model)) return false;
  choose(entry.model);
  prompt().value = entry.prompt;
  negative.value = entry.negative ?? "";
  seed.value = withSeed ? entry.seed : "";
  if (withSeed) count.value = 1;
  for (const name of SETTINGS) byId(name).value = entry.settings[name] ?? "";
  blend.value = entry.blend ?? "";
  setShare(entry.blend_share ?? 0.5);
  // The seed is that of the best one, unless it was drawn place by place.
  const alone = withSeed && entry.edit?.edit !== "outpaint";
  byId("best_of").value = (alone ? entry.edit && 1 : entry.best_of) ?? "";
  await fillEdit(entry.edit);
  return true;
}

// Makes a drawn image the one that is edited.
export async function editImage(entry) {
  if (!card.edits) return false;
  await setImage(entry.file);
  return true;
}

function setShare(value) {
  share.value = value;
  byId("share-value").value = share.value;
}

function prompt() {
  return byId(card.kind === "class" ? "class" : "text");
}

function number(input) {
  return input.value === "" ? undefined : Number(input.value);
}

function choose(id) {
  const before = card;
  card = cards.find((each) => each.id === id);
  if (card === before) return;
  model.value = id;
  const ofClasses = card.kind === "class";
  byId("class-field").hidden = !ofClasses;
  byId("text-field").hidden = byId("negative-field").hidden = ofClasses;
  byId("class").required = ofClasses;
  byId("text").required = !ofClasses;
  if (ofClasses) showClasses(card.classes);
  byId("ideas").hidden = !ofClasses;
  count.max = card.max_images;
  if (ofClasses) blend.setAttribute("list", "classes");
  else blend.removeAttribute("list");
  setModel(card);
  byId("top-k-hint").textContent = `Likeliest of ${card.codes.toLocaleString("en")} codes. 0: all.`;
  byId("about").textContent = `${card.id} · ${card.size.replace("x", " × ")} px`;
  reset();
}

function showClasses(names) {
  byId("classes").replaceChildren(...names.map((name) => new Option(name)));
  byId("class").value = "";
  byId("class-hint").textContent =
    `One of ${names.length.toLocaleString("en")} classes, or its number.`;
  byId("ideas").replaceChildren(...some(names).map(idea));
}

function idea(name) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "plain";
  button.textContent = name;
  button.addEventListener("click", () => {
    prompt().value = name;
    form.requestSubmit();
  });
  item.append(button);
  return item;
}

function some(names) {
  const left = [...names];
  const taken = [];
  while (left.length && taken.length < IDEAS) {
    taken.push(...left.splice(Math.floor(Math.random() * left.length), 1));
  }
  return taken;
}

function reset() {
  for (const name of SETTINGS) byId(name).value = card.settings[name] ?? "";
  blend.value = byId("best_of").value = "";
  setShare(0.5);
}

model.addEventListener("change", () => choose(model.value));
byId("reset").addEventListener("click", reset);

// A field that is wrong must be seen.
form.addEventListener(
  "invalid",
  ({ target }) => {
    const closed = target.closest("details:not([open])");
    if (closed) closed.open = true;
  },
  { capture: true },
);
share.addEventListener("input", () => setShare(share.value));

for (const field of [byId("text"), negative]) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
