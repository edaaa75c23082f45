// Runs ONNX files with onnxruntime-node or onnxruntime-web: `node consumers.mjs node|web JOBS.json`.
// A job is {model, input, shape, output}: float32 without header in, out; the model's own input name is asked for.
import { readFileSync, writeFileSync } from "node:fs";

const [, , name, path] = process.argv;
const ort = name === "node" ? (await import("onnxruntime-node")).default : await import("onnxruntime-web");
if (name === "web") ort.env.wasm.numThreads = 1;
const providers = name === "node" ? ["cpu"] : ["wasm"];
const faults = {};
for (const { model, input, shape, output } of JSON.parse(readFileSync(path, "utf8"))) {
  try {
    const session = await ort.InferenceSession.create(readFileSync(model), { executionProviders: providers, intraOpNumThreads: 1 });
    const bytes = readFileSync(input);
    const data = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    const results = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", data, shape) });
    const found = results[session.outputNames[0]].data;
    writeFileSync(output, Buffer.from(found.buffer, found.byteOffset, found.byteLength));
    await session.release?.();
  } catch (error) {
    faults[model] = String(error.message ?? error).slice(0, 300);
  }
}
console.log(JSON.stringify(faults));
