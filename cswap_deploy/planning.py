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

from cswap_deploy import engines, export, progress, prune, surveying
from cswap_deploy.artifacts import Curves, Groups, ImageSet, Network, OnnxModel, PruningPlan, Scores, Split
from cswap_deploy.budget.loop import Loop
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Approach, Budget, Staircase, Trial
from cswap_deploy.device.target import Away, Probe, Target, reach
from cswap_deploy.digests import load_json, write_atomically
from cswap_deploy.errors import DeviceError, ExportError
from cswap_deploy.metering import NOTHING, Meter, of_engines
from cswap_deploy.prune.allocate import damage_at, least_damage
from cswap_deploy.recipe import CurvesAllocation, FpsTarget, LatencyTarget, PruneSettings, Recipe
from cswap_deploy.samples import Ratio
from cswap_deploy.stage import Workdir
from cswap_deploy.wording import percent

PROBE = "probe.json"
"""In the work folder: what each target was when it answered last, so that its stored results are found when it does not."""
UNPRUNED = NOTHING, PruningPlan({}, (), None)
"""No groups, and the plan of which nothing leaves."""

Widths = dict[str, int]
Ship = Callable[[Network, Groups, PruningPlan, str], Mapping[str, OnnxModel]]


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
        return work.run(prune.find_groups, source, recipe.prune.skip, recipe.prune.heads, True)

    with reached(recipe, work) as (target, probe):
        if recipe.ships_engine:
            meter = of_engines(recipe, work, dense, source.input, leaving(), target, probe)
        else:
            graph = engines.alone(dense[recipe.shipped_file])
            meter = Meter(recipe, work, graph, probe.facts("onnxruntime"), target)
        first = surveying.asked(meter, beside)
        if first.verdict == "not needed":
            return source, *UNPRUNED, first
        groups, quantised = meter.groups if recipe.ships_engine else leaving(), meter.file.startswith("int8")
        sizes = work.run(export.sizes_of, source, groups, dense["fp32"], recipe.onnx.graph, quantised)
        groups = groups if sizes.branches else groups.without_branches
        meter = replace(meter, groups=groups, sizes=sizes, call_ms=first.call_ms)
        first = surveying.probed(meter, first)
        staircase = surveying.learned(meter) if first.verdict == "met" else None
        if staircase:
            first = surveying.reachable(meter, first, staircase)
        if not staircase or first.verdict != "met":
            return source, *UNPRUNED, replace(first, unbuilt=len(meter.unbuilt))
        turned = rotated(recipe, source, split, groups, work)
        planner = _Planner(recipe, turned, split, groups, work, staircase)
        plan, found = planner.settled(meter, first, ship)
        return turned, groups, plan, replace(found, staircase=staircase, unbuilt=len(meter.unbuilt))


def rotated(recipe: Recipe, source: Network, split: Split, groups: Groups, work: Workdir) -> Network:
    """What is pruned: the dense network, where dimensions within heads may leave with other weights for the same function."""
    if recipe.prune.heads != "dims" or not groups.groups:
        return source
    fit = ImageSet(split.fit, recipe.calibration.images)
    return replace(source, weights=work.run(prune.rotate, source, groups, fit, recipe.device))


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


def rungs(steps: int, ratio: float) -> list[float]:
    """Parts of the dense latency on the way to this one: `steps` of them down to half of it, and on; the last step takes half a
    stride at least.

    They hang on no budget, so that all budgets of a network share them.
    """
    stride, found = 0.5 / steps, list[float]()
    while (level := 1 - stride * (len(found) + 1)) >= ratio + stride / 2 - 1e-9:
        found.append(round(level, 9))
    return found


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

    def settled(self, meter: Meter, first: Budget, ship: Ship) -> tuple[PruningPlan, Budget]:
        """The plan, and `first` with trials and verdict. What ships is measured in the end; where it misses or leaves room,
        the loop goes on."""
        goal, ratio = self.recipe.prune.target, first.ratio
        assert isinstance(goal, LatencyTarget | FpsTarget)
        least = (1 - goal.tolerance) * ratio
        scores, curves = self._scored()
        steps = Steps(self.groups, self.staircase)
        allowed = {group.name: steps.allowed(group.name) for group in self.groups.groups}
        approach, scale = self._approached(meter, scores, curves, steps, ratio)
        now = _widths(approach)

        def choose(target: float) -> Widths:
            return self._one_of_alike(least_damage(steps, approach.curves, now, allowed, target), now)

        loop = Loop(ratio, goal.tolerance, goal.trials, choose, steps.total, meter.ratio, scale)
        damage = partial(damage_at, approach.curves)
        trials, made, shift = loop.run(), list[_Made](), 1.0
        if not trials:
            raise surveying.unbuildable("a candidate")
        why = ""
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
        met, done = (
            [each for each in made if each.ratio.value <= ratio],
            replace(first, trials=trials, refused=len(loop.failed)),
        )
        if not met:
            if done.tried < goal.trials:
                progress.note(
                    f"the budget is missed after {done.tried} of {goal.trials} candidates: the widths that pay allow no faster one"
                )
            return min(made, key=lambda each: each.ratio.value).plan, replace(done, verdict="missed")
        final = min(met, key=lambda each: damage(each.widths))
        if final.ratio.value < least:
            if final.ratio.high >= least:
                why = "that much is within the interval of what was measured"
            all_used = "after all trials" if done.tried >= goal.trials else ""
            why = why or all_used or "no other network of the widths that pay lies between"
            progress.note(f"{percent(1 - final.ratio.value / ratio, 0)} of the budget is left: {why}")
        return final.plan, replace(done, verdict="met")

    def _one_of_alike(self, widths: Widths, now: Widths) -> Widths:
        """Of widths that make the same network, since some branches leave with others, those that lose least by themselves."""
        closed = self.groups.closed(widths)
        return {
            name: now[name] if closed.get(self.groups.behind.get(name, "")) == 0 else width
            for name, width in widths.items()
        }

    def _approached(
        self, meter: Meter, scores: Scores, curves: Curves, steps: Steps, ratio: float
    ) -> tuple[Approach, float]:
        """Where candidates begin, and what networks near the budget take as a part of what is predicted.

        They are no wider than that; so where it is faster than the budget already, they begin a step earlier.
        """
        everything = {group.name: tuple(range(group.units)) for group in self.groups.groups}
        passed = [Approach(everything, curves.groups, scores.groups, ())]
        levels = rungs(self.recipe.prune.steps, ratio)
        for number, level in enumerate(levels, 1):
            if steps.total(_widths(passed[-1])) <= level:
                continue
            with progress.part(f"step {number} of {len(levels)}"):
                approach = self._approach(passed[-1], level)
            if approach.keep == passed[-1].keep:  # nothing faster may be
                break
            passed.append(approach)
        known = list[tuple[float, float]]()
        while (approach := passed.pop()).keep != everything:
            found = meter.ratio(_widths(approach), False)
            if found is None:
                break
            known.append((abs(found.value - ratio), found.value / steps.total(_widths(approach))))
            if found.high >= ratio:
                break
            progress.note(f"{found.value:.3f} of the dense latency before the last step already: from the step before")
        return approach, min(known)[1] if known else 1.0

    @property
    def _method(self) -> PruneSettings:
        """How units leave: what is asked for, and how often it may be tried, makes no other network."""
        return self.recipe.prune.model_copy(update={"target": None, "skip": (), "steps": 1})

    def _images(self) -> tuple[ImageSet, ImageSet]:
        root = self.recipe.calibration.images
        return ImageSet(self.split.fit, root), ImageSet(self.split.selection, root)

    def _scored(self) -> tuple[Scores, Curves]:
        recipe, settings = self.recipe, self.recipe.prune
        assert isinstance(settings.allocation, CurvesAllocation)
        fit, _ = self._images()
        learned = recipe.accuracy.max_drop is not None
        scores = self.work.run(
            prune.score,
            self.source,
            self.groups.without_branches,
            fit,
            settings.criterion,
            recipe.device,
            recipe.seed,
            learned,
        )
        curves = self.work.run(
            prune.measure_curves, self.source, self.groups, scores, fit, settings.criterion, settings.compensate,
            settings.allocation, 1, recipe.device,
        )  # fmt: skip
        return scores, curves

    def _approach(self, earlier: Approach, ratio: float) -> Approach:
        recipe = self.recipe
        fit, selection = self._images()
        return self.work.run(
            prune.approach, self.source, self.groups, fit, selection, self._method, self.staircase, earlier, ratio,
            recipe.device, recipe.seed,
        )  # fmt: skip

    def _settle(self, scores: Scores, curves: Curves, approach: Approach, widths: Mapping[str, int]) -> PruningPlan:
        recipe = self.recipe
        fit, selection = self._images()
        return self.work.run(
            prune.settle, self.source, self.groups, scores, curves, fit, selection, self._method, approach,
            dict(widths), recipe.device, recipe.seed,
        )  # fmt: skip
