"""L2 norms of the weights that leave with a unit, added over the layers that it spans, relative to its group's mean.

After Li et al. 2017 (arXiv 1608.08710), who take the L1 norm of the one filter that makes the unit.
"""

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
