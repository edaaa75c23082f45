"""L2 norm of all weights that leave with a unit, relative to its group's mean (Li et al. 2017, arXiv 1608.08710, coupled)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group, GroupScores
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria.weights import relative_scores, unit_rows

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Magnitude:
    """Looks at no image."""

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        matrices = {name: value.detach() for name, value in module.named_parameters() if value.ndim >= 2}
        return tuple(
            relative_scores(group, [rows.norm(dim=1) for rows in unit_rows(matrices, group)]) for group in groups
        )
