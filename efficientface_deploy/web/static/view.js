// What is shown: the picture with its boxes, the faces with their bars, the times, the messages.

const element = (id) => document.getElementById(id);
const stage = element("stage");
const picture = element("picture");
const overlay = element("overlay");

const LARGEST = 1600; // pixels of a picture that is shown
const [PORTRAIT, THUMB] = [52, 64];
const RARE = 0.03; // of the training faces, below which a class is named as often missed

let shown = null; // { width, height, faces }: what the overlay is drawn of
let rate = null; // frames a second, averaged
let seen = 0; // when the last frame was shown
const cards = new Map(); // of the faces, by number

// ---- messages

/** Say what is going on. */
export function say(text) {
  element("status").textContent = text;
}

/** Say what went wrong. */
export function fail(text) {
  const error = element("error");
  error.textContent = error.hidden ? text : `${error.textContent} ${text}`;
  error.hidden = false;
}

/** How many faces are shown, in words. */
export function summary() {
  const count = shown?.faces.length ?? 0;
  return count === 1 ? "One face." : count ? `${count} faces.` : "No face was found.";
}

// ---- the model

/** Say what runs, how sure it is of itself, and where its limits are. */
export function describe({ spec, provenance, provider, threads, checked }) {
  const parts = [spec.name || "A model", `${spec.labels.length} expressions`];
  parts.push(`${spec.input_size}×${spec.input_size} pixels`);
  const accuracy = provenance.verification?.accuracy;
  if (accuracy) parts.push(`${percent(accuracy, 1)} of its test faces labelled right`);
  const promise = spec.sure_precision
    ? ` A label with “?” is unsure; of the others ${percent(spec.sure_precision)} are right.`
    : "";
  element("card").textContent = `${parts.join(", ")}.${promise}`;
  const rare = spec.labels.filter((_, at) => spec.class_frequencies?.[at] < RARE);
  element("rare").textContent = rare.length ? `It often misses ${list(rare).toLowerCase()}.` : "";
  const runs = provider === "wasm" ? `WASM, ${threads === 1 ? "one thread" : `${threads} threads`}` : "WebGPU";
  const check = checked ? "; checked: it computes here what it must" : "";
  element("engine").textContent = `${runs}${check}.`;
  showProvider(provider);
}

/** Mark what runs. */
export function showProvider(provider) {
  document.querySelector(`input[value=${provider}]`).checked = true;
}

/** Offer WebGPU where the browser has it. */
export function offerProviders() {
  if (navigator.gpu) return;
  const radio = document.querySelector("input[value=webgpu]");
  radio.disabled = true;
  radio.parentElement.title = "This browser has no WebGPU.";
}

// ---- pictures

/** Forget what was shown. */
export function clear() {
  element("error").hidden = true;
  element("filmstrip").replaceChildren();
  element("filmstrip").hidden = true;
  element("no-faces").hidden = false;
  element("no-faces").textContent = "The expressions of each face will stand here.";
  element("faces").replaceChildren();
  cards.clear();
  stage.dataset.shows = "nothing";
  [shown, rate, seen] = [null, null, 0];
  showTimes(null);
}

/** Show a picture, and put it into the strip where there are several. */
export function addPicture(name, bitmap, faces, times) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", `${name}: ${faces.length} faces`);
  button.append(thumbnail(bitmap, [0, 0, bitmap.width, bitmap.height], THUMB));
  button.addEventListener("click", () => select(button, name, bitmap, faces, times));
  item.append(button);
  element("filmstrip").append(item);
  element("filmstrip").hidden = element("filmstrip").children.length < 2;
  select(button, name, bitmap, faces, times);
}

function select(button, name, bitmap, faces, times) {
  for (const other of element("filmstrip").querySelectorAll("button")) {
    other.setAttribute("aria-current", String(other === button));
  }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  picture.width = Math.round(bitmap.width * scale);
  picture.height = Math.round(bitmap.height * scale);
  picture.getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
  picture.setAttribute("aria-label", `${name}, ${inWords(faces)}`);
  stage.dataset.shows = "picture";
  cards.clear();
  element("faces").replaceChildren();
  showFaces(bitmap, bitmap.width, bitmap.height, faces);
  showTimes(times);
}

// ---- video

/** Show the player. */
export function showVideo() {
  stage.dataset.shows = "video";
}

/** Show a camera as in a mirror, or not. */
export function mirror(on) {
  stage.classList.toggle("mirrored", on);
}

/** Show the faces of a frame. */
export function showFrame(frame, faces, times) {
  const now = performance.now();
  if (seen) {
    const current = 1000 / (now - seen);
    rate = rate === null ? current : rate + 0.1 * (current - rate);
  }
  seen = now;
  showFaces(frame, frame.width, frame.height, faces);
  showTimes(times);
}

// ---- faces

function showFaces(source, width, height, faces) {
  shown = { width, height, faces };
  draw();
  element("no-faces").hidden = faces.length > 0;
  element("no-faces").textContent = "No face was found.";
  const current = new Set(faces.map((face, at) => face.track ?? at + 1));
  for (const [number, card] of cards) {
    if (current.has(number)) continue;
    card.item.remove();
    cards.delete(number);
  }
  for (const [at, face] of faces.entries()) {
    const number = face.track ?? at + 1;
    if (!cards.has(number)) {
      cards.set(number, makeCard(Object.keys(face.prediction.probabilities), cards.size === 0));
      element("faces").append(cards.get(number).item);
    }
    fillCard(cards.get(number), number, face, source);
  }
}

function makeCard(labels, isOpen) {
  const item = document.createElement("li");
  item.innerHTML =
    "<details><summary><span class=portrait></span><span><strong></strong><span class=muted></span></span>" +
    "<span class=percent></span></summary><div class=bars></div></details>";
  const bars = item.querySelector(".bars");
  const rows = labels.map((label) => {
    const name = document.createElement("span");
    const bar = document.createElement("span");
    const value = document.createElement("span");
    name.textContent = label;
    bar.className = "bar";
    bar.append(document.createElement("span"));
    value.className = "value";
    bars.append(name, bar, value);
    return { name, bar, value };
  });
  item.firstChild.open = isOpen;
  return { item, rows, portrait: 0 };
}

function fillCard(card, number, { box, small, prediction }, source) {
  const now = performance.now();
  if (now - card.portrait > 500) {
    card.item.querySelector(".portrait").replaceChildren(thumbnail(source, squareOf(box), PORTRAIT));
    card.portrait = now;
  }
  const { label, confidence, unsure, probabilities } = prediction;
  card.item.querySelector("strong").textContent = small ? "Too small to judge" : label;
  card.item.querySelector(".muted").textContent = `face ${number}${unsure && !small ? ", unsure" : ""}`;
  card.item.querySelector(".percent").textContent = small ? "" : percent(confidence);
  card.item.querySelector(".bars").hidden = small;
  for (const [at, value] of Object.values(probabilities).entries()) {
    const row = card.rows[at];
    const isBest = row.name.textContent === label;
    row.bar.firstChild.style.width = percent(value, 1).replace(" ", "");
    row.value.textContent = percent(value);
    row.name.classList.toggle("best", isBest);
    row.bar.classList.toggle("best", isBest);
  }
}

/** A square around a box: left, top, width and height. */
function squareOf([left, top, right, bottom]) {
  const side = 1.15 * Math.max(right - left, bottom - top);
  return [(left + right - side) / 2, (top + bottom - side) / 2, side, side];
}

function thumbnail(source, [left, top, width, height], side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side * 2; // for fine screens
  canvas.style.width = canvas.style.height = `${side}px`;
  const scale = canvas.width / Math.min(width, height);
  const [x, y] = [(canvas.width - width * scale) / 2, (canvas.height - height * scale) / 2];
  canvas.getContext("2d").drawImage(source, left, top, width, height, x, y, width * scale, height * scale);
  canvas.setAttribute("aria-hidden", "true");
  return canvas;
}

// ---- boxes

function draw() {
  if (shown === null) return;
  const below = stage.dataset.shows === "video" ? element("player") : picture;
  const [width, height] = [below.clientWidth, below.clientHeight];
  const fine = window.devicePixelRatio || 1;
  overlay.width = Math.round(width * fine);
  overlay.height = Math.round(height * fine);
  Object.assign(overlay.style, {
    width: `${width}px`,
    height: `${height}px`,
    left: `${below.offsetLeft}px`,
    top: `${below.offsetTop}px`,
  });
  const context = overlay.getContext("2d");
  context.scale(fine, fine);
  const scale = width / shown.width;
  const colours = getComputedStyle(document.documentElement);
  for (const face of shown.faces) {
    let [left, top, right, bottom] = face.box.map((edge) => edge * scale);
    if (stage.classList.contains("mirrored")) [left, right] = [width - right, width - left];
    const doubtful = face.small || face.prediction.unsure;
    context.lineWidth = 3;
    context.setLineDash(doubtful ? [7, 5] : []);
    context.strokeStyle = colours.getPropertyValue("--accent");
    context.shadowColor = "rgb(0 0 0 / 50%)";
    context.shadowBlur = 3;
    context.beginPath();
    context.roundRect(left, top, right - left, bottom - top, 8);
    context.stroke();
    context.shadowBlur = 0;
    context.setLineDash([]);
    drawLabel(context, boxText(face), left, top, width, colours);
  }
}

function drawLabel(context, text, left, top, width, colours) {
  context.font = "600 14px system-ui, sans-serif";
  const [wide, high] = [context.measureText(text).width + 16, 24];
  const x = Math.max(0, Math.min(left - 1.5, width - wide));
  const y = top - high - 4 >= 0 ? top - high - 4 : Math.max(top + 5, 2); // else within the box
  context.fillStyle = colours.getPropertyValue("--accent");
  context.beginPath();
  context.roundRect(x, y, wide, high, 6);
  context.fill();
  context.fillStyle = colours.getPropertyValue("--on-accent");
  context.textBaseline = "middle";
  context.fillText(text, x + 8, y + high / 2 + 1);
}

function boxText({ small, track, prediction }) {
  const number = track === null ? "" : `${track} · `;
  if (small) return `${number}too small`;
  const mark = prediction.unsure ? "?" : "";
  return `${number}${prediction.label}${mark} ${percent(prediction.confidence)}`;
}

new ResizeObserver(draw).observe(stage);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// ---- times

function showTimes(times) {
  const text = (value, unit) => (value === null || value === undefined ? "–" : `${value.toFixed(value < 10 ? 1 : 0)}${unit}`);
  element("rate").textContent = text(rate, "");
  for (const step of ["search", "prepare", "label"]) {
    element(step).textContent = text(times?.[step], " ms");
  }
}

// ---- words

function percent(value, digits = 0) {
  return `${(100 * value).toFixed(digits)} %`;
}

function list(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

function inWords(faces) {
  if (!faces.length) return "no face";
  return faces.map(({ small, prediction }) => (small ? "a face too small" : prediction.label)).join(", ");
}
