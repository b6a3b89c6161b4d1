// What to change: an image, and a mask that is painted over it. What is sent is what is shown: the
// image as large as the model's, whatever the file's size and format.

const byId = (id) => document.getElementById(id);
const input = byId("image");
const kind = byId("edit-kind");
const canvas = byId("canvas");
const OPTIONS = { inpaint: [], complete: ["keep_rows"], outpaint: ["below", "right"], vary: ["keep"] };
// Keys that move the cursor by rows and columns; the space bar paints where it is.
const MOVES = {
  ...{ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] },
  " ": [0, 0],
};

let card = null;
// As it was chosen; null while nothing is edited.
let source = null;
// As the model takes it, and what is painted over it.
const picture = document.createElement("canvas");
const mask = document.createElement("canvas");
const brush = mask.getContext("2d", { willReadFrequently: true });
// For those who paint with the keyboard: a cell of the grid.
const cursor = { row: 0, column: 0 };
let last = null;

export const KINDS = Object.fromEntries([...kind.options].map(({ value, text }) => [value, text]));

// Whether an image is there to be edited.
const isEditing = () => source !== null && card.edits;
const color = () => getComputedStyle(canvas).color;
const cellSize = () => ({ row: canvas.height / card.rows, column: canvas.width / card.columns });
const fileOf = (from) => new Promise((resolve) => from.toBlob(resolve, "image/png"));

// Makes everything fit a model.
export function setModel(chosen) {
  card = chosen;
  document.body.classList.toggle("draws-only", !card.edits);
  const [width, height] = card.size.split("x").map(Number);
  for (const each of [canvas, picture, mask]) [each.width, each.height] = [width, height];
  canvas.classList.toggle("pixels", width <= 128);
  byId("keep_rows").max = card.rows - 1;
  byId("keep_rows").value = Math.floor(card.rows / 2);
  byId("below").max = 2 * card.rows;
  byId("right").max = 2 * card.columns;
  byId("below").value = byId("right").value = Math.floor(card.columns / 2);
  Object.assign(cursor, { row: card.rows >> 1, column: card.columns >> 1 });
  show();
}

// Takes an image file, or a part of one.
export async function setImage(file) {
  try {
    source = await createImageBitmap(file);
  } catch {
    input.value = "";
    input.setCustomValidity("The browser cannot read this file as an image.");
    input.reportValidity();
    input.setCustomValidity("");
    return;
  }
  byId("edit").open = true;
  clear();
}

// What the request says of the edit; null if there is none.
export async function edit() {
  if (!isEditing()) return null;
  const wanted = { edit: kind.value, image: await fileOf(picture) };
  for (const name of OPTIONS[kind.value]) wanted[name] = Number(byId(name).value);
  if (kind.value === "inpaint") wanted.mask = await fileOf(blackAndWhite());
  return wanted;
}

// Shows what an image was made of, or that it was made of none.
export async function fillEdit(wanted) {
  if (!wanted) return remove();
  await setImage(wanted.image);
  kind.value = wanted.edit;
  for (const name of OPTIONS[wanted.edit]) byId(name).value = wanted[name];
  if (wanted.mask) await paintAsBefore(wanted.mask);
  show();
}

// Before the form is sent: says so if nothing is painted.
export function checkEdit() {
  const missing = isEditing() && kind.value === "inpaint" && !isPainted();
  kind.setCustomValidity(missing ? "Paint over the part that is to be drawn anew." : "");
}

function remove() {
  source = null;
  input.value = "";
  show();
}

function show() {
  byId("editing").hidden = !isEditing();
  for (const part of document.querySelectorAll("[data-edit]"))
    part.hidden = part.disabled = !isEditing() || part.dataset.edit !== kind.value;
  byId("keep-value").value = byId("keep").value;
  const paints = kind.value === "inpaint";
  canvas.tabIndex = paints ? 0 : -1;
  canvas.setAttribute("role", paints ? "application" : "img");
  canvas.setAttribute("aria-label", paints ? "Paint a mask" : "The image");
  byId("canvas-hint").hidden = !paints;
  kind.setCustomValidity("");
  prepare();
  redraw();
}

// The short side becomes the model's, and the middle is cut out.
function prepare() {
  if (source === null) return;
  const { width, height } = picture;
  const scale = Math.max(width / source.width, height / source.height);
  const [w, h] = [source.width * scale, source.height * scale];
  const pen = picture.getContext("2d");
  Object.assign(pen, { imageSmoothingQuality: "high", fillStyle: "white" });
  pen.fillRect(0, 0, width, height);
  pen.drawImage(source, (width - w) / 2, (height - h) / 2, w, h);
}

function redraw() {
  const { width, height } = canvas;
  const { row, column } = cellSize();
  const pen = canvas.getContext("2d");
  pen.drawImage(picture, 0, 0);
  Object.assign(pen, { globalAlpha: 0.6, fillStyle: color() });
  if (kind.value === "inpaint") pen.drawImage(mask, 0, 0);
  if (kind.value === "complete") {
    const kept = Number(byId("keep_rows").value) * row;
    pen.fillRect(0, kept, width, height - kept);
  }
  pen.globalAlpha = 1;
  if (kind.value === "inpaint" && canvas.matches(":focus-visible")) {
    Object.assign(pen, { strokeStyle: color(), lineWidth: Math.max(1, width / 128) });
    pen.strokeRect(cursor.column * column, cursor.row * row, column, row);
  }
}

function clear() {
  brush.clearRect(0, 0, mask.width, mask.height);
  show();
}

function stroke(from, to) {
  brush.globalCompositeOperation = byId("erase").checked ? "destination-out" : "source-over";
  brush.strokeStyle = brush.fillStyle = color();
  brush.lineWidth = Number(byId("brush").value) * cellSize().column;
  brush.beginPath();
  brush.moveTo(...from);
  brush.lineTo(...to);
  brush.stroke();
  // A round end; and a dot, where there is no line.
  brush.beginPath();
  brush.arc(...to, brush.lineWidth / 2, 0, 2 * Math.PI);
  brush.fill();
  kind.setCustomValidity("");
  redraw();
}

function isPainted() {
  const { data } = brush.getImageData(0, 0, mask.width, mask.height);
  return data.some((value, index) => index % 4 === 3 && value >= 128);
}

// White where it is painted.
function blackAndWhite() {
  const made = document.createElement("canvas");
  [made.width, made.height] = [mask.width, mask.height];
  const pen = made.getContext("2d");
  pen.drawImage(mask, 0, 0);
  for (const [how, fill] of [["source-in", "white"], ["destination-over", "black"]]) {
    Object.assign(pen, { globalCompositeOperation: how, fillStyle: fill });
    pen.fillRect(0, 0, made.width, made.height);
  }
  return made;
}

async function paintAsBefore(file) {
  const before = await createImageBitmap(file);
  brush.globalCompositeOperation = "source-over";
  brush.drawImage(before, 0, 0, mask.width, mask.height);
  const pixels = brush.getImageData(0, 0, mask.width, mask.height);
  // What was black is not painted.
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at];
  brush.putImageData(pixels, 0, 0);
  Object.assign(brush, { globalCompositeOperation: "source-in", fillStyle: color() });
  brush.fillRect(0, 0, mask.width, mask.height);
}

function place({ offsetX, offsetY }) {
  return [offsetX, offsetY].map((at) => (at * canvas.width) / canvas.clientWidth);
}

canvas.addEventListener("pointerdown", (event) => {
  if (kind.value !== "inpaint" || event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  stroke(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (canvas.hasPointerCapture(event.pointerId)) stroke(last, (last = place(event)));
});
canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move || kind.value !== "inpaint") return;
  event.preventDefault();
  cursor.row = Math.min(card.rows - 1, Math.max(0, cursor.row + move[0]));
  cursor.column = Math.min(card.columns - 1, Math.max(0, cursor.column + move[1]));
  const { column, row } = cellSize();
  const middle = [(cursor.column + 0.5) * column, (cursor.row + 0.5) * row];
  if (event.key === " ") stroke(middle, middle);
  else redraw();
});
for (const name of ["focus", "blur"]) canvas.addEventListener(name, redraw);

kind.addEventListener("change", show);
byId("keep_rows").addEventListener("input", redraw);
byId("keep").addEventListener("input", () => (byId("keep-value").value = byId("keep").value));
byId("clear-mask").addEventListener("click", clear);
byId("remove-image").addEventListener("click", () => {
  remove();
  input.focus();
});
input.addEventListener("change", () => input.files[0] && setImage(input.files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const [dropped] = event.dataTransfer.files;
  if (dropped && card?.edits) setImage(dropped);
});
