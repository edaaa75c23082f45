"""Values for the weights of all candidates, in one file beside them that is sent once: noise, by type and scale.

Weights that a node makes when a file is loaded (ConstantOfShape) would need no such file. But they lie elsewhere in memory, so that
networks are faster than with weights that were read (docs/latency-budget.md). And TensorRT wants a convolution's weights to be
constants: those that a node makes take its path for weights that change (onnx-tensorrt 10.1, onnxOpImporters.cpp). Weights in a file
beside the model are constants, read at their offset and length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import File

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

PAGE = 4096
"""Sections begin at multiples of it, as ONNX recommends for files that are mapped."""
SPREAD = 42.0
"""Standard deviation of integers: a third of int8's range."""

Shape = tuple[int, ...]
Section = tuple[int, int]
"""ONNX's number of a data type, and how often the noise is halved: so that it is 1 / sqrt(fan-in) or a little less."""


@dataclass(frozen=True)
class SharedWeights:
    """Where each section lies in `file`, whose name is its digest: it is found beside a model on any target's store.

    Noise of zero mean and no more than 1 / sqrt(fan-in) keeps activations within what biases make them, and in float16's range.
    """

    file: File
    offsets: Mapping[Section, int]

    @staticmethod
    def write(folder: Path, tensors: Iterable[onnx.TensorProto]) -> SharedWeights:
        """Long enough for these tensors and whatever is narrower."""
        import numpy as np

        lengths: dict[Section, int] = {}
        for tensor in tensors:
            shape = tuple(tensor.dims)
            most = _halved(tensor.data_type, shape)
            for halved in range(most + 1):
                length = prod(shape) if halved == most else shape[0] * 4**halved
                lengths[tensor.data_type, halved] = max(lengths.get((tensor.data_type, halved), 0), length)
        noise = np.random.default_rng(0).standard_normal(max(lengths.values(), default=0), np.float32)
        offsets, path = {}, folder / "weights"
        with path.open("wb") as stream:
            for section, length in sorted(lengths.items()):
                stream.seek(-(-stream.tell() // PAGE) * PAGE)
                offsets[section] = stream.tell()
                stream.write(_values(section, noise[:length]))
        file = File.of(path)
        return SharedWeights(replace(file, path=path.rename(folder / file.sha256)), offsets)

    def fill(self, tensor: onnx.TensorProto, shape: Shape) -> None:
        """Make a tensor one of this shape whose values lie in the file."""
        import onnx

        kind, name = tensor.data_type, tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, kind, onnx.TensorProto.EXTERNAL
        tensor.dims.extend(shape)
        where = {
            "location": self.file.sha256,
            "offset": self.offsets[kind, _halved(kind, shape)],
            "length": prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize,
        }
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))


def _halved(kind: int, shape: Shape) -> int:
    """The least number h with 4**h at least the fan-in; 0 for integers."""
    import numpy as np
    import onnx

    if np.issubdtype(onnx.helper.tensor_dtype_to_np_dtype(kind), np.integer):
        return 0
    return ((prod(shape[1:]) - 1).bit_length() + 1) // 2


def _values(section: Section, noise: npt.NDArray[np.float32]) -> bytes:
    import numpy as np
    import onnx

    kind, halved = section
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind)
    if not np.issubdtype(wanted, np.integer):
        return bytes((noise * np.float32(0.5**halved)).astype(wanted).tobytes())
    bounds = np.iinfo(wanted)
    middle = 128 if bounds.min == 0 else 0
    return bytes(np.clip(np.rint(noise * SPREAD) + middle, bounds.min, bounds.max).astype(wanted).tobytes())
