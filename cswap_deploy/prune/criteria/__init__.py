"""How much the network loses when a unit leaves: one criterion a file, chosen by the recipe's `kind`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from typing_extensions import assert_never

from cswap_deploy.artifacts import Group, GroupScores
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria.causal import CausalEffect
from cswap_deploy.prune.criteria.logits import BesideLogits
from cswap_deploy.prune.criteria.magnitude import Magnitude
from cswap_deploy.prune.criteria.random import Random
from cswap_deploy.prune.criteria.taylor import Taylor
from cswap_deploy.prune.criteria.variance import Variance
from cswap_deploy.recipe import (
    CausalCriterion,
    CriterionSettings,
    MagnitudeCriterion,
    RandomCriterion,
    TaylorCriterion,
    VarianceCriterion,
)

if TYPE_CHECKING:
    from torch import nn


class Scorer(Protocol):
    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        """keep_value of all units of each group, comparable across groups; `module` is left as it was."""


def scorer(settings: CriterionSettings, seed: int) -> Scorer:
    """The criterion that the recipe names; `seed` is for the one that draws. Dimensions of queries are scored by their logits."""
    return BesideLogits(_criterion(settings, seed))


def _criterion(settings: CriterionSettings, seed: int) -> Scorer:
    match settings:
        case CausalCriterion():
            return CausalEffect(settings)
        case TaylorCriterion():
            return Taylor(settings)
        case MagnitudeCriterion():
            return Magnitude()
        case VarianceCriterion():
            return Variance(settings)
        case RandomCriterion():
            return Random(seed)
        case _:
            assert_never(settings)


def between_steps(settings: CriterionSettings) -> CriterionSettings:
    """The same criterion at the price of a forward and a backward: what is measured exactly, is measured on the dense network."""
    match settings:
        case CausalCriterion():
            return settings.model_copy(update={"estimator": "attribution"})
        case _:
            return settings


def images_used(settings: CriterionSettings, available: int) -> int:
    """How many of the fit images the criterion looks at."""
    match settings:
        case CausalCriterion() | TaylorCriterion() | VarianceCriterion():
            return min(settings.images, available)
        case _:
            return 0
