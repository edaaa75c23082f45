"""Module → one self-contained ONNX file → simplified; both compared with PyTorch on real images."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy import int8, onnx_file, progress, repeats
from cswap_deploy.artifacts import File, Groups, ImageSet, InputSpec, Network, OnnxModel, TestVectors
from cswap_deploy.attention import exportable
from cswap_deploy.budget import sizes
from cswap_deploy.budget.narrow import Template, require_runnable
from cswap_deploy.budget.sizes import Numbers, Sizes
from cswap_deploy.errors import ExportError, reason
from cswap_deploy.images import decoded, load
from cswap_deploy.model import quiet
from cswap_deploy.preprocess import INPUT, LABELS_KEY, OUTPUT, PREPROCESS_KEY, preprocess
from cswap_deploy.prune.cut import cut_copy, restore
from cswap_deploy.recipe import OnnxSettings
from cswap_deploy.runtime import Session, without_folders
from cswap_deploy.stage import disk_fault, stage

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray
    from torch import nn

    Array = NDArray[np.float32]

LIBRARIES = ("torch", "timm", "numpy", "pillow", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
TOLERANCE = 1e-3
"""Largest difference from PyTorch, relative to the largest logit; the worst seen on sound fp32 exports is 1e-4."""
VECTORS = 4
"""Images in the bundle's test vectors."""
LARGEST_PICTURE = 4_000_000
"""Pixels of a picture that the test vectors hold."""
SIMPLIFY = """
import ctypes, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: whoever is killed leaves nobody behind to write into his folder
class WithoutTorch:  # onnxsim imports it, for seconds, for what is not asked for here
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, WithoutTorch)
import onnx, onnxsim
model, ok = onnxsim.simplify(onnx.load(sys.argv[1]))
onnx.save(model, sys.argv[2])
"""
SIMPLIFY_SECONDS: float = 300
BUSY = "; a machine that is busy or short of memory may be why: --force simplified tries again"
"""Where the graph may not be at fault. The result is kept all the same: a machine that is always too small must get its bundle."""


@stage("exported", returns=OnnxModel, libraries=LIBRARIES)
def to_onnx(
    out: Path, network: Network, labels: tuple[str, ...], images: ImageSet, settings: OnnxSettings
) -> OnnxModel:
    """Export with torch's dynamo exporter; opset and IR version are asserted on the written file. Errors: ExportError."""
    model = onnx_file.without_traces(_export(restore(network), network.input, settings))
    _describe(model, network.input, labels)
    model.ir_version = min(model.ir_version, settings.ir_version)
    path = out / "model.onnx"
    onnx_file.write(model, path)
    onnx_file.require_as_asked(path, settings)
    return _checked(path, network, images, "")


@stage("simplified", returns=OnnxModel, libraries=(*LIBRARIES, "onnxsim"))
def simplify(out: Path, exported: OnnxModel, network: Network, images: ImageSet, settings: OnnxSettings) -> OnnxModel:
    """Fold constants and drop dead nodes with onnxsim, in a process of its own; its failure costs nothing but the folding."""
    import onnx

    path = out / "model.onnx"
    fault = _run_onnxsim(exported.graph.path, path)
    if fault is None:
        try:
            model = onnx_file.without_traces(onnx_file.read(path))
            original = onnx.load(exported.graph.path, load_external_data=False)
            onnx_file.restore_metadata(model, original)
            repeats.shorten(model)
            model.ir_version = min(model.ir_version, original.ir_version)
            onnx_file.write(model, path)
            onnx_file.require_as_asked(path, settings)
            return _checked(path, network, images, "")
        except ExportError as error:
            fault = without_folders(error.message)
    progress.warn(f"the graph is shipped unsimplified: {fault}")
    for file in (exported.graph, *exported.beside):
        shutil.copyfile(file.path, out / file.path.name)
    return _checked(path, network, images, f"not simplified: {fault}")


@stage("sizes", returns=Sizes, libraries=(*LIBRARIES, "onnxsim"))
def sizes_of(
    out: Path, network: Network, groups: Groups, dense: OnnxModel, settings: OnnxSettings, quantised: bool
) -> Sizes:
    """How the numbers in the dense network's file follow widths, from exports of narrower ones; tried on widths beside theirs.

    `dense`: its float32 file; `quantised`: of the graph that ONNX Runtime's quantiser makes of it. Errors: ExportError.
    """
    import onnx

    if dense.beside:
        raise ExportError("the model is beyond 2 GB, so that no latency can be asked for", sizes.HINT)
    wanted = sizes.settings(groups)
    if not any(wanted):
        return Sizes(())

    module, narrower = restore(network), list[tuple[dict[str, int], Numbers]]()
    with tempfile.TemporaryDirectory(dir=out) as folder:

        def seen(path: Path) -> onnx.ModelProto:
            model = onnx.load(path)
            if not dense.note:
                repeats.shorten(model)
            return int8.prepared(model, Path(folder) / "prepared.onnx") if quantised else model

        path, simpler = Path(folder) / "narrower.onnx", Path(folder) / "simplified.onnx"
        for number, widths in enumerate(wanted):
            progress.advance("narrower networks exported", number, len(wanted))
            smaller = cut_copy(module, groups.groups, {name: tuple(range(width)) for name, width in widths.items()})
            onnx.save(_export(smaller, network.input, settings), path)
            if not dense.note and (fault := _run_onnxsim(path, simpler)):
                raise ExportError(f"a narrower network cannot be simplified as the dense one was: {fault}", sizes.HINT)
            narrower.append((widths, Numbers.of(seen(path if dense.note else simpler))))
        whole = seen(dense.graph.path)
        found = sizes.learned(groups, Numbers.of(whole), narrower)
        onnx.save(whole, Path(folder) / "dense.onnx")
        template = Template.read(Path(folder) / "dense.onnx", groups, found)
        shared, widths = template.shared(Path(folder)), sizes.another(groups, wanted)
        path.write_bytes(template.narrowed(widths, shared))
        require_runnable(path)
        if gone := {group.name: 0 for group in groups.groups if group.branch}:
            try:
                path.write_bytes(template.narrowed({**widths, **gone}, shared))
                require_runnable(path)
            except ExportError as error:
                progress.warn(
                    f"no branch leaves whole, since latencies of such networks cannot be measured: {error.message}"
                )
                return replace(found, branches=False)
        return found


# --- export


def _export(module: nn.Module, spec: InputSpec, settings: OnnxSettings) -> onnx.ModelProto:
    import contextlib
    import io
    import logging

    import torch

    batch = 2 if settings.dynamic_batch else 1
    example = torch.zeros(batch, *spec.shape)
    shapes = ({0: torch.export.Dim("batch")},) if settings.dynamic_batch else None
    try:
        with contextlib.ExitStack() as silence, warnings.catch_warnings(), torch.no_grad(), exportable():
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
            f"PyTorch cannot export the network to ONNX: {without_folders(reason(error.__cause__ or error))}",
            "the forward must not branch on the values of tensors",
        ) from error
    assert program is not None
    _list_constants(program.model.graph)
    model: onnx.ModelProto = program.model_proto
    return model


def _list_constants(graph: ir.Graph) -> None:
    """Constants that nodes read and the graph does not list: of several that a rewriting names alike, it lists the last alone."""
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.const_value is not None and not (value.producer() or value.is_initializer()):
                graph.register_initializer(value)


def _describe(model: onnx.ModelProto, spec: InputSpec, labels: tuple[str, ...]) -> None:
    """Labels and preprocessing in the file's metadata, one namespaced JSON key each."""
    for key, value in ((LABELS_KEY, list(labels)), (PREPROCESS_KEY, preprocess(spec))):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)


# --- simplification


def _run_onnxsim(source: Path, target: Path) -> str | None:
    """None, or why there is no simplified file. A process of its own: onnxsim has crashed and hung its callers.

    Errors: OSError where the disk is full.
    """
    command = [sys.executable, "-c", SIMPLIFY, str(source), str(target)]
    try:
        done = subprocess.run(
            command, cwd=target.parent, capture_output=True, timeout=SIMPLIFY_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"onnxsim did not end within {SIMPLIFY_SECONDS} s{BUSY}"
    if done.returncode < 0:
        ended = f"onnxsim was ended by signal {-done.returncode} ({signal.strsignal(-done.returncode)})"
        return ended + (BUSY if done.returncode == -signal.SIGKILL else "")
    if done.returncode > 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if fault := disk_fault(last):
            raise OSError(fault)  # not the graph's fault: it must not ship unsimplified for that
        return f"onnxsim failed with exit code {done.returncode}: {without_folders(last)}"
    return None if target.exists() else "onnxsim wrote no file"


# --- parity


def _checked(path: Path, network: Network, images: ImageSet, note: str) -> OnnxModel:
    """The written file with its parity, and test vectors beside it: preprocessed images and PyTorch's logits for them.

    Errors: ExportError where its logits are further than TOLERANCE from PyTorch's.
    """
    import numpy as np

    inputs, wanted = onnx_file.reference(network, images)
    found = onnx_file.parity(Session(path).logits(inputs), wanted)
    largest = float(np.abs(wanted).max())
    if not np.isfinite(found.max_abs) or found.max_abs > TOLERANCE * max(largest, 1e-6):
        raise ExportError(
            f"the ONNX file differs from PyTorch by up to {found.max_abs:.2e} on {found.images} images "
            f"(largest logit {largest:.2e}, SQNR {found.sqnr_db:.1f} dB)",
            "report this network; try another onnx.opset",
        )
    vectors = _vectors(path.parent, network.input, images, inputs[:VECTORS], wanted[:VECTORS])
    return onnx_file.described(path, found, vectors, note)


def _vectors(folder: Path, spec: InputSpec, images: ImageSet, inputs: Array, wanted: Array) -> TestVectors:
    """Test vectors with the pictures that they come from, decoded, upright, without metadata; huge pictures are left out."""
    import numpy as np
    from PIL import Image

    first = ImageSet(images.images[:VECTORS], images.root)
    pixels, _ = load(first, spec)
    shown = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    for name, array in (("input", inputs), ("output", wanted), ("pixels", shown)):
        np.save(folder / f"{name}.npy", array)
    pictures = []
    for number, image in enumerate(first.images):
        picture = np.asarray(decoded(images.root, image, spec.shape[0]))
        if picture.shape[0] * picture.shape[1] <= LARGEST_PICTURE:
            Image.fromarray(picture).save(folder / f"image_{number}.png")
            pictures.append(File.of(folder / f"image_{number}.png"))
    written = {name: File.of(folder / f"{name}.npy") for name in ("input", "output", "pixels")}
    return TestVectors(**written, pictures=tuple(pictures))
