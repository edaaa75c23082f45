"""Variance of a unit's activation where it is read, relative to its group's mean (variance-based pruning, MLP units of ViTs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group, GroupScores
from cswap_deploy.prune.ablation import channel_axis, taps, unit_sums
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria.weights import relative_scores
from cswap_deploy.recipe import VarianceCriterion

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Variance:
    """A unit that never changes can be folded into a bias without loss."""

    settings: VarianceCriterion

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        """Population variance over images, positions and the group's consumers, all pooled; float64 moments in one pass."""
        import torch

        layers = sorted({member.module for group in groups for member in group.consumers})
        moments: dict[str, list[Tensor]] = {
            group.name: [torch.zeros(group.units).double() for _ in "12"] for group in groups
        }
        seen_values = dict.fromkeys(moments, 0)
        with torch.no_grad():
            for images, _ in batches.first(self.settings.images):
                with taps(module, layers) as seen:
                    module(images)
                for group in groups:
                    for member in group.consumers:
                        layer = module.get_submodule(member.module)
                        for tap in seen[member.module]:
                            for power, total in enumerate(moments[group.name], 1):
                                (own,) = unit_sums(tap.double() ** power, member, layer, group.units, images=1)
                                total += own.cpu()
                            seen_values[group.name] += tap.numel() // tap.shape[channel_axis(layer)] * member.repeat
        results = []
        for group in groups:
            mean, square = (total / seen_values[group.name] for total in moments[group.name])
            results.append(relative_scores(group, [(square - mean**2).clamp_min(0)]))
        return tuple(results)
