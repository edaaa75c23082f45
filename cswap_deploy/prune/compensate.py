"""What the network does for the units that left: nothing, means into biases, BatchNorm statistics, or least squares.

All work on a masked module: of the dense shape, with nothing reading the units that left. Cutting it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typing_extensions import assert_never

from cswap_deploy import progress
from cswap_deploy.artifacts import Group
from cswap_deploy.prune.ablation import channel_axis, taps
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import Keep, add_bias, masked_copy, positions
from cswap_deploy.prune.observe import observe
from cswap_deploy.prune.replay import Walk
from cswap_deploy.prune.rows import Rows
from cswap_deploy.recipe import (
    BatchNormCompensation,
    CompensationSettings,
    LeastSquaresCompensation,
    MeanCompensation,
    NoCompensation,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

RIDGE = 1e-4
"""Ridge of the least squares relative to each input's own power; it pulls towards the dense weights."""
SCARCE = 8
"""With fewer rows than this per unknown the ridge is stronger in proportion."""


@dataclass
class Structure:
    """What holds for the layers of a network whatever leaves: found at the first compensation, used by the later ones."""

    systems: dict[str, tuple[Rows | None, bool]] = field(default_factory=dict)
    """Per layer how it is a linear system, and whether its output goes into a sum."""
    reads: dict[str, set[str] | None] = field(default_factory=dict)


def compensated(
    dense: nn.Module,
    groups: Sequence[Group],
    keep: Keep,
    batches: Batches,
    settings: CompensationSettings,
    structure: Structure | None = None,
) -> nn.Module:
    """A masked copy of `dense` that has absorbed the units which left, as far as the recipe's method can.

    Give the same `structure` to all calls on one network with the same images, so that it is examined once.
    """
    import torch

    module = masked_copy(dense, groups, keep)
    gone = _gone_inputs(groups, keep)
    with torch.no_grad():
        match settings:
            case NoCompensation():
                pass
            case _ if not gone:
                pass
            case MeanCompensation():
                _fold_means(dense, module, gone, batches)
            case BatchNormCompensation():
                _reestimate(module, batches)
            case LeastSquaresCompensation():
                _refit(dense, module, gone, batches, structure or Structure())
            case _:
                assert_never(settings)
    return module


def _gone_inputs(groups: Sequence[Group], keep: Keep) -> dict[str, list[int]]:
    """Per consumer layer, the input channels that nothing may read any more."""
    gone: dict[str, set[int]] = {}
    for group in groups:
        removed = sorted(set(range(group.units)) - set(keep.get(group.name, range(group.units))))
        for member in group.consumers if removed else ():
            gone.setdefault(member.module, set()).update(positions(member, removed))
    return {name: sorted(indices) for name, indices in gone.items()}


def _in_order(module: nn.Module, names: Mapping[str, Any], images: Tensor) -> list[str]:
    """These layers in the order in which a forward calls them."""
    called: list[str] = []
    with ExitStack() as undo:
        for name in names:
            hook = module.get_submodule(name).register_forward_pre_hook(
                lambda _layer, _inputs, name=name: called.append(name)
            )
            undo.callback(hook.remove)
        module(images)
    return list(dict.fromkeys(called))


# --- mean: b += W_gone mean(a_gone)


def _fold_means(dense: nn.Module, module: nn.Module, gone: Mapping[str, list[int]], batches: Batches) -> None:
    import torch

    sums: dict[str, Tensor] = {}
    for images, _ in batches:
        with taps(dense, list(gone)) as seen:
            dense(images)
        for name, inputs in seen.items():
            axis = channel_axis(dense.get_submodule(name))
            flat = torch.cat([tap.movedim(axis, -1).flatten(0, -2) for tap in inputs])
            sums[name] = sums.get(name, 0) + flat.mean(0) * len(images)
    for name, indices in gone.items():
        weight: Any = dense.get_submodule(name).weight
        reach = weight[:, indices].flatten(2).sum(2) if weight.ndim > 2 else weight[:, indices]
        bias = add_bias(module, name)
        bias += reach @ (sums[name][indices] / len(batches))


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


# --- least squares: consumers re-fitted in execution order on the already compensated prefix


def _refit(
    dense: nn.Module, module: nn.Module, gone: Mapping[str, list[int]], batches: Batches, structure: Structure
) -> None:
    """Sequential ridge regression of each consumer onto the dense network's values at the same place.

    W = argmin |U W - (Y + drift)|^2 + ridge |W - W_dense|^2 over the inputs that are left: U what the layer reads in the
    compensated network, Y what it gives in the dense one, drift what the shortcut that it is added to has lost by then.
    """
    ordered = _in_order(dense, gone, next(iter(batches.first(1)))[0])
    there, here = Walk(dense, batches, structure.reads), Walk(module, batches, structure.reads)
    for number, name in enumerate(ordered, 1):
        if name not in structure.systems:
            structure.systems[name] = _examine(dense, name, batches, there.once)
        rows, with_sum = structure.systems[name]
        if rows is None:
            continue
        system = _System.empty(rows, batches.device)
        pairs = zip(there.visit(name, as_far_as_sum=with_sum), here.visit(name, as_far_as_sum=with_sum), strict=True)
        for seed, (wanted, found) in enumerate(pairs):
            drift = wanted.drift(found, channel_axis(rows.layer))
            target = wanted.output if drift is None else wanted.output + drift
            system.add(rows.draw(found.inputs, target, seed))
        _solve(rows.layer, module, name, system, rows, gone[name])
        progress.advance("layers refitted", number, len(ordered))


def _examine(dense: nn.Module, name: str, batches: Batches, once: Sequence[str]) -> tuple[Rows | None, bool]:
    place = observe(dense, name, next(iter(batches.first(2)))[0], as_far_as_sum=True)
    rows = Rows.of(dense.get_submodule(name), place.inputs, place.output, len(batches)) if name in once else None
    if rows is None:
        progress.warn(f"{name} is not refitted: it is no plain convolution or linear layer that is called once")
    return rows, place.shortcut is not None


@dataclass
class _System:
    """A = U'U and B = U'Y with U extended by a column of ones; float32 products of a block, float64 sums of blocks."""

    gram: Tensor
    cross: Tensor

    @staticmethod
    def empty(rows: Rows, device: str) -> _System:
        import torch

        size = rows.columns + 1
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        return _System(gram, torch.zeros(size, rows.outputs, dtype=torch.float64, device=device))

    def add(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        for fields, targets in blocks:
            size, positions = fields.shape[1], fields.shape[0] * fields.shape[2]
            sums = fields.sum((0, 2)).double()
            self.gram[:size, :size] += (fields @ fields.transpose(1, 2)).sum(0).double()
            self.gram[:size, size] += sums
            self.gram[size, :size] += sums
            self.gram[size, size] += positions
            self.cross[:size] += (fields @ targets.transpose(1, 2)).sum(0).double()
            self.cross[size] += targets.sum((0, 2)).double()


def _solve(old: Any, module: nn.Module, name: str, system: _System, rows: Rows, gone: Sequence[int]) -> None:
    import torch

    layer: Any = module.get_submodule(name)
    kernel = rows.columns // layer.weight.shape[1]
    lost = set(gone)
    left = [c * kernel + k for c in range(layer.weight.shape[1]) if c not in lost for k in range(kernel)] + [
        rows.columns
    ]
    index = torch.tensor(left, device=system.gram.device)
    bias = old.bias if old.bias is not None else old.weight.new_zeros(rows.outputs)
    start = torch.cat([old.weight.flatten(1), bias[:, None]], 1).T.double()[index]
    gram, cross = system.gram[index][:, index], system.cross[index]
    scarcity = max(1.0, SCARCE * rows.columns / float(system.gram[-1, -1]))
    ridge = RIDGE * scarcity * (gram.diagonal() + 1e-3 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram + torch.diag(ridge))
    solution = torch.cholesky_solve(cross + ridge[:, None] * start, factor).float()
    weight = torch.zeros_like(layer.weight).flatten(1)
    weight[:, index[:-1]] = solution[:-1].T
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    add_bias(module, name).copy_(solution[-1])
