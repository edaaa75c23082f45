"""The simplified graph in fewer bits: one more self-contained ONNX file per kind; inputs and outputs stay float32."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from cswap_deploy import onnx_file, progress
from cswap_deploy.artifacts import File, ImageSet, InputSpec, Network, OnnxModel, TestVectors
from cswap_deploy.checkpoint import reason
from cswap_deploy.errors import CswapError, ExportError
from cswap_deploy.images import batches, normalise
from cswap_deploy.model import quiet
from cswap_deploy.preprocess import INPUT
from cswap_deploy.recipe import OnnxSettings, Variant
from cswap_deploy.runtime import Session
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float32]

LIBRARIES = ("torch", "timm", "numpy", "pillow", "onnx", "onnxruntime", "onnxconverter-common")
CALIBRATION_IMAGES = 128
CALIBRATION_BATCH = 8
"""Images at a time where the file leaves the batch open."""
LARGEST_HALF = 65504.0
WEIGHTED = ("Conv", "Gemm", "MatMul")
TRANSFORMER = frozenset({"LayerNormalization", "Softmax"})
"""A graph with one of these is taken for a transformer: its activations have outliers that 8 bits flatten."""


@dataclass(frozen=True)
class Half:
    """Weights and activations in float16, but for the operators that onnxconverter-common knows to lack it."""


@dataclass(frozen=True)
class Int8:
    """Static quantisation in QDQ format, weights signed and per channel; `options` are those of `quantize_static`."""

    activations: Literal["QUInt8", "QInt8"]
    operators: tuple[str, ...] = ()
    """Operators that are quantised; empty: all that the quantizer knows."""
    options: Mapping[str, object] = field(default_factory=dict)
    note: str = ""


TENSORRT = (*WEIGHTED, "ConvTranspose", "Add")
KINDS: dict[Variant, Half | Int8] = {
    "fp16": Half(),
    "int8": Int8("QUInt8"),
    "int8-arm": Int8("QInt8"),
    "int8-tensorrt": Int8(
        "QInt8",
        operators=TENSORRT,
        options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": False,
            "OpTypesToExcludeOutputQuantization": list(TENSORRT),
        },
        note="weights are stored as float32, each behind QuantizeLinear: the engine holds them in 8 bits",
    ),
}
"""`int8` is U8S8, for phones and x86; `int8-arm` S8S8; `int8-tensorrt` S8S8 with zero point 0, as TensorRT reads it:
inputs of weighted layers and of residual additions, biases in float."""


@stage("variants", returns=OnnxModel, libraries=LIBRARIES)
def make(
    out: Path, model: OnnxModel, network: Network, images: ImageSet, kind: Variant, settings: OnnxSettings
) -> OnnxModel:
    """Convert `model`; `images` are the fit split: int8 ranges are the least and greatest value on the first of them.

    The parity is the distance from `network` in PyTorch on the first images; how much is too much, accuracy decides.
    Errors: ExportError that names the variant; also where logits, or activations in float16, leave the finite numbers.
    """
    with _named(kind), tempfile.TemporaryDirectory(dir=out) as scratch, _quiet_tools(Path(scratch)):
        original = onnx_file.read(model.graph.path)
        graph, note = _converted(original, network.input, images, kind, Path(scratch))
        _write(graph, original, out / "model.onnx", settings)
        inputs, wanted = onnx_file.reference(network, images)
        found = Session(out / "model.onnx").logits(inputs)
        _require_finite(found)
        return onnx_file.described(
            out / "model.onnx", onnx_file.parity(found, wanted), _copied(model.vectors, out), note
        )


def _converted(
    original: onnx.ModelProto, spec: InputSpec, images: ImageSet, kind: Variant, scratch: Path
) -> tuple[onnx.ModelProto, str]:
    """A new graph, and what about it is not as its name says."""
    match KINDS[kind]:
        case Half():
            return _half(original, spec, images, scratch), ""
        case Int8() as asked:
            operators, note = _operators(original, asked)
            return _int8(original, spec, images, asked, operators, scratch), note


# --- float16


def _half(original: onnx.ModelProto, spec: InputSpec, images: ImageSet, scratch: Path) -> onnx.ModelProto:
    """Weights beyond float16 become infinite, not clipped in silence as is the converter's default."""
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16  # type: ignore[import-untyped]

    onnx.save(original, scratch / "float32.onnx")
    _require_within_half(_ranges(scratch / "float32.onnx", _batches(original, spec, images)))
    copy = onnx.ModelProto()
    copy.CopyFrom(original)
    _name_nodes(copy)
    converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, max_finite_val=float("inf"))
    return converted


def _ranges(path: Path, inputs: Iterable[Array]) -> dict[str, float]:
    """Largest magnitude of each activation in a float32 graph."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    calibrator = create_calibrator(
        path, augmented_model_path=str(path.with_name("augmented.onnx")), calibrate_method=CalibrationMethod.MinMax
    )
    calibrator.collect_data(_Feed(inputs))
    found = calibrator.compute_data()
    return {name: max(abs(float(end.min())) for end in found[name].range_value) for name in found}


def _require_within_half(ranges: Mapping[str, float]) -> None:
    """ONNX Runtime computes float16 graphs in float32 on a CPU: what overflows on a device has to be looked for."""
    name, largest = max(ranges.items(), key=lambda item: (item[1], item[0]))
    if largest > LARGEST_HALF:
        raise ExportError(
            f"{name!r} reaches {largest:.3g} in float32, and float16 ends at {LARGEST_HALF:g}",
            "remove fp16 from variants; this network needs float32's range",
        )


def _name_nodes(model: onnx.ModelProto) -> None:
    """The converters tell nodes apart by their names, which ONNX leaves optional."""
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"


# --- int8


def _operators(original: onnx.ModelProto, asked: Int8) -> tuple[tuple[str, ...], str]:
    """What is quantised in this graph, and the remark about it."""
    outliers = sorted(TRANSFORMER & {node.op_type for node in original.graph.node})
    if not outliers:
        return asked.operators, asked.note
    remark = f"only {', '.join(WEIGHTED)} in 8 bits, since the graph has {' and '.join(outliers)}"
    return WEIGHTED, "; ".join(filter(None, (remark, asked.note)))


def _int8(
    original: onnx.ModelProto,
    spec: InputSpec,
    images: ImageSet,
    asked: Int8,
    operators: tuple[str, ...],
    scratch: Path,
) -> onnx.ModelProto:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static

    source, prepared, target = (scratch / f"{name}.onnx" for name in ("float32", "prepared", "int8"))
    onnx.save(original, source)
    # The exporter has written all shapes; symbolic inference would only add sympy and its failures.
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    _name_nodes(model)
    onnx.save(model, prepared)
    quantize_static(
        prepared,
        target,
        _Feed(_batches(original, spec, images)),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(operators),
        per_channel=True,
        activation_type=QuantType[asked.activations],
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options=dict(asked.options),
    )
    return onnx.load(target)


class _Feed:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, inputs: Iterable[Array]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, Array] | None:
        return next(({INPUT: batch} for batch in self._inputs), None)


def _batches(original: onnx.ModelProto, spec: InputSpec, images: ImageSet) -> Iterator[Array]:
    """Calibration images, normalised, as many at a time as the graph takes."""
    chosen = ImageSet(images.images[:CALIBRATION_IMAGES], images.root)
    fixed = original.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    done = 0
    for pixels, _ in batches(chosen, spec, fixed or CALIBRATION_BATCH):
        yield normalise(pixels, spec)
        done += len(pixels)
        progress.advance("calibration images", done, len(chosen.images))


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

    return TestVectors(copy(vectors.input), copy(vectors.output))


# --- tools of others


@contextmanager
def _named(kind: Variant) -> Iterator[None]:
    """What fails inside fails with the variant's name; faults of images and disks keep their own."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"variant {kind}: {error.message}", error.hint) from error
    except (CswapError, OSError):
        raise
    except Exception as error:  # the converters raise whatever a graph makes them stumble over
        raise ExportError(
            f"variant {kind}: the conversion failed: {reason(error)}",
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
