"""What every group's width costs, learned from whole networks that were measured with it.

The latency, as a part of the dense network's, is a constant, plus for every layer a part that shrinks with the product of its widths
and a part that shrinks with each of them. Sizes count in whole blocks, and once more in smaller ones: a runtime may work in blocks of
output channels and read single input channels. Parts of layers of one shape are equal, and all are at least 0. Where branches may leave,
a layer also has a part that is there as long as the layer is.
There are more of them than a few dozen networks tell apart. So rates that all layers share are fitted first (a constant, per MAC, per
weight, per output position and index of an axis that groups shorten, per layer), and all parts are drawn towards what these say.
Below a multiple a runtime may do something else altogether: what a kind of group takes there beside its layers has a number for each
width, drawn towards 0. At other widths there is none: in sum over the kinds it made predictions of narrow networks worse
(benchmarks/staircase.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, prod, sqrt
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Axis, CostTerm, Groups
from cswap_deploy.budget.values import GroupSteps, LayerTime, Staircase
from cswap_deploy.prune.select import step_of
from cswap_deploy.samples import Ratio

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

Widths = Mapping[str, int]

FIRM, LEAST = 0.1, 0.01
"""A part (the constant's, or that of all layers of a shape) that is off by as much as the rates say it is, and by `LEAST` of the dense
latency at least, counts like a measurement that is off by `FIRM`."""
CONSTANT, RATES, RATES_FIRM = 0.2, (0.8, 0.0, 0.0, 0.0), 0.01
"""What the constant, and MACs, weights, positions and layers are expected to make up, and how firmly: decides where little was measured."""
BESIDE = 0.06
"""What all groups of a kind take beside their layers at a width: so much of the dense latency counts like a measurement off by `FIRM`."""
DENSE_WEIGHT = 30.0
"""How firmly the parts add up to 1 for the dense network, which every ratio refers to."""
FOLDS = 4
COARSER = (2, 4)
"""Blocks, in multiples, that are tried beside the parts of one: a multiple that pays a little may still be no whole block."""
SMALLER = (2, 4, 8, 16)
"""Parts of the block that are tried for the smaller one."""
LEAST_TOTAL = 1e-3
"""Of the dense latency: what narrow groups save beside their layers adds up to no less."""
EARNED = 0.001
"""By how much smaller blocks beside must lower the relative error, which have as many numbers again."""


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
    settings best that it has not seen; likewise the smaller one beside it, if any.
    """

    together = sorted(together, key=lambda item: item.ratio.value)  # narrow and wide ones in every fold
    folds = FOLDS if len(together) >= 2 * FOLDS else 0

    def of(shapes: _Shapes, seen: Sequence[Observation]) -> Staircase:
        constant, layers, beside = shapes.fitted([*alone, *seen])
        steps = tuple(
            GroupSteps(tuple(kinds[name]), (*options[name], groups.by_name[name].units), beside[name]) for name in kinds
        )
        return Staircase(multiple, shapes.blocks[0], constant, layers, steps, len(alone) + len(together), ())

    def missed(shapes: _Shapes) -> list[float]:
        found = list[float]()
        for fold in range(folds):
            try:
                known = Steps(
                    groups, of(shapes, [item for place, item in enumerate(together) if place % FOLDS != fold])
                )
            except RuntimeError:  # the solver's, where it does not converge
                return [inf]
            found += [known.total(item.widths) / item.ratio.value - 1 for item in together[fold::FOLDS]]
        return found

    parts: list[int] = [multiple // part for part in (1, 2, 4, 8, 16, 32) if multiple % part == 0]
    single = [(block,) for block in (*parts, *(multiple * times for times in COARSER))]
    pairs = [(block, block // part) for (block,) in single for part in SMALLER if block % part == 0]
    tried = [_Shapes.of(groups, kinds, options, multiple, blocks) for blocks in (*single, *pairs)]
    found = [(missed(shapes), shapes) for shapes in tried]
    errors, best = min(found, key=lambda pair: _size(pair[0]) + (EARNED if len(pair[1].blocks) > 1 else 0))
    return replace(of(best, together), errors=tuple(errors))


def off_by(errors: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile of relative errors, without their signs; at least one."""
    sizes = sorted(map(abs, errors))
    return sizes[len(sizes) // 2], sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]


def _size(errors: Sequence[float]) -> float:
    """Root mean square; 0 where nothing is known."""
    return sqrt(sum(error**2 for error in errors) / max(1, len(errors)))


@dataclass(frozen=True)
class Steps:
    """A staircase of a network's groups: predicts the ratio of any widths, and counts as the cost of a search."""

    groups: Groups
    staircase: Staircase

    def total(self, widths: Widths) -> float:
        """Groups that are not named are whole."""
        widths = self.groups.closed(widths)
        layers = sum(self._layer(number, widths) for number in range(len(self._layers)))
        return max(LEAST_TOTAL, self.staircase.constant + layers + self._beside(widths, self._narrow))

    def changes(self, at: Widths, name: str, widths: Sequence[int]) -> list[float]:
        """By how much the network with the widths `at` gets slower when group `name` alone gets each of `widths`."""

        def own(width: int) -> float:
            changed = self.groups.closed({**at, name: width})
            layers = sum(self._layer(number, changed) for number in self._of_group[name])
            return layers + self._beside(changed, (name, *self._behind.get(name, ())))

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
            owners |= dict.fromkeys(branch for name in owners for branch in self._leads(name))
            for name in owners:
                found[name].append(number)
        return found

    def _leads(self, name: str) -> list[str]:
        """The branches that a group leaves with, directly or with another one."""
        found = list[str]()
        while (name := self.groups.behind.get(name, "")) and name not in found:
            found.append(name)
        return found

    @cached_property
    def _steps(self) -> dict[str, GroupSteps]:
        return {name: steps for steps in self.staircase.steps for name in steps.groups}

    @cached_property
    def _narrow(self) -> dict[str, dict[int, float]]:
        """Groups that take something beside their layers, by width."""
        return {name: steps.beside for name, steps in self._steps.items() if steps.beside}

    @cached_property
    def _behind(self) -> dict[str, list[str]]:
        """What leaves with each branch."""
        found: dict[str, list[str]] = {}
        for name in self.groups.behind:
            for branch in self._leads(name):
                found.setdefault(branch, []).append(name)
        return found

    def _beside(self, widths: Widths, names: Iterable[str]) -> float:
        return sum(self._narrow[name].get(widths.get(name, -1), 0.0) for name in names if name in self._narrow)

    def _layer(self, number: int, widths: Widths) -> float:
        term, layer = self._layers[number]
        parts = [_part(axis, widths, self._units, layer.block) for axis in term.axes]
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
    kinds: Mapping[str, Sequence[str]]
    blocks: tuple[int, ...]
    terms: tuple[tuple[CostTerm, ...], ...]
    narrow: tuple[tuple[str, int], ...]
    """Kinds and their widths below a multiple."""
    rows: dict[int, Floats] = field(default_factory=dict, compare=False)
    """Of observations, by their identity: each takes part in several fits."""

    @staticmethod
    def of(
        groups: Groups,
        kinds: Mapping[str, Sequence[str]],
        options: Mapping[str, Sequence[int]],
        multiple: int,
        blocks: tuple[int, ...],
    ) -> _Shapes:
        kind_of = {name: kind for kind, names in kinds.items() for name in names}
        found: dict[object, list[CostTerm]] = {}
        for term in groups.terms:
            if term.macs and term.axes:
                owners = tuple(
                    (axis.size, tuple((kind_of[name], repeat) for name, repeat in axis.owners)) for axis in term.axes
                )
                found.setdefault((term.macs, term.params, owners), []).append(term)
        narrow = [
            (kind, width)
            for kind in kinds
            for width in options[kind]
            if 0 < width < step_of(groups.by_name[kind], multiple)
        ]
        return _Shapes(groups, kinds, blocks, tuple(map(tuple, found.values())), tuple(narrow))

    def once(self, block: int) -> bool:
        """Whether layers have a part that is there as long as they are: beside those that go in blocks of the first size."""
        return block == self.blocks[0] and any(group.branch for group in self.groups.groups)

    def fitted(self, seen: Sequence[Observation]) -> tuple[float, tuple[LayerTime, ...], dict[str, dict[int, float]]]:
        """The constant, the layers' parts and what kinds take beside them with the least relative error: two least-squares problems.

        All are at least 0 but the last, which are the difference of two numbers.
        """
        import numpy as np
        from scipy.optimize import nnls

        dense, rates = self._features({}), self._rates()
        rows = np.vstack([*(self._row(item) for item in seen), DENSE_WEIGHT * dense])
        sides = [1.0] * len(seen) + [DENSE_WEIGHT]

        expected = np.array([CONSTANT, *RATES, *(0.0,) * (rates.shape[1] - 1 - len(RATES))])
        shared = np.vstack([rows @ rates, RATES_FIRM * np.diag(dense @ rates)])
        wanted = dense * (rates @ nnls(shared, np.array([*sides, *(RATES_FIRM * expected)]))[0])
        size = np.maximum(wanted, LEAST)
        counts = [self._counts(item.widths) / item.ratio.value for item in seen]
        beside = np.vstack([*counts, np.zeros((1 + len(dense), len(self.narrow)))])
        firm = FIRM / BESIDE * np.diag([float(len(self.kinds[kind])) for kind, _ in self.narrow])
        own = np.block(
            [
                [np.vstack([rows, FIRM * np.diag(dense / size)]), beside, -beside],
                [np.zeros((len(firm), len(dense))), firm, -firm],
            ]
        )
        found, _ = nnls(own, np.array([*sides, *(FIRM * wanted / size), *(0.0 for _ in self.narrow)]))

        parts, more, less = np.split(found / float(found[: len(dense)] @ dense), [len(dense), len(dense) + len(firm)])
        took: dict[str, dict[int, float]] = {kind: {} for kind in self.kinds}
        for (kind, width), value in zip(self.narrow, (more - less).tolist(), strict=True):
            took[kind][width] = value
        return float(parts[0]), tuple(self._layers(parts[1:].tolist())), took

    def _layers(self, parts: Sequence[float]) -> Iterator[LayerTime]:
        """From the parts behind the constant's; those that take nothing are left out."""
        place = 0
        for block in self.blocks:
            for terms in self.terms:
                axes = len(terms[0].axes)
                sides, once = axes if axes > 1 else 0, self.once(block)
                own = parts[place : place + 1 + sides + once]
                place += len(own)
                if any(own):
                    names, alone = tuple(term.name for term in terms), (0.0,) * axes
                    yield LayerTime(names, own[0], tuple(own[1 : 1 + sides]) or alone, own[-1] if once else 0.0, block)

    def _row(self, item: Observation) -> Floats:
        """Its features, relative to what was measured."""
        if id(item) not in self.rows:
            self.rows[id(item)] = self._features(item.widths) / item.ratio.value
        return self.rows[id(item)]

    def _features(self, widths: Widths) -> Floats:
        """1, then by block for each shape the sum over its layers of the product, of each side if there are several, and their number.

        Layers of branches that have left count nowhere; the number of layers is there once, and only where there are branches.
        """
        import numpy as np

        units = {group.name: group.units for group in self.groups.groups}
        widths, found = self.groups.closed(widths), [1.0]
        for block in self.blocks:
            for terms in self.terms:
                parts = np.array([[_part(axis, widths, units, block) for axis in term.axes] for term in terms])
                there = parts.all(1)
                found.append(float(parts.prod(1).sum()))
                found += parts[there].sum(0).tolist() if parts.shape[1] > 1 else []
                found += [float(there.sum())] if self.once(block) else []
        return np.array(found)

    def _counts(self, widths: Widths) -> Floats:
        """How many groups of a kind have each width below a multiple."""
        import numpy as np

        widths = self.groups.closed(widths)
        return np.array(
            [float(sum(widths.get(name) == width for name in self.kinds[kind])) for kind, width in self.narrow]
        )

    def _rates(self) -> Floats:
        """(features, 1 + 4 per block): what each feature of one layer costs where a constant, or in one size of blocks MACs, weights,
        positions or layers, alone cost anything.

        Each column adds up to the dense latency, or is 0. Positions (MACs per weight) are those of the output, times the size of each
        axis: they stand for what a layer reads and writes, too few where a stride skips inputs, none where it has no weights of its own.
        """
        import numpy as np

        rates, row = np.zeros((len(self._features({})), 1 + len(RATES) * len(self.blocks))), 1
        rates[0, 0] = 1.0
        for number, block in enumerate(self.blocks):
            for terms in self.terms:
                macs, weights, sizes = terms[0].macs, terms[0].params, [axis.size for axis in terms[0].axes]
                values = [macs / weights * size if weights else 0.0 for size in sizes]
                several = len(sizes) > 1
                own = [[macs, weights, 0.0 if several else values[0], 0.0]]
                own += [[0.0, 0.0, value, 0.0] for value in values] if several else []
                own += [[0.0, 0.0, 0.0, 1.0]] if self.once(block) else []
                first = 1 + len(RATES) * number
                rates[row : row + len(own), first : first + len(RATES)] = own
                row += len(own)
        whole = self._features({}) @ rates
        return rates / np.where(whole > 0, whole, 1.0)
