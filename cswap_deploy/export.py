"""Module → one self-contained ONNX file → simplified; both compared with PyTorch on real images."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.artifacts import File, ImageSet, InputSpec, Network, OnnxModel, Parity, TestVectors
from cswap_deploy.checkpoint import reason
from cswap_deploy.errors import ExportError
from cswap_deploy.images import load, normalise
from cswap_deploy.model import quiet
from cswap_deploy.preprocess import INPUT, OUTPUT, preprocess
from cswap_deploy.prune.cut import restore
from cswap_deploy.recipe import OnnxSettings
from cswap_deploy.runtime import Session
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LIBRARIES = ("torch", "timm", "numpy", "pillow", "onnx", "onnxscript", "onnxruntime")
MAX_IR = 10
"""Highest IR version that ONNX Runtime 1.18 and the mobile runtimes of its time read."""
PARITY_IMAGES = 16
TOLERANCE = 1e-3
"""Largest difference from PyTorch, relative to the largest logit; the worst seen on sound fp32 exports is 1e-4."""
MAX_SQNR = 200.0
"""What is reported where no difference is left."""
VECTORS = 4
"""Images in the bundle's test vectors."""
SIMPLIFY = """
import sys, onnx, onnxsim
model, ok = onnxsim.simplify(onnx.load(sys.argv[1]))
onnx.save(model, sys.argv[2])
"""
SIMPLIFY_SECONDS: float = 300
PRODUCER = "cswap-deploy"


@stage("exported", returns=OnnxModel, libraries=LIBRARIES)
def to_onnx(
    out: Path, network: Network, labels: tuple[str, ...], images: ImageSet, settings: OnnxSettings
) -> OnnxModel:
    """Export with torch's dynamo exporter; opset and IR version are asserted on the written file. Errors: ExportError."""
    model = _without_traces(_export(network, settings))
    _describe(model, network.input, labels)
    path = out / "model.onnx"
    _write(model, path)
    _require_written_as_asked(path, settings)
    return _checked(path, network, images, "")


@stage("simplified", returns=OnnxModel, libraries=(*LIBRARIES, "onnxsim"))
def simplify(out: Path, exported: OnnxModel, network: Network, images: ImageSet, settings: OnnxSettings) -> OnnxModel:
    """Fold constants and drop dead nodes with onnxsim, in a process of its own; its failure costs nothing but the folding."""
    import onnx

    path = out / "model.onnx"
    fault = _run_onnxsim(exported.graph.path, path)
    if fault is None:
        try:
            model = _without_traces(_load(path))
            _restore_metadata(model, onnx.load(exported.graph.path))
            _write(model, path)
            _require_written_as_asked(path, settings)
            return _checked(path, network, images, "")
        except ExportError as error:
            fault = error.message
    progress.warn(f"the graph is shipped unsimplified: {fault}")
    path.write_bytes(exported.graph.path.read_bytes())
    return _checked(path, network, images, f"not simplified: {fault}")


# --- export


def _export(network: Network, settings: OnnxSettings) -> onnx.ModelProto:
    import contextlib
    import io
    import logging

    import torch

    module = restore(network)
    batch = 2 if settings.dynamic_batch else 1
    example = torch.zeros(batch, *network.input.shape)
    shapes = ({0: torch.export.Dim("batch")},) if settings.dynamic_batch else None
    try:
        with contextlib.ExitStack() as silence, warnings.catch_warnings(), torch.no_grad():
            silence.enter_context(quiet("torch", logging.ERROR))
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=settings.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the user's forward makes it stumble over
        raise ExportError(
            f"PyTorch cannot export the network to ONNX: {reason(error.__cause__ or error)}",
            "the forward must not branch on the values of tensors",
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what the tools write about themselves: stack traces and paths of the build machine, lists of removed nodes."""
    import onnx

    for holder in _holders(model):
        del holder.metadata_props[:]
        holder.doc_string = ""
    keep = [entry for entry in model.opset_import if entry.domain in {"", *(node.domain for node in model.graph.node)}]
    own = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in keep]
    del model.opset_import[:]
    model.opset_import.extend(own)
    model.producer_name, model.producer_version = PRODUCER, ""
    return model


def _holders(model: onnx.ModelProto) -> Iterator[Any]:
    """Everything in a model that can carry metadata or a doc string."""
    yield from (model, *_inside(model.graph))
    for function in model.functions:
        yield from (function, *_nodes(function))


def _inside(graph: onnx.GraphProto) -> Iterator[Any]:
    yield from (graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *_nodes(graph))


def _nodes(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[Any]:
    """Nodes, and what lies in the graphs that branches and loops carry."""
    for node in body.node:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _inside(graph)


def _describe(model: onnx.ModelProto, spec: InputSpec, labels: tuple[str, ...]) -> None:
    """Labels and preprocessing in the file's metadata, one namespaced JSON key each."""
    for key, value in (("cswap.labels", list(labels)), ("cswap.preprocess", preprocess(spec))):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)


def _restore_metadata(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)


def _write(model: onnx.ModelProto, path: Path) -> None:
    import onnx

    if model.ir_version > MAX_IR:
        model.ir_version = MAX_IR
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {reason(error)}", "report this network") from error
    path.write_bytes(model.SerializeToString(deterministic=True))


def _require_written_as_asked(path: Path, settings: OnnxSettings) -> None:
    """The exporter may silently choose another opset than asked for: read the file."""
    import onnx

    model = onnx.load(path)
    opset = _opset(model)
    if opset != settings.opset:
        raise ExportError(
            f"the written file has opset {opset}, onnx.opset asks for {settings.opset}", f"set onnx.opset: {opset}"
        )
    foreign = sorted({entry.domain for entry in model.opset_import} - {"", "ai.onnx"})
    if foreign:
        raise ExportError(
            f"the written file needs operators of the domains {', '.join(foreign)}", "report this network"
        )
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    if bool(batch.dim_param) != settings.dynamic_batch:
        raise ExportError(
            "the written file's batch axis is not what onnx.dynamic_batch asks for", "report this network"
        )


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's DecodeError; its package is not ours to import
        raise ExportError(f"{path.name} is not an ONNX file", "report this network") from error


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


# --- simplification


def _run_onnxsim(source: Path, target: Path) -> str | None:
    """None, or why there is no simplified file. A process of its own: onnxsim has crashed and hung its callers."""
    command = [sys.executable, "-c", SIMPLIFY, str(source), str(target)]
    try:
        done = subprocess.run(
            command, cwd=target.parent, capture_output=True, timeout=SIMPLIFY_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"onnxsim did not end within {SIMPLIFY_SECONDS} s"
    if done.returncode < 0:
        return f"onnxsim was ended by signal {-done.returncode} ({signal.strsignal(-done.returncode)})"
    if done.returncode > 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"onnxsim failed with exit code {done.returncode}: {last}"
    return None if target.exists() else "onnxsim wrote no file"


# --- parity


def _checked(path: Path, network: Network, images: ImageSet, note: str) -> OnnxModel:
    """The written file with its parity, and test vectors beside it: preprocessed images and PyTorch's logits for them."""
    import numpy as np
    import onnx

    inputs, wanted = _reference(network, ImageSet(images.images[:PARITY_IMAGES], images.root))
    parity = _parity(Session(path).logits(inputs), wanted)
    np.save(path.with_name("input.npy"), inputs[:VECTORS])
    np.save(path.with_name("output.npy"), wanted[:VECTORS])
    vectors = TestVectors(File.of(path.with_name("input.npy")), File.of(path.with_name("output.npy")))
    model = onnx.load(path)
    return OnnxModel(File.of(path), _opset(model), model.ir_version, len(model.graph.node), parity, vectors, note)


def _reference(network: Network, images: ImageSet) -> tuple[Array, Array]:
    """Normalised images and PyTorch's logits for them."""
    import torch

    pixels, _ = load(images, network.input)
    inputs = normalise(pixels, network.input)
    with torch.no_grad():
        return inputs, restore(network)(torch.from_numpy(inputs.copy())).numpy()


def _parity(found: Array, wanted: Array) -> Parity:
    """Distance of the ONNX file's logits from PyTorch's. Errors: ExportError beyond TOLERANCE."""
    import numpy as np

    difference = found.astype(np.float64) - wanted.astype(np.float64)
    max_abs, largest = float(np.abs(difference).max()), float(np.abs(wanted).max())
    noise, signal = float((difference**2).mean()), float((wanted.astype(np.float64) ** 2).mean())
    sqnr = min(MAX_SQNR, 10 * float(np.log10(signal / noise))) if noise > 0 else MAX_SQNR
    if not np.isfinite(max_abs) or max_abs > TOLERANCE * max(largest, 1e-6):
        raise ExportError(
            f"the ONNX file differs from PyTorch by up to {max_abs:.2e} on {len(wanted)} images "
            f"(largest logit {largest:.2e}, SQNR {sqnr:.1f} dB)",
            "report this network; try another onnx.opset",
        )
    return Parity(len(wanted), max_abs, sqnr)
