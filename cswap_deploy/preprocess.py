"""The preprocessing as data: what preprocess.json and the ONNX file's metadata say to those who feed the model."""

from __future__ import annotations

from math import floor
from typing import Any

from cswap_deploy.artifacts import InputSpec
from cswap_deploy.images import fill

INPUT, OUTPUT = "input", "logits"
"""Names of the graph's input and output."""
IMAGE, PROBABILITIES = "image", "probabilities"
"""Names where the preprocessing is inside."""
LABELS_KEY, PREPROCESS_KEY = "cswap.labels", "cswap.preprocess"
"""Keys of the file's metadata; both values are JSON."""
RULES = {"center": "shortest", "squash": "exact", "border": "longest"}
"""What a crop mode does to a picture's sides."""


def preprocess(spec: InputSpec) -> dict[str, Any]:
    """Plain JSON data; the keys are part of what users rely on."""
    return {
        "input": INPUT,
        "output": OUTPUT,
        "layout": "NCHW",
        "color": _color(spec),
        "dtype": "float32",
        "shape": list(spec.shape),
        "resize": _resize(spec),
        "scale": 1 / 255,
        "mean": list(spec.mean[: spec.shape[0]]),
        "std": list(spec.std[: spec.shape[0]]),
        "formula": "(pixel * scale - mean) / std",
    }


def preprocess_inside(spec: InputSpec) -> dict[str, Any]:
    """The same for the file that takes pixels: nothing but the resize and the crop is left to do."""
    channels, height, width = spec.shape
    return {
        "input": IMAGE,
        "output": PROBABILITIES,
        "layout": "NHWC",
        "color": _color(spec),
        "dtype": "uint8",
        "shape": [height, width, channels],
        "resize": _resize(spec),
        "formula": "pixel",
    }


def _resize(spec: InputSpec) -> dict[str, Any]:
    """`to`: height and width; of `shortest`, the shorter side becomes that of `to`, the other one follows; of `longest` the
    longer one. `fill`: the colour beyond the picture's edge.

    `antialias`: the filter widens with the reduction, as Pillow's does; bilinear filters of phones do not.
    """
    height, width = (floor(side / spec.crop_pct) for side in spec.shape[1:])
    return {
        "mode": spec.crop_mode,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "rule": RULES[spec.crop_mode],
        "to": [height, width],
        "antialias": spec.interpolation != "nearest",
        "crop": list(spec.shape[1:]),
        "fill": list(fill(spec)) if spec.crop_mode == "border" else [0, 0, 0],
    }


def _color(spec: InputSpec) -> str:
    return "RGB" if spec.shape[0] == 3 else "L"
