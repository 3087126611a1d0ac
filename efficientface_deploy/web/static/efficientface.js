// Label faces in the browser: the same models, and the same answers, as the Python runtime.
//
//   import { load } from "./efficientface.js";
//   const predictor = await load();
//   const faces = await predictor.predictFaces(image);

import { EfficientFaceError } from "./errors.js";
import { SMALL, cutFace, sideOf } from "./faces.js";
import { readModel } from "./metadata.js";
import { resize, toPicture } from "./pixels.js";
import { SteadyLabels, best } from "./steady.js";
import { Tracker } from "./tracks.js";
import { YuNet, checkOptions } from "./yunet.js";

export { EfficientFaceError };

const RUNTIMES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };
const MOST_THREADS = 4; // these networks gain little from more
const started = {}; // threads of each runtime that this page has started
const INPUT = "image"; // uint8 (N, S, S, 3), RGB, which every exported file takes

/**
 * Load a model, and check that it computes here what its file says. See efficientface.d.ts.
 */
export async function load({
  model = new URL("model.onnx", import.meta.url),
  detector = new URL("yunet.onnx", import.meta.url),
  runtime = new URL("ort/", import.meta.url),
  provider = "wasm",
  threads = null,
  check = true,
} = {}) {
  const [[ort, options], [file, name], faceFile] = await Promise.all([
    openRuntime(runtime, provider, threads),
    fetchFile(model, "a model"),
    detector === null ? null : fetchFile(detector, "a face detector"),
  ]);
  const description = readModel(file, name);
  const session = await openSession(ort, file, name, options);
  if (!session.inputNames.includes(INPUT)) {
    const expected = "an input of uint8 pixels";
    const fix = "export it without --float-input";
    throw new EfficientFaceError(name, expected, session.inputNames.join(", "), fix);
  }
  const yunet =
    faceFile && new YuNet(ort, await openSession(ort, faceFile[0], faceFile[1], options));
  const predictor = new Predictor(ort, session, yunet, description, provider);
  if (check) await predictor.checkProbe(name);
  return predictor;
}

/** A model ready to label faces; made by load(). */
class Predictor {
  #ort;
  #session;
  #detector;
  #probe;
  #queue = Promise.resolve();

  constructor(ort, session, detector, { spec, provenance, probe }, provider) {
    this.#ort = ort;
    this.#session = session;
    this.#detector = detector;
    this.#probe = probe;
    Object.assign(this, { spec, provenance, provider });
    this.threads = provider === "wasm" ? ort.env.wasm.numThreads : 1;
    this.checked = null;
    this.times = { search: 0, prepare: 0, label: 0 };
  }

  /** Label one face, which fills the picture. */
  async predict(image) {
    return (await this.predictBatch([image]))[0];
  }

  /** Label several faces in one pass. */
  async predictBatch(images) {
    const inputs = [];
    for (const image of images) inputs.push(this.#fit(await toPicture(image)));
    return this.#label(inputs);
  }

  /** Find the faces of a picture and label each, the most confident first. */
  async predictFaces(image, options = {}) {
    if (this.#detector === null) {
      const fix = "leave detector out of load()";
      throw new EfficientFaceError("predictFaces", "a face detector", "none", fix);
    }
    checkOptions(options);
    const start = performance.now();
    const picture = await toPicture(image);
    const found = await this.#alone(() => this.#detector.detect(picture, options));
    const searched = performance.now();
    const cuts = found.map((face) => this.#fit(cutFace(picture, face, this.spec.face_crop)));
    const prepared = performance.now();
    const predictions = await this.#label(cuts);
    this.times = {
      search: searched - start,
      prepare: prepared - searched,
      label: performance.now() - prepared,
    };
    return found.map((face, at) => ({
      ...face,
      small: sideOf(face.box) < SMALL,
      prediction: predictions[at],
      track: null,
      raw: null,
    }));
  }

  /** Follow the faces of a video or camera: numbers that last, and labels that do not flicker. */
  follow() {
    const [tracker, steady] = [new Tracker(), new SteadyLabels()];
    return {
      predictFaces: async (image, seconds, options = {}) => {
        const faces = await this.predictFaces(image, options);
        const numbers = tracker.update(faces, seconds);
        return faces
          .map((face, at) => this.#followed(face, numbers[at], seconds, steady))
          .sort((one, other) => one.track - other.track);
      },
    };
  }

  /** Run preprocessed images, uint8 (N, S, S, 3), RGB: float32 logits and probabilities, (N, C). */
  async infer(pixels) {
    const side = this.spec.input_size;
    const count = pixels.length / (side * side * 3);
    if (!Number.isInteger(count) || count < 1) {
      const expected = `N * ${side} * ${side} * 3 bytes`;
      const fix = "take predict for pictures of other sizes";
      throw new EfficientFaceError("pixels", expected, String(pixels.length), fix);
    }
    const input = new this.#ort.Tensor("uint8", pixels, [count, side, side, 3]);
    const wanted = ["logits", "probabilities"];
    const outputs = await this.#alone(() => this.#session.run({ [INPUT]: input }, wanted));
    return { logits: outputs.logits.data, probabilities: outputs.probabilities.data };
  }

  /** Run the probe that the file carries, one picture after the other: also the warm-up. */
  async checkProbe(name) {
    if (this.#probe === null) return;
    const { side, pixels, logits, tolerance } = this.#probe;
    const [expected, found] = [[], []];
    for (const [number, row] of logits.entries()) {
      const picture = pixels.subarray(number * side * side * 3, (number + 1) * side * side * 3);
      const answer = await this.infer(repeated(picture, side, this.spec.input_size));
      const mean = row.reduce((sum, value) => sum + value, 0) / row.length;
      expected.push(...row.map((value) => (value - mean) ** 2));
      found.push(...row.map((value, at) => (answer.logits[at] - value) ** 2));
    }
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const difference = Math.sqrt(sum(found) / Math.max(sum(expected), 1e-12));
    this.checked = { difference, tolerance };
    if (!(difference <= tolerance)) {
      const told = `${difference.toPrecision(2)} of their spread beside them`;
      const fix = 'take provider: "wasm", or check: false';
      throw new EfficientFaceError(name, "the logits that it says it gives", told, fix);
    }
  }

  /** Free the model. */
  async close() {
    await this.#alone(() => this.#session.release());
    await this.#detector?.session.release();
  }

  #fit(picture) {
    const side = this.spec.input_size;
    return toRgb(resize(picture, side, side, this.spec.resize));
  }

  async #label(inputs) {
    if (!inputs.length) return [];
    const size = inputs[0].length;
    const pixels = new Uint8Array(size * inputs.length);
    inputs.forEach((input, at) => pixels.set(input, at * size));
    const { probabilities } = await this.infer(pixels);
    const classes = this.spec.labels.length;
    return inputs.map((_, at) =>
      this.#prediction(probabilities.subarray(at * classes, (at + 1) * classes)),
    );
  }

  #prediction(probabilities, label = best(Array.from(probabilities))) {
    const { labels, sure_above: sureAbove } = this.spec;
    const confidence = probabilities[label];
    return {
      label: labels[label],
      confidence,
      probabilities: Object.fromEntries(labels.map((name, at) => [name, probabilities[at]])),
      unsure: sureAbove === undefined ? null : confidence <= sureAbove,
    };
  }

  #followed(face, track, seconds, steady) {
    if (face.small) return { ...face, track }; // a guess would spoil what larger frames showed
    const raw = face.prediction;
    const values = this.spec.labels.map((name) => raw.probabilities[name]);
    const { probabilities, label } = steady.update(track, seconds, values);
    return { ...face, track, raw, prediction: this.#prediction(probabilities, label) };
  }

  /** One inference after the other, whoever calls: a session is not for two at once. */
  #alone(work) {
    const done = this.#queue.then(work);
    this.#queue = done.catch(() => {});
    return done;
  }
}

async function openRuntime(folder, provider, threads) {
  if (!(provider in RUNTIMES)) {
    const known = Object.keys(RUNTIMES).join(" or ");
    throw new EfficientFaceError("provider", known, String(provider), "choose one of these");
  }
  if (provider === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
    const fix = 'take provider: "wasm"';
    throw new EfficientFaceError("webgpu", "a browser with WebGPU", "none", fix);
  }
  const address = new URL(folder, globalThis.location?.href ?? import.meta.url).href;
  let ort;
  try {
    ort = await import(new URL(RUNTIMES[provider], address).href);
  } catch (error) {
    const fix = "see that the folder ort/ lies beside efficientface.js";
    throw new EfficientFaceError("ONNX Runtime Web", `its files in ${address}`, error.message, fix);
  }
  ort.env.wasm.wasmPaths = address;
  ort.env.logLevel = "error";
  // Without the headers that isolate a page there are no threads.
  const cores = Math.min(navigator.hardwareConcurrency ?? 1, MOST_THREADS);
  const wanted = globalThis.crossOriginIsolated ? (threads ?? cores) : 1;
  started[provider] ??= wanted; // a page starts a runtime once, and its threads with it
  ort.env.wasm.numThreads = started[provider];
  return [ort, { executionProviders: [provider], graphOptimizationLevel: "all" }];
}

async function openSession(ort, file, name, options) {
  try {
    return await ort.InferenceSession.create(file, options);
  } catch (error) {
    const expected = "a model that ONNX Runtime Web can load";
    throw new EfficientFaceError(name, expected, error.message, "reload the page, or export again");
  }
}

/** The bytes of a model, and what to call it. */
async function fetchFile(source, expected) {
  if (source instanceof Uint8Array) return [source, expected];
  if (source instanceof ArrayBuffer) return [new Uint8Array(source), expected];
  const address = String(source);
  const name = address.split("/").at(-1);
  let found;
  try {
    const response = await fetch(address);
    if (response.ok) return [new Uint8Array(await response.arrayBuffer()), name];
    found = `HTTP ${response.status}`;
  } catch (error) {
    found = error.message;
  }
  throw new EfficientFaceError(name, `${expected} at ${address}`, found, "check the address");
}

function toRgb({ data }) {
  const rgb = new Uint8Array((data.length / 4) * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    rgb[to] = data[from];
    rgb[to + 1] = data[from + 1];
    rgb[to + 2] = data[from + 2];
  }
  return rgb;
}

/** A stored picture of a probe as the model takes it: its pixels are repeated. */
function repeated(pixels, side, wanted) {
  const made = new Uint8Array(wanted * wanted * 3);
  for (let y = 0, to = 0; y < wanted; y++) {
    const row = Math.floor((y * side) / wanted) * side;
    for (let x = 0; x < wanted; x++, to += 3) {
      const from = 3 * (row + Math.floor((x * side) / wanted));
      made.set(pixels.subarray(from, from + 3), to);
    }
  }
  return made;
}
