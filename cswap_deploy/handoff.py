"""What goes to a phone team beside the models: labels, preprocessing, test vectors with tolerances, as data for any language."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import AccuracyReport, File, InputSpec, OnnxModel, TestVectors
from cswap_deploy.errors import DataError, UsageError
from cswap_deploy.preprocess import IMAGE, INPUT, OUTPUT, PROBABILITIES, preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILES = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "int8": "model.int8.onnx",
    "int8-tensorrt": "model.int8.tensorrt.onnx",
    "int8-arm": "model.int8.arm.onnx",
    "ort": "model.ort",
    "image": "model.image.onnx",
}
"""The bundle's file of each ONNX model."""
VECTORS = "test_vectors"
SCHEMA = "cswap-deploy/test-vectors/1"
TOLERANCE = 1e-3
"""Largest difference from PyTorch, relative to the largest logit: the export's own limit."""
VARIANT_MARGIN = 1.5
"""A variant's test vectors may differ by this much more than the 16 images did at build; other CPUs round otherwise."""


def copies(models: Mapping[str, OnnxModel], vectors: TestVectors) -> dict[str, File]:
    """Files of the bundle that are copied as they are."""
    found = {FILES[name]: model.graph for name, model in models.items()}
    found |= {file.path.name: file for model in models.values() for file in model.beside}
    arrays = {"input": vectors.input, "output": vectors.output, "pixels": vectors.pixels}
    found |= {f"{VECTORS}/{name}.npy": file for name, file in arrays.items()}
    return found | {f"{VECTORS}/{file.path.name}": file for file in vectors.pictures}


def write(folder: Path, models: Mapping[str, OnnxModel], labels: tuple[str, ...], spec: InputSpec) -> None:
    """labels.txt, preprocess.json and test_vectors/expected.json; the vectors' arrays are there already. Errors: DataError."""
    (folder / "labels.txt").write_text(one_a_line(labels), encoding="utf-8")
    _write_json(folder / "preprocess.json", preprocess(spec))
    _write_json(folder / VECTORS / "expected.json", _expected(folder / VECTORS, models, labels))


def tolerance(largest: float, recorded: float | None) -> float:
    """How far test vectors may differ; `recorded`: a variant's difference from PyTorch when it was built."""
    return TOLERANCE * max(largest, 1e-6) + VARIANT_MARGIN * (recorded or 0.0)


def one_a_line(labels: tuple[str, ...]) -> str:
    """Text in which line i names output i for every reader. Errors: DataError."""
    for label in labels:
        if label.splitlines() != [label]:
            raise DataError(
                f"class name {label!r} holds a line break, so labels.txt could not give one line to each output",
                "rename the class folder, or correct the file of calibration.labels",
            )
    return "".join(f"{label}\n" for label in labels)


def creation_date(report: AccuracyReport) -> str:
    """ISO 8601, UTC: SOURCE_DATE_EPOCH where it is set, else when the models were judged, so that a bundle can be made again.

    Errors: UsageError for a SOURCE_DATE_EPOCH that is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return report.at
    if not (epoch.isascii() and epoch.isdigit() and len(epoch) < 12):
        raise UsageError(f"SOURCE_DATE_EPOCH is {epoch!r}, expected whole seconds since 1970", "correct or unset it")
    return datetime.fromtimestamp(int(epoch), timezone.utc).isoformat(timespec="seconds")


def _expected(folder: Path, models: Mapping[str, OnnxModel], labels: tuple[str, ...]) -> dict[str, Any]:
    """What each file of the bundle must give for each test image; arrays by name, with where their data begins."""
    import numpy as np

    logits = np.load(folder / "output.npy", allow_pickle=False)
    pictures = {path.name for path in folder.glob("image_*.png")}
    names = [f"image_{number}.png" for number in range(len(logits))]
    return {
        "schema": SCHEMA,
        "images": [
            {"picture": name if name in pictures else None, "top1": int(best), "label": labels[int(best)]}
            for name, best in zip(names, logits.argmax(1), strict=True)
        ],
        "arrays": {name: _array(folder / f"{name}.npy") for name in ("pixels", "input", "output")},
        "files": {FILES[name]: _ends(name, model, float(np.abs(logits).max())) for name, model in models.items()},
    }


def _array(path: Path) -> dict[str, Any]:
    """`offset`: bytes before the data, which are little-endian, row by row, without gaps."""
    import numpy as np

    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return {
        "file": path.name,
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "offset": path.stat().st_size - array.nbytes,
    }


def _ends(name: str, model: OnnxModel, largest: float) -> dict[str, Any]:
    """`expects`: the array that its output is compared with; probabilities are the softmax of `output`."""
    inside = name == "image"
    return {
        "input": {"name": IMAGE if inside else INPUT, "array": "pixels" if inside else "input"},
        "output": {"name": PROBABILITIES if inside else OUTPUT, "expects": "softmax(output)" if inside else "output"},
        "tolerance": tolerance(1.0 if inside else largest, None if name == "fp32" else model.parity.max_abs),
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
