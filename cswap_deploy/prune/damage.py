"""How far a network's outputs are from the dense one's: softened Kullback-Leibler divergence per image, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy.prune.batches import Batches

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Damage:
    """KL(dense || other) of the class probabilities at `temperature`, times its square (Hinton et al. 2015, arXiv 1503.02531)."""

    batches: Batches
    wanted: tuple[Tensor, ...]
    """Per batch the dense network's log probabilities (images, classes) at the temperature."""
    temperature: float

    @staticmethod
    def to(dense: nn.Module, batches: Batches, temperature: float) -> Damage:
        import torch

        with torch.no_grad():
            wanted = tuple((dense(images) / temperature).log_softmax(1) for images, _ in batches)
        return Damage(batches, wanted, temperature)

    def of(self, module: nn.Module) -> float:
        """Mean over the images, in nats."""
        import torch

        with torch.no_grad():
            return sum(self.batch(number, module(images)) for number, (images, _) in enumerate(self.batches))

    def batch(self, number: int, logits: Tensor) -> float:
        """What batch `number` adds to the mean over all images."""
        wanted = self.wanted[number]
        found = (logits / self.temperature).log_softmax(1)
        return float((wanted.exp() * (wanted - found)).sum()) * self.temperature**2 / len(self.batches)
