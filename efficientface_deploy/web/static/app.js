// The page: where pictures come from, and in what order things happen. What is shown of them is
// view.js's.

import { EfficientFaceError, load } from "./efficientface.js";
import { Record } from "./record.js";
import * as view from "./view.js";

const element = (id) => document.getElementById(id);
const player = element("player");

let predictor = null;
let source = 0; // grows with each picture, video or camera, so that an earlier one knows its end
let paused = null; // what to say again when the page is seen again
const record = new Record();

// ---- the model

async function start(provider) {
  view.say("Loading the model…");
  try {
    const earlier = predictor;
    predictor = await load({ provider });
    await earlier?.close();
  } catch (error) {
    view.fail(sentence(error));
    view.say(predictor ? "The model runs as before." : "There is no model: nothing can be labelled.");
    view.showProvider(predictor?.provider ?? "wasm");
    return;
  }
  record.labels = predictor.spec.labels;
  view.describe(predictor);
  view.say("Ready.");
  document.documentElement.dataset.ready = provider;
}

/** What went wrong, for people. */
function sentence(error) {
  if (error instanceof EfficientFaceError) {
    return `${error.subject}: this should be ${error.expected}, but is ${error.found}. ${error.fix}.`;
  }
  return `Something went wrong: ${error.message}`;
}

// ---- pictures

async function openPictures(files) {
  const own = begin();
  const missed = [];
  for (const [number, file] of files.entries()) {
    if (files.length > 1) view.say(`Picture ${number + 1} of ${files.length}…`);
    try {
      const bitmap = await decode(file);
      const faces = await predictor.predictFaces(bitmap);
      if (own !== source) return;
      record.add(file.name, "", faces);
      view.addPicture(file.name, bitmap, faces, predictor.times);
    } catch (error) {
      if (own !== source) return;
      missed.push(sentence(error));
    }
  }
  if (missed.length) view.fail(missed.join(" "));
  view.say(missed.length === files.length ? "No picture was labelled." : view.summary());
}

async function decode(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    const found = file.size ? "a file that this browser cannot decode" : "an empty file";
    throw new EfficientFaceError(file.name, "a picture", found, "Give a JPEG, PNG or WebP file");
  }
}

async function openSample() {
  try {
    const response = await fetch(new URL("sample.jpg", import.meta.url));
    if (!response.ok) throw new Error(`the sample picture is not there (${response.status})`);
    await openPictures([new File([await response.blob()], "sample.jpg")]);
  } catch (error) {
    view.fail(sentence(error));
  }
}

// ---- video and camera

async function openVideo(file) {
  const own = begin();
  player.src = URL.createObjectURL(file);
  player.controls = true;
  try {
    await player.play();
  } catch {
    if (own !== source) return;
    stop();
    const what = `${file.name}: this should be a video, but this browser cannot play it.`;
    view.fail(`${what} Give an MP4 or WebM file.`);
    view.say("No video.");
    return;
  }
  view.say(`Playing ${file.name}.`);
  await follow(own, file.name);
}

const CAMERA_ERRORS = {
  NotAllowedError:
    "The camera may not be used: permission was refused. Allow it at the page's address, and press “Camera” again.",
  NotFoundError: "No camera was found. Connect one, and press “Camera” again.",
  NotReadableError: "The camera is used by another program. Close that, and press “Camera” again.",
};

async function openCamera() {
  const own = begin();
  let camera;
  try {
    if (!navigator.mediaDevices) {
      throw new Error("a camera needs a page that was loaded by https, or from this machine.");
    }
    const video = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" };
    camera = await navigator.mediaDevices.getUserMedia({ video });
  } catch (error) {
    view.fail(CAMERA_ERRORS[error.name] ?? `The camera cannot be used: ${error.message}`);
    view.say("No camera.");
    return;
  }
  if (own !== source) {
    for (const track of camera.getTracks()) track.stop();
    return;
  }
  camera.getVideoTracks()[0].addEventListener("ended", () => {
    if (own !== source) return;
    stop();
    view.fail("The camera was disconnected.");
    view.say("No camera.");
  });
  player.srcObject = camera;
  player.controls = false;
  element("camera").setAttribute("aria-pressed", "true");
  element("camera").textContent = "Stop camera";
  view.mirror(true);
  await player.play();
  view.say("The camera is on.");
  await follow(own, "camera");
}

/** Label what the player shows, the newest frame each time, until something else is opened. */
async function follow(own, name) {
  let stream = predictor.follow();
  let model = predictor;
  let last = -1;
  view.showVideo();
  while (own === source) {
    await nextFrame(player);
    if (own !== source) return;
    const seconds = player.currentTime;
    if (document.hidden || seconds === last) continue;
    if (seconds < last || model !== predictor) [stream, model] = [predictor.follow(), predictor];
    last = seconds;
    let frame;
    try {
      frame = await createImageBitmap(player); // the player goes on meanwhile
      const faces = await stream.predictFaces(frame, seconds);
      if (own !== source) return;
      record.add(name, seconds, faces);
      view.showFrame(frame, faces, predictor.times);
    } catch (error) {
      if (own !== source || model !== predictor) continue; // it was closed for another one
      stop();
      view.fail(sentence(error));
      return;
    } finally {
      frame?.close();
    }
  }
}

/** When the player has another frame, or after a tenth of a second. */
function nextFrame(video) {
  return new Promise((resolve) => {
    setTimeout(resolve, 100); // of a video that stands still there is none
    (video.requestVideoFrameCallback ?? window.requestAnimationFrame).call(
      video.requestVideoFrameCallback ? video : window,
      resolve,
    );
  });
}

/** Something else is opened: end what was, and forget its messages. */
function begin() {
  stop();
  view.clear();
  return source;
}

function stop() {
  source += 1;
  for (const track of player.srcObject?.getTracks() ?? []) track.stop();
  player.pause();
  player.srcObject = null;
  if (player.src) URL.revokeObjectURL(player.src);
  player.removeAttribute("src");
  element("camera").setAttribute("aria-pressed", "false");
  element("camera").textContent = "Camera";
  view.mirror(false);
}

// ---- what people do

function open(files) {
  const videos = files.filter((file) => file.type.startsWith("video/"));
  if (!files.length) return;
  if (!predictor) {
    view.fail("The model is not loaded yet. Wait a moment, and try again.");
  } else if (videos.length) {
    openVideo(videos[0]);
    if (files.length > 1) view.fail(`One video at a time: this is ${videos[0].name}.`);
  } else {
    openPictures(files);
  }
}

function whenReady(action) {
  if (predictor) action();
  else view.fail("The model is not loaded yet. Wait a moment, and try again.");
}

for (const [button, input] of [
  ["pictures", "picture-files"],
  ["video", "video-file"],
]) {
  element(button).addEventListener("click", () => element(input).click());
  element(input).addEventListener("change", ({ target }) => {
    open([...target.files]);
    target.value = ""; // the same file may be chosen again
  });
}

element("sample").addEventListener("click", () => whenReady(openSample));

element("camera").addEventListener("click", () => {
  if (player.srcObject) {
    begin();
    view.say("The camera is off.");
  } else {
    whenReady(openCamera);
  }
});

element("save").addEventListener("click", () => record.save());

for (const radio of document.querySelectorAll("input[name=provider]")) {
  radio.addEventListener("change", () => start(radio.value));
}

document.addEventListener("visibilitychange", () => {
  if (element("stage").dataset.shows !== "video") return;
  if (document.hidden) {
    paused = { playing: !player.paused, said: element("status").textContent };
    player.pause();
    view.say("Paused while this page is in the background.");
  } else if (paused) {
    if (paused.playing) player.play();
    view.say(paused.said);
    paused = null;
  }
});

const stage = element("stage");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  stage.classList.add("dragged");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) stage.classList.remove("dragged");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("dragged");
  const files = [...event.dataTransfer.files];
  if (files.length) open(files);
  else view.fail("What was dropped is no file. Save the picture first, and drop the file.");
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) open(files);
});

view.offerProviders();
start("wasm");
