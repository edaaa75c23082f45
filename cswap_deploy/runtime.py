"""ONNX Runtime on the host's CPU: the one place that opens a session."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import ExportError, reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


AT_ONCE = 64
"""Images of a call where a file leaves its batch open: activations of a thousand would fill the memory."""


class Session:
    """An ONNX file opened once. `threads` 0 leaves their number to the runtime. Errors: ExportError.

    `literal`: node by node as the file has them. Blocked convolutions, which ONNX Runtime would make of some, do not mind a weight
    with other channels than their input where both fill as many blocks.
    """

    def __init__(self, path: Path, threads: int = 0, literal: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if literal:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise ExportError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {path.name}: {without_folders(reason(error))}",
                "update onnxruntime, or lower onnx.opset",
            ) from error
        self._input = self._session.get_inputs()[0]

    @property
    def takes_pixels(self) -> bool:
        """The preprocessing is inside: uint8 (n, H, W, C) in place of normalised (n, C, H, W)."""
        return bool(self._input.type == "tensor(uint8)")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input, without the batch."""
        return tuple(self._input.shape[1:])

    def logits(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, C, H, W) normalised images → (n, classes); one by one where the file's batch is fixed to one, else up to AT_ONCE."""
        return self.run(inputs)

    def run(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """What the file takes, (n, ...), → its first output."""
        import numpy as np

        step = 1 if self._input.shape[0] == 1 else AT_ONCE
        starts = range(0, len(inputs), step)
        return np.concatenate([self._session.run(None, {self._input.name: inputs[i : i + step]})[0] for i in starts])


def without_folders(text: str) -> str:
    """A library's message as a bundle may hold it: paths of this machine are their last names.

    What begins with a folder that exists is such a path; names of ONNX nodes may begin with a slash too. `os.path` is asked, since
    a Path raises where a name is too long.
    """
    kept, at = "", 0
    for found in re.finditer(r"(?<![\w/.~-])/(?=[^\s/])", text):
        start = found.start()
        slashes = [match.start() for match in re.finditer("/", text) if match.start() > start]
        folders = [place for place in slashes if os.path.isdir(text[start:place])]  # noqa: PTH112
        if start < at or not folders:
            continue
        word = re.match(r"[^\s'\"]*", text[start:])
        assert word
        end = max(folders[-1], *(place for place in slashes if place < start + word.end()))
        kept, at = kept + text[at:start], end + 1
    return kept + text[at:]
