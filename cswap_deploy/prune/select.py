"""Scores + cost + target → which units leave. Pure functions on plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd, lcm
from typing import Literal

from cswap_deploy.artifacts import CostTerm, Group, Groups, GroupScores
from cswap_deploy.errors import PruningError

Kept = dict[str, tuple[int, ...]]
CostKind = Literal["macs", "params"]


def choose_units(
    groups: Groups, scores: tuple[GroupScores, ...], keep: Kept, kind: CostKind, fraction: float, round_to: int
) -> Kept:
    """Remove units, least loss per saved cost first, until `fraction` of the dense cost is left.

    Units leave in lots that keep a group's widths multiples of `round_to` (`step_of`); the last lot of a group stays.
    Errors: PruningError when even that is above the target.
    """
    bench = _Bench(groups, kind, round_to, {item.group: ranking(item, keep[item.group]) for item in scores})
    while bench.cost > fraction * bench.dense * (1 + 1e-12):
        best = bench.cheapest()
        if best is None:
            raise PruningError(
                f"{fraction:.3f} of the {kind} cannot be reached: with every group at its narrowest "
                f"{bench.cost / bench.dense:.3f} is left",
                f"raise prune.target, lower prune.round_to ({round_to}), or shorten prune.skip",
            )
        bench.remove(best)
    return {name: tuple(sorted(unit for unit, _ in ranked)) for name, ranked in bench.ranked.items()}


def narrowest(groups: Groups, kind: CostKind, round_to: int) -> float:
    """The fraction of the dense cost that is left when every group is as narrow as `round_to` lets it be."""
    keep = {group.name: tuple(range(floor_of(group, round_to))) for group in groups.groups}
    return groups.cost(keep)[kind == "macs"] / groups.cost({})[kind == "macs"]


def unreachable(
    groups: Groups, kind: CostKind, fraction: float, multiple: int, share: float = 1.0
) -> PruningError | None:
    """Why so small a part of the dense network's cost cannot be reached.

    `share`: the dense network's part of all that the groups' costs count, biases that compensation may add among them.
    """
    if not groups.groups:
        return nothing(groups)
    least = narrowest(groups, kind, multiple) / share
    if fraction >= least - 1e-9:
        return None
    return PruningError(
        f"prune.target asks to keep {fraction:g} of the {kind}; with every group at its narrowest "
        f"(round_to {multiple}) {least:.3f} is left",
        f"raise prune.target.{kind}, lower prune.round_to, or shorten prune.skip",
    )


def nothing(groups: Groups) -> PruningError:
    """That no group may be narrowed, and why."""
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in groups.refused[:3])
    return PruningError(f"nothing in this network can be pruned ({reasons})", "set prune.target: null")


Ranking = list[tuple[int, float]]


def ranking(item: GroupScores, kept: tuple[int, ...]) -> Ranking:
    """(unit, value) of the kept units, the most valuable first; ties by index so that the same scores give the same plan."""
    value = dict(zip(item.units, item.keep_value, strict=True))
    return sorted(((unit, value[unit]) for unit in kept), key=lambda pair: (-pair[1], pair[0]))


def step_of(group: Group, round_to: int) -> int:
    """Units of which the group's width is a multiple, so that every tensor keeps a multiple of `round_to` indices of it.

    Of heads only what they own several indices of counts: a table with one entry for each head is no width of a layer.
    """
    per_unit: dict[tuple[str, int], int] = {}
    for member in group.members:
        place = member.tensor, member.axis
        per_unit[place] = per_unit.get(place, 0) + member.repeat
    if group.kind == "heads":
        per_unit = {place: count for place, count in per_unit.items() if count > 1}
        return lcm(*(round_to // gcd(round_to, count) for count in per_unit.values()))
    return lcm(*(round_to // gcd(round_to, count) for count in per_unit.values())) if per_unit else round_to


def floor_of(group: Group, round_to: int) -> int:
    """Units that stay at the least."""
    return min(group.units, step_of(group, round_to))


def spread(step: int, units: int, most: int) -> tuple[int, ...]:
    """The step and multiples of it below `units`, narrow to wide: all, or about `most` that are multiples of one of them.

    What a runtime computes in blocks is wide in whole blocks so: 8, 16, 32, 48 in place of 8, 24, 40.
    """
    stride = step * max(1, units // (most * step))
    return tuple(dict.fromkeys(width for width in (step, *range(stride, units, stride)) if width < units))


@dataclass
class _Bench:
    """Widths on the way down, with what each group's next lot would lose and save."""

    groups: Groups
    kind: CostKind
    round_to: int
    ranked: dict[str, Ranking]
    savings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.terms: dict[str, list[CostTerm]] = {name: [] for name in self.ranked}
        for term in self.groups.terms:
            for name in _owners(term) & set(self.ranked):
                self.terms[name].append(term)
        self.dense = self.groups.cost({})[self.kind == "macs"]
        keep = {name: tuple(unit for unit, _ in ranked) for name, ranked in self.ranked.items()}
        self.cost = self.groups.cost(keep)[self.kind == "macs"]
        self.removed = {name: self.groups.by_name[name].units - len(ranked) for name, ranked in self.ranked.items()}
        self.savings = {name: self._saving(name) for name in self.ranked}

    def cheapest(self) -> str | None:
        """The group whose next lot loses least per saved cost; None when every group is at its narrowest."""
        candidates = [name for name in self.ranked if self._lot(name) and self.savings[name] > 0]
        return min(candidates, key=lambda name: (self._loss(name) / self.savings[name], name), default=None)

    def remove(self, name: str) -> None:
        lot = self._lot(name)
        self.cost -= self.savings[name]
        self.removed[name] += lot
        del self.ranked[name][-lot:]
        for other in {owner for term in self.terms[name] for owner in _owners(term)} & set(self.ranked):
            self.savings[other] = self._saving(other)

    def _lot(self, name: str) -> int:
        """Units in the group's next lot; 0 when it is at its narrowest."""
        group, width = self.groups.by_name[name], len(self.ranked[name])
        if width <= floor_of(group, self.round_to):
            return 0
        step = step_of(group, self.round_to)
        return width % step or step

    def _loss(self, name: str) -> float:
        return sum(value for _, value in self.ranked[name][-self._lot(name) :])

    def _saving(self, name: str) -> float:
        after = {**self.removed, name: self.removed[name] + self._lot(name)}
        return sum(
            (term.macs if self.kind == "macs" else term.params) * (term.fraction(self.removed) - term.fraction(after))
            for term in self.terms[name]
        )


def _owners(term: CostTerm) -> set[str]:
    return {owner for axis in term.axes for owner, _ in axis.owners}
