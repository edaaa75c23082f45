"""In which order the units of a group leave when their consumers are re-fitted after each: greedy elimination with down-dates.

A unit costs what the re-fitted consumers' outputs lose without it given what has left already: w' [H^-1]_jj^-1 w, with H the
consumer's normal equations and w its weights of the unit (optimal brain surgeon, Hassibi and Stork 1992, in blocks). Two copies
of a unit are seen for what they are: the first costs nothing, the second then all that both did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cswap_deploy.prune.least_squares import factorised

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 96
"""Down-dates of all that is left per group, about: of wider groups several units leave between two, each given those before it."""
STALE = 1 / 6
"""Share of the rows and columns that may be of units that have left; they are then taken out."""


@dataclass(frozen=True)
class Consumer:
    """`gram` (n, n): regularised normal equations of the columns that are alive, the bias last; `weight` (n, outputs);
    `owned` (units, columns of a unit): where in them each candidate unit's columns are; `rows` the equations were summed over.
    """

    gram: Tensor
    weight: Tensor
    owned: Tensor
    rows: float


def leaving_costs(consumers: Sequence[Consumer]) -> tuple[list[int], list[float]]:
    """(units, first to leave first; squared error per row that each adds). Units index `owned`; one of them is last to stay."""
    import torch

    states = [_State.of(consumer) for consumer in consumers]
    units = len(consumers[0].owned)
    alive = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    while len(order) < units:
        left = alive.nonzero()[:, 0]
        cost = torch.stack([state.costs(left) for state in states]).sum(0).cpu()
        lot = max(1, min(len(left), units // ROUNDS))
        pool = left[cost.argsort(stable=True)[: 2 * lot]]
        chosen, found = _cheapest(states, pool, lot)
        for state in states if lot < len(left) else ():
            state.drop(chosen)
        alive[chosen] = False
        order += chosen.tolist()
        costs += found
    return order, costs


def _cheapest(states: Sequence[_State], pool: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """`count` units of `pool`, the cheapest first given those before it, and what each costs: exact within the pool."""
    import torch

    parts = [state.part(pool) for state in states]
    left, chosen, costs = list(range(len(pool))), [], []
    for _ in range(count):
        cost = torch.stack([part.costs(torch.tensor(left, device=part.owned.device)) for part in parts]).sum(0).cpu()
        place = int(cost.argmin())
        costs.append(float(cost[place]))
        chosen.append(left.pop(place))
        for part in parts if len(chosen) < count else ():
            part.drop(torch.tensor(chosen[-1:], device=part.owned.device))
    return pool[chosen], costs


@dataclass
class _State:
    """The inverse of what is left, and the weights that are best for it; rows and columns of what is `gone` are stale."""

    inverse: Tensor
    weight: Tensor
    owned: Tensor
    rows: float
    gone: list[int] = field(default_factory=list)

    @staticmethod
    def of(consumer: Consumer) -> _State:
        import torch

        inverse = torch.cholesky_inverse(factorised(consumer.gram)[0])
        return _State(inverse, consumer.weight.double().clone(), consumer.owned, consumer.rows)

    def part(self, units: Tensor) -> _State:
        """Of these units alone, numbered anew; what is eliminated in it leaves this one as it was."""
        import torch

        index = self.owned[units].flatten()
        owned = torch.arange(len(index), device=index.device).reshape(len(units), -1)
        return _State(self.inverse[index][:, index], self.weight[index], owned, self.rows)

    def costs(self, units: Tensor) -> Tensor:
        """(len(units),)"""
        import torch

        index = self.owned[units]
        blocks = self.inverse[index[:, :, None], index[:, None, :]]
        own = self.weight[index]
        found: Tensor = torch.linalg.solve(blocks, own @ own.mT).diagonal(dim1=1, dim2=2).sum(1) / self.rows
        return found

    def drop(self, units: Tensor) -> None:
        import torch

        gone = self.owned[units].flatten()
        towards = torch.linalg.solve(self.inverse[gone][:, gone], torch.cat([self.inverse[gone], self.weight[gone]], 1))
        size = len(self.inverse)
        sides = self.inverse[:, gone]
        self.weight.addmm_(sides, towards[:, size:], alpha=-1)
        self.inverse.addmm_(sides, towards[:, :size], alpha=-1)
        self.gone += gone.tolist()
        if len(self.gone) > STALE * size:
            self._shrink()

    def _shrink(self) -> None:
        """Take out what is stale."""
        import torch

        left = torch.ones(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        left[self.gone] = False
        self.owned = (left.cumsum(0) - 1)[self.owned]
        index = left.nonzero()[:, 0]
        self.inverse, self.weight, self.gone = self.inverse[index[:, None], index], self.weight[index], []
