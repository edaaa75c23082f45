"""What every group's width costs, learned from whole networks that were measured with it.

The latency, as a part of the dense network's, is a constant, plus for every layer a part that shrinks with the product of its widths
and a part that shrinks with each of them. Sizes count in whole blocks. Parts of layers of one shape are equal, and all are at least 0.
Where branches may leave, a layer also has a part that is there as long as the layer is.
There are more of them than a few dozen networks tell apart. So five rates that all layers share are fitted first (a constant, per MAC, per
weight, per output position and index of an axis that groups shorten, per layer), and all parts are drawn towards what these say.
What a kind of group measured alone deviates from that is not kept: in sum over the kinds it made predictions of narrow networks worse
(benchmarks/staircase.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Axis, CostTerm, Groups
from cswap_deploy.budget.values import GroupSteps, LayerTime, Staircase
from cswap_deploy.samples import Ratio

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

Widths = Mapping[str, int]

FIRM, LEAST = 0.1, 0.01
"""A part (the constant's, or that of all layers of a shape) that is off by as much as the rates say it is, and by `LEAST` of the dense
latency at least, counts like a measurement that is off by `FIRM`."""
RATES, RATES_FIRM = (0.2, 0.8, 0.0, 0.0, 0.0), 0.01
"""What the constant, MACs, weights, positions and layers are expected to make up, and how firmly: decides where little was measured."""
DENSE_WEIGHT = 30.0
"""How firmly the parts add up to 1 for the dense network, which every ratio refers to."""
FOLDS = 4
COARSER = (2, 4)
"""Blocks, in multiples, that are tried beside the parts of one: a multiple that pays a little may still be no whole block."""


@dataclass(frozen=True)
class Observation:
    """A setting of widths and the ratio that was measured."""

    widths: Widths
    ratio: Ratio


def learn(
    groups: Groups,
    kinds: Mapping[str, Sequence[str]],
    options: Mapping[str, Sequence[int]],
    multiple: int,
    alone: Sequence[Observation],
    together: Sequence[Observation],
) -> Staircase:
    """`kinds`: groups that cost the same, by the first; `options`: widths that each kind may have; `alone`:
    observations of one kind that is narrow. The block is the part of the multiple, or the one of a few multiples of it, that predicts
    settings best that it has not seen.
    """

    together = sorted(together, key=lambda item: item.ratio.value)  # narrow and wide ones in every fold
    steps = tuple(GroupSteps(tuple(kinds[name]), (*options[name], groups.by_name[name].units)) for name in kinds)

    def of(block: int, seen: Sequence[Observation]) -> Staircase:
        constant, layers = _Shapes.of(groups, kinds, block).fitted([*alone, *seen])
        return Staircase(multiple, block, constant, layers, steps, len(alone) + len(together), ())

    best, errors = multiple, list[float]()
    finer = [multiple // part for part in (1, 2, 4, 8, 16, 32) if multiple % part == 0]
    for block in [*finer, *(multiple * times for times in COARSER)]:
        found = list[float]()
        for fold in range(FOLDS if len(together) >= 2 * FOLDS else 0):
            known = Steps(groups, of(block, [item for place, item in enumerate(together) if place % FOLDS != fold]))
            found += [known.total(item.widths) / item.ratio.value - 1 for item in together[fold::FOLDS]]
        if found and (not errors or _size(found) < _size(errors)):
            best, errors = block, found
    return replace(of(best, together), errors=tuple(errors))


def off_by(errors: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile of relative errors, without their signs; at least one."""
    sizes = sorted(map(abs, errors))
    return sizes[len(sizes) // 2], sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]


def _size(errors: Sequence[float]) -> float:
    return sum(error**2 for error in errors)


@dataclass(frozen=True)
class Steps:
    """A staircase of a network's groups: predicts the ratio of any widths, and counts as the cost of a search."""

    groups: Groups
    staircase: Staircase

    def total(self, widths: Widths) -> float:
        """Groups that are not named are whole."""
        widths = self.groups.closed(widths)
        return self.staircase.constant + sum(self._layer(number, widths) for number in range(len(self._layers)))

    def changes(self, at: Widths, name: str, widths: Sequence[int]) -> list[float]:
        """By how much the network with the widths `at` gets slower when group `name` alone gets each of `widths`."""

        def own(width: int) -> float:
            changed = self.groups.closed({**at, name: width})
            return sum(self._layer(number, changed) for number in self._of_group[name])

        begun = own(at[name])
        return [own(width) - begun for width in widths]

    def allowed(self, name: str) -> tuple[int, ...]:
        """Widths that a group may have, narrow to wide."""
        return self._steps[name].widths

    @cached_property
    def _layers(self) -> list[tuple[CostTerm, LayerTime]]:
        by_name = {term.name: term for term in self.groups.terms}
        return [(by_name[name], layer) for layer in self.staircase.layers for name in layer.terms]

    @cached_property
    def _units(self) -> dict[str, int]:
        return {group.name: group.units for group in self.groups.groups}

    @cached_property
    def _of_group(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {group.name: [] for group in self.groups.groups}
        for number, (term, _) in enumerate(self._layers):
            owners = dict.fromkeys(owner for axis in term.axes for owner, _ in axis.owners)
            for _ in self.groups.behind:  # what leaves with another branch is that one's too
                owners |= {self.groups.behind[name]: None for name in owners if name in self.groups.behind}
            for name in owners:
                found[name].append(number)
        return found

    @cached_property
    def _steps(self) -> dict[str, GroupSteps]:
        return {name: steps for steps in self.staircase.steps for name in steps.groups}

    def _layer(self, number: int, widths: Widths) -> float:
        term, layer = self._layers[number]
        units, block = self._units, self.staircase.block
        parts = [_part(axis, widths, units, block) for axis in term.axes]
        if not all(parts):  # of a branch that has left
            return 0.0
        sides = sum(side * part for side, part in zip(layer.sides, parts, strict=True))
        return layer.once + layer.product * prod(parts) + sides


def _part(axis: Axis, widths: Widths, units: Mapping[str, int], block: int) -> float:
    """What is left of an axis, in whole blocks."""
    kept = axis.size - sum((units[name] - widths.get(name, units[name])) * repeat for name, repeat in axis.owners)
    return -(-kept // block) / -(-axis.size // block)


# --- learning


@dataclass(frozen=True)
class _Shapes:
    """Layers of the same shape between groups of the same kinds: they take the same time."""

    groups: Groups
    block: int
    terms: tuple[tuple[CostTerm, ...], ...]

    @staticmethod
    def of(groups: Groups, kinds: Mapping[str, Sequence[str]], block: int) -> _Shapes:
        kind_of = {name: kind for kind, names in kinds.items() for name in names}
        found: dict[object, list[CostTerm]] = {}
        for term in groups.terms:
            if term.macs and term.axes:
                owners = tuple(
                    (axis.size, tuple((kind_of[name], repeat) for name, repeat in axis.owners)) for axis in term.axes
                )
                found.setdefault((term.macs, term.params, owners), []).append(term)
        return _Shapes(groups, block, tuple(map(tuple, found.values())))

    @property
    def branches(self) -> bool:
        return any(group.branch for group in self.groups.groups)

    def fitted(self, seen: Sequence[Observation]) -> tuple[float, tuple[LayerTime, ...]]:
        """The constant and the layers' parts with the least relative error: two non-negative least-squares problems."""
        import numpy as np
        from scipy.optimize import nnls

        dense, rates = self._features({}), self._rates()
        rows = np.vstack([*(self._features(item.widths) / item.ratio.value for item in seen), DENSE_WEIGHT * dense])
        sides = [1.0] * len(seen) + [DENSE_WEIGHT]

        shared = np.vstack([rows @ rates, RATES_FIRM * np.diag(dense @ rates)])
        wanted = dense * (rates @ nnls(shared, np.array([*sides, *(RATES_FIRM * np.array(RATES))]))[0])
        size = np.maximum(wanted, LEAST)
        own = np.vstack([rows, FIRM * np.diag(dense / size)])
        found, _ = nnls(own, np.array([*sides, *(FIRM * wanted / size)]))

        found /= float(found @ dense)
        layers, place = [], 1
        for terms in self.terms:
            axes = len(terms[0].axes) if len(terms[0].axes) > 1 else 0
            parts = tuple(float(value) for value in found[place : place + 1 + axes])
            place += 1 + axes
            once = float(found[place]) if self.branches else 0.0
            place += self.branches
            names, alone = tuple(term.name for term in terms), (0.0,) * len(terms[0].axes)
            layers.append(LayerTime(names, parts[0], parts[1:] or alone, once))
        return float(found[0]), tuple(layers)

    def _features(self, widths: Widths) -> Floats:
        """1, then for each shape the sum over its layers of the product, of each side where there are several, and their number.

        Layers of branches that have left count nowhere; where there are no branches, the number of layers is left out.
        """
        import numpy as np

        units = {group.name: group.units for group in self.groups.groups}
        widths, found = self.groups.closed(widths), [1.0]
        for terms in self.terms:
            parts = np.array([[_part(axis, widths, units, self.block) for axis in term.axes] for term in terms])
            there = parts.all(1)
            found.append(float(parts.prod(1).sum()))
            found += parts[there].sum(0).tolist() if parts.shape[1] > 1 else []
            found += [float(there.sum())] if self.branches else []
        return np.array(found)

    def _rates(self) -> Floats:
        """(features, 5): what each feature of one layer costs where a constant, MACs, weights, positions or layers alone cost anything.

        Each column adds up to the dense latency, or is 0. Positions (MACs per weight) are those of the output, times the size of each
        axis: they stand for what a layer reads and writes, too few where a stride skips inputs, none where it has no weights of its own.
        """
        import numpy as np

        found = [[1.0, 0.0, 0.0, 0.0, 0.0]]
        for terms in self.terms:
            macs, weights, sizes = terms[0].macs, terms[0].params, [axis.size for axis in terms[0].axes]
            values = [macs / weights * size if weights else 0.0 for size in sizes]
            several = len(sizes) > 1
            found.append([0.0, macs, weights, 0.0 if several else values[0], 0.0])
            found += [[0.0, 0.0, 0.0, value, 0.0] for value in values] if several else []
            found += [[0.0, 0.0, 0.0, 0.0, 1.0]] if self.branches else []
        rates = np.array(found)
        whole = self._features({}) @ rates
        return rates / np.where(whole > 0, whole, 1.0)
