"""A latency budget: what widths cost on the device, which of them to choose, and the closed loop that proves it.

`narrow` makes files of any width, `design` says which to measure, `staircase` learns from them, `loop` corrects and chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from cswap_deploy.artifacts import Groups
from cswap_deploy.budget import design, staircase
from cswap_deploy.budget.staircase import Observation
from cswap_deploy.budget.values import Staircase, WidthTimings
from cswap_deploy.samples import Ratio, Samples
from cswap_deploy.stage import stage


@stage("staircase", returns=Staircase, libraries=("numpy", "scipy"))
def learn(
    out: Path, groups: Groups, timings: tuple[WidthTimings, ...], multiple: int, options: Mapping[str, tuple[int, ...]]
) -> Staircase:
    """What each group's width costs, from networks that were measured with it; `options`: `widths`.

    Widths that no candidate may have tell nothing: they are off the steps.

    Of medians, whatever percentile the budget is about: short measurements know no other, and the loop corrects what that leaves.
    """
    kinds = design.kinds_of(groups)
    allowed = design.allowed(groups, kinds, options)
    seen = [found for item in timings for found in observed(item, 50) if design.may_be(found.widths, allowed)]
    of_one_kind = [set(names) for names in kinds.values()] if len(groups.groups) > 1 else []
    alone = [item for item in seen if set(item.widths) in of_one_kind and len(set(item.widths.values())) == 1]
    together = [item for item in seen if item not in alone]
    return staircase.learn(groups, kinds, options, multiple, alone, together)


def widths(groups: Groups, seen: Sequence[Observation], multiple: int) -> dict[str, tuple[int, ...]]:
    """Those that each kind of group may have: multiples, and of small groups finer ones unless they were slower, alone."""
    kinds = design.kinds_of(groups)
    of_names = {frozenset(names): kind for kind, names in kinds.items()}
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in kinds}
    for item in seen:
        kind, own = of_names.get(frozenset(item.widths)), set(item.widths.values())
        if kind and len(own) == 1:
            found[kind].setdefault(own.pop(), []).append(item.ratio.value)
    alone = {kind: {width: median(values) for width, values in own.items()} for kind, own in found.items()}
    options, finer = design.options(groups, kinds, multiple), design.finer(groups, kinds, multiple)
    return design.paying(options, finer, alone)


def observed(timings: WidthTimings, percentile: int) -> list[Observation]:
    """Each setting that was measured, and its ratio."""
    return [Observation(*pair) for pair in zip(timings.settings, ratios(timings, percentile), strict=True)]


def ratios(timings: WidthTimings, percentile: int) -> list[Ratio]:
    """Of each setting, to the dense network with shared weights."""
    samples = Samples.load(timings.samples.path)
    return [samples.ratio(number, 0, percentile) for number in range(1, samples.models)]
