// An image → the tensor that the model takes, as preprocess.json says: Pillow's filters in its fixed point. Pillow may take the
// vertical pass first, so that single values differ by the rounding between the passes.

const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
  lanczos: [3, (x) => {
    const sinc = (v) => (v === 0 ? 1 : Math.sin(Math.PI * v) / (Math.PI * v));
    return Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0;
  }],
};
const ONE = 2 ** 22; // Pillow's fixed point

/** {data, width, height, channels}: 8-bit values, row by row, channels last. `rgba` is what a canvas gives. */
export function fromCanvas(rgba, width, height, color) {
  const channels = color === "RGB" ? 3 : 1;
  const data = new Uint8Array(width * height * channels);
  for (let at = 0; at < width * height; at++) {
    const [r, g, b] = rgba.subarray(4 * at, 4 * at + 3);
    if (channels === 1) data[at] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else data.set([r, g, b], 3 * at);
  }
  return { data, width, height, channels };
}

/** Resized and cropped to the network's height and width. */
export function crop(image, spec) {
  const [height, width] = spec.resize.crop;
  const [wide, high] = resized(image.width, image.height, spec);
  const scaled = resize(image, wide, high, spec.resize.interpolation);
  const left = offset(wide, width), top = offset(high, height);
  const { channels } = image, data = new Uint8Array(width * height * channels).map((_, at) => spec.resize.fill[at % channels]);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const fromY = y + top, fromX = x + left;
    if (fromY < 0 || fromX < 0 || fromY >= high || fromX >= wide) continue; // beyond the edge
    const from = (fromY * wide + fromX) * channels;
    data.set(scaled.data.subarray(from, from + channels), (y * width + x) * channels);
  }
  return { data, width, height, channels };
}

/** A cropped image as float32 (1, C, H, W): (pixel * scale - mean) / std. */
export function normalise(image, spec) {
  const { data, width, height, channels } = image, plane = width * height;
  const values = new Float32Array(channels * plane);
  for (let c = 0; c < channels; c++) for (let at = 0; at < plane; at++) {
    values[c * plane + at] = (data[at * channels + c] * spec.scale - spec.mean[c]) / spec.std[c];
  }
  return { data: values, dims: [1, channels, height, width] };
}

function resized(width, height, spec) {
  const [toHeight, toWidth] = spec.resize.to;
  if (spec.resize.rule === "exact") return [toWidth, toHeight];
  const longest = spec.resize.rule === "longest";
  if (longest || toHeight !== toWidth) {
    const ratio = Math[longest ? "max" : "min"](height / toHeight, width / toWidth);
    return [even(width / ratio), even(height / ratio)];
  }
  return width <= height
    ? [toWidth, Math.trunc((toWidth * height) / width)]
    : [Math.trunc((toHeight * width) / height), toHeight];
}

/** Python's round: halves go to the even neighbour. */
function even(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}

function offset(have, want) {
  return want > have ? -Math.trunc((want - have) / 2) : even((have - want) / 2);
}

function resize(image, width, height, interpolation) {
  if (interpolation === "nearest") return nearest(image, width, height);
  let { data } = image;
  const { channels } = image;
  if (width !== image.width) data = pass(data, image.width, image.height, channels, width, interpolation, false);
  if (height !== image.height) data = pass(data, width, image.height, channels, height, interpolation, true);
  return { data, width, height, channels };
}

/** One axis of a resize; the result is rounded to 8 bits, as Pillow does between the two. */
function pass(data, width, height, channels, size, interpolation, vertical) {
  const [support, filter] = FILTERS[interpolation];
  const length = vertical ? height : width, weights = kernels(length, size, support, filter);
  const outWidth = vertical ? width : size, outHeight = vertical ? size : height;
  const out = new Uint8ClampedArray(outWidth * outHeight * channels), step = (vertical ? width : 1) * channels;
  for (let y = 0; y < outHeight; y++) for (let x = 0; x < outWidth; x++) {
    const [first, kernel] = weights[vertical ? y : x];
    const base = (vertical ? first * width + x : y * width + first) * channels;
    for (let c = 0; c < channels; c++) {
      let sum = ONE / 2;
      for (let k = 0; k < kernel.length; k++) sum += data[base + k * step + c] * kernel[k];
      out[(y * outWidth + x) * channels + c] = Math.floor(sum / ONE);
    }
  }
  return out;
}

function kernels(length, size, support, filter) {
  const scale = length / size, wider = Math.max(scale, 1), reach = support * wider, narrower = 1 / wider;
  return Array.from({ length: size }, (_, at) => {
    const centre = (at + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach + 0.5));
    const raw = Array.from({ length: last - first }, (_, k) => filter((k + first - centre + 0.5) * narrower));
    const sum = raw.reduce((a, b) => a + b, 0);
    return [first, raw.map((value) => Math.trunc((value / sum) * ONE + (value < 0 ? -0.5 : 0.5)))];
  });
}

function nearest(image, width, height) {
  const { data, channels } = image, out = new Uint8Array(width * height * channels);
  const rows = steps(image.height, height), columns = steps(image.width, width);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const from = (rows[y] * image.width + columns[x]) * channels;
    out.set(data.subarray(from, from + channels), (y * width + x) * channels);
  }
  return { data: out, width, height, channels };
}

/** Where each value comes from; added up, since Pillow's places have the rounding of its sum. */
function steps(from, to) {
  const found = [], step = from / to;
  for (let at = step * 0.5; found.length < to; at += step) found.push(Math.trunc(at));
  return found;
}
