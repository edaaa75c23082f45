"""What of a layer's input channel the other channels cannot explain: all that leaves with a unit when its consumer is re-fitted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Slice
from cswap_deploy.prune.ablation import channel_axis
from cswap_deploy.prune.cut import positions
from cswap_deploy.prune.least_squares import NormalEquations, factorised, ridge_of
from cswap_deploy.prune.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 1200
"""Widest receptive field that is explained value by value; beyond it channel by channel, positions pooled."""


@dataclass(frozen=True)
class Residual:
    """r = matrix @ u + offset for the receptive field u: block j holds what is left of unit j's values given all others.

    With P the inverse of the ridge-regularised Gram matrix of the receptive fields (a ones column among them), the rows of
    unit j are P_jj^-1 P_j: (the block inverse formula): re-fitting the consumer without the unit changes its output by
    -W_j r_j. `kernel`: values of a receptive field per channel; 1 also stands for channel-wise.
    """

    layer: Any
    matrix: Tensor
    offset: Tensor
    kernel: int

    @staticmethod
    def fit(rows: Rows, member: Slice, units: int, calls: Iterable[tuple[Tensor, Tensor]]) -> Residual:
        """From (inputs, output) of the layer of `rows` on the fit images, batch by batch."""
        layer: Any = rows.layer
        kernel = rows.columns // layer.weight.shape[1]
        if rows.columns > COLUMNS:
            kernel, gram = 1, _channel_gram(layer, (inputs for inputs, _ in calls))
        else:
            system = NormalEquations.empty(rows.columns, rows.outputs, str(layer.weight.device))
            system.add(chain.from_iterable(rows.draw(*call, seed) for seed, call in enumerate(calls)), rows.order())
            gram = system.gram
        weight = layer.weight.detach().movedim(1, 0).flatten(1)
        live = weight.any(1).repeat_interleave(kernel)
        matrix = _unexplained(gram, live, member, units, kernel).to(weight.dtype)
        return Residual(layer, matrix[:, :-1].contiguous(), matrix[:, -1].contiguous(), kernel)

    def of(self, inputs: Tensor) -> Tensor:
        """Like `inputs`; kernel-wise (rows, columns, positions)."""
        import torch.nn.functional as F

        layer = self.layer
        if self.kernel > 1:
            kernels = self.matrix.reshape(len(self.matrix), -1, *layer.kernel_size)
            return F.conv2d(inputs, kernels, self.offset, layer.stride, layer.padding, layer.dilation).flatten(2)
        axis = channel_axis(layer)
        return (inputs.movedim(axis, -1) @ self.matrix.T + self.offset).movedim(-1, axis)


def _channel_gram(layer: Any, inputs: Iterable[Tensor]) -> Tensor:
    """Gram matrix of the channels with a ones column, over all images and positions."""
    import torch

    channels = layer.weight.shape[1]
    gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=layer.weight.device)
    for values in inputs:
        flat = values.movedim(channel_axis(layer), -1).flatten(0, -2).double()
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
        gram += flat.T @ flat
    return gram


def _unexplained(gram: Tensor, live: Tensor, member: Slice, units: int, kernel: int) -> Tensor:
    """(columns, columns + 1): zeros for columns that nothing reads, which explain nothing either; they have left already."""
    import torch

    index = torch.cat([live, live.new_ones(1)]).nonzero()[:, 0]
    own = gram[index][:, index]
    own += torch.diag(ridge_of(own.diagonal(), len(gram) - 1, float(gram[-1, -1])))
    precision = torch.zeros_like(gram)
    precision[index[:, None], index] = torch.cholesky_inverse(factorised(own)[0])
    found = torch.zeros_like(gram[:-1])
    for unit in range(units):
        columns = [c * kernel + k for c in positions(member, [unit]) for k in range(kernel)]
        alive = [c for c in columns if bool(live[c])]
        if alive:
            found[alive] = torch.linalg.solve(precision[alive][:, alive], precision[alive])
    return found
