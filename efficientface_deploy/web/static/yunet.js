// YuNet, searching a picture for faces of any size: a port of efficientface_deploy/vision/yunet.py
// and search.py, whose comments say why.

import { EfficientFaceError } from "./errors.js";
import { MAX_TILT, SMALL, sideOf, tilt } from "./faces.js";
import { cutSquare, roundEven, shrink, turnQuarters } from "./pixels.js";

const MAX_SIDE = 2048;
const STRIDES = [8, 16, 32];
const [SMALLEST, LARGEST, DOUBTFUL] = [14, 300, 0.88];
const [MAX_OVERLAP, MAX_WITHIN, MAX_COVERED] = [0.3, 0.8, 0.4];
const [CHEAP, ORDINARY, LEAST, STEP, COARSEST] = [0.5, 512, 192, 4, 256];
const [MOST_LOOKS, AROUND, LOOK] = [8, 2, 128];
const [CANDIDATE, BETTER, SURE] = [0.15, 0.05, 0.8];
const MULTIPLE = 32;

/** Finds faces; a face is { box: [left, top, right, bottom], score, points: five [x, y] }. */
export class YuNet {
  /**
   * @param ort ONNX Runtime Web
   * @param session of a file that takes pictures of any size
   */
  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
  }

  /** The faces of a picture, the most confident first. */
  async detect(picture, { minScore = 0.5, minFace = null } = {}) {
    const longest = Math.max(picture.width, picture.height);
    const candidate = Math.min(minScore, CANDIDATE);
    const pictures = [picture];
    const copies = [];
    let copy = picture;
    const scales = searchScales(longest, minFace);
    for (const scale of scales) {
      const sides = [picture.width, picture.height].map((n) => Math.max(1, roundEven(n * scale)));
      copy = shrink(copy, ...sides);
      pictures.push(copy);
      const [x, y] = [copy.width / picture.width, copy.height / picture.height];
      const found = await this.search(copy, candidate);
      copies.push(found.map((face) => moved(face, ([px, py]) => [px / x, py / y])));
    }
    const largest = scales.map((scale) => LARGEST / scale);
    let faces = merge(copies, largest, minScore);
    if (minFace !== null) faces = faces.filter((face) => sideOf(face.box) >= minFace);
    faces = await this.lookAgain(pictures, faces, minScore);
    return faces.filter((face) => face.score >= minScore);
  }

  /** The faces of a picture as it is, boxes that overlap included. */
  async search(picture, minScore) {
    const [columns, rows] = [picture.width, picture.height].map(
      (side) => Math.ceil(side / MULTIPLE) * MULTIPLE,
    );
    const planes = toPlanes(picture, columns, rows);
    const input = new this.ort.Tensor("float32", planes, [1, 3, rows, columns]);
    const outputs = await this.session.run({ input });
    return STRIDES.flatMap((stride) => decode(outputs, stride, columns, minScore));
  }

  /** The same faces, those that lie or hang with the points of the head as it is. */
  async lookAgain(pictures, found, minScore) {
    const doubtful = found
      .filter((face) => face.score < DOUBTFUL || Math.abs(tilt(face.points)) > MAX_TILT)
      .filter((face) => sideOf(face.box) >= SMALL)
      .sort((one, other) => sideOf(other.box) - sideOf(one.box))
      .slice(0, MOST_LOOKS);
    for (const face of doubtful) {
      const [left, top, right, bottom] = face.box;
      const side = roundEven(AROUND * sideOf(face.box));
      const corner = [(left + right - side) / 2, (top + bottom - side) / 2].map(roundEven);
      const square = look(pictures, corner, side);
      const looks = [];
      for (let turns = 0; turns < 4; turns++) {
        looks.push(await this.middle(turnQuarters(square, turns)));
      }
      const scores = looks.map((one) => one?.score ?? 0);
      const turns = scores.indexOf(Math.max(...scores));
      const wanted = scores[0] + BETTER;
      const least = face.score < minScore ? Math.max(wanted, SURE) : wanted;
      if (scores[turns] <= least) continue;
      const scale = side / LOOK;
      const place = ([x, y]) => [x * scale + corner[0], y * scale + corner[1]];
      Object.assign(face, moved(turnedBack(looks[turns], turns), place));
    }
    return suppress(found);
  }

  /** The most confident face about the middle of a square. */
  async middle(square) {
    const near = (from, to) => Math.abs((from + to) / 2 - LOOK / 2) < LOOK / 6;
    const found = (await this.search(square, CANDIDATE)).filter(
      ({ box }) => near(box[0], box[2]) && near(box[1], box[3]),
    );
    return found.reduce((best, face) => (best && best.score >= face.score ? best : face), null);
  }
}

/** Refuse an option that cannot be meant. */
export function checkOptions({ minScore = 0.5, minFace = null }) {
  const fix = "leave it out";
  if (!(minScore >= 0 && minScore <= 1)) {
    throw new EfficientFaceError("minScore", "a number from 0 to 1", String(minScore), fix);
  }
  if (minFace !== null && !(minFace >= 1 && minFace <= 1 << 14)) {
    throw new EfficientFaceError("minFace", "pixels, 1 to 16384", String(minFace), fix);
  }
}

function searchScales(longest, minFace) {
  const wanted =
    minFace === null
      ? Math.max(CHEAP * longest, Math.min(longest, ORDINARY))
      : (longest * SMALLEST) / minFace;
  const scales = [Math.min(Math.max(wanted, LEAST), MAX_SIDE) / longest];
  while (scales.at(-1) * longest > COARSEST) scales.push(scales.at(-1) / STEP);
  return scales;
}

/** Blue, green and red planes, as OpenCV orders them, filled up with black. */
function toPlanes({ data, width, height }, columns, rows) {
  const size = columns * rows;
  const planes = new Float32Array(3 * size);
  for (let y = 0, from = 0; y < height; y++) {
    for (let to = y * columns, end = to + width; to < end; to++, from += 4) {
      planes[to] = data[from + 2];
      planes[size + to] = data[from + 1];
      planes[2 * size + to] = data[from];
    }
  }
  return planes;
}

function decode(outputs, stride, columns, minScore) {
  const [kinds, objects, sizes, landmarks] = ["cls", "obj", "bbox", "kps"].map(
    (name) => outputs[`${name}_${stride}`].data,
  );
  const faces = [];
  const clip = (value) => Math.min(Math.max(value, 0), 1);
  for (let cell = 0; cell < kinds.length; cell++) {
    const product = Math.fround(clip(kinds[cell]) * clip(objects[cell]));
    if (product < minScore * minScore) continue;
    const column = cell % (columns / stride);
    const row = Math.floor(cell / (columns / stride));
    const [dx, dy, width, height] = sizes.subarray(4 * cell, 4 * cell + 4);
    const [x, y] = [column + dx, row + dy];
    const [halfWidth, halfHeight] = [Math.exp(width) / 2, Math.exp(height) / 2];
    const box = [x - halfWidth, y - halfHeight, x + halfWidth, y + halfHeight];
    const five = landmarks.subarray(10 * cell, 10 * cell + 10);
    faces.push({
      box: box.map((edge) => edge * stride),
      score: Math.sqrt(product),
      points: [0, 2, 4, 6, 8].map((at) => [
        (column + five[at]) * stride,
        (row + five[at + 1]) * stride,
      ]),
    });
  }
  return faces;
}

/** The faces of a picture, from those of its copies, the finest first. */
function merge(copies, largest, minScore) {
  const sure = (faces) => faces.filter((face) => face.score >= minScore);
  const kept = copies.map((faces, number) => {
    const large = sure(copies.slice(number + 1).flat()).filter(
      (face) => sideOf(face.box) > largest[number],
    );
    return faces.filter(({ box }) => !large.some((face) => shared(box, face.box) > MAX_WITHIN));
  });
  for (let number = 1; number < kept.length; number++) {
    for (let finer = 0; finer < number; finer++) {
      const faces = suppress(sure(kept[finer]));
      kept[number] = kept[number].filter(
        ({ box }) => sideOf(box) > largest[finer] || !isBetween(box, faces),
      );
    }
  }
  return suppress(kept.flat());
}

/** Of two boxes for one face the less confident is left out. */
function suppress(faces) {
  const kept = [];
  for (const face of [...faces].sort((one, other) => other.score - one.score)) {
    if (kept.every((other) => !overlaps(face.box, other.box))) kept.push(face);
  }
  return kept;
}

function area([left, top, right, bottom]) {
  return (right - left) * (bottom - top);
}

function intersection(one, other) {
  const width = Math.min(one[2], other[2]) - Math.max(one[0], other[0]);
  const height = Math.min(one[3], other[3]) - Math.max(one[1], other[1]);
  return Math.max(width, 0) * Math.max(height, 0);
}

function overlaps(one, other) {
  const common = intersection(one, other);
  return common >= MAX_OVERLAP * (area(one) + area(other) - common);
}

/** How much of a box lies within another. */
function shared(box, other) {
  return intersection(box, other) / Math.max(area(box), 1e-9);
}

/** Whether a box is largely covered by faces, and is none of them. */
function isBetween(box, faces) {
  const covered = faces.reduce((sum, face) => sum + shared(box, face.box), 0);
  const same = faces.some(
    (face) => intersection(box, face.box) > 0 && overlaps(box, face.box),
  );
  return covered > MAX_COVERED && !same;
}

/** A square of a picture, small, of the coarsest copy that is fine enough for it. */
function look(pictures, corner, side) {
  const scales = pictures.map((picture) => picture.width / pictures[0].width);
  const at = Math.max(scales.findLastIndex((scale) => side * scale >= LOOK), 0);
  const [left, top] = corner.map((edge) => roundEven(edge * scales[at]));
  return shrink(cutSquare(pictures[at], left, top, roundEven(side * scales[at])), LOOK, LOOK);
}

/** What was found in a square that was turned by quarters, as it was. */
function turnedBack(face, turns) {
  let made = face;
  for (let turn = 0; turn < turns; turn++) made = moved(made, ([x, y]) => [LOOK - y, x]);
  return made;
}

/** A face whose corners and points are somewhere else. */
function moved({ box, score, points }, move) {
  const [one, other] = [move(box.slice(0, 2)), move(box.slice(2))];
  const xs = [one[0], other[0]];
  const ys = [one[1], other[1]];
  return {
    box: [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)],
    score,
    points: points.map(move),
  };
}
