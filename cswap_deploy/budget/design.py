"""Which widths are worth measuring: extremes, multiples that pay, each kind of group alone, and random ones together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, lcm
from random import Random

from cswap_deploy.artifacts import Groups
from cswap_deploy.prune.select import floor_of, spread, step_of

Widths = dict[str, int]

PAYS = 0.3
"""A multiple pays when the step in the middle of its double brings at least this part of the double's time; 0.5 is in proportion.

In 24 runs of three networks on a processor that works in blocks of 8, multiples of 8, 16 and 32 brought 0.35 and more, 4 up to 0.21.
"""
NOISE = 0.01
"""Of the dense latency: what one short measurement does not tell from nothing."""
CHOICES = 32
"""Widths that a group may have, about."""
SMALL = 4
"""Multiples that a group has at most whose widths may be finer: it would have few widths otherwise."""
SPREAD = 0.4
"""By how much a group's part of its units differs from the common one, at most, where all are narrow."""

LEAVE = 0.2
"""Part of the branches that leave in every setting of all groups: the narrowest networks are not the only ones that miss some."""


@dataclass(frozen=True)
class Design:
    """Which networks are measured before any is chosen."""

    multiples: tuple[int, ...]
    """Of units, coarse to fine: which of them pay is measured."""
    prior: int
    """The multiple that is taken where no group has room to measure any."""
    narrowest: tuple[int, ...]
    """Multiples that the widths of the first probe are the least of."""
    stop: bool
    """Multiples are measured one after the other until one does not pay; else all of them, in fewer requests."""
    alone: int
    """Widths of each kind of group that are measured alone, about, finer ones aside; 0: none, and no finer ones either."""
    together: int
    """Settings in which all groups are narrow."""

    def most(self, groups: Groups, round_to: int | None) -> int:
        """Networks that are measured before any is chosen, at most where nothing finer is; the dense one and its twin come on top."""
        multiple = round_to or self.prior
        kinds = kinds_of(groups)
        widths = self.widths_alone(groups, kinds, multiple, exact=round_to is not None)
        multiples = 0 if round_to else 3 * sum(steps_of(groups, number) is not None for number in self.multiples)
        floors = len(extremes(groups, self, round_to))
        floors *= 1 if round_to and floors == 1 else 2  # once more where candidates may not have such widths
        return floors + multiples + sum(map(len, widths.values())) + self.together

    def widths_alone(
        self, groups: Groups, kinds: Mapping[str, Sequence[str]], multiple: int, *, exact: bool
    ) -> dict[str, tuple[int, ...]]:
        """Widths in which each kind of group is measured alone, if any is: some multiples, unless these are `exact` all finer ones.

        And without its units, where these are branches.
        """
        found = levels(options(groups, kinds, multiple), self.alone)
        if not self.alone:
            return found
        found = emptied(groups, found)
        if exact:
            return found
        small = finer(groups, kinds, multiple)
        return {kind: (*widths, *small[kind]) for kind, widths in found.items()}


OF_FILES = Design((32, 16, 8, 4, 2, 1), 1, (1, 4, 8, 16), stop=False, alone=1, together=24)
"""Of ONNX files, which take milliseconds to make. What pays is 16 in AVX-512, say."""
OF_ENGINES = {
    "fp32": Design((16, 8, 4), 8, (1, 8), stop=True, alone=0, together=16),
    "fp16": Design((16, 8, 4), 8, (1, 8), stop=True, alone=0, together=16),
    "int8": Design((32, 16, 8), 16, (1, 16), stop=True, alone=0, together=16),
}
"""By precision, since an engine may take minutes to build. TensorRT pads channels to 8 for fp16 on tensor cores, to 16 or 32 for int8.

Settings of all groups alone predict about as well as with kinds alone beside them (`benchmarks/staircase.py`)."""


def kinds_of(groups: Groups) -> dict[str, tuple[str, ...]]:
    """Groups that cost the same at the same width, by the name of the first: repeated blocks of one stage.

    They have as many units and own the same axes of layers of the same shape and cost, and all or none of them may leave whole.
    """
    found: dict[object, list[str]] = {}
    for group in groups.groups:
        owned = []
        for term in groups.terms:
            mine = [(axis.size, repeat) for axis in term.axes for name, repeat in axis.owners if name == group.name]
            if mine and term.macs:
                owned.append((term.macs, term.params, tuple(axis.size for axis in term.axes), tuple(mine)))
        leaves = group.name in groups.leaving
        found.setdefault((group.kind, leaves, group.units, tuple(sorted(owned))), []).append(group.name)
    return {names[0]: tuple(names) for names in found.values()}


def extremes(groups: Groups, design: Design, round_to: int | None) -> tuple[Widths, ...]:
    """Every group as narrow as multiples of a few numbers let it be, with and without branches: the fastest is the floor.

    `round_to`: of which all widths are multiples. The first is as narrow as any candidate.
    """
    numbers = dict.fromkeys(lcm(round_to or 1, number) for number in design.narrowest)
    narrow = [{group.name: floor_of(group, number) for group in groups.groups} for number in numbers]
    gone = dict.fromkeys(groups.leaving, 0)
    return _each_once([*({**setting, **gone} for setting in narrow), *narrow])


def narrowest(extremes: Sequence[Widths], allowed: Callable[[str], Sequence[int]]) -> tuple[Widths, ...]:
    """Extremes with the next width that each group of a candidate may have (`allowed`, narrow to wide) in place of its own."""
    found = [
        {name: min(wide for wide in allowed(name) if wide >= width) for name, width in setting.items()}
        for setting in extremes
    ]
    return _each_once(found)


def _each_once(settings: Sequence[Widths]) -> tuple[Widths, ...]:
    return tuple(setting for number, setting in enumerate(settings) if setting not in settings[:number])


def steps_of(groups: Groups, multiple: int) -> tuple[Widths, Widths, Widths] | None:
    """All groups at three neighbouring multiples, wide to narrow, the middle one odd; None where no group has room for them."""
    settings: tuple[Widths, Widths, Widths] = ({}, {}, {})
    for group in groups.groups:
        step = step_of(group, multiple)
        most = group.units // step if group.kind == "channels" else 0
        middle = 2 * (most // 3) + 1  # about two thirds of the units
        room = 3 <= middle < most
        for setting, times in zip(settings, (middle + 1, middle, middle - 1), strict=True):
            setting[group.name] = times * step if room else group.units
    return settings if settings[0] != settings[2] else None


def pays(ratios: tuple[float, float, float]) -> bool:
    """Whether both steps bring time, and the one in the middle its part of it. `ratios`: of the settings of `steps_of`."""
    wide, middle, narrow = ratios
    return wide > narrow and wide - middle >= PAYS * (wide - narrow)


def alignment(design: Design, ratios: Mapping[int, tuple[float, float, float]]) -> int:
    """The finest multiple that pays and whose coarser ones do; `ratios`: by multiple, of those that could be measured."""
    if not ratios:
        return design.prior
    found = design.multiples[0]
    for multiple in design.multiples:
        if multiple in ratios and not pays(ratios[multiple]):
            break
        if multiple >= min(ratios):
            found = multiple
    return found


def options(groups: Groups, kinds: Mapping[str, Sequence[str]], multiple: int) -> dict[str, tuple[int, ...]]:
    """Widths that each kind of group may have, narrow to wide, below its units: multiples, about `CHOICES`."""
    found = {}
    for name in kinds:
        group = groups.by_name[name]
        found[name] = spread(step_of(group, multiple), group.units, CHOICES)
    return found


def emptied(groups: Groups, widths: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Widths of each kind of group, with 0 where these may leave whole; what is behind another branch leaves with that one."""
    return {kind: ((0,) if kind in groups.leaving else ()) + tuple(own) for kind, own in widths.items()}


def finer(groups: Groups, kinds: Mapping[str, Sequence[str]], multiple: int) -> dict[str, tuple[int, ...]]:
    """Halves of the multiple, wide to narrow, down to a single unit, that small groups may have unless they are measured to be slower."""
    found = {}
    for name in kinds:
        group = groups.by_name[name]
        step = step_of(group, multiple)
        halves = [step >> halving for halving in range(1, step.bit_length())] if group.units <= SMALL * step else []
        found[name] = tuple(width for width in halves if width < group.units)
    return found


def paying(
    options: Mapping[str, Sequence[int]],
    finer: Mapping[str, Sequence[int]],
    alone: Mapping[str, Mapping[int, float]],
) -> dict[str, tuple[int, ...]]:
    """`options` with what is `finer`, above the first that is slower than the next wider by `NOISE`. `alone`: ratios of kinds, by width.

    What brings little alone stays: where all groups are narrow it may be what is left to take, and the staircase knows its price.
    """
    found = {}
    for kind, widths in options.items():
        known, taken = alone.get(kind, {}), list(widths)
        for narrow in finer[kind]:
            wide = known.get(taken[0]) if taken else 1.0  # the whole group's
            if wide is None or known.get(narrow, inf) > wide + NOISE:
                break
            taken.insert(0, narrow)
        found[kind] = tuple(taken)
    return found


def allowed(
    groups: Groups, kinds: Mapping[str, Sequence[str]], options: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Widths that each group may have, narrow to wide, the last all its units."""
    return {name: (*options[kind], groups.by_name[name].units) for kind, names in kinds.items() for name in names}


def requests_alone(settings: Sequence[Widths], most: int) -> Sequence[Sequence[Widths]]:
    """Settings of `alone` in requests of at most `most`; a kind's are in one if they fit, since they are compared with each other."""
    found: list[list[Widths]] = []
    for _, same in groupby(settings, key=tuple):
        own = [*same]
        if found and len(found[-1]) + len(own) <= most:
            found[-1] += own
        else:
            found += [own[start : start + most] for start in range(0, len(own), most)]
    return found


def requests_together(settings: Sequence[Widths], most: int) -> Sequence[Sequence[Widths]]:
    """Settings of `together` in requests of at most `most`, each from all over: none is off by what narrow networks alone would be."""
    count = -(-len(settings) // most)
    return [settings[number::count] for number in range(count)]


def may_be(widths: Mapping[str, int], allowed: Mapping[str, Sequence[int]]) -> bool:
    """Whether a candidate may have these widths."""
    return all(width in allowed[name] for name, width in widths.items())


def levels(options: Mapping[str, Sequence[int]], most: int) -> dict[str, tuple[int, ...]]:
    """Of the widths that each kind of group may have, about `most`: the narrowest, and others evenly spread below all its units."""
    found = {}
    for kind, widths in options.items():
        places = {round(place * len(widths) / most) for place in range(most)}
        found[kind] = tuple(width for place, width in enumerate(widths) if place in places)
    return found


def alone(kinds: Mapping[str, Sequence[str]], widths: Mapping[str, Sequence[int]]) -> tuple[Widths, ...]:
    """All groups of one kind at one width, the others whole: many groups that narrow together are seen above the noise."""
    return tuple(dict.fromkeys(names, width) for kind, names in kinds.items() for width in widths[kind])


def together(
    groups: Groups, kinds: Mapping[str, Sequence[str]], widths: Mapping[str, Sequence[int]], count: int, seed: int
) -> tuple[Widths, ...]:
    """Every group at one of its widths, near a common part of its units: what narrow neighbours do to each other."""
    random, settings = Random(seed), []
    for number in range(count):
        part = (number + random.random()) / count
        setting = {}
        for kind, names in kinds.items():
            units = groups.by_name[kind].units
            for name in names:
                wanted = units * min(1.0, max(0.0, part + random.uniform(-SPREAD, SPREAD)))
                if 0 in widths[kind] and random.random() < LEAVE:
                    wanted = 0.0
                setting[name] = min((*widths[kind], units), key=lambda width: abs(width - wanted))
        settings.append(setting)
    return tuple(settings)
