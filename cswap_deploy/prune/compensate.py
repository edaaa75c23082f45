"""What the network does for the units that left: nothing, means into biases, BatchNorm statistics, or least squares.

All work on a masked module: of the dense shape, with nothing reading the units that left. Cutting it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import assert_never

from cswap_deploy import progress
from cswap_deploy.artifacts import Group, HeadDims
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import Keep, add_bias, masked_copy, positions
from cswap_deploy.prune.producers import partners
from cswap_deploy.prune.reading import input_means
from cswap_deploy.prune.refit import Structure, examine, refit
from cswap_deploy.prune.systems import Systems
from cswap_deploy.recipe import (
    BatchNormCompensation,
    CompensationSettings,
    LeastSquaresCompensation,
    MeanCompensation,
    NoCompensation,
)

if TYPE_CHECKING:
    from torch import nn

FIT_IMAGES, MOST_VIEWS = 768, 8
"""As many images as `views: auto` fills up to with shifted copies, with at most so many views of one."""


def seen(fit: Batches, settings: CompensationSettings) -> Batches:
    """The fit images as this method sees them: of few images there are shifted copies as well."""
    match settings:
        case LeastSquaresCompensation(views="auto"):
            views, most = MOST_VIEWS, max(0, FIT_IMAGES - len(fit))
        case LeastSquaresCompensation(views=int(views)):
            most = views * len(fit)
        case _:
            return fit
    copies = min(most, (views - 1) * (len(fit) - fit.uncopied))
    return fit.with_copies(copies) if copies else fit


def compensated(
    dense: nn.Module,
    groups: Sequence[Group],
    keep: Keep,
    batches: Batches,
    settings: CompensationSettings,
    structure: Structure | None = None,
    systems: Systems | None = None,
) -> nn.Module:
    """A masked copy of `dense` that has absorbed the units which left, as far as the recipe's method can.

    Give the same `structure` to all calls on one network with the same images, so that it is examined once. `systems`: where
    least squares is the method, the normal equations of all consumers in the copy are noted there.
    """
    import torch

    module = masked_copy(dense, groups, keep)
    gone, silent = _gone_inputs(groups, keep), _silent(groups, keep)
    with torch.no_grad():
        match settings:
            case LeastSquaresCompensation():
                structure = structure or Structure()
                examine(dense, structure, batches, gone)
                moving = partners(groups, structure.sites)
                refit(dense, module, gone, batches, structure, moving, settings.producer_steps, silent, systems)
            case MeanCompensation() if any(gone.values()):
                _fold_means(dense, module, {name: lost for name, lost in gone.items() if lost}, batches)
            case BatchNormCompensation() if any(gone.values()) or any(silent.values()):
                _reestimate(module, batches)
            case NoCompensation() | MeanCompensation() | BatchNormCompensation():
                pass
            case _:
                assert_never(settings)
    return module


def with_systems(
    dense: nn.Module,
    groups: Sequence[Group],
    keep: Keep,
    batches: Batches,
    settings: CompensationSettings,
    structure: Structure,
) -> tuple[nn.Module, Systems]:
    """`compensated`, and the normal equations of all consumers in it where least squares is the method."""
    systems: Systems = {}
    return compensated(dense, groups, keep, batches, settings, structure, systems), systems


def _gone_inputs(groups: Sequence[Group], keep: Keep) -> dict[str, list[int]]:
    """Per consumer layer, the input channels that nothing may read any more."""
    gone: dict[str, set[int]] = {}
    for group in groups:
        removed = sorted(set(range(group.units)) - set(keep.get(group.name, range(group.units))))
        for member in group.consumers:
            gone.setdefault(member.module, set()).update(positions(member, removed))
    return {name: sorted(indices) for name, indices in gone.items()}


def _silent(groups: Sequence[Group], keep: Keep) -> dict[str, list[int]]:
    """Per layer the rows of queries and keys that a mask holds at 0."""
    found: dict[str, set[int]] = {}
    for group in groups:
        if isinstance(group, HeadDims):
            removed = sorted(set(range(group.units)) - set(keep.get(group.name, range(group.units))))
            for name, rows in group.silenced(removed).items():
                found.setdefault(name, set()).update(rows)
    return {name: sorted(rows) for name, rows in found.items()}


# --- mean: b += W_gone mean(a_gone)


def _fold_means(dense: nn.Module, module: nn.Module, gone: Mapping[str, list[int]], batches: Batches) -> None:
    means = input_means(dense, list(gone), batches)
    for name, indices in gone.items():
        weight: Any = dense.get_submodule(name).weight
        reach = weight[:, indices].flatten(2).sum(2) if weight.ndim > 2 else weight[:, indices]
        bias = add_bias(module, name)
        bias += reach @ means[name][indices]


# --- batchnorm: statistics of the masked network


def _reestimate(module: nn.Module, batches: Batches) -> None:
    """Reset the running statistics of every BatchNorm and average them anew over the calibration images."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        progress.warn(
            "prune.compensate: batchnorm does nothing here: the network has no BatchNorm with running statistics"
        )
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    for images, _ in batches:
        if len(images) == 1 < batches.size and len(batches) > 1:
            continue
        seen += len(images)
        for layer in norms:
            layer.momentum = len(images) / seen
        module(images)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
