"""A layer that can be fitted: where it stands in the network, and its normal equations there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.cut import add_bias
from cswap_deploy.prune.least_squares import Nested, NormalEquations
from cswap_deploy.prune.observe import Outlet, Place
from cswap_deploy.prune.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor, nn

Systems = dict[str, "System"]


@dataclass(frozen=True)
class Site:
    """A layer that can be fitted: as a linear system, and where its output goes."""

    rows: Rows
    outlet: Outlet


@dataclass(frozen=True)
class System:
    """One layer's normal equations in the compensated network, and the weights that the ridge pulls towards."""

    equations: NormalEquations
    start: Tensor
    """(columns + 1, outputs), the bias last."""
    gone: frozenset[int]
    """Input channels that nothing may read."""
    kernel: int
    """Columns per input channel."""
    norm: str
    """The BatchNorm that takes up the bias; "" where the layer itself has to."""
    mean: Tensor | None
    """The running mean that this BatchNorm has in the dense network."""
    silent: tuple[int, ...] = ()
    """Outputs that stay 0."""

    @staticmethod
    def begin(site: Site, dense: nn.Module, gone: frozenset[int], silent: tuple[int, ...] = ()) -> System:
        """With nothing summed yet."""
        rows, start = site.rows, start_of(site.rows.layer)
        old: Any = rows.layer
        equations = NormalEquations.empty(rows.columns, rows.outputs, str(start.device))
        return System(equations, start, gone, rows.columns // old.weight.shape[1], *norm_of(site, dense), silent)

    def emptied(self) -> System:
        """The same layer with nothing summed."""
        columns, outputs = len(self.start) - 1, self.start.shape[1]
        return replace(self, equations=NormalEquations.empty(columns, outputs, str(self.start.device)))

    def write(self, module: nn.Module, name: str, weights: Tensor) -> None:
        """`weights` (columns + 1, outputs), the bias last, into layer `name`; the BatchNorm behind it takes up the bias."""
        if self.silent:
            weights = weights.clone()
            weights[:, list(self.silent)] = 0
        write(module, name, weights, self.norm, self.mean)

    def solve(self) -> Tensor:
        """(columns + 1, outputs): the ridge solution that reads the channels that are left."""
        return self.equations.solve(self.columns(self.channels), self.start)

    def nested(self) -> Nested:
        """The same with its factor."""
        return self.equations.nested(self.columns(self.channels), self.start)

    def columns(self, channels: Collection[int]) -> list[int]:
        return [channel * self.kernel + k for channel in channels for k in range(self.kernel)]

    @property
    def read(self) -> list[int] | None:
        """Input channels that have to be looked at; None for all."""
        return self.channels if self.gone else None

    @property
    def channels(self) -> list[int]:
        """Input channels that are left."""
        return [c for c in range((len(self.start) - 1) // self.kernel) if c not in self.gone]


@dataclass(frozen=True)
class Block:
    """Some output positions: (images, columns, positions) fields, (images, outputs, positions) targets and rectifier offsets.

    A rectifier passes on what lies above minus the offset, or below it for channels whose scale is negative.
    """

    fields: Tensor
    targets: Tensor
    offsets: Tensor

    @staticmethod
    def of(
        site: Site, found: Place, wanted: Tensor, seed: int, channels: Sequence[int] | None = None
    ) -> Iterator[Block]:
        """Of one batch, `found` in the compensated network; `wanted` (images, outputs, positions) of the dense one, with its sum.

        `channels`: that the layer may read, None for all.
        """
        rows, way = site.rows, site.outlet
        beside = rows.pick(way.beside(found), seed)
        offsets = beside + way.constant(found.output)[:, None]
        start, positions = 0, found.output.numel() // rows.outputs // len(found.output)
        for fields, targets in rows.fields(found.inputs, wanted - beside, positions, seed, channels):
            yield Block(fields, targets, offsets[start : start + len(fields)])
            start += len(fields)

    def moved(self, fit: Tensor, sign: Tensor) -> Tensor:
        """The targets; wherever the rectifier gives 0, the nearest value to the `fit` for which it does so."""
        return rectified(self.targets, self.offsets, fit, sign)[0]


def rectified(targets: Tensor, offsets: Tensor, fit: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """(images, outputs, positions) each: what `Block.moved` says, and whether a small change of the `fit` matters."""
    import torch

    direction = sign.to(fit)[:, None]
    passed = (direction * (targets + offsets) > 0) | (direction == 0)
    above = direction * (fit + offsets) > 0
    return torch.where(passed, targets, torch.where(above, -offsets, fit)), passed | above


def start_of(layer: Any) -> Tensor:
    """(columns + 1, outputs): a layer's weights, its bias or zeros last."""
    import torch

    weight = layer.weight.detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    return torch.cat([weight.flatten(1), bias[:, None]], 1).T


def norm_of(site: Site, dense: nn.Module) -> tuple[str, Tensor | None]:
    """The BatchNorm that takes up the bias, with its running mean in the dense network; "" where the layer itself has to."""
    layer: Any = site.rows.layer
    norm = site.outlet.norm if layer.bias is None else ""
    mean: Any = dense.get_submodule(norm).running_mean if norm else None
    return norm, mean


def write(module: nn.Module, name: str, weights: Tensor, norm: str, mean: Tensor | None) -> None:
    """`weights` (columns + 1, outputs) into a layer; the bias into itself or, given its running mean, into a BatchNorm."""
    layer: Any = module.get_submodule(name)
    layer.weight.copy_(weights[:-1].T.reshape(layer.weight.shape))
    if mean is None:
        add_bias(module, name).copy_(weights[-1])
    else:
        behind: Any = module.get_submodule(norm)
        behind.running_mean.copy_(mean - weights[-1])
