"""Test vectors of a bundle: plain arrays that are not trusted, and what a model's output is held to beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import VerifyError, reason
from cswap_deploy.handoff import tolerance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

AGAIN = "copy the bundle again, or build it again"
LARGEST = 256 << 20
"""Bytes of an array that is read."""


def read(inputs: Path, outputs: Path, pixels: bool = False) -> tuple[NDArray[Any], Array]:
    """Images, normalised (n, C, H, W) or, with `pixels`, uint8 (n, H, W, C), and PyTorch's logits for them (n, classes)."""
    import numpy as np

    given, wanted = _array(inputs, "uint8" if pixels else "float32"), _array(outputs, "float32")
    if given.ndim != 4 or wanted.ndim != 2 or len(given) != len(wanted):
        raise VerifyError(
            f"the test vectors are {given.shape} and {wanted.shape}, expected images and as many rows of logits", AGAIN
        )
    if not (np.isfinite(given).all() and np.isfinite(wanted).all()):
        raise VerifyError("the test vectors hold numbers that are not finite", AGAIN)
    return given, wanted


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities (n, classes) of logits."""
    import numpy as np

    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    shares: Array = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    return shares


def _array(path: Path, kind: str) -> NDArray[Any]:
    """A plain array. It is mapped before it is copied: a header that promises more than the file holds is refused."""
    import numpy as np

    name = f"{path.parent.name}/{path.name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # on garbage NumPy raises almost anything
        raise VerifyError(f"{name} is not a plain array: {reason(error)}", AGAIN) from error
    if array.dtype != np.dtype(kind) or not array.size:
        raise VerifyError(f"{name} is not an array of {kind}", AGAIN)
    if array.nbytes > LARGEST:
        raise VerifyError(f"{name} holds {array.nbytes} bytes, at most {LARGEST} are read", AGAIN)
    return np.array(array)


def compare(what: str, found: Array, wanted: Array, recorded: float | None) -> str:
    """The measured difference and its tolerance. Errors: VerifyError beyond it, or when a variant's top-1 differs."""
    import numpy as np

    exact, largest = wanted.astype(np.float64), float(np.abs(wanted).max())
    allowed = tolerance(largest, recorded)
    if found.shape != wanted.shape:
        raise VerifyError(f"{what} returns {found.shape}, the test vectors hold {wanted.shape}", AGAIN)
    difference = float(np.abs(found - exact).max())
    numbers = f"{len(wanted)} test vectors differ from PyTorch by up to {difference:.2e}, tolerance {allowed:.2e}"
    if not difference <= allowed:
        raise VerifyError(f"{what}: {numbers}", AGAIN)
    if recorded is None:
        return numbers
    if other := int(((found.argmax(1) != exact.argmax(1)) & (_leads(exact) > allowed)).sum()):
        raise VerifyError(f"{what}: top-1 of {other} differs, though their best logit leads by more; {numbers}", AGAIN)
    proof = f"; that is more than the largest logit ({largest:.2e}) and proves little" if allowed > largest else ""
    return f"{numbers}, top-1 agrees{proof}"


def _leads(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the best logit of each row is ahead of the next; 0 where there is one class only."""
    import numpy as np

    ordered = np.sort(logits, 1)
    lead: NDArray[np.float64] = ordered[:, -1] - ordered[:, -min(2, logits.shape[1])]
    return lead
