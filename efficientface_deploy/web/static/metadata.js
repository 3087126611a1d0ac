// What an ONNX file says of itself: the ModelSpec, how it was made, and the probe (see
// efficientface_deploy/artifact.py and probe.py). ONNX Runtime Web does not give metadata.

import { EfficientFaceError } from "./errors.js";

// Numbers of fields in onnx.proto.
const METADATA = 14;
const KEY = 1;
const VALUE = 2;

const REMAKE = "export the model again with efficientface-export";

/**
 * The spec, the provenance and the probe of a model file.
 *
 * @param {Uint8Array} file
 * @param {string} name for errors
 */
export function readModel(file, name) {
  let entries;
  try {
    entries = readMetadata(file);
  } catch {
    throw new EfficientFaceError(name, "an ONNX model", "something else", "check the address");
  }
  const text = entries.get("efficientface.spec");
  if (text === undefined) {
    const expected = "a model with a ModelSpec in its metadata";
    throw new EfficientFaceError(name, expected, "none", REMAKE);
  }
  try {
    const spec = checkedSpec(JSON.parse(text));
    const provenance = JSON.parse(entries.get("efficientface.provenance") ?? "{}");
    const probe = readProbe(JSON.parse(entries.get("efficientface.probe") ?? "null"));
    return { spec, provenance, probe };
  } catch (error) {
    throw new EfficientFaceError(name, "metadata of ours", error.message, REMAKE);
  }
}

function checkedSpec(spec) {
  const known = { face_crop: "as-is", resize: "bilinear", colour: "rgb", name: "", ...spec };
  const right =
    known.schema === 1 &&
    Array.isArray(known.labels) &&
    Number.isInteger(known.input_size) &&
    ["bilinear", "bicubic"].includes(known.resize) &&
    ["as-is", "box", "aligned"].includes(known.face_crop);
  if (!right) throw new Error("a spec that this version does not know");
  return Object.freeze(known);
}

function readProbe(record) {
  if (record === null || record.schema !== 1) return null;
  const pixels = Uint8Array.from(atob(record.pixels), (letter) => letter.charCodeAt(0));
  const { side, logits, tolerance } = record;
  if (pixels.length !== logits.length * side * side * 3) throw new Error("a damaged probe");
  return { side, pixels, logits, tolerance };
}

function readMetadata(file) {
  const entries = new Map();
  for (const [number, content] of fields(file)) {
    if (number !== METADATA) continue;
    const entry = new Map(fields(content));
    const decoder = new TextDecoder("utf-8", { fatal: true });
    const text = (part) => decoder.decode(entry.get(part) ?? new Uint8Array());
    entries.set(text(KEY), text(VALUE));
  }
  return entries;
}

/** The fields of bytes of a protobuf message, with their numbers. */
function* fields(message) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= message.length || scale > 2 ** 63) throw new Error("no protobuf");
      const byte = message[at++];
      value += (byte % 128) * scale; // not by shifts, which end at 32 bits
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const tag = varint();
    const [number, kind] = [Math.floor(tag / 8), tag % 8];
    if (number === 0) throw new Error("no protobuf");
    if (kind === 0) {
      varint();
      continue;
    }
    const size = kind === 2 ? varint() : { 1: 8, 5: 4 }[kind];
    if (size === undefined || at + size > message.length) throw new Error("no protobuf");
    if (kind === 2) yield [number, message.subarray(at, at + size)];
    at += size;
  }
}
