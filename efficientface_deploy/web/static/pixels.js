// Pictures, and what is done to their pixels: bit for bit what Pillow does, since canvas scaling
// is another filter in each browser. A picture is { data, width, height }, RGBA as in ImageData;
// alpha is not looked at.

import { EfficientFaceError } from "./errors.js";

const MAX_PIXELS = 89_478_485; // Pillow's limit, which the Python runtime has too

/**
 * Decode any image source of a page to a picture, upright, transparency laid over white.
 *
 * @param source Blob, ImageData, an element (img, video, canvas), ImageBitmap, VideoFrame, or
 *   { data, width, height } with RGB or RGBA bytes
 */
export async function toPicture(source) {
  if (source instanceof Blob) return decode(source);
  if (source?.data instanceof Uint8Array || source?.data instanceof Uint8ClampedArray) {
    return fromBytes(source);
  }
  const width = source?.videoWidth ?? source?.naturalWidth ?? source?.displayWidth ?? source?.width;
  const height =
    source?.videoHeight ?? source?.naturalHeight ?? source?.displayHeight ?? source?.height;
  if (!(width > 0 && height > 0)) {
    const found = source === null || source === undefined ? String(source) : "one without pixels";
    throw new EfficientFaceError("image", "a picture", found, "wait until it has loaded");
  }
  return draw(source, width, height);
}

async function decode(blob) {
  const name = blob.name ?? "image";
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    const found = blob.size ? "a file that this browser cannot decode" : "an empty file";
    const fix = "give a JPEG, PNG or WebP file";
    throw new EfficientFaceError(name, "a picture", found, fix);
  }
  try {
    return draw(bitmap, bitmap.width, bitmap.height, name);
  } finally {
    bitmap.close();
  }
}

function fromBytes({ data, width, height }) {
  const pixels = width * height;
  if (data.length === 4 * pixels) return { data, width, height };
  if (data.length !== 3 * pixels || !pixels) {
    const expected = "width * height RGB or RGBA bytes";
    const fix = "check width and height";
    throw new EfficientFaceError("image", expected, `${data.length} bytes`, fix);
  }
  const rgba = new Uint8Array(4 * pixels);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) {
    rgba[to] = data[from];
    rgba[to + 1] = data[from + 1];
    rgba[to + 2] = data[from + 2];
  }
  return { data: rgba, width, height };
}

let canvas; // one, since a camera gives thirty frames a second

function draw(source, width, height, name = "image") {
  if (width * height > MAX_PIXELS) {
    const found = `${width}x${height}`;
    throw new EfficientFaceError(name, "at most 89 million pixels", found, "shrink it first");
  }
  if (canvas?.width !== width || canvas?.height !== height) {
    canvas = new OffscreenCanvas(width, height);
  }
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// ---- Pillow's resize

const PRECISION_BITS = 22;

const FILTERS = {
  bilinear: { support: 1, weight: (x) => (x < 1 ? 1 - x : 0) },
  bicubic: {
    support: 2,
    weight: (x) =>
      x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0,
  },
};

/**
 * Image.resize of Pillow: antialiased, in fixed point, rounded after the rows and after the columns.
 *
 * @param picture
 * @param {number} width
 * @param {number} height
 * @param {"bilinear" | "bicubic"} filter
 * @param {number[]} extent width and height of what is resized, which Pillow's box may cut
 */
export function resize(
  picture,
  width,
  height,
  filter = "bilinear",
  extent = [picture.width, picture.height],
) {
  const rows = (from) =>
    width === picture.width && extent[0] === width
      ? from
      : resizeRows(from, width, weights(picture.width, extent[0], width, FILTERS[filter]));
  const columns = (from) =>
    height === picture.height && extent[1] === height
      ? from
      : resizeColumns(from, height, weights(picture.height, extent[1], height, FILTERS[filter]));
  // The order of Pillow 13; older releases always begin with the rows, which is the same for
  // squares, and so for faces.
  const lost = picture.height - height;
  const columnsFirst = lost > 0 && lost > 2 * (picture.width - width);
  return columnsFirst ? rows(columns(picture)) : columns(rows(picture));
}

/** For each pixel of a side: where its weights begin, how many there are, and these. */
function weights(from, extent, to, { support, weight }) {
  const scale = Math.fround(extent) / to;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const most = Math.ceil(reach) * 2 + 1;
  const [starts, counts] = [new Int32Array(to), new Int32Array(to)];
  const fixed = new Int32Array(to * most);
  const row = new Float64Array(most);
  for (let at = 0; at < to; at++) {
    const centre = (at + 0.5) * scale;
    const start = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const count = Math.min(Math.trunc(centre + reach + 0.5), from) - start;
    let sum = 0;
    for (let k = 0; k < count; k++) {
      row[k] = weight(Math.abs((k + start - centre + 0.5) * (1 / stretch)));
      sum += row[k];
    }
    for (let k = 0; k < count; k++) {
      const share = (sum ? row[k] / sum : row[k]) * 2 ** PRECISION_BITS;
      fixed[at * most + k] = Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    }
    starts[at] = start;
    counts[at] = count;
  }
  return { starts, counts, fixed, most };
}

const HALF = 1 << (PRECISION_BITS - 1);

function resizeRows({ data, width, height }, to, { starts, counts, fixed, most }) {
  const made = new Uint8ClampedArray(4 * to * height);
  for (let y = 0, out = 0; y < height; y++) {
    for (let x = 0; x < to; x++, out += 4) {
      let [red, green, blue] = [HALF, HALF, HALF];
      let from = 4 * (y * width + starts[x]);
      for (let k = x * most, end = k + counts[x]; k < end; k++, from += 4) {
        red += data[from] * fixed[k];
        green += data[from + 1] * fixed[k];
        blue += data[from + 2] * fixed[k];
      }
      made[out] = red >> PRECISION_BITS;
      made[out + 1] = green >> PRECISION_BITS;
      made[out + 2] = blue >> PRECISION_BITS;
      made[out + 3] = 255;
    }
  }
  return { data: made, width: to, height };
}

function resizeColumns({ data, width }, to, { starts, counts, fixed, most }) {
  const stride = 4 * width;
  const made = new Uint8ClampedArray(stride * to);
  for (let y = 0, out = 0; y < to; y++) {
    const [first, start, count] = [y * most, starts[y] * stride, counts[y]];
    for (let x = 0; x < stride; x++, out++) {
      let sum = HALF;
      for (let k = 0, from = start + x; k < count; k++, from += stride) {
        sum += data[from] * fixed[first + k];
      }
      made[out] = sum >> PRECISION_BITS;
    }
  }
  return { data: made, width, height: to };
}

/** Image.resize of Pillow with reducing_gap=1.0: by whole factors first, then by the filter. */
export function shrink(picture, width, height) {
  if (width === picture.width && height === picture.height) return picture;
  const [x, y] = [picture.width / width, picture.height / height].map((f) => Math.trunc(f) || 1);
  if (x === 1 && y === 1) return resize(picture, width, height);
  const extent = [picture.width / x, picture.height / y];
  return resize(reduce(picture, x, y), width, height, "bilinear", extent);
}

/** Image.reduce of Pillow: the mean of each cell of factorX by factorY pixels. */
function reduce({ data, width, height }, factorX, factorY) {
  const [columns, rows] = [Math.ceil(width / factorX), Math.ceil(height / factorY)];
  const made = new Uint8ClampedArray(4 * columns * rows);
  for (let row = 0, out = 0; row < rows; row++) {
    const [top, bottom] = [row * factorY, Math.min((row + 1) * factorY, height)];
    for (let column = 0; column < columns; column++, out += 4) {
      const [left, right] = [column * factorX, Math.min((column + 1) * factorX, width)];
      const count = (right - left) * (bottom - top);
      const multiplier = Math.trunc(Math.fround(2 ** 24 / count));
      let red = count >> 1;
      let [green, blue] = [red, red];
      for (let y = top; y < bottom; y++) {
        for (let from = 4 * (y * width + left), end = from + 4 * (right - left); from < end; ) {
          red += data[from];
          green += data[from + 1];
          blue += data[from + 2];
          from += 4;
        }
      }
      made[out] = Math.imul(red, multiplier) >>> 24;
      made[out + 1] = Math.imul(green, multiplier) >>> 24;
      made[out + 2] = Math.imul(blue, multiplier) >>> 24;
      made[out + 3] = 255;
    }
  }
  return { data: made, width: columns, height: rows };
}

// ---- squares, turned and warped

/** A square of a picture, whose edge goes on where the square reaches beyond it. */
export function cutSquare({ data, width, height }, left, top, side) {
  const made = new Uint8ClampedArray(4 * side * side);
  const pixels = words(data);
  const to = words(made);
  // Wholly outside it is black, as in Python.
  if (left >= width || top >= height || left + side <= 0 || top + side <= 0) {
    return { data: made, width: side, height: side };
  }
  for (let y = 0; y < side; y++) {
    const from = Math.min(Math.max(top + y, 0), height - 1) * width;
    for (let x = 0; x < side; x++) {
      to[y * side + x] = pixels[from + Math.min(Math.max(left + x, 0), width - 1)];
    }
  }
  return { data: made, width: side, height: side };
}

/** The square turned by quarters, counter-clockwise, as numpy.rot90 does. */
export function turnQuarters(square, turns) {
  const side = square.width;
  const from = words(square.data);
  const made = new Uint8ClampedArray(4 * side * side);
  const to = words(made);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const [row, column] = [
        [y, x],
        [x, side - 1 - y],
        [side - 1 - y, side - 1 - x],
        [side - 1 - x, y],
      ][turns];
      to[y * side + x] = from[row * side + column];
    }
  }
  return { data: made, width: side, height: side };
}

function words(data) {
  return new Uint32Array(data.buffer, data.byteOffset, data.length / 4);
}

/** Image.rotate of Pillow, counter-clockwise about the middle, bilinear. */
export function rotate(picture, radians) {
  const { width, height } = picture;
  const angle = -radians;
  const rounded = (value) => Number(value.toFixed(15));
  const matrix = [
    ...[rounded(Math.cos(angle)), rounded(Math.sin(angle)), 0],
    ...[rounded(-Math.sin(angle)), rounded(Math.cos(angle)), 0],
  ];
  const [x, y] = [width / 2, height / 2];
  matrix[2] = matrix[0] * -x + matrix[1] * -y + x;
  matrix[5] = matrix[3] * -x + matrix[4] * -y + y;
  return warp(picture, width, height, matrix);
}

/** Image.transform of Pillow, AFFINE and BILINEAR: black beyond the picture. */
export function warp(picture, width, height, [a, b, c, d, e, f]) {
  const { data } = picture;
  const made = new Uint8ClampedArray(4 * width * height);
  for (let row = 0, out = 0; row < height; row++) {
    for (let column = 0; column < width; column++, out += 4) {
      made[out + 3] = 255;
      const x = a * (column + 0.5) + b * (row + 0.5) + c;
      const y = d * (column + 0.5) + e * (row + 0.5) + f;
      if (x < 0 || x >= picture.width || y < 0 || y >= picture.height) continue;
      const [left, top] = [Math.floor(x - 0.5), Math.floor(y - 0.5)];
      const [right, down] = [x - 0.5 - left, y - 0.5 - top];
      const x0 = 4 * Math.min(Math.max(left, 0), picture.width - 1);
      const x1 = 4 * Math.min(Math.max(left + 1, 0), picture.width - 1);
      const upper = 4 * picture.width * Math.min(Math.max(top, 0), picture.height - 1);
      const inside = top + 1 >= 0 && top + 1 < picture.height;
      const lower = inside ? 4 * picture.width * (top + 1) : upper;
      for (let channel = 0; channel < 3; channel++) {
        const at = (place) => data[place + channel];
        const above = at(upper + x0) * (1 - right) + at(upper + x1) * right;
        const below = at(lower + x0) * (1 - right) + at(lower + x1) * right;
        made[out + channel] = Math.trunc(above * (1 - down) + below * down);
      }
    }
  }
  return { data: made, width, height };
}

/** Python's round: halves go to the even number. */
export function roundEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}
