"""What is measured before anything is pruned: the dense network, the narrowest ones, and what widths cost on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cswap_deploy import budget, progress
from cswap_deploy.budget import design
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Budget, BudgetVerdict, Staircase, WidthTimings
from cswap_deploy.errors import DeviceError
from cswap_deploy.metering import LONGER, Meter, sampling_s
from cswap_deploy.recipe import FpsTarget, LatencyTarget
from cswap_deploy.samples import Ratio
from cswap_deploy.wording import duration_text, percent

WIDTHS_S = 0.75
"""Sampling of each network while the floor is looked for and while the staircase is learned."""
UNBUILT = "TensorRT on the target builds no engine of"
"""How that begins, where it is of none of the networks that were to be measured."""
NARROW_HINT = "prune for macs in place of a latency, or report this network with the warnings above"

Widths = dict[str, int]


def unbuildable(what: str) -> DeviceError:
    """Where TensorRT builds no engine of any of the networks that are to be measured: `what` they are."""
    return DeviceError(f"no engine of {what} can be built", NARROW_HINT, public=f"{UNBUILT} {what}")


def asked(meter: Meter, beside: Sequence[float] = ()) -> Budget:
    """What is asked for, beside what the dense network takes: `not needed`, or `met` for the time being.

    The dense network is measured longer where its interval holds that, or one of the other latencies `beside` it.
    """
    target, goal, percentile = meter.recipe.prune.target, meter.recipe.goal_ms, meter.percentile
    assert isinstance(target, LatencyTarget | FpsTarget) and goal

    seconds = meter.timing.duration_s
    dense = meter.alone(seconds)
    call_ms = dense.percentile_ms(0, 50)
    if (enough := sampling_s(percentile, call_ms, seconds)) > seconds:
        progress.note(
            f"a p{percentile} is sampled for {enough:g} s in place of {seconds:g}: some calls must lie beyond it"
        )
        dense = meter.alone(enough)
    low, high = dense.percentile_ci95_ms(0, percentile)
    if any(low <= value <= high for value in (goal, *beside)):
        dense = meter.alone(LONGER * enough)
    took = dense.percentile_ms(0, percentile)
    verdict: BudgetVerdict = "met" if took > goal else "not needed"
    interval = dense.percentile_ci95_ms(0, percentile)
    known = f"{took:.4g} ms (p{percentile}, 95 %: {interval[0]:.4g} to {interval[1]:.4g})"
    said = f"dense network {known}, budget {goal:.4g} ms"
    progress.note(f"{said}, {percent(goal / took, 0)} of it" if verdict == "met" else f"{said}: {verdict}")
    return Budget(
        goal,
        percentile,
        took,
        interval,
        None,
        verdict,
        (),
        None,
        meter.facts,
        call_ms=call_ms,
        tolerance=target.tolerance,
    )


def probed(meter: Meter, first: Budget) -> Budget:
    """With the floor: the fastest of the narrowest networks that there are. `met` stands for: it may be."""
    settings = design.extremes(meter.groups, meter.design, meter.exact) if meter.groups.groups else ()
    found, took = _floored(meter, first, settings, "at its narrowest")
    if settings and found.floor is None:
        raise unbuildable("narrower groups")
    if found.verdict == "met" and meter.bench and took:
        took = (meter.bench.dense.seconds, *took)
        each, more = sum(took) / len(took), meter.planned - len(settings) - 2
        progress.note(
            f"an engine took {each:.0f} s: up to {duration_text(each * more)} for the {more} that may follow, less for those "
            "that were measured before"
        )
    return found


def reachable(meter: Meter, first: Budget, staircase: Staircase) -> Budget:
    """With the floor of what candidates may be: where not all the narrowest networks may be one, of the narrowest that may."""
    extremes = design.extremes(meter.groups, meter.design, meter.exact)
    settings = design.narrowest(extremes, Steps(meter.groups, staircase).allowed)
    if all(setting in settings for setting in extremes):
        return first
    return _floored(meter, first, settings, "at the narrowest width that pays")[0]


def _floored(meter: Meter, first: Budget, settings: Sequence[Widths], narrow: str) -> tuple[Budget, tuple[float, ...]]:
    """The budget with the fastest of some networks for its floor, and the seconds that building engines of them took.

    `narrow`: how narrow the groups are, in words.

    Without settings it is the dense network, and without a floor where no engine of them can be built.
    """
    goal, dense = first.latency_ms, first.dense_ms
    seconds = meter.sampling_s(WIDTHS_S)
    for sampling in (seconds, LONGER * seconds):
        timings = _in_requests(meter, "floor", settings, sampling)
        ratios = [ratio for part in timings for ratio in budget.ratios(part, meter.percentile)]
        if settings and not ratios:
            return first, ()
        ratios = ratios or [Ratio(1.0, 1.0, 1.0)]
        if not any(ratio.low * dense <= goal <= ratio.high * dense for ratio in ratios):
            break
    floor = min(ratio.value for ratio in ratios)
    verdict: BudgetVerdict = "infeasible" if min(ratio.low for ratio in ratios) * dense > goal else "met"
    said = f"with every group {narrow} {floor * dense:.4g} ms" if settings else "nothing in this network can be pruned"
    progress.note(said if verdict == "met" else f"{said}: {verdict}")
    return replace(first, floor=floor, verdict=verdict), tuple(took for part in timings for took in part.build_s)


def _in_requests(meter: Meter, what: str, settings: Sequence[Widths], seconds: float) -> list[WidthTimings]:
    """In as few requests as can be: a board holds so many engines at once."""
    most = meter.batch
    return [meter.timings(what, settings[n : n + most], seconds) for n in range(0, len(settings), most)]


def learned(meter: Meter) -> Staircase:
    """What widths cost on this device."""
    groups, wanted, exact = meter.groups, meter.design, meter.exact is not None
    timings = _in_requests(meter, "floor", design.extremes(groups, wanted, meter.exact), meter.sampling_s(WIDTHS_S))
    multiple = meter.exact
    if multiple is None:
        multiple, found = alignment(meter)
        timings += found
    kinds = design.kinds_of(groups)
    narrow = design.alone(kinds, wanted.widths_alone(groups, kinds, multiple, exact=exact))
    drawn, total = list[WidthTimings](), len(narrow) + wanted.together

    def draw(requests: Sequence[Sequence[Widths]]) -> None:
        for request in requests:
            drawn.append(meter.timings("widths", request, WIDTHS_S))
            done = sum(len(item.settings) + len(item.unbuilt) for item in drawn)
            progress.advance("networks measured", done, total)

    draw(design.requests_alone(narrow, meter.batch))
    options = design.options(groups, kinds, multiple)
    if not exact and wanted.alone:
        seen = [found for item in (*timings, *drawn) for found in budget.observed(item, 50)]
        options = budget.widths(groups, seen, multiple)
    options = design.emptied(groups, options)
    settings = design.together(groups, kinds, options, wanted.together, meter.recipe.seed)
    draw(design.requests_together(settings, meter.batch))
    if unbuilt := sum(len(item.unbuilt) for item in drawn):
        progress.warn(f"{unbuilt} of {total} engines could not be built; the staircase is learned from the others")
    if unbuilt == total:
        raise unbuildable("narrower groups")
    return meter.work.run(budget.learn, groups, (*timings, *drawn), multiple, options)


def alignment(meter: Meter) -> tuple[int, list[WidthTimings]]:
    """The multiple of units that this runtime on this device works in, and what was measured for it."""
    wanted, taken = meter.design, list[WidthTimings]()
    tried = {multiple: steps for multiple in wanted.multiples if (steps := design.steps_of(meter.groups, multiple))}
    ratios: dict[int, tuple[float, float, float]] = {}
    at_once = 1 if wanted.stop else 2
    for start in range(0, len(tried), at_once):
        part = [*tried][start : start + at_once]
        settings = [setting for multiple in part for setting in tried[multiple]]
        timings = _in_requests(meter, "multiples", settings, WIDTHS_S)
        taken += timings
        failed = [item.widths for request in timings for item in request.unbuilt]
        values = iter([ratio for request in timings for ratio in budget.ratios(request, 50)])
        for multiple in part:
            found = [next(values).value for setting in tried[multiple] if setting not in failed]
            if len(found) == 3:
                ratios[multiple] = (found[0], found[1], found[2])
        if wanted.stop and ratios and not design.pays([*ratios.values()][-1]):
            break
    multiple = design.alignment(wanted, ratios)
    shown = ", ".join(f"{key}: {' '.join(f'{value:.3f}' for value in values)}" for key, values in ratios.items())
    progress.note(f"widths count in multiples of {multiple} (ratios at three neighbouring multiples: {shown})")
    return multiple, taken
