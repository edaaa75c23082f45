"""The simplified graph in fewer bits, or in another form: one more self-contained file per kind."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cswap_deploy import choice, image_input, onnx_file, ort_format, progress
from cswap_deploy.artifacts import File, ImageSet, Network, OnnxModel, Quantised, TestVectors
from cswap_deploy.choice import Judged
from cswap_deploy.errors import CswapError, ExportError, reason
from cswap_deploy.half import to_half
from cswap_deploy.images import batches, load, normalise
from cswap_deploy.int8 import KINDS, WEIGHTED, Quantiser, Way
from cswap_deploy.model import quiet
from cswap_deploy.recipe import Int8Settings, OnnxSettings, Variant
from cswap_deploy.runtime import Session, without_folders
from cswap_deploy.stage import stage
from cswap_deploy.vectors import softmax

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float32]

LIBRARIES = ("torch", "timm", "numpy", "pillow", "onnx", "onnxruntime", "onnxconverter-common")
SELECTION_IMAGES = 1024
"""Of the selection images that int8 files are chosen on, at most."""


@stage("variants", returns=OnnxModel, libraries=LIBRARIES)
def make(
    out: Path,
    model: OnnxModel,
    network: Network,
    fit: ImageSet,
    selection: ImageSet,
    kind: Variant,
    settings: OnnxSettings,
    int8: Int8Settings,
) -> OnnxModel:
    """Convert `model`: int8 ranges come from `fit`, method and nodes in float are chosen on `selection` (choice.py).

    The parity is the distance from `network` in PyTorch on the first images; how much is too much, accuracy decides.
    Errors: ExportError that names the variant; also where logits, or activations in float16, leave the finite numbers.
    """
    with _named(kind), tempfile.TemporaryDirectory(dir=out) as scratch, _quiet_tools(Path(scratch)):
        original = onnx_file.read(model.graph.path)
        _require_small(original)
        if kind == "fp16":
            inputs = _batches(original, network, _first(fit, int8.images))
            graph, note, quantised = to_half(original, inputs, Path(scratch)), "", None
        else:
            graph, note, quantised = _int8(original, network, fit, selection, kind, int8, Path(scratch))
        _write(graph, original, out / "model.onnx", settings)
        found = _checked(out / "model.onnx", network, fit, model.vectors, note)
        return replace(found, quantised=quantised)


@stage("variants", returns=OnnxModel, libraries=LIBRARIES)
def to_ort(out: Path, model: OnnxModel, network: Network, images: ImageSet) -> OnnxModel:
    """The same file in ORT format, with the list of operators that a minimal build of ONNX Runtime needs for it."""
    with _named("ort"), tempfile.TemporaryDirectory(dir=out) as scratch, _quiet_tools(Path(scratch)):
        _require_small(onnx_file.read(model.graph.path))
        ort_format.convert(model.graph.path, out, Path(scratch))
        inputs, wanted = onnx_file.reference(network, images)
        found = onnx_file.parity(Session(out / ort_format.MODEL).logits(inputs), wanted)
        return replace(
            model,
            graph=File.of(out / ort_format.MODEL),
            parity=found,
            vectors=_copied(model.vectors, out),
            beside=(File.of(out / ort_format.OPERATORS),),
        )


@stage("variants", returns=OnnxModel, libraries=LIBRARIES)
def with_image_input(
    out: Path, model: OnnxModel, network: Network, images: ImageSet, settings: OnnxSettings
) -> OnnxModel:
    """The same file with the preprocessing inside: pixels in, probabilities out; its parity is that of probabilities."""
    with _named("image"):
        original = onnx_file.read(model.graph.path)
        _require_small(original)
        graph = image_input.wrapped(original, network.input)
        onnx_file.write(graph, out / "model.onnx", "the graph with its preprocessing")
        onnx_file.require_as_asked(out / "model.onnx", settings)
        chosen = ImageSet(images.images[: onnx_file.PARITY_IMAGES], images.root)
        pixels, _ = load(chosen, network.input)
        _, wanted = onnx_file.reference(network, images)
        found = Session(out / "model.onnx").run(pixels.transpose(0, 2, 3, 1))
        parity = onnx_file.parity(found, softmax(wanted))
        made = onnx_file.described(out / "model.onnx", parity, _copied(model.vectors, out), model.note)
        return replace(made, quantised=model.quantised)


# --- int8


def _int8(
    original: onnx.ModelProto,
    network: Network,
    fit: ImageSet,
    selection: ImageSet,
    kind: Variant,
    settings: Int8Settings,
    scratch: Path,
) -> tuple[onnx.ModelProto, str, Quantised]:
    """The chosen graph, what about it is not as its name says, and how it was chosen."""
    asked, ranged = KINDS[kind], _first(fit, settings.images)
    quantiser = Quantiser(original, asked, lambda: _batches(original, network, ranged), scratch)
    seen = _first(selection, SELECTION_IMAGES)
    judge = _judge(original, quantiser, network, seen, scratch)
    chosen = choice.choose(quantiser.nodes, judge, settings)
    best = chosen.best
    quantised = Quantised(
        best.way.method, best.way.in_float, len(quantiser.nodes), len(seen.images), best.drop_pp, best.divergence,
        chosen.tried, chosen.met,
    )  # fmt: skip
    return quantiser.graph(best.way), _note(quantiser, best.way, asked.note), quantised


def _judge(
    original: onnx.ModelProto, quantiser: Quantiser, network: Network, selection: ImageSet, scratch: Path
) -> Callable[[Way, int | None], Judged]:
    """What a way loses on the selection images, or on the first so many, against the float32 graph."""
    import onnx

    pixels, labels = load(selection, network.input)
    inputs = normalise(pixels, network.input)
    onnx.save(original, scratch / "original.onnx")
    wanted = Session(scratch / "original.onnx").logits(inputs)

    def judge(way: Way, images: int | None = None) -> Judged:
        onnx.save(quantiser.graph(way), scratch / "tried.onnx")
        found = Session(scratch / "tried.onnx").logits(inputs[:images])
        return choice.judged(way, found, wanted[:images], labels[:images].tolist())

    return judge


def _note(quantiser: Quantiser, way: Way, own: str) -> str:
    remarks = []
    if way.method == "weights":
        return "only weights are in 8 bits, activations in float32: the file is smaller, not faster"
    if quantiser.outliers:
        remarks.append(f"only {', '.join(WEIGHTED)} in 8 bits, since the graph has {' and '.join(quantiser.outliers)}")
    if way.in_float:
        remarks.append(f"in float: {', '.join(way.in_float)}")
    return "; ".join(filter(None, (*remarks, own)))


def _first(images: ImageSet, count: int) -> ImageSet:
    return ImageSet(images.images[:count], images.root)


def _batches(original: onnx.ModelProto, network: Network, images: ImageSet) -> Iterator[Array]:
    """Calibration images, normalised, as many at a time as the graph takes; one where its batch is open.

    ONNX Runtime stacks the activations of a call for its histograms, and cannot where the last batch is shorter than the others.
    """
    fixed = original.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    done = 0
    for pixels, _ in batches(images, network.input, fixed or 1):
        yield normalise(pixels, network.input)
        done += len(pixels)
        progress.advance("calibration images", done, len(images.images))


# --- the written file


def _write(graph: onnx.ModelProto, original: onnx.ModelProto, path: Path, settings: OnnxSettings) -> None:
    onnx_file.without_traces(graph)
    onnx_file.restore_metadata(graph, original)
    graph.ir_version = original.ir_version
    for which in ("input", "output"):
        found, wanted = ([(value.name, value.type) for value in getattr(m.graph, which)] for m in (graph, original))
        if found != wanted:
            raise ExportError(f"the conversion changed the graph's {which}", "report this network")
    onnx_file.write(graph, path, "the converted graph")
    onnx_file.require_as_asked(path, settings)


def _checked(path: Path, network: Network, images: ImageSet, vectors: TestVectors, note: str) -> OnnxModel:
    inputs, wanted = onnx_file.reference(network, images)
    found = Session(path).logits(inputs)
    _require_finite(found)
    return onnx_file.described(path, onnx_file.parity(found, wanted), _copied(vectors, path.parent), note)


def _require_small(original: onnx.ModelProto) -> None:
    """The converters hold a model in one message."""
    if onnx_file.is_large(original):
        raise ExportError(
            "the model is beyond 2 GB, which the converters do not take", "remove it: model.onnx alone is made of it"
        )


def _require_finite(logits: Array) -> None:
    import numpy as np

    lost = int((~np.isfinite(logits)).any(axis=1).sum())
    if lost:
        raise ExportError(
            f"the logits of {lost} of {len(logits)} images are NaN or infinite",
            "remove it from variants; this network's numbers do not fit into it",
        )


def _copied(vectors: TestVectors, out: Path) -> TestVectors:
    def copy(file: File) -> File:
        return File.of(Path(shutil.copyfile(file.path, out / file.path.name)))

    return TestVectors(
        copy(vectors.input), copy(vectors.output), copy(vectors.pixels), tuple(map(copy, vectors.pictures))
    )


# --- tools of others


@contextmanager
def _named(kind: str) -> Iterator[None]:
    """What fails inside fails with the variant's name; faults of images and disks keep their own."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"variant {kind}: {without_folders(error.message)}", error.hint) from error
    except (CswapError, OSError):
        raise
    except Exception as error:  # the converters raise whatever a graph makes them stumble over
        raise ExportError(
            f"variant {kind}: the conversion failed: {without_folders(reason(error))}",
            f"remove {kind} from variants, or report this network",
        ) from error


@contextmanager
def _quiet_tools(scratch: Path) -> Iterator[None]:
    """The converters keep their warnings to themselves and their temporary files under `scratch`.

    stdout and stderr stay as they are: whoever waits sees the calibration advance.
    """
    import onnxruntime

    with ExitStack() as undo:
        silent = logging.NullHandler()  # without a handler, logging.warning would install one for good
        logging.getLogger().addHandler(silent)
        undo.callback(logging.getLogger().removeHandler, silent)
        undo.enter_context(quiet("", logging.ERROR))
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        undo.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = str(scratch)
        undo.callback(onnxruntime.set_default_logger_severity, 2)
        onnxruntime.set_default_logger_severity(3)
        yield
