"""Dimensions of queries and keys by their part of the logits: no layer reads them through weights, which is where units are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group, GroupScores, HeadDims
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.rotation import logit_scores

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BesideLogits:
    """The criterion that the recipe names scores all other groups."""

    criterion: Any

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        """In the order of `groups`."""
        own = [group for group in groups if isinstance(group, HeadDims) and group.queries]
        if not own:
            found: tuple[GroupScores, ...] = self.criterion.score(module, groups, batches)
            return found
        others = self.criterion.score(module, [group for group in groups if group not in own], batches)
        scores = {item.group: item for item in (*others, *logit_scores(module, own, batches))}
        return tuple(scores[group.name] for group in groups)
