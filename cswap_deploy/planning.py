"""A latency budget, end to end: measure the dense network, learn what widths cost, choose, measure, correct, choose again.

The one part of the host's half that needs the target. Every measurement is a result in the work folder: a rerun decides the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cswap_deploy import budget, latency, progress, prune
from cswap_deploy.artifacts import Curves, File, Groups, ImageSet, Network, PruningPlan, Scores, Split
from cswap_deploy.budget import design
from cswap_deploy.budget.loop import Loop
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Approach, Budget, BudgetVerdict, Staircase, Trial, WidthTimings
from cswap_deploy.device.target import Away, Probe, Target, reach
from cswap_deploy.digests import load_json, write_atomically
from cswap_deploy.errors import DeviceError
from cswap_deploy.prune.allocate import damage_at, least_damage
from cswap_deploy.recipe import CurvesAllocation, FpsTarget, LatencySettings, LatencyTarget, Recipe
from cswap_deploy.samples import Ratio, Samples
from cswap_deploy.stage import Workdir

PROBE = "probe.json"
"""In the work folder: what the target that answered last is, so that its stored results are found when it does not."""
BATCH = 8
"""Networks that are measured in turn with the dense one in one request."""
PROBE_S, WIDTHS_S, WARMUP_S = 1.5, 0.4, 0.1
"""Sampling of each network while the floor is looked for and while the staircase is learned; running before that."""
LONGER = 4
"""Times the sampling of a measurement that was too close to call."""
ATTEMPTS, PAUSE_S = 3, 2.0
"""At a measurement whose connection ends, or that another one keeps waiting; seconds before the second, twice as many before the third."""

Widths = dict[str, int]
Ship = Callable[[Network, Groups, PruningPlan], File]
Measured = TypeVar("Measured")


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
            document = (load_json(work.root / PROBE, dict[str, Any]) or {}).get(recipe.target)
            if document is None:
                raise
            progress.warn(f"{error}; what it was when it answered last is assumed, and nothing is measured anew")
            target, probe = Away(recipe.target, (), error), Probe(document)
        else:
            if not work.dry:
                write_atomically(work.root / PROBE, json.dumps({recipe.target: probe.document}))
        yield target, probe


def choose(
    recipe: Recipe, source: Network, split: Split, dense: File, work: Workdir, ship: Ship
) -> tuple[Network, Groups, PruningPlan, Budget]:
    """What is pruned, the plan with the least damage that meets the recipe's latency, and what was measured. Errors: DeviceError.

    `dense`: the dense network in the precision that ships; `ship` makes the file that would ship from a plan.
    """
    groups = work.run(prune.find_groups, source, recipe.prune.skip, recipe.prune.heads)
    with reached(recipe, work) as (target, probe):
        meter = Meter(recipe, work, dense, groups, probe.facts("onnxruntime"), target)
        first = begun(meter)
        if first.verdict != "met":
            return source, Groups((), (), ()), PruningPlan({}, (), None), first
        staircase = learned(meter)
        turned = rotated(recipe, source, split, groups, work)
        planner = _Planner(recipe, turned, split, groups, work, staircase)
        trials, plan, verdict = planner.settled(meter, first.ratio, ship)
        return turned, groups, plan, replace(first, trials=trials, staircase=staircase, verdict=verdict)


def rotated(recipe: Recipe, source: Network, split: Split, groups: Groups, work: Workdir) -> Network:
    """What is pruned: the dense network, where dimensions within heads may leave with other weights for the same function."""
    if recipe.prune.heads != "dims" or not groups.groups:
        return source
    fit = ImageSet(split.fit, recipe.calibration.images)
    return replace(source, weights=work.run(prune.rotate, source, groups, fit, recipe.device))


@dataclass
class Meter:
    """Measures networks with narrower groups beside the dense one; each measurement is a result of the work folder."""

    recipe: Recipe
    work: Workdir
    dense: File
    groups: Groups
    facts: dict[str, str]
    target: Target

    @property
    def timing(self) -> LatencySettings:
        assert self.recipe.latency
        return self.recipe.latency

    @property
    def percentile(self) -> int:
        assert isinstance(self.recipe.prune.target, LatencyTarget | FpsTarget)
        return self.recipe.prune.target.percentile

    def timings(self, what: str, settings: Sequence[Widths], seconds: float, warmup: float = WARMUP_S) -> WidthTimings:
        """In one request; `what` it is for is reported. Errors: DeviceError, after some attempts."""
        timing = self.timing.model_copy(update={"duration_s": seconds, "warmup_s": min(warmup, self.timing.warmup_s)})
        with progress.part(what):
            return self._patiently(
                lambda: self.work.run(
                    latency.of_widths, self.dense, self.groups, tuple(settings), timing, self.facts, self.target
                )
            )

    def ratio(self, widths: Widths, longer: bool) -> Ratio:
        """Of one candidate, as long as the recipe measures, or `LONGER` times as long."""
        seconds = self.timing.duration_s * (LONGER if longer else 1)
        return budget.ratios(self.timings("candidate", [widths], seconds, self.timing.warmup_s), self.percentile)[0]

    def shipped(self, file: File) -> Ratio:
        """Of the file that ships, in turn with the dense one, as the bundle reports it. Errors: DeviceError, as above."""
        report = self._patiently(
            lambda: self.work.run(
                latency.measure, self.dense, file, (self.dense, file), self.groups, self.timing, self.facts, self.target
            )
        )
        return Samples.load(report.samples.path).ratio(1, 0, self.percentile)

    def _patiently(self, measured: Callable[[], Measured]) -> Measured:
        for attempt in range(ATTEMPTS):
            try:
                return measured()
            except DeviceError as error:
                if attempt + 1 == ATTEMPTS or isinstance(self.target, Away):
                    raise
                progress.warn(f"{error.message}; trying again")
                time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


# --- before anything is pruned


def begun(meter: Meter) -> Budget:
    """The dense network and the narrowest ones: is a budget needed, and can it be met? `met` stands for: it may be."""
    goal = goal_ms(meter.recipe)
    assert goal
    exact = meter.recipe.prune.round_to
    settings = design.extremes(meter.groups, exact if exact != "auto" else None) if meter.groups.groups else ()
    for seconds in (PROBE_S, LONGER * PROBE_S):
        timings = meter.timings("floor", settings, seconds)
        samples = Samples.load(timings.samples.path)
        dense = samples.percentile_ms(0, meter.percentile)
        low, high = samples.percentile_ci95_ms(0, meter.percentile)
        floor = min(
            budget.ratios(timings, meter.percentile), key=lambda ratio: ratio.value, default=Ratio(1.0, 1.0, 1.0)
        )
        if not (low <= goal <= high or floor.low * dense <= goal <= floor.high * dense):
            break
    verdict: BudgetVerdict = "not needed" if dense <= goal else "infeasible" if floor.value * dense > goal else "met"
    progress.note(
        f"dense network {dense:.4g} ms (p{meter.percentile}), budget {goal:.4g} ms, with every group at its narrowest "
        f"{floor.value * dense:.4g} ms{'' if verdict == 'met' else f': {verdict}'}"
    )
    return Budget(goal, meter.percentile, dense, (low, high), floor.value, verdict, (), None, meter.facts)


def learned(meter: Meter) -> Staircase:
    """What widths cost on this device."""
    exact, groups = meter.recipe.prune.round_to, meter.groups
    timings: list[WidthTimings] = []
    multiple = exact if exact != "auto" else _alignment(meter)
    kinds = design.kinds_of(groups)
    options = design.options(groups, kinds, multiple, exact=exact != "auto")
    levels = design.levels(options)
    settings = [
        *design.alone(kinds, levels),
        *design.together(groups, kinds, levels, design.TOGETHER, meter.recipe.seed),
    ]
    for start in range(0, len(settings), BATCH):
        timings.append(meter.timings("widths", settings[start : start + BATCH], WIDTHS_S))
        progress.advance("networks measured", min(start + BATCH, len(settings)), len(settings))
    return meter.work.run(budget.learn, groups, tuple(timings), multiple, exact != "auto")


def _alignment(meter: Meter) -> int:
    """The multiple of units that this runtime on this device works in."""
    tried = {multiple: steps for multiple in design.MULTIPLES if (steps := design.steps_of(meter.groups, multiple))}
    settings = [setting for steps in tried.values() for setting in steps]
    found: list[float] = []
    for start in range(0, len(settings), 2 * 3):
        part = settings[start : start + 2 * 3]
        found += [ratio.value for ratio in budget.ratios(meter.timings("multiples", part, WIDTHS_S), 50)]
    ratios = {multiple: tuple(found[3 * place : 3 * place + 3]) for place, multiple in enumerate(tried)}
    multiple = design.alignment({key: (wide, middle, narrow) for key, (wide, middle, narrow) in ratios.items()})
    shown = ", ".join(f"{key}: {' '.join(f'{value:.3f}' for value in values)}" for key, values in ratios.items())
    progress.note(f"widths count in multiples of {multiple} (ratios at three neighbouring multiples: {shown})")
    return multiple


# --- choosing


@dataclass(frozen=True)
class _Planner:
    """What the closed loop runs on."""

    recipe: Recipe
    source: Network
    split: Split
    groups: Groups
    work: Workdir
    staircase: Staircase

    def settled(self, meter: Meter, ratio: float, ship: Ship) -> tuple[tuple[Trial, ...], PruningPlan, BudgetVerdict]:
        """Trials, plan and verdict. What ships is measured in the end; where it misses or leaves room, the loop goes on."""
        goal = self.recipe.prune.target
        assert isinstance(goal, LatencyTarget | FpsTarget)
        scores, curves = self._scored()
        approach = self._approach(scores, curves, ratio)
        steps = Steps(self.groups, self.staircase)
        allowed = {group.name: steps.allowed(group.name) for group in self.groups.groups}
        now = {name: len(units) for name, units in approach.keep.items()}
        loop = Loop(
            ratio,
            goal.tolerance,
            goal.trials,
            lambda target: least_damage(steps, approach.curves, now, allowed, target),
            steps.total,
            meter.ratio,
        )
        trials, shift, good = loop.run(), 1.0, None
        while True:
            best = loop.best(trials, lambda widths: damage_at(approach.curves, widths), shift)
            plan = self._settle(scores, curves, approach, best.widths)
            shipped = meter.shipped(ship(self.source, self.groups, plan))
            progress.note(
                f"what ships takes {shipped.value:.3f} ({shipped.low:.3f} to {shipped.high:.3f}) of the dense latency, "
                f"its candidate took {best.ratio:.3f}, the budget is {ratio:.3f}"
            )
            good = plan if shipped.value <= ratio else good
            shift = shipped.value / best.ratio
            more = trials if loop.fits(best, shift) else loop.run(trials, shift)
            if len(more) == len(trials):
                return trials, good or plan, "met" if good else "missed"
            trials = more

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
