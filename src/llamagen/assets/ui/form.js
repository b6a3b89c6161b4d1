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
const IDEAS = 6;
const MOST_PARTIAL_IMAGES = 64;

let cards = [];
let card = null;

export const chosenModel = () => card;
const prompt = () => byId(card.kind === "class" ? "class" : "text");
const number = (input) => (input.value === "" ? undefined : Number(input.value));

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

// Returns whether everything is filled in; if not, the browser tells what is missing.
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
  for (const { name, type } of card.declared_settings) {
    const { value } = byId(name);
    if (value !== "") body[name] = type === "str" ? value : Number(value);
  }
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
  fillSettings(entry.settings);
  blend.value = entry.blend ?? "";
  setShare(entry.blend_share ?? 0.5);
  // The seed is that of the best one, unless it was drawn place by place.
  const alone = withSeed && entry.edit?.edit !== "outpaint";
  byId("best_of").value = (alone ? entry.edit && 1 : entry.best_of) ?? "";
  await fillEdit(entry.edit);
  return true;
}

// Makes a drawn image the one that is edited; false if the model does not edit.
export async function editImage(entry) {
  if (card.edits) await setImage(entry.file);
  return card.edits;
}

// The name of a setting, for people.
export const label = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

// An element with some properties and content.
export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The field of a setting that the server declares.
function settingField({ name, type, help, minimum, exclusive_minimum, maximum, choices, optional }) {
  const input = element(type === "str" ? "select" : "input", { id: name });
  const hint = element("p", { className: "hint", id: `${name}-hint` }, help);
  input.setAttribute("aria-describedby", hint.id);
  if (type === "str") {
    if (optional) input.append(new Option(""));
    input.append(...choices.map((choice) => new Option(choice)));
  } else {
    input.type = "number";
    input.min = exclusive_minimum ? Number.MIN_VALUE : (minimum ?? "");
    input.max = maximum ?? "";
    input.step = type === "int" ? 1 : "any";
  }
  const caption = element("label", { htmlFor: name }, label(name));
  return element("div", { className: "field" }, caption, input, hint);
}

function fillSettings(values) {
  for (const { name } of card.declared_settings) byId(name).value = values[name] ?? "";
}

function setShare(value) {
  share.value = value;
  byId("share-value").value = share.value;
}

function choose(id) {
  const before = card;
  card = cards.find((each) => each.id === id);
  if (card === before) return;
  model.value = id;
  const ofClasses = card.kind === "class";
  byId("class-field").hidden = byId("ideas").hidden = !ofClasses;
  byId("text-field").hidden = byId("negative-field").hidden = ofClasses;
  byId("class").required = ofClasses;
  byId("text").required = !ofClasses;
  showClasses(card.classes ?? []);
  count.max = card.max_images;
  setModel(card);
  byId("sampling").replaceChildren(...card.declared_settings.map(settingField));
  byId("about").textContent = `${card.id} · ${card.size.replace("x", " × ")} px`;
  reset();
}

function showClasses(names) {
  byId("classes").replaceChildren(...names.map((name) => new Option(name)));
  byId("class").value = "";
  byId("class-hint").textContent =
    `One of ${names.length.toLocaleString("en")} classes, or its number.`;
  const mixed = [...names].sort(() => Math.random() - 0.5);
  byId("ideas").replaceChildren(...mixed.slice(0, IDEAS).map(idea));
}

function idea(name) {
  const onclick = () => {
    prompt().value = name;
    form.requestSubmit();
  };
  return element("li", {}, element("button", { onclick }, name));
}

function reset() {
  fillSettings(card.settings);
  blend.value = byId("best_of").value = "";
  setShare(0.5);
}

model.addEventListener("change", () => choose(model.value));
byId("reset").addEventListener("click", reset);

// A field that is wrong must be seen.
const openAround = ({ target }) => target.closest("details")?.setAttribute("open", "");
form.addEventListener("invalid", openAround, { capture: true });
share.addEventListener("input", () => setShare(share.value));

for (const field of [byId("text"), negative]) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
