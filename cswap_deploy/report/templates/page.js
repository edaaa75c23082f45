// The page: loads the model of this bundle, classifies its test images and those of the visitor, and times it here.
import { crop, fromCanvas, normalise } from "./preprocess.js";

const CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/";
/** The two files of ONNX Runtime Web that are run, by their digests: another file is not run, wherever it comes from. */
const RUNTIME = {
  "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
  "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
};
const WARM_UP = 10, LEAST_RUNS = 30, SECONDS = 3;
const $ = (id) => document.getElementById(id);
const state = {};

/** `?ort=path/` takes ONNX Runtime Web from this server in place of the CDN; another origin is not taken. */
function runtimePlace() {
  const asked = new URLSearchParams(location.search).get("ort");
  if (!asked) return CDN;
  const place = new URL(asked, location.href);
  if (place.origin !== location.origin) throw new Error("?ort= must lie on this server");
  return place.href.endsWith("/") ? place.href : `${place.href}/`;
}

async function runtimeFile(place, name) {
  try {
    const answer = await fetch(`${place}${name}`, { integrity: RUNTIME[name], referrerPolicy: "no-referrer" });
    if (answer.ok) return await answer.arrayBuffer();
  } catch { /* the browser does not say which of the two it was */ }
  throw new Error(`${name} of ONNX Runtime Web cannot be had from ${place}, or is not the file that this page was made with`);
}

/** Fetched and run from a blob: all browsers compare what they fetch with its digest, only new ones what they import. */
async function runtime() {
  const place = runtimePlace();
  const [code, binary] = await Promise.all(Object.keys(RUNTIME).map((name) => runtimeFile(place, name)));
  const source = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const ort = await import(source);
  URL.revokeObjectURL(source);
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = 1;
  return ort;
}

async function get(path, kind) {
  const answer = await fetch(`../${path}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer[kind]();
}

async function start() {
  $("verdict").textContent = "loading the model and ONNX Runtime Web (14 MB) ...";
  const [manifest, spec, labels, expected] = await Promise.all([
    get("manifest.json", "json"), get("preprocess.json", "json"), get("labels.txt", "text"), get("test_vectors/expected.json", "json"),
  ]);
  state.spec = spec;
  state.labels = labels.split("\n").slice(0, -1);
  state.file = manifest.shipped.endsWith(".onnx") ? manifest.shipped : "model.onnx";
  $("title").textContent = manifest.name;
  document.title = manifest.name;
  state.ort = await runtime();
  state.session = await state.ort.InferenceSession.create(new Uint8Array(await get(state.file, "arrayBuffer")));
  $("model").textContent = `${state.file}, ONNX Runtime Web ${state.ort.env.versions.web}, WebAssembly, 1 thread`;
  $("verdict").textContent = "running ...";
  await testImages(expected);
  $("time").disabled = $("file").disabled = false;
}

async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return fromCanvas(data, bitmap.width, bitmap.height, state.spec.color);
}

/** Logits of an image file. */
async function logits(blob) {
  const { data, dims } = normalise(crop(await pixelsOf(blob), state.spec), state.spec);
  state.last = { [state.spec.input]: new state.ort.Tensor("float32", data, dims) };
  return (await state.session.run(state.last))[state.spec.output].data;
}

function ranked(values, count) {
  const top = Math.max(...values), powers = Array.from(values, (value) => Math.exp(value - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power, index) => ({ index, share: power / sum })).sort((a, b) => b.share - a.share).slice(0, count);
}

async function classify(blob) {
  return ranked(await logits(blob), 5);
}

async function testImages(expected) {
  const rows = expected.images.filter((image) => image.picture);
  let same = 0;
  for (const image of rows) {
    const blob = await get(`test_vectors/${image.picture}`, "blob"), [best] = await classify(blob);
    const agrees = best.index === image.top1;
    same += agrees;
    const row = $("tests").insertRow(), picture = document.createElement("img");
    picture.src = `../test_vectors/${image.picture}`;
    picture.alt = "";
    row.insertCell().append(picture);
    row.insertCell().textContent = state.labels[best.index];
    row.insertCell().textContent = image.label;
    row.insertCell().textContent = agrees ? "same" : "DIFFERENT";
  }
  $("verdict").textContent = `${same} of ${rows.length} test images have the top-1 that PyTorch gave`;
  $("verdict").dataset.same = String(same === rows.length);
}

async function time() {
  $("time").disabled = true;
  $("latency").textContent = "running ...";
  await new Promise(requestAnimationFrame);
  for (let i = 0; i < WARM_UP; i++) await state.session.run(state.last);
  const samples = [], until = performance.now() + 1000 * SECONDS;
  while (samples.length < LEAST_RUNS || performance.now() < until) {
    const began = performance.now();
    await state.session.run(state.last);
    samples.push(performance.now() - began);
  }
  samples.sort((a, b) => a - b);
  const at = (p) => samples[Math.min(samples.length - 1, Math.ceil((p / 100) * samples.length) - 1)].toFixed(2);
  $("latency").textContent = `p50 ${at(50)} ms, p90 ${at(90)} ms, ${samples.length} runs, batch 1, on ${navigator.userAgent}`;
  $("time").disabled = false;
}

$("time").addEventListener("click", time);
$("file").addEventListener("change", async ({ target }) => {
  const [first] = target.files;
  if (!first) return;
  const found = await classify(first);
  $("answer").textContent = found.map(({ index, share }) => `${state.labels[index]} ${(100 * share).toFixed(1)} %`).join("\n");
});
window.classify = classify;
window.ready = start().then(() => true, (fault) => {
  $("verdict").textContent = `cannot run: ${fault.message}`;
  return false;
});
