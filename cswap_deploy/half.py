"""A float32 graph in float16: weights and activations, but for the operators that lack it; ends stay float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy import onnx_file
from cswap_deploy.errors import ExportError
from cswap_deploy.onnx_file import Feed

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LARGEST = 65504.0


def to_half(original: onnx.ModelProto, inputs: Iterable[Array], scratch: Path) -> onnx.ModelProto:
    """Weights beyond float16 become infinite, not clipped in silence as is the converter's default.

    Errors: ExportError where a float32 activation on `inputs` lies beyond float16.
    """
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16  # type: ignore[import-untyped]

    onnx.save(original, scratch / "float32.onnx")
    _require_within(_ranges(scratch / "float32.onnx", inputs))
    copy = onnx.ModelProto()
    copy.CopyFrom(original)
    onnx_file.name_nodes(copy)
    converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, max_finite_val=float("inf"))
    return converted


def _ranges(path: Path, inputs: Iterable[Array]) -> dict[str, float]:
    """Largest magnitude of each activation in a float32 graph."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    calibrator = create_calibrator(
        path,
        augmented_model_path=str(path.with_name("augmented.onnx")),
        calibrate_method=CalibrationMethod.MinMax,
    )
    calibrator.collect_data(Feed(inputs))
    found = calibrator.compute_data()
    return {name: max(abs(float(end.min())) for end in found[name].range_value) for name in found}


def _require_within(ranges: Mapping[str, float]) -> None:
    """ONNX Runtime computes float16 graphs in float32 on a CPU: what overflows on a device has to be looked for."""
    name, largest = max(ranges.items(), key=lambda item: (item[1], item[0]))
    if largest > LARGEST:
        raise ExportError(
            f"{name!r} reaches {largest:.3g} in float32, and float16 ends at {LARGEST:g}",
            "remove fp16 from variants; this network needs float32's range",
        )
