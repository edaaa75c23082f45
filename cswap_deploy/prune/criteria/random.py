"""A seeded uniform draw: the floor that every other criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group, GroupScores
from cswap_deploy.prune.batches import Batches

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Random:
    seed: int

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        import numpy as np

        generator = np.random.default_rng(self.seed)
        return tuple(
            GroupScores(group.name, tuple(range(group.units)), tuple(generator.random(group.units).tolist()))
            for group in groups
        )
