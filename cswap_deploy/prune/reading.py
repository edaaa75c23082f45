"""How a consumer reads a unit, and what its output loses when the unit leaves: linear in what the unit contributes.

An intervention takes the unit's own values (zero), what they differ from their mean by (mean), or only what the other units
cannot explain (surgery). In each case the consumer's output changes by minus its weights times what is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cswap_deploy import progress
from cswap_deploy.artifacts import Group, Slice
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.ablation import channel_axis, taps, unit_sums
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import positions
from cswap_deploy.prune.observe import observe
from cswap_deploy.prune.refit import MOST_COLUMNS
from cswap_deploy.prune.replay import Reuse, Walk, in_order
from cswap_deploy.prune.residual import Residual
from cswap_deploy.prune.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor, nn

Intervention: TypeAlias = Literal["zero", "mean", "surgery"]


@dataclass(frozen=True)
class Reading:
    """One consumer of a group; `plain`: its forward is the product of its weight with its receptive fields."""

    member: Slice
    layer: Any
    units: int
    plain: bool
    means: Tensor | None
    residual: Residual | None

    def taken(self, inputs: Tensor) -> Tensor:
        """What the units would take with them, all at once: like `inputs`, or (rows, columns, positions) of a kernel-wise residual."""
        if self.residual is not None:
            return self.residual.of(inputs)
        if self.means is None:
            return inputs
        axis = channel_axis(self.layer) % inputs.ndim
        return inputs - self.means.reshape([-1 if i == axis else 1 for i in range(inputs.ndim)])

    def changed(self, output: Tensor, taken: Tensor, units: Tensor, rows: Tensor) -> Tensor:
        """The consumer's output without unit `units[n]` for row `rows[n]` of what was taken; `output` belongs to these rows already."""
        import torch

        weight = self._weights[units]
        fields = self._fields(taken, units, rows).to(weight.dtype)
        if channel_axis(self.layer) == -1:
            return torch.baddbmm(output.reshape(len(rows), -1, output.shape[-1]), fields, weight, alpha=-1).view_as(
                output
            )
        size = output.shape[2:]
        flat = output.permute(0, 2, 3, 1).reshape(len(rows), -1, output.shape[1])
        found = torch.baddbmm(flat, fields, weight, alpha=-1)
        return found.reshape(len(rows), *size, -1).permute(0, 3, 1, 2)

    @property
    def by_value(self) -> bool:
        """Whether what is taken is known value by value of the receptive fields, not channel by channel."""
        return self.residual is not None and self.residual.kernel > 1

    def first_order(self, taken: Tensor, slope: Tensor, images: int) -> Tensor:
        """(images, units) of one call: minus what is taken times `slope`, the gradient at its input (`by_value`: at its output)."""
        if not self.by_value:
            return -unit_sums(taken * slope, self.member, self.layer, self.units, images)
        assert self.residual is not None
        size, start = self.member.repeat * self.residual.kernel, self.member.offset * self.residual.kernel
        products = taken * (slope.flatten(2).transpose(1, 2) @ self.layer.weight.flatten(1)).transpose(1, 2)
        own: Tensor = products[:, start : start + self.units * size].sum(2)
        return -own.reshape(images, -1, self.units, size).sum((1, 3))

    def strength(self) -> Tensor:
        """Per unit the sum of its weights' absolute values; 0: nothing is read."""
        found: Tensor = self._weights.abs().sum((1, 2))
        return found

    @cached_property
    def _weights(self) -> Tensor:
        """(units, columns of a unit, outputs)"""
        own = self.layer.weight[:, positions(self.member, range(self.units))]
        found: Tensor = own.reshape(len(own), self.units, -1).permute(1, 2, 0)
        return found

    def _fields(self, taken: Tensor, units: Tensor, rows: Tensor) -> Tensor:
        """(rows, positions, columns of a unit)"""
        import torch
        import torch.nn.functional as F

        first, size = self.member.offset, self.member.repeat
        if self.by_value:
            assert self.residual is not None
            size, first = size * self.residual.kernel, first * self.residual.kernel
            chosen = first + units[:, None] * size + torch.arange(size, device=units.device)
            return taken[rows[:, None], chosen].transpose(1, 2)
        chosen = first + units[:, None] * size + torch.arange(size, device=units.device)
        if channel_axis(self.layer) == -1:
            flat = taken.reshape(len(taken), -1, taken.shape[-1])
            return flat[rows[:, None], :, chosen].transpose(1, 2)
        own = taken[rows[:, None], chosen]
        layer = self.layer
        if tuple(layer.kernel_size) == tuple(layer.stride) == (1, 1) and tuple(layer.padding) == (0, 0):
            return own.flatten(2).transpose(1, 2)
        return F.unfold(own, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)


def readings(
    module: nn.Module, groups: Sequence[Group], batches: Batches, intervention: Intervention
) -> list[tuple[Reading, ...]]:
    """How each group is read, and what the intervention takes; statistics over all images of `batches`.

    Errors: PruningError where a layer's rows do not belong to images.
    """
    import torch

    found: dict[Slice, Reading] = {}
    members = {member: group.units for group in groups for member in group.consumers}
    with torch.no_grad():
        image = next(iter(batches.first(1)))[0]
        layers = sorted({member.module for member in members})
        _require_rows_by_image(module, layers, image)
        means = input_means(module, layers, batches) if intervention == "mean" else {}
        walk = Walk(module, batches, Reuse())
        order = in_order(module, [member.module for member in members], image)
        place = {name: number for number, name in enumerate(order)}
        for number, member in enumerate(sorted(members, key=lambda member: place[member.module]), 1):
            layer, units = module.get_submodule(member.module), members[member]
            few = next(iter(batches.first(2)))[0]
            seen = observe(module, member.module, few, as_far_as_sum=False)
            rows = Rows.of(layer, seen.inputs, seen.output, len(seen.output) * len(batches) // len(few))
            residual = None
            if intervention == "surgery" and rows is not None and _explainable(member.module, layer):
                places = walk.visit(member.module, as_far_as_sum=False)
                residual = Residual.fit(rows, member, units, ((own.inputs, own.output) for own in places))
                progress.advance("consumers fitted", number, len(members))
            found[member] = Reading(member, layer, units, rows is not None, means.get(member.module), residual)
    return [tuple(found[member] for member in group.consumers) for group in groups]


def _require_rows_by_image(module: nn.Module, layers: Sequence[str], image: Tensor) -> None:
    """Twice the images must be twice the rows: a transformer that puts its tokens first has as many, whatever it is given."""
    import torch

    counts: list[dict[str, list[int]]] = []
    for images in (image, torch.cat([image, image])):
        with taps(module, layers) as seen:
            module(images)
        counts.append({name: [len(values) for values in calls] for name, calls in seen.items()})
    for name in layers:
        one, two = (sum(own[name]) for own in counts)
        if counts[1][name] != [2 * rows for rows in counts[0][name]]:
            raise PruningError(
                f"{name} reads {one} rows for one image and {two} for 2 images: effects cannot be told apart by image",
                f"let the network keep its images first (batch_first=True), or list {name!r} under prune.skip",
            )


def _explainable(name: str, layer: Any) -> bool:
    """Whether the Gram matrix of a layer's input channels fits into memory; where it does not, a unit takes its own values."""
    channels = int(layer.weight.shape[1])
    if channels > MOST_COLUMNS:
        progress.warn(
            f"units that {name} reads are scored without a re-fit: one of its {channels} inputs would not fit into memory"
        )
    return channels <= MOST_COLUMNS


def input_means(module: nn.Module, layers: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Mean of each layer's input channels over images and positions."""
    import torch

    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for images, _ in batches:
            with taps(module, layers) as seen:
                module(images)
            for name, inputs in seen.items():
                axis = channel_axis(module.get_submodule(name))
                own = torch.stack([tap.movedim(axis, -1).flatten(0, -2).mean(0) for tap in inputs]).mean(0)
                sums[name] = sums.get(name, torch.zeros_like(own)) + own * len(images)
    return {name: total / len(batches) for name, total in sums.items()}
