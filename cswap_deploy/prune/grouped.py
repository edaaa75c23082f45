"""Grouped and depthwise convolutions behind a cut: each of their groups is a small linear system of its own.

They never lose an input alone (a channel leaves a depthwise layer together with its output), but what they read has drifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.least_squares import ridge_of
from cswap_deploy.prune.replay import Walk
from cswap_deploy.prune.rows import Rows, is_sized
from cswap_deploy.prune.systems import Block, Site, norm_of, start_of, write

if TYPE_CHECKING:
    from torch import Tensor, nn


def grouped_rows(layer: nn.Module, inputs: Tensor, output: Tensor, length: int) -> Rows | None:
    """The receptive fields of all groups side by side; None for other layers, or where the forward is not that product.

    `inputs`, `output`, `length`: as in `Rows.of`.
    """
    import torch
    from torch import nn

    if not isinstance(layer, nn.Conv2d) or layer.groups == 1 or not is_sized(layer, inputs, output):
        return None
    weight, outputs = layer.weight.detach(), layer.out_channels
    columns = layer.in_channels * weight[0, 0].numel()
    start = start_of(layer)
    everything = Rows(layer, columns, outputs, 1.0)
    for fields, targets in everything.draw(inputs, output, seed=0):
        close = 1e-3 * float(targets.abs().max().clamp_min(1e-6))
        if not torch.allclose(_product(layer, start, _in_order(everything, fields)), targets, rtol=1e-3, atol=close):
            return None
    return Rows.sampled(layer, columns, len(start), output, length)


def refit_grouped(
    site: Site, dense: nn.Module, module: nn.Module, name: str, wanted: Sequence[Tensor], here: Walk
) -> None:
    """Fit layer `name` of `module` in place, as `refit` does with a layer of one group; `wanted` as there."""
    rows, way = site.rows, site.outlet
    layer: Any = rows.layer
    start = start_of(layer)
    sums, kept = _Sums.empty(layer), []
    for seed, found in enumerate(here.visit(name, as_far_as_sum=way.summed)):
        for block in Block.of(site, found, wanted[seed], seed):
            ordered = replace(block, fields=_in_order(rows, block.fields))
            sums.add(ordered.fields, ordered.targets)
            kept += [ordered] if way.rectified else []
    weights = sums.solve(start)
    if kept:
        again = _Sums.empty(layer)
        for block in kept:
            again.add(block.fields, block.moved(_product(layer, weights, block.fields), way.sign(rows.outputs)))
        weights = again.solve(start)
    write(module, name, weights, *norm_of(site, dense))


def _in_order(rows: Rows, fields: Tensor) -> Tensor:
    """(images, columns, positions), the columns as in the layer's weight, channel after channel."""
    return fields.index_select(1, rows.order().argsort())


def _by_group(values: Tensor, groups: int) -> Tensor:
    """(images, channels, positions) as (groups, channels of a group, rows)."""
    own = values.reshape(len(values), groups, -1, values.shape[2])
    return own.permute(1, 2, 0, 3).flatten(2)


def _weights(layer: Any, weights: Tensor) -> Tensor:
    """(columns of a group + 1, outputs) as (groups, columns of a group + 1, outputs of a group)."""
    return weights.reshape(len(weights), layer.groups, -1).transpose(0, 1)


def _product(layer: Any, weights: Tensor, fields: Tensor) -> Tensor:
    """(images, outputs, positions)"""
    own = _weights(layer, weights)
    found = own[:, :-1].transpose(1, 2) @ _by_group(fields, layer.groups) + own[:, -1, :, None]
    shape = (layer.groups, -1, len(fields), fields.shape[2])
    return found.reshape(*shape).permute(2, 0, 1, 3).flatten(1, 2)


@dataclass
class _Sums:
    """Normal equations of each group, a column of ones last: (groups, n, n) and (groups, n, outputs of a group), in float64."""

    layer: Any
    gram: Tensor
    cross: Tensor

    @staticmethod
    def empty(layer: Any) -> _Sums:
        import torch

        size = layer.weight[0].numel() + 1
        kind = {"dtype": torch.float64, "device": layer.weight.device}
        outputs = layer.out_channels // layer.groups
        return _Sums(
            layer, torch.zeros(layer.groups, size, size, **kind), torch.zeros(layer.groups, size, outputs, **kind)
        )

    def add(self, fields: Tensor, targets: Tensor) -> None:
        import torch

        own = _by_group(fields, self.layer.groups)
        own = torch.cat([own, torch.ones_like(own[:, :1])], 1)
        self.gram += (own @ own.transpose(1, 2)).double()
        self.cross += (own @ _by_group(targets, self.layer.groups).transpose(1, 2)).double()

    def solve(self, start: Tensor) -> Tensor:
        """(columns of a group + 1, outputs); the ridge as in `least_squares`, where nothing is read towards `start` alone."""
        import torch

        power, rows = self.gram.diagonal(dim1=1, dim2=2), float(self.gram[0, -1, -1])
        ridge = ridge_of(power, self.gram.shape[1] - 1, rows)
        pull = ridge[:, :, None] * _weights(self.layer, start).double()
        found = torch.linalg.solve(self.gram + torch.diag_embed(ridge), self.cross + pull)
        weights: Tensor = found.transpose(0, 1).flatten(1).float()
        return weights
