"""Measured damage of every group at several widths + cost + target → how wide each group is: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cswap_deploy.artifacts import CostTerm, Curve, Groups
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.select import CostKind, spread, step_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROUNDS = 4
"""Times, at most, that the cost, a product over the axes of each layer, is taken as a sum over the groups at the widths found so far."""
BINS = 4096
"""Steps of the cost that the knapsack tells apart."""
CHOICES = 64
"""Widths of a group that the knapsack may choose from, about."""
LEAST_DAMAGE = 1e-6
"""Nats that a removed unit costs at least, so that nothing leaves for nothing."""

Widths = dict[str, int]


class Cost(Protocol):
    """What a network costs over the widths of its groups; groups that are not named are whole."""

    def total(self, widths: Mapping[str, int]) -> float:
        """Of the network with these widths."""

    def changes(self, at: Mapping[str, int], name: str, widths: Sequence[int]) -> list[float]:
        """By how much the network with the widths `at` gets dearer when group `name` alone gets each of `widths`."""


def choose_widths(
    groups: Groups, curves: Sequence[Curve], now: Widths, kind: CostKind, fraction: float, round_to: int
) -> Widths:
    """The widths with the least damage in sum whose cost is at most `fraction` of the dense network's.

    `now`: widths that the curves were measured at; none grows. Errors: PruningError when the narrowest widths cost more.
    """
    allowed = {curve.group: _allowed(groups, curve, round_to) for curve in curves}
    bill = _Bill.of(groups, kind)
    dense = bill.total({group.name: group.units for group in groups.groups})
    found = least_damage(bill, curves, now, allowed, fraction * dense)
    if bill.total(found) > fraction * dense * (1 + 1e-9):
        raise PruningError(
            f"{fraction:.3f} of the {kind} cannot be reached in this step: with every group at its narrowest "
            f"{bill.total(found) / dense:.3f} is left",
            f"raise prune.target, lower prune.round_to ({round_to}), or shorten prune.skip",
        )
    return found


def least_damage(
    cost: Cost, curves: Sequence[Curve], now: Widths, allowed: Mapping[str, Sequence[int]], target: float
) -> Widths:
    """The widths, of those `allowed` and the present ones, with the least damage in sum whose cost is at most `target`.

    Where none costs so little: each group's cheapest.
    """
    target *= 1 + 1e-9
    options = {curve.group: _options(curve, now[curve.group], allowed[curve.group]) for curve in curves}
    cheapest = _cheapest(cost, options, now)
    if cost.total(cheapest) > target:
        return cheapest
    settled = [_settled(cost, options, around, target) for around in (now, cheapest)]
    found = [widths for widths in settled if cost.total(widths) <= target]
    return min(found or [_filled(cost, options, cheapest, target)], key=lambda widths: _damage(options, widths))


def damage_at(curves: Sequence[Curve], widths: Mapping[str, int]) -> float:
    """In sum, beyond what the network has lost that the curves were measured on (nats)."""
    return sum(between(curve, len(curve.order), [widths[curve.group]])[0] for curve in curves)


# --- what a group may be


@dataclass(frozen=True)
class _Options:
    """Widths that a group may have, narrowest first, the present one last, and the damage of each."""

    widths: tuple[int, ...]
    damage: tuple[float, ...]


def _allowed(groups: Groups, curve: Curve, round_to: int) -> tuple[int, ...]:
    group = groups.by_name[curve.group]
    return (*spread(step_of(group, round_to), group.units, CHOICES), *curve.widths)


def _options(curve: Curve, now: int, allowed: Sequence[int]) -> _Options:
    """None below those at which the damage was measured."""
    least = min(curve.widths, default=now)
    widths = sorted({*(width for width in allowed if least <= width < now), now})
    damage = [max(value, LEAST_DAMAGE * (now - width)) for value, width in zip(between(curve, now, widths), widths)]
    return _Options(tuple(widths), tuple(damage))


def between(curve: Curve, now: int, widths: Sequence[int]) -> list[float]:
    """The damage at these widths: monotone cubic between those of the curve (Fritsch and Carlson 1980), 0 at the width `now`."""
    import numpy as np
    from scipy.interpolate import PchipInterpolator

    known = {now: 0.0, **dict(zip(curve.widths, curve.damage, strict=True))}
    measured = sorted(known)
    if len(measured) == 1:
        return [0.0 for _ in widths]
    values = np.maximum.accumulate([known[width] for width in measured][::-1])[::-1].round(12)
    found: list[float] = PchipInterpolator(measured, values)(widths).tolist()
    return found


def _damage(options: Mapping[str, _Options], widths: Widths) -> float:
    return sum(found.damage[found.widths.index(widths[name])] for name, found in options.items())


# --- what it costs


@dataclass(frozen=True)
class _Bill:
    """What each layer costs when nothing has left, and which groups its axes belong to."""

    units: Widths
    whole: tuple[float, ...]
    terms: tuple[CostTerm, ...]
    of_group: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(groups: Groups, kind: CostKind) -> _Bill:
        terms = groups.terms
        whole = tuple(float(term.macs if kind == "macs" else term.params) for term in terms)
        owners = [{owner for axis in term.axes for owner, _ in axis.owners} for term in terms]
        units = {group.name: group.units for group in groups.groups}
        return _Bill(
            units, whole, terms, {name: tuple(i for i, own in enumerate(owners) if name in own) for name in units}
        )

    def total(self, widths: Mapping[str, int]) -> float:
        return self._sum(range(len(self.terms)), widths)

    def changes(self, at: Mapping[str, int], name: str, widths: Sequence[int]) -> list[float]:
        begun = self._sum(self.of_group[name], at)
        return [self._sum(self.of_group[name], {**at, name: width}) - begun for width in widths]

    def _sum(self, numbers: Sequence[int], widths: Mapping[str, int]) -> float:
        removed = {name: self.units[name] - width for name, width in widths.items()}
        return sum(self.whole[number] * self.terms[number].fraction(removed) for number in numbers)


# --- choosing


def _cheapest(cost: Cost, options: Mapping[str, _Options], now: Widths) -> Widths:
    """Each group at the width that costs least: the narrowest, but where a narrower layer is slower."""
    found = dict(now)
    for name, choice in options.items():
        changes = cost.changes(found, name, choice.widths)
        found[name] = choice.widths[changes.index(min(changes))]
    return found


def _settled(bill: Cost, options: Mapping[str, _Options], around: Widths, target: float) -> Widths:
    """Chosen with the costs as they are at `around`, then with those at the widths found, as long as that is better."""
    best = _filled(bill, options, _chosen(bill, options, around, target), target)
    for _ in range(ROUNDS - 1):
        found = _filled(bill, options, _chosen(bill, options, best, target), target)
        if _damage(options, found) >= _damage(options, best):
            break
        best = found
    return best


def _chosen(bill: Cost, options: Mapping[str, _Options], around: Widths, target: float) -> Widths:
    """Least damage with the cost taken as a sum; of the budgets for that sum the largest whose true cost meets the target.

    Two groups that narrow one layer save less together than in sum.
    """
    changes = {name: bill.changes(around, name, found.widths) for name, found in options.items()}
    table = _Knapsack.of(options, changes)
    low, high = 0, BINS
    while low < high:
        middle = (low + high + 1) // 2
        if bill.total({**around, **table.widths(options, middle)}) <= target:
            low = middle
        else:
            high = middle - 1
    return {**around, **table.widths(options, low)}


def _filled(bill: Cost, options: Mapping[str, _Options], widths: Widths, target: float) -> Widths:
    """Groups get wider again where the target leaves room for it, the one first that loses least damage by it."""
    widths = dict(widths)
    while True:
        room = target - bill.total(widths)
        gains = []
        for name, found in options.items():
            place = found.widths.index(widths[name])
            wider = found.widths[place + 1 :]
            for at, change in enumerate(bill.changes(widths, name, wider), place + 1):
                if change <= room:
                    gains.append((found.damage[place] - found.damage[at], name, found.widths[at]))
        if not gains:
            return widths
        _, name, width = max(gains)
        widths[name] = width


@dataclass(frozen=True)
class _Knapsack:
    """Per budget of 0 to BINS steps above the least cost, what each group takes when the damage is least."""

    taken: npt.NDArray[np.int64]
    """(groups, BINS + 1): the place among the group's options."""
    steps: tuple[npt.NDArray[np.int64], ...]
    """Per group the steps that each of its options costs above its cheapest."""

    @staticmethod
    def of(options: Mapping[str, _Options], changes: Mapping[str, Sequence[float]]) -> _Knapsack:
        """By dynamic programming over the groups."""
        import numpy as np

        above = [np.array(found) - min(found) for found in changes.values()]
        step = max(sum(float(found.max()) for found in above) / BINS, 1e-300)
        steps = tuple(np.ceil(found / step - 1e-9).astype(np.int64) for found in above)
        least = np.zeros(BINS + 1)
        taken = []
        for found, own in zip(options.values(), steps, strict=True):
            tried = np.full((len(own), BINS + 1), np.inf)
            for place, (cost, damage) in enumerate(zip(own, found.damage, strict=True)):
                tried[place, cost:] = least[: BINS + 1 - cost] + damage
            taken.append(tried.argmin(0))
            least = tried.min(0)
        return _Knapsack(np.array(taken).reshape(len(steps), BINS + 1), steps)

    def widths(self, options: Mapping[str, _Options], budget: int) -> Widths:
        found: Widths = {}
        for number, (name, choice) in reversed(list(enumerate(options.items()))):
            place = int(self.taken[number, budget])
            found[name] = choice.widths[place]
            budget -= int(self.steps[number][place])
        return found
