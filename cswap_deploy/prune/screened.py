"""Screen, flag, verify: an approximation for every unit and image, exact ablation where it cannot be trusted.

The screen is the first order of the logits, taken exactly through the softmax. It errs most on the images on which the network
is least sure, and there most of a unit's effect comes from: on ResNet-20, 15 % of the images carry nine tenths of the sum of all
absolute effects, and the screen tells which images these are. So a few units, ablated on all images, teach how far the screen
errs; every unit is ablated on as many of those images as it takes; and the units for which most still rests on the screen
alone are ablated on all. What that costs is bounded: the larger the network, the fewer units and images.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from cswap_deploy import progress
from cswap_deploy.model import count
from cswap_deploy.prune.attribution import through_softmax
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.verdicts import verdicts

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 1 / 8
"""Largest share of the images on which every unit is ablated: those with the largest mean absolute effect in the screen."""
SETTLED = 0.02
"""Fewer images are enough where the screen's errors on the rest are below this share of a unit's absolute effects, on average."""
UNITS = 1 / 64
"""Share of the units that are ablated on all images to learn the screen's error there; as many again because they are in doubt."""
FEWEST = 8
"""But never fewer than this many, whatever that costs: the screen's error cannot be told from less."""
BUDGET = 1e13
"""Multiply-accumulates for ablations, a third each for the units that teach, those in doubt and the hard images; one unit on one
image counts as half a forward. A network of 100 million has 200,000 of them, a resnet50 at 224 pixels 4,900. Beyond 5 billion, with 256
images, the fewest units cost more than this."""


@dataclass(frozen=True)
class Screened:
    """`effects`: (images, units) per group, exact where `exact`, else from the screen. `spread`: per unit the standard error
    that the screened images add to its mean; 0 for units that are exact on all images."""

    effects: list[Tensor]
    exact: list[Tensor]
    spread: list[Tensor]

    @staticmethod
    def all(effects: list[Tensor], *, exact: bool) -> Screened:
        """Effects of one kind only."""
        import torch

        masks = [torch.full(values.shape, exact) for values in effects]
        return Screened(effects, masks, [values.new_zeros(values.shape[1]) for values in effects])

    @property
    def verified(self) -> list[tuple[bool, ...]]:
        return [tuple(mask.all(0).tolist()) for mask in self.exact]


def screen(ablations: Ablations, alpha: float) -> Screened:
    """Effects of all units; `alpha`: the level of the verdicts that are counted as open when the budget is spent."""
    import torch

    state = Screened.all(through_softmax(ablations.fast, ablations.readings, ablations.batches), exact=False)
    guessed = torch.cat(state.effects, 1)
    images, units = guessed.shape
    third = BUDGET / (count(ablations.module, ablations.batches.spec)[1] / 2) / 3
    share = min(units, max(FEWEST, min(ceil(UNITS * units), int(third / images))))
    learnt = _chosen(
        guessed.abs().sum(0).argsort(stable=True)[torch.linspace(0, units - 1, share).round().long()], units
    )
    state = _ablate(ablations, state, learnt.expand(images, -1))
    hard = _hard_images(
        guessed, torch.cat(state.effects, 1)[:, learnt], learnt, min(ceil(IMAGES * images), int(third / units))
    )
    left = guessed[~hard].abs().sum(0).masked_fill(learnt, 0)
    doubtful = _chosen(left.argsort(descending=True, stable=True)[:share], units)
    state = _ablate(ablations, state, hard[:, None] | doubtful)
    state = Screened(state.effects, state.exact, _spread(state, guessed, learnt))
    progress.note(
        f"{sum(map(sum, state.verified))} of {units} units verified by ablation on all {images} images, the others on "
        f"{int(hard.sum())}; {_open(state, alpha)} verdicts hang on the screen"
    )
    return state


def _chosen(indices: Tensor, size: int) -> Tensor:
    import torch

    mask = torch.zeros(size, dtype=torch.bool)
    mask[indices] = True
    return mask


def _ablate(ablations: Ablations, state: Screened, wanted: Tensor) -> Screened:
    """Exact effects where `wanted` (images, units of all groups)."""
    import torch

    masks = torch.split(wanted, [values.shape[1] for values in state.effects], 1)
    found = ablations.effects([mask & ~own for mask, own in zip(masks, state.exact, strict=True)])
    effects = [torch.where(new.isnan(), old, new) for new, old in zip(found, state.effects, strict=True)]
    return Screened(effects, [mask | own for mask, own in zip(masks, state.exact, strict=True)], state.spread)


def _hard_images(guessed: Tensor, truth: Tensor, learnt: Tensor, most: int) -> Tensor:
    """Per image, whether every unit is ablated on it; of `most` at most. guessed: (images, units); truth: (images, learnt units)."""
    order = guessed.abs().mean(1).argsort(descending=True, stable=True)
    sizes = truth.abs().sum(0)
    errors = (truth - guessed[:, learnt]).abs()[:, sizes > 0] / sizes[sizes > 0]
    left = errors.sum(1)[order].flip(0).cumsum(0).flip(0) / max(1, errors.shape[1])
    return _chosen(order[: min(int((left > SETTLED).sum()), most)], len(guessed))


def _spread(state: Screened, guessed: Tensor, learnt: Tensor) -> list[Tensor]:
    """The screen's error of a unit's mean, in proportion to the unit's own standard error: root mean square over learnt units.

    Of these only the images count that were screened for the other units.
    """
    import torch

    effects, exact = torch.cat(state.effects, 1), torch.cat(state.exact, 1)
    count = len(effects)
    scale = effects.std(0) / count**0.5 if count > 1 else effects[0] * 0
    screened = ~exact.all(1)
    errors = (effects - guessed)[screened].sum(0) / count
    known = learnt & (scale > 0)
    ratio = float((errors / scale)[known].square().mean().sqrt()) if known.any() else 0.0
    spread = (ratio * scale).masked_fill(exact.all(0), 0)
    return list(torch.split(spread, [values.shape[1] for values in state.effects]))


def _open(state: Screened, alpha: float) -> int:
    """Units whose verdict would be another if the screen were exact."""
    said, guessed = (
        [verdict for own in verdicts(state.effects, alpha, decisive=True, spread=spread) for verdict in own]
        for spread in (state.spread, None)
    )
    return sum(one != other for one, other in zip(said, guessed, strict=True))
