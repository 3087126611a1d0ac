// How a face is cut for the network: a port of efficientface_deploy/vision/faces.py.

import { EfficientFaceError } from "./errors.js";
import { cutSquare, rotate, roundEven, warp } from "./pixels.js";

const BOX_SCALE = 1.04;
const MAX_EXCESS = 3; // a cut-out larger than the picture by this is a detector's mistake

export const SMALL = 24; // pixels of a box's longer side below which a face is not judged
export const MAX_TILT = Math.PI / 4; // a head that is turned by more is set upright

const TEMPLATE = [
  ...[38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366, 41.5493, 92.3655, 70.7299, 92.2041],
].map((value) => value / 112);

/** The longer side of a box. */
export function sideOf([left, top, right, bottom]) {
  return Math.max(right - left, bottom - top);
}

/**
 * Cut a face as the model's training faces were cut.
 *
 * @param picture
 * @param face { box, points } or one with points null
 * @param {string} crop the spec's face_crop
 */
export function cutFace(picture, face, crop) {
  if (crop === "aligned") return align(picture, face);
  const [left, top, right, bottom] = face.box;
  const side = wholeSide(BOX_SCALE * sideOf(face.box), picture);
  const angle = face.points ? tilt(face.points) : 0;
  const upright = Math.abs(angle) <= MAX_TILT;
  const around = upright ? side : Math.ceil(side * Math.SQRT2); // corners come in when it turns
  const corner = [(left + right - around) / 2, (top + bottom - around) / 2].map(roundEven);
  const cut = cutSquare(picture, ...corner, around);
  if (upright) return cut;
  const inset = Math.floor((around - side) / 2);
  return cutSquare(rotate(cut, angle), inset, inset, side);
}

/** By what angle a face is turned clockwise, radians, from its five points [x, y]. */
export function tilt(points) {
  const [real, imaginary] = turnAndScale(TEMPLATE, points.flat());
  return Math.atan2(imaginary, real);
}

function align(picture, face) {
  if (!face.points) {
    const expected = "five points, since this model was trained on aligned faces";
    throw new EfficientFaceError("face", expected, "none", "use predictFaces");
  }
  // From the template to the picture, which is what a warp asks for each pixel that it fills.
  const target = face.points.flat();
  const [a, b] = turnAndScale(TEMPLATE, target);
  const [from, to] = [mean(TEMPLATE), mean(target)];
  const shift = [to[0] - a * from[0] + b * from[1], to[1] - b * from[0] - a * from[1]];
  const side = wholeSide(Math.hypot(a, b), picture);
  const [x, y] = [a / side, b / side];
  return warp(picture, side, side, [x, -y, shift[0], y, x, shift[1]]);
}

/** The similarity that takes points nearest to others: a complex factor. Points lie flat. */
function turnAndScale(source, target) {
  const [from, to] = [mean(source), mean(target)];
  let [real, imaginary, square] = [0, 0, 0];
  for (let at = 0; at < source.length; at += 2) {
    const [sx, sy] = [source[at] - from[0], source[at + 1] - from[1]];
    const [tx, ty] = [target[at] - to[0], target[at + 1] - to[1]];
    real += sx * tx + sy * ty;
    imaginary += sx * ty - sy * tx;
    square += sx * sx + sy * sy;
  }
  return [real / square, imaginary / square];
}

function mean(flat) {
  const count = flat.length / 2;
  let [x, y] = [0, 0];
  for (let at = 0; at < flat.length; at += 2) {
    x += flat[at] / count;
    y += flat[at + 1] / count;
  }
  return [x, y];
}

function wholeSide(length, { width, height }) {
  if (length > MAX_EXCESS * Math.max(width, height)) {
    const found = `one ${Math.round(length)} pixels wide`;
    const expected = `a face within the picture of ${width}x${height}`;
    throw new EfficientFaceError("face", expected, found, "check the detector that made it");
  }
  return Math.max(1, roundEven(length));
}
