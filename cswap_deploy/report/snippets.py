"""What the code in a bundle's README needs to be about this very model: names, shapes, preprocessing as literals."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

Facts = dict[str, Any]
PURPOSES = {
    "fp16": "half the size; GPUs and NPUs that compute in float16",
    "int8": "x86 with VNNI, Qualcomm (QNN)",
    "int8-arm": "ARM CPUs",
    "int8-tensorrt": "TensorRT",
    "ort": "minimal builds of ONNX Runtime",
    "image": "apps that feed pixels: `image` uint8 (1, H, W, C) in, `probabilities` out",
}
RULES = {
    "center": "shorter side first, then the centre",
    "squash": "straight to its size",
    "border": "longer side first, then borders of the mean colour",
}
ANDROID = "1.24.3"
"""Version of onnxruntime-android in the README; it reads IR version 13 and opset 25."""


@dataclass(frozen=True)
class Snippet:
    """Literals of the README's code; `python_resize` are whole lines."""

    color: str
    classes: int | str
    pictures: int
    mean: list[float]
    std: list[float]
    rule: str
    python_resize: str
    purposes: dict[str, str]
    android: str = ANDROID

    @property
    def mean_kotlin(self) -> str:
        return ", ".join(f"{value}f" for value in self.mean)

    @property
    def std_kotlin(self) -> str:
        return ", ".join(f"{value}f" for value in self.std)

    @staticmethod
    def of(manifest: Facts) -> Snippet:
        """What the code in README needs to know of the model that ships."""
        spec = manifest["model"]["input"]
        channels = spec["shape"][0]
        pictures = [file for file in manifest.get("files", ()) if file["path"].startswith("test_vectors/image_")]
        return Snippet(
            color="RGB" if channels == 3 else "L",
            classes=manifest["model"].get("outputs", "classes"),
            pictures=len(pictures),
            mean=spec["mean"][:channels],
            std=spec["std"][:channels],
            rule=RULES[spec.get("crop_mode", "center")],
            python_resize=_python_resize(spec),
            purposes=PURPOSES,
        )


def _python_resize(spec: Facts) -> str:
    """Lines that resize and crop `image`, as images.transform does."""
    _, height, width = spec["shape"]
    high, wide = (floor(side / spec["crop_pct"]) for side in (height, width))
    method = f"Image.Resampling.{spec['interpolation'].upper()}"
    mode = spec.get("crop_mode", "center")
    if mode == "squash":
        return f"    image = image.resize(({wide}, {high}), {method})"
    if mode == "border":
        fill = tuple(round(255 * value) for value in spec["mean"][: spec["shape"][0]])
        lines = [
            f"ratio = max(image.height / {high}, image.width / {wide})",
            f"small = image.resize((round(image.width / ratio), round(image.height / ratio)), {method})",
            f"image = Image.new(image.mode, ({width}, {height}), {fill if len(fill) > 1 else fill[0]})",
            "spare = [want - have for want, have in zip(image.size, small.size)]",
            "image.paste(small, [room // 2 if room > 0 else -round(-room / 2) for room in spare])",
        ]
        return "\n".join(f"    {line}" for line in lines)
    if high == wide:
        lines = [
            "short = min(image.size)",
            f"image = image.resize([{wide} * side // short for side in image.size], {method})",
        ]
    else:
        lines = [
            f"ratio = min(image.height / {high}, image.width / {wide})",
            f"image = image.resize((round(image.width / ratio), round(image.height / ratio)), {method})",
        ]
    lines += [
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
    return "\n".join(f"    {line}" for line in lines)
