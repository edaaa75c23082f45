"""What versions of runtimes read: the highest opset and IR version of each, for `onnx.runtimes` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Version = tuple[int, ...]
WISH = r"^(onnxruntime|onnxruntime-web|onnxruntime-node|tensorrt)(>=|==)\d+(\.\d+){1,3}$"
MAX_IR = 10
"""Highest IR version that is written: what ONNX Runtime 1.18 and the mobile runtimes of its time read."""
MIN_IR = 8
"""Operators up to opset 22 need no more: a file of IR version 10 with this number in its place loads in older runtimes."""

ONNXRUNTIME: tuple[tuple[Version, int, int], ...] = (
    ((1, 14), 18, 8),
    ((1, 15), 19, 8),
    ((1, 16), 19, 9),
    ((1, 17), 20, 9),
    ((1, 18), 21, 10),
    ((1, 22), 22, 10),
)
"""From this version on: opset, IR version. From 1.16 on measured by loading small models, 1.14 and 1.15 by ONNX Runtime's own
compatibility table."""
TENSORRT: tuple[tuple[Version, int, int], ...] = (
    ((8, 5), 17, MAX_IR),
    ((10, 0), 20, MAX_IR),
    ((10, 9), 22, MAX_IR),
)
"""From NVIDIA's release notes; its parser does not refuse by IR version. Not run on TensorRT."""
NOT_IN_TENSORRT = frozenset(
    (
        "ConcatFromSequence ConvInteger Det DynamicQuantizeLinear MatMulInteger MaxRoiPool Multinomial "
        "NegativeLogLikelihoodLoss QLinearConv QLinearMatMul SequenceAt SequenceConstruct SequenceEmpty SequenceErase "
        "SequenceInsert SequenceLength SoftmaxCrossEntropyLoss SplitToSequence StringNormalizer TfIdfVectorizer"
    ).split()
)
"""Standard operators that no TensorRT parser knows, by onnx-tensorrt's support matrix."""


@dataclass(frozen=True)
class Runtime:
    """One wish such as `onnxruntime>=1.18`: the file must run on the lowest version that it admits."""

    wish: str
    name: str
    version: Version

    @staticmethod
    def of(wish: str) -> Runtime:
        """`wish` matches WISH."""
        name, version = re.split(">=|==", wish)
        return Runtime(wish, name, tuple(map(int, version.split("."))))

    @property
    def limits(self) -> tuple[int, int] | None:
        """(opset, IR version) that it reads; None where it is older than what is known."""
        table = TENSORRT if self.name == "tensorrt" else ONNXRUNTIME
        return next(((opset, ir) for first, opset, ir in reversed(table) if self.version >= first), None)

    @property
    def oldest(self) -> str:
        table = TENSORRT if self.name == "tensorrt" else ONNXRUNTIME
        return ".".join(map(str, table[0][0]))


def ir_version(wishes: Sequence[str]) -> int:
    """The highest IR version that all of them read, at most MAX_IR."""
    known = [limits[1] for limits in (Runtime.of(wish).limits for wish in wishes) if limits]
    return max(MIN_IR, min([MAX_IR, *known]))


def impossible(wishes: Sequence[str], opset: int) -> Iterator[tuple[str, str]]:
    """(wish, why) for each runtime that cannot read a file of this opset."""
    for wish in wishes:
        runtime = Runtime.of(wish)
        limits = runtime.limits
        if limits is None:
            yield wish, f"{wish} is older than this tool writes for ({runtime.name} {runtime.oldest} or newer)"
        elif limits[0] < opset:
            yield wish, f"{wish} reads ONNX up to opset {limits[0]}, and onnx.opset is {opset}"


def misfits(wish: str, opset: int, ir: int, operators: Sequence[str], unsigned: bool) -> Iterator[str]:
    """Why a written file does not run on a runtime; `unsigned`: it quantises to uint8 or around a zero point."""
    runtime = Runtime.of(wish)
    limits = runtime.limits or (0, 0)
    if limits[0] < opset:
        yield f"reads up to opset {limits[0]}, the file has {opset}"
    if limits[1] < ir:
        yield f"reads up to IR version {limits[1]}, the file has {ir}"
    if runtime.name == "tensorrt":
        if strange := sorted(NOT_IN_TENSORRT & set(operators)):
            yield f"has no {', '.join(strange)}"
        if unsigned:
            yield "reads int8 around zero only"
