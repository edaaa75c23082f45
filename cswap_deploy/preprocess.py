"""The preprocessing as data: what preprocess.json and the ONNX file's metadata say to those who feed the model."""

from __future__ import annotations

from typing import Any

from cswap_deploy.artifacts import InputSpec

INPUT, OUTPUT = "input", "logits"
"""Names of the graph's input and output."""


def preprocess(spec: InputSpec) -> dict[str, Any]:
    """Plain JSON data; the keys are part of what users rely on."""
    return {
        "input": INPUT,
        "output": OUTPUT,
        "layout": "NCHW",
        "color": "RGB" if spec.shape[0] == 3 else "L",
        "dtype": "float32",
        "shape": list(spec.shape),
        "resize": {"mode": spec.crop_mode, "interpolation": spec.interpolation, "crop_pct": spec.crop_pct},
        "scale": 1 / 255,
        "mean": list(spec.mean[: spec.shape[0]]),
        "std": list(spec.std[: spec.shape[0]]),
        "formula": "(pixel * scale - mean) / std",
    }
