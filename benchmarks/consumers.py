"""Other readers of ONNX files, each asked for the logits of one file: what they say is compared with PyTorch by the caller.

onnx's ReferenceEvaluator, OpenVINO and tract share no kernel with ONNX Runtime. onnxruntime-node does, and shows that another
version of it reads the file; onnxruntime-web is WebAssembly, in Node and in Chromium. None is a dependency of the package:
`pip install "cswap-deploy[consumers]"`, `npm ci --prefix benchmarks --ignore-scripts`, Debian's chromium.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
PAGE = """<!doctype html><meta charset="utf-8"><script type="module">
import * as ort from "/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
window.logits = async (model, input, shape) => {
  const bytes = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
  const session = await ort.InferenceSession.create(await bytes(model));
  const data = new Float32Array((await bytes(input)).buffer);
  const found = await session.run({[session.inputNames[0]]: new ort.Tensor("float32", data, shape)});
  const values = Array.from(found[session.outputNames[0]].data);
  await session.release();
  return values;
};
window.loaded = true;
</script>"""


def onnxruntime(path: Path, inputs: Array) -> Array:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return found


def reference(path: Path, inputs: Array) -> Array:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    found: Array = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: inputs})[0]
    return found


def openvino(path: Path, inputs: Array) -> Array:
    """In float32: on some CPUs its default is bfloat16."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", settings)
    found: Array = np.array(compiled([inputs])[compiled.output(0)])
    return found


def tract(path: Path, inputs: Array) -> Array:
    """It does not unify a symbolic batch with a number: the shape of the input is given."""
    import tract as runtime

    model = runtime.onnx().load(str(path))
    shape = ",".join(map(str, inputs.shape))
    model.set_input_fact(0, f"{shape},f32")
    found: Array = model.into_model().into_runnable().run([inputs])[0].to_numpy()
    return found


def node(path: Path, inputs: Array, runtime: str = "node") -> Array:
    """`runtime`: node or web."""
    with tempfile.TemporaryDirectory() as folder:
        given, output, jobs = (Path(folder) / name for name in ("input", "output", "jobs.json"))
        given.write_bytes(np.ascontiguousarray(inputs, "<f4").tobytes())
        job = {"model": str(path), "input": str(given), "shape": list(inputs.shape), "output": str(output)}
        jobs.write_text(json.dumps([job]))
        command = ["node", str(HERE / "consumers.mjs"), runtime, str(jobs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        if fault := json.loads(done.stdout.splitlines()[-1]).get(str(path)):
            raise RuntimeError(fault)
        return np.frombuffer(output.read_bytes(), "<f4").reshape(len(inputs), -1)


def chromium(path: Path, inputs: Array) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copyfile(path, root / "model.onnx")
        (root / "input").write_bytes(np.ascontiguousarray(inputs, "<f4").tobytes())
        (root / "index.html").write_text(PAGE)
        with serving(root) as address, browser() as opened:
            page = opened.new_page()
            page.goto(f"{address}/index.html")
            page.wait_for_function("window.loaded")
            values = page.evaluate("([shape]) => window.logits('model.onnx', 'input', shape)", [list(inputs.shape)])
        return np.array(values, np.float32).reshape(len(inputs), -1)


CONSUMERS: dict[str, Callable[[Path, Array], Array]] = {
    "reference": reference,
    "openvino": openvino,
    "tract": tract,
    "node": node,
    "web": partial(node, runtime="web"),
    "chromium": chromium,
}


def missing(name: str) -> str:
    """Why a consumer cannot run here; empty when it can."""
    if name in ("reference", "openvino", "tract"):
        module = {"reference": "onnx"}.get(name, name)
        return "" if find_spec(module) else f'{module} is not installed: pip install "cswap-deploy[consumers]"'
    if shutil.which("node") is None:
        return "Node.js is not installed: apt-get install nodejs npm"
    package = "onnxruntime-node" if name == "node" else "onnxruntime-web"
    if not (MODULES / package).is_dir():
        return f"{package} is not installed: npm ci --prefix benchmarks --ignore-scripts"
    if name == "chromium" and shutil.which("chromium") is None:
        return "Chromium is not installed: apt-get install chromium"
    return (
        'playwright is not installed: pip install "cswap-deploy[dev]"'
        if name == "chromium" and not find_spec("playwright")
        else ""
    )


def difference(found: Array, wanted: Array) -> float:
    """Largest difference relative to the largest logit."""
    if found.shape != wanted.shape:
        raise RuntimeError(f"the output is {found.shape}, expected {wanted.shape}")
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


# --- a browser


class _Files(SimpleHTTPRequestHandler):
    """A folder, and the JavaScript packages under /node_modules/."""

    def translate_path(self, path: str) -> str:
        prefix = "/node_modules/"
        if path.startswith(prefix) and ".." not in path:
            return str(MODULES / path.removeprefix(prefix).partition("?")[0])
        return super().translate_path(path)

    def log_message(self, *_: Any) -> None:
        return


_Files.extensions_map = {
    **SimpleHTTPRequestHandler.extensions_map,
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The folder over http on a free port of this machine; the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=os.fspath(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()
