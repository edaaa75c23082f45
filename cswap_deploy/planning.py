"""A latency budget, end to end: measure the dense network, learn what widths cost, choose, measure, correct, choose again.

The one part of the host's half that needs the target. Every measurement is a result in the work folder: a rerun decides the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cswap_deploy import budget, export, progress, prune
from cswap_deploy.artifacts import Curves, Groups, ImageSet, Network, OnnxModel, PruningPlan, Scores, Split
from cswap_deploy.budget import design
from cswap_deploy.budget.loop import Loop
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Approach, Budget, BudgetVerdict, Staircase, Trial, WidthTimings
from cswap_deploy.device.target import Away, Probe, Target, reach
from cswap_deploy.digests import load_json, write_atomically
from cswap_deploy.errors import DeviceError, ExportError
from cswap_deploy.metering import LONGER, NOTHING, Meter, of_engines, sampling_s
from cswap_deploy.prune.allocate import damage_at, least_damage
from cswap_deploy.recipe import CurvesAllocation, FpsTarget, LatencyTarget, Recipe
from cswap_deploy.samples import Ratio
from cswap_deploy.stage import Workdir
from cswap_deploy.wording import duration_text, percent

PROBE = "probe.json"
"""In the work folder: what each target was when it answered last, so that its stored results are found when it does not."""
WIDTHS_S = 0.75
"""Sampling of each network while the floor is looked for and while the staircase is learned."""
UNBUILT = "TensorRT on the target builds no engine of narrower groups"
NARROW_HINT = "prune for macs in place of a latency, or report this network with the warnings above"
UNPRUNED = NOTHING, PruningPlan({}, (), None)
"""No groups, and the plan of which nothing leaves."""

Widths = dict[str, int]
Ship = Callable[[Network, Groups, PruningPlan, str], Mapping[str, OnnxModel]]


def goal_ms(recipe: Recipe) -> float | None:
    """The latency that the recipe asks for, of one batch; None where it asks for something else."""
    match recipe.prune.target:
        case LatencyTarget(latency_ms=value):
            return value
        case FpsTarget(fps=rate):
            assert recipe.latency
            return 1000 * recipe.latency.batch / rate
        case _:
            return None


@contextmanager
def reached(recipe: Recipe, work: Workdir) -> Iterator[tuple[Target, Probe]]:
    """The target, or, where it does not answer now, what it was when it answered last. Errors: DeviceError."""
    with ExitStack() as stack:
        try:
            target = stack.enter_context(reach(recipe.target))
            probe = Probe.of(target)
        except DeviceError as error:
            document = _answers(work).get(recipe.target)
            if document is None:
                raise
            progress.warn(f"{error}; what it was when it answered last is assumed, and nothing is measured anew")
            target, probe = Away(recipe.target, (), error), Probe(document)
        else:
            if not work.dry:
                write_atomically(work.root / PROBE, json.dumps({**_answers(work), recipe.target: probe.document}))
        yield target, probe


def _answers(work: Workdir) -> dict[str, Any]:
    """What each target was when it answered last."""
    return load_json(work.root / PROBE, dict[str, Any]) or {}


def choose(
    recipe: Recipe,
    source: Network,
    split: Split,
    dense: Mapping[str, OnnxModel],
    work: Workdir,
    ship: Ship,
    beside: Sequence[float] = (),
) -> tuple[Network, Groups, PruningPlan, Budget]:
    """What is pruned, the plan with the least damage that meets the recipe's latency, and what was measured. Errors: DeviceError.

    `dense`: the dense network's files; `ship` makes those of a plan that a file which ships or becomes the engine needs. `beside`:
    other latencies that are asked for, in ms, as parts of the same dense latency.
    """

    def leaving() -> Groups:
        return work.run(prune.find_groups, source, recipe.prune.skip, recipe.prune.heads)

    with reached(recipe, work) as (target, probe):
        if recipe.ships_engine:
            meter = of_engines(recipe, work, dense, source.input, leaving(), target, probe)
        else:
            meter = Meter(recipe, work, dense[recipe.shipped_file].graph, probe.facts("onnxruntime"), target)
        first = asked(meter, beside)
        if first.verdict == "not needed":
            return source, *UNPRUNED, first
        groups, quantised = meter.groups if recipe.ships_engine else leaving(), meter.file.startswith("int8")
        sizes = work.run(export.sizes_of, source, groups, dense["fp32"], recipe.onnx.graph, quantised)
        meter = replace(meter, groups=groups, sizes=sizes, call_ms=first.call_ms)
        first = probed(meter, first)
        staircase = learned(meter) if first.verdict == "met" else None
        if staircase:
            first = reachable(meter, first, staircase)
        if not staircase or first.verdict != "met":
            return source, *UNPRUNED, replace(first, unbuilt=len(meter.unbuilt))
        turned = rotated(recipe, source, split, groups, work)
        planner = _Planner(recipe, turned, split, groups, work, staircase)
        trials, plan, verdict = planner.settled(meter, first, ship)
        unbuilt = len(meter.unbuilt)
        found = replace(first, trials=trials, staircase=staircase, verdict=verdict, unbuilt=unbuilt)
        return turned, groups, plan, found


def rotated(recipe: Recipe, source: Network, split: Split, groups: Groups, work: Workdir) -> Network:
    """What is pruned: the dense network, where dimensions within heads may leave with other weights for the same function."""
    if recipe.prune.heads != "dims" or not groups.groups:
        return source
    fit = ImageSet(split.fit, recipe.calibration.images)
    return replace(source, weights=work.run(prune.rotate, source, groups, fit, recipe.device))


# --- before anything is pruned


def asked(meter: Meter, beside: Sequence[float] = ()) -> Budget:
    """What is asked for, beside what the dense network takes: `not needed`, or `met` for the time being.

    The dense network is measured longer where its interval holds that, or one of the other latencies `beside` it.
    """
    target, goal, percentile = meter.recipe.prune.target, goal_ms(meter.recipe), meter.percentile
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
    found, took = _floored(meter, first, settings)
    if settings and found.floor is None:
        raise DeviceError("no engine of narrower groups can be built", NARROW_HINT, public=UNBUILT)
    if found.verdict == "met" and meter.bench and took:
        took = (meter.bench.dense.seconds, *took)
        each, more = sum(took) / len(took), meter.planned - len(settings) - 2
        progress.note(f"an engine took {each:.0f} s: up to {duration_text(each * more)} for the {more} that may follow")
    return found


def reachable(meter: Meter, first: Budget, staircase: Staircase) -> Budget:
    """With the floor of what candidates may be: where not all the narrowest networks may be one, of the narrowest that may."""
    extremes = design.extremes(meter.groups, meter.design, meter.exact)
    settings = design.narrowest(extremes, Steps(meter.groups, staircase).allowed)
    if all(setting in settings for setting in extremes):
        return first
    found, _ = _floored(meter, first, settings)
    return first if found.floor is None else found


def _floored(meter: Meter, first: Budget, settings: Sequence[Widths]) -> tuple[Budget, tuple[float, ...]]:
    """The budget with the fastest of some networks for its floor, and the seconds that building engines of them took.

    Without settings it is the dense network, and without a floor where no engine of them can be built.
    """
    goal, dense = first.latency_ms, first.dense_ms
    seconds = meter.sampling_s(WIDTHS_S)
    for sampling in (seconds, LONGER * seconds):
        timings = meter.timings("floor", settings, sampling)
        ratios = budget.ratios(timings, meter.percentile)
        if settings and not ratios:
            return first, ()
        floor = min(ratios, key=lambda ratio: ratio.value, default=Ratio(1.0, 1.0, 1.0))
        if not floor.low * dense <= goal <= floor.high * dense:
            break
    verdict: BudgetVerdict = "infeasible" if floor.low * dense > goal else "met"
    narrowest = f"with every group at its narrowest {floor.value * dense:.4g} ms"
    said = narrowest if settings else "nothing in this network can be pruned"
    progress.note(said if verdict == "met" else f"{said}: {verdict}")
    return replace(first, floor=floor.value, verdict=verdict), timings.build_s


def learned(meter: Meter) -> Staircase:
    """What widths cost on this device."""
    groups, wanted, exact = meter.groups, meter.design, meter.exact is not None
    timings = [meter.timings("floor", design.extremes(groups, wanted, meter.exact), meter.sampling_s(WIDTHS_S))]
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
    settings = design.together(groups, kinds, options, wanted.together, meter.recipe.seed)
    draw(design.requests_together(settings, meter.batch))
    if unbuilt := sum(len(item.unbuilt) for item in drawn):
        progress.warn(f"{unbuilt} of {total} engines could not be built; the staircase is learned from the others")
    if unbuilt == total:
        raise DeviceError("no engine of narrower groups can be built", NARROW_HINT, public=UNBUILT)
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
        timings = meter.timings("multiples", settings, WIDTHS_S)
        taken.append(timings)
        failed, values = [item.widths for item in timings.unbuilt], iter(budget.ratios(timings, 50))
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


# --- choosing


@dataclass(frozen=True)
class _Made:
    """A plan that was cut, exported and measured; `ratio`: of what ships to its dense twin."""

    widths: Widths
    plan: PruningPlan
    ratio: Ratio


def _next(
    loop: Loop,
    trials: tuple[Trial, ...],
    made: Sequence[_Made],
    damage: Callable[[Mapping[str, int]], float],
    shift: float,
) -> Trial | None:
    """The trial to make: the best that did not miss when it was made. None: it was made, or one as little damaged is within the budget."""
    missed = [each.widths for each in made if each.ratio.value > loop.budget]
    left = tuple(trial for trial in trials if trial.widths not in missed)
    hopeful = any(trial.ratio * shift <= loop.budget for trial in left)
    best = loop.best(left if hopeful else trials, damage, shift)
    better = all(each.widths in missed or damage(best.widths) < damage(each.widths) for each in made)
    return best if better and best.widths not in missed else None


def _widths(approach: Approach) -> Widths:
    return {name: len(units) for name, units in approach.keep.items()}


@dataclass(frozen=True)
class _Planner:
    """What the closed loop runs on."""

    recipe: Recipe
    source: Network
    split: Split
    groups: Groups
    work: Workdir
    staircase: Staircase

    def settled(self, meter: Meter, first: Budget, ship: Ship) -> tuple[tuple[Trial, ...], PruningPlan, BudgetVerdict]:
        """Trials, plan and verdict. What ships is measured in the end; where it misses or leaves room, the loop goes on."""
        goal, ratio = self.recipe.prune.target, first.ratio
        assert isinstance(goal, LatencyTarget | FpsTarget)
        least = (1 - goal.tolerance) * ratio
        scores, curves = self._scored()
        steps = Steps(self.groups, self.staircase)
        allowed = {group.name: steps.allowed(group.name) for group in self.groups.groups}
        approach, scale = self._approached(meter, scores, curves, steps, ratio)
        now = _widths(approach)
        loop = Loop(
            ratio,
            goal.tolerance,
            goal.trials,
            lambda target: least_damage(steps, approach.curves, now, allowed, target),
            steps.total,
            meter.ratio,
            scale,
        )

        damage = partial(damage_at, approach.curves)
        trials, made, shift = loop.run(), list[_Made](), 1.0
        if not trials:
            raise DeviceError("no engine of a candidate can be built", NARROW_HINT, public=UNBUILT)
        why = "no other network of the widths that pay lies between"
        while best := _next(loop, trials, made, damage, shift):
            try:
                plan = self._settle(scores, curves, approach, best.widths)
                shipped = meter.shipped(ship(self.source, self.groups, plan, meter.file), first)
                progress.note(
                    f"what ships takes {shipped.value:.3f} ({shipped.low:.3f} to {shipped.high:.3f}) of the dense "
                    f"latency, its candidate took {best.ratio:.3f}, the budget is {ratio:.3f}"
                )
                made.append(_Made(best.widths, plan, shipped))
                if shipped.value <= ratio and shipped.high >= least:
                    break  # no more room is left than the tolerance, as far as that is known
                shift = shipped.value / best.ratio
                trials = loop.run(trials, shift)
            except (DeviceError, ExportError) as error:
                if all(each.ratio.value > ratio for each in made):
                    raise
                why = "a better one could not be made or measured"
                progress.warn(f"{error.message}; what was within the budget before it ships")
                break
        met, used = [each for each in made if each.ratio.value <= ratio], len(trials) + len(loop.failed)
        if not met:
            if used < goal.trials:
                progress.note(
                    f"the budget is missed after {used} of {goal.trials} candidates: the widths that pay allow no faster one"
                )
            return trials, min(made, key=lambda each: each.ratio.value).plan, "missed"
        final = min(met, key=lambda each: damage(each.widths))
        if final.ratio.value < least:
            if final.ratio.high >= least:
                why = "that much is within the interval of what was measured"
            elif used >= goal.trials:
                why = "after all trials"
            progress.note(f"{percent(1 - final.ratio.value / ratio, 0)} of the budget is left: {why}")
        return trials, final.plan, "met"

    def _approached(
        self, meter: Meter, scores: Scores, curves: Curves, steps: Steps, ratio: float
    ) -> tuple[Approach, float]:
        """Where candidates begin, and what it takes as a part of what is predicted.

        They are no wider than that; so where it is faster than the budget already, the approach goes less far.
        """
        approach = self._approach(scores, curves, ratio)
        widths = _widths(approach)
        narrower = any(widths[group.name] < group.units for group in self.groups.groups)
        found = meter.ratio(widths, False) if narrower else None
        if found is None:
            return approach, 1.0
        predicted = steps.total(widths)
        if found.high >= ratio:
            return approach, found.value / predicted
        progress.note(f"{found.value:.3f} of the dense latency before the last step already: once more, less far")
        aimed = 1 - (1 - ratio) * (1 - predicted) / (1 - found.value)  # the dense network takes what is predicted
        return self._approach(scores, curves, aimed), ratio / aimed

    def _images(self) -> tuple[ImageSet, ImageSet]:
        root = self.recipe.calibration.images
        return ImageSet(self.split.fit, root), ImageSet(self.split.selection, root)

    def _scored(self) -> tuple[Scores, Curves]:
        recipe, settings = self.recipe, self.recipe.prune
        assert isinstance(settings.allocation, CurvesAllocation)
        fit, _ = self._images()
        learned = recipe.accuracy.max_drop is not None
        scores = self.work.run(
            prune.score, self.source, self.groups, fit, settings.criterion, recipe.device, recipe.seed, learned
        )
        curves = self.work.run(
            prune.measure_curves, self.source, self.groups, scores, fit, settings.criterion, settings.compensate,
            settings.allocation, 1, recipe.device,
        )  # fmt: skip
        return scores, curves

    def _approach(self, scores: Scores, curves: Curves, ratio: float) -> Approach:
        recipe = self.recipe
        fit, selection = self._images()
        with progress.part("approach"):
            return self.work.run(
                prune.approach, self.source, self.groups, scores, curves, fit, selection, recipe.prune, self.staircase,
                ratio, recipe.device, recipe.seed,
            )  # fmt: skip

    def _settle(self, scores: Scores, curves: Curves, approach: Approach, widths: Mapping[str, int]) -> PruningPlan:
        recipe = self.recipe
        fit, selection = self._images()
        return self.work.run(
            prune.settle, self.source, self.groups, scores, curves, fit, selection, recipe.prune, approach,
            dict(widths), recipe.device, recipe.seed,
        )  # fmt: skip
