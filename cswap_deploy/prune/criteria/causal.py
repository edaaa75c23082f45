"""Causal effect of a unit: what log p(true class) does when the unit leaves.

An independent implementation of the idea of C-SWAP (arXiv 2510.18636). Its relative effect
xi = mean((p* - p) / p) is kept beside ours, mean(log p* - log p), which hard images do not dominate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import assert_never

from cswap_deploy.artifacts import Group, GroupScores, Verdict
from cswap_deploy.prune.attribution import first_order
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.reading import readings
from cswap_deploy.prune.screened import Screened, screen
from cswap_deploy.prune.verdicts import verdicts
from cswap_deploy.recipe import CausalCriterion

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class CausalEffect:
    """`attribution`: first order, all units from one forward and one backward. `exact`: every unit is ablated on every image.
    `screened`: first order, and ablation where it is in doubt."""

    settings: CausalCriterion

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        """Scores over all units of each group; `module` is left as it was.

        Critical and detrimental are said of units whose mean effect is significant; where images were only screened, its error
        holds the screen's, as learnt on units that were ablated on all images. `attribution` never says them.
        """
        if not groups:
            return ()
        batches = batches.first(self.settings.images)
        found = self._effects(module, groups, batches)
        decisive = self.settings.estimator != "attribution"
        said = verdicts(found.effects, self.settings.alpha, decisive=decisive, spread=found.spread)
        parts = zip(groups, found.effects, found.spread, said, found.verified, strict=True)
        return tuple(_group_scores(*part) for part in parts)

    def _effects(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> Screened:
        import torch

        intervention = self.settings.intervention
        match self.settings.estimator:
            case "attribution":
                effects = first_order(module, readings(module, groups, batches, intervention), batches)
                return Screened.all(effects, exact=False)
            case "exact":
                everything = [torch.ones(len(batches), group.units, dtype=torch.bool) for group in groups]
                effects = Ablations.prepare(module, groups, batches, intervention).effects(everything)
                return Screened.all(effects, exact=True)
            case "screened":
                return screen(Ablations.prepare(module, groups, batches, intervention), self.settings.alpha)
            case _:
                assert_never(self.settings.estimator)


def _group_scores(
    group: Group, values: Tensor, spread: Tensor, verdict: tuple[Verdict, ...], verified: tuple[bool, ...]
) -> GroupScores:
    """values: (images, units) change of log p(true class) per image; spread: standard error beyond that of the images."""
    error = (values.var(0) / len(values) + spread**2).sqrt() if len(values) > 1 else values[0] * 0
    return GroupScores(
        group.name,
        tuple(range(group.units)),
        tuple(values.abs().mean(0).tolist()),
        tuple(values.mean(0).tolist()),
        tuple(error.tolist()),
        tuple(values.clamp(max=50).expm1().mean(0).tolist()),
        verdict,
        verified,
    )
