"""Calibration images in memory, handed out as normalised tensors on the device that scores and fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import ImageSet, InputSpec
from cswap_deploy.images import load, normalise, shifted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

BATCH_ELEMENTS = 3 << 20
"""Input elements per batch, which holds 64 images at the most: 20 of 3x224x224."""
UNCOPIED = 5
"""One in so many images, of the first ones, has no copies."""


@dataclass(frozen=True)
class Batches:
    """Iterates (images float32 (n, C, H, W) normalised, labels int64 (n,)) in a fixed order.

    Images lie channels last in memory, which convolutions are faster on.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    spec: InputSpec
    device: str
    at_most: int = 64
    """Images per batch."""
    copies: int = 0
    """So many of the images, the last ones, are shifted copies of others."""

    @staticmethod
    def read(images: ImageSet, spec: InputSpec, device: str) -> Batches:
        pixels, labels = load(images, spec)
        return Batches(pixels, labels, spec, device)

    def first(self, count: int) -> Batches:
        """The first `count` images; a split lists its images in random order."""
        copies = max(0, min(count, len(self)) - self.originals)
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count], copies=copies)

    def divided(self, parts: int) -> Batches:
        """The same images, their originals in so many batches or more."""
        return replace(self, at_most=min(self.at_most, max(1, -(-self.originals // parts))))

    def with_copies(self, count: int) -> Batches:
        """And `count` copies, shifted at random by up to an eighth of height and width, reflected at the borders.

        Of all but the first fifth of the images, in turn: those are left to judge what was learnt from the others.
        """
        import numpy as np

        chosen = np.resize(np.arange(self.uncopied, len(self)), count)
        pixels = np.concatenate([self.pixels, shifted(self.pixels[chosen], np.random.default_rng(0))])
        labels = np.concatenate([self.labels, self.labels[chosen]])
        return replace(self, pixels=pixels, labels=labels, copies=self.copies + count)

    @property
    def uncopied(self) -> int:
        """Of the first images, those that get no copies."""
        return len(self) // UNCOPIED

    @property
    def originals(self) -> int:
        """Images that are no copies; they come first."""
        return len(self) - self.copies

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        size = self.size
        for start in range(0, len(self), size):
            images = torch.from_numpy(normalise(self.pixels[start : start + size], self.spec))
            labels = torch.from_numpy(self.labels[start : start + size])
            yield images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)

    @property
    def size(self) -> int:
        """Images per batch, so that the activations of deep networks stay within some hundred megabytes."""
        channels, height, width = self.spec.shape
        return max(1, min(self.at_most, BATCH_ELEMENTS // (channels * height * width)))


def resolve_device(wanted: str) -> str:
    """`auto` is cuda where PyTorch sees one, else cpu. Errors: DeviceError when cuda is asked for and absent.

    On cuda convolutions then compute in full float32, not TF32, and the same each time.
    """
    import torch

    from cswap_deploy.errors import DeviceError

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise DeviceError("the recipe asks for device: cuda, and PyTorch finds no CUDA device", "set device: auto")
    found = ("cuda" if available else "cpu") if wanted == "auto" else wanted
    if found == "cuda":
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
        torch.backends.cudnn.benchmark = False
    return found
