"""A latency budget, end to end: measure the dense network, learn what widths cost, choose, measure, correct, choose again.

The one part of the host's half that needs the target. Every measurement is a result in the work folder: a rerun decides the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cswap_deploy import budget, engines, latency, progress, prune
from cswap_deploy.artifacts import (
    Curves,
    Engine,
    File,
    Groups,
    ImageSet,
    InputSpec,
    LatencyReport,
    Network,
    OnnxModel,
    PruningPlan,
    Scores,
    Split,
)
from cswap_deploy.budget import design
from cswap_deploy.budget.design import Design
from cswap_deploy.budget.loop import Loop
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Approach, Budget, BudgetVerdict, Staircase, Trial, Unbuilt, WidthTimings
from cswap_deploy.device.building import refused
from cswap_deploy.device.target import Away, Probe, Target, reach
from cswap_deploy.digests import load_json, write_atomically
from cswap_deploy.errors import DeviceError
from cswap_deploy.prune.allocate import damage_at, least_damage
from cswap_deploy.recipe import CurvesAllocation, FpsTarget, LatencySettings, LatencyTarget, Recipe
from cswap_deploy.samples import Ratio, Samples
from cswap_deploy.stage import Workdir
from cswap_deploy.wording import duration_text

PROBE = "probe.json"
"""In the work folder: what the target that answered last is, so that its stored results are found when it does not."""
BATCH = 8
"""Networks that are measured in turn with the dense one in one request."""
ENGINES_BYTES = 1 << 30
"""Of all engines that are loaded at once, about: a board's memory is shared by all that runs there."""
PROBE_S, WIDTHS_S, WARMUP_S = 1.5, 0.4, 0.1
"""Sampling of each network while the floor is looked for and while the staircase is learned; running before that."""
LONGER = 4
"""Times the sampling of a measurement that was too close to call."""
ATTEMPTS, PAUSE_S = 3, 2.0
"""At a measurement whose connection ends, or that another one keeps waiting; seconds before the second, twice as many before the third."""

UNBUILT = "TensorRT on the target builds no engine of narrower groups"
NARROW_HINT = "prune for macs in place of a latency, or report this network with the warnings above"

Widths = dict[str, int]
Ship = Callable[[Groups, PruningPlan, str], Mapping[str, OnnxModel]]
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
    recipe: Recipe, source: Network, split: Split, dense: Mapping[str, OnnxModel], work: Workdir, ship: Ship
) -> tuple[Groups, PruningPlan, Budget]:
    """The plan with the least damage that meets the recipe's latency, and what was measured on the way. Errors: DeviceError.

    `dense`: the dense network's files; `ship` makes those of a plan that a file which ships or becomes the engine needs.
    """
    groups = work.run(prune.find_groups, source, recipe.prune.skip)
    with reached(recipe, work) as (target, probe):
        if recipe.ships_engine:
            meter = _of_engines(recipe, work, dense, source.input, groups, target, probe)
        else:
            file = dense[recipe.shipped_file].graph
            meter = Meter(recipe, work, file, groups, probe.facts("onnxruntime"), target)
        first = begun(meter)
        if first.verdict != "met":
            return Groups((), (), ()), PruningPlan({}, (), None), first
        staircase = learned(meter)
        planner = _Planner(recipe, source, split, groups, work, staircase)
        trials, plan, verdict = planner.settled(meter, first.ratio, ship)
        unbuilt = len(meter.unbuilt)
        return groups, plan, replace(first, trials=trials, staircase=staircase, verdict=verdict, unbuilt=unbuilt)


def _of_engines(
    recipe: Recipe,
    work: Workdir,
    dense: Mapping[str, OnnxModel],
    spec: InputSpec,
    groups: Groups,
    target: Target,
    probe: Probe,
) -> Meter:
    """A meter of engines, with the dense one built, and how many more may follow. Errors: DeviceError."""
    probe.require_tensorrt(target.name)
    graph = engines.alone(engines.chosen(recipe, dense, probe))
    fresh = Meter(recipe, work, graph, groups, probe.facts("tensorrt"), target)
    if not work.dry:
        progress.note(
            f"each network that is measured needs an engine, built on the target: up to {_planned(fresh)}; those that were "
            "measured before are not built again"
        )
    with progress.part("dense"):
        built = fresh.patiently(lambda: engines.build(recipe, dense, spec, groups, work, target, probe))
    return replace(fresh, bench=Bench(built, spec, probe))


@dataclass(frozen=True)
class Bench:
    """Where engines are measured: the dense one, and what others are built like."""

    dense: Engine
    spec: InputSpec
    probe: Probe


@dataclass
class Meter:
    """Measures networks with narrower groups beside the dense one; each measurement is a result of the work folder."""

    recipe: Recipe
    work: Workdir
    dense: File
    """The ONNX file that is narrowed."""
    groups: Groups
    facts: dict[str, str]
    target: Target
    bench: Bench | None = None
    """None: ONNX Runtime runs the files."""
    unbuilt: list[Unbuilt] = field(default_factory=list)
    """What no engine could be built of."""

    @property
    def timing(self) -> LatencySettings:
        assert self.recipe.latency
        return self.recipe.latency

    @property
    def percentile(self) -> int:
        assert isinstance(self.recipe.prune.target, LatencyTarget | FpsTarget)
        return self.recipe.prune.target.percentile

    @property
    def exact(self) -> int | None:
        """The recipe's own multiple; None: it is found."""
        return self.recipe.prune.round_to if self.recipe.prune.round_to != "auto" else None

    @property
    def design(self) -> Design:
        """What to measure; where each network takes an engine, less."""
        engine = self.recipe.engine if self.recipe.ships_engine else None
        return design.OF_ENGINES[engine.precision] if engine else design.OF_FILES

    @property
    def batch(self) -> int:
        """Networks in one request."""
        fit = ENGINES_BYTES // self.bench.dense.file.bytes - 2 if self.bench else BATCH
        return max(1, min(BATCH, fit))

    def timings(self, what: str, settings: Sequence[Widths], seconds: float, warmup: float = WARMUP_S) -> WidthTimings:
        """In one request; `what` it is for is reported. Errors: DeviceError, after some attempts."""
        timing = self.timing.model_copy(update={"duration_s": seconds, "warmup_s": min(warmup, self.timing.warmup_s)})
        with progress.part(what):
            found = self.patiently(lambda: self._timed(tuple(settings), timing))
        self.unbuilt += [item for item in found.unbuilt if item not in self.unbuilt]
        return found

    def _timed(self, settings: tuple[Widths, ...], timing: LatencySettings) -> WidthTimings:
        if self.bench is None:
            return self.work.run(latency.of_widths, self.dense, self.groups, settings, timing, self.facts, self.target)
        order, dense = engines.order(self.recipe, self.bench.spec), self.bench.dense.file
        return self.work.run(
            latency.of_engines, dense, self.dense, self.groups, settings, order, timing, self.facts, self.target
        )

    def ratio(self, widths: Widths, longer: bool) -> Ratio | None:
        """Of one candidate, as long as the recipe measures, or `LONGER` times as long. None: no engine of it can be built."""
        seconds = self.timing.duration_s * (LONGER if longer else 1)
        found = budget.ratios(self.timings("candidate", [widths], seconds, self.timing.warmup_s), self.percentile)
        return found[0] if found else None

    def shipped(self, models: Mapping[str, OnnxModel]) -> Ratio:
        """Of what ships, in turn with the dense twin, as the bundle reports it. Errors: DeviceError, as above."""
        report = self.patiently(lambda: self._reported(models))
        return Samples.load(report.samples.path).ratio(1, 0, self.percentile)

    def _reported(self, models: Mapping[str, OnnxModel]) -> LatencyReport:
        graphs = run = self.dense, models[self.file].graph
        if self.bench:
            probe, spec = self.bench.probe, self.bench.spec
            built = engines.build(self.recipe, models, spec, self.groups, self.work, self.target, probe)
            run = self.bench.dense.file, built.file
        return self.work.run(latency.measure, *run, graphs, self.groups, self.timing, self.facts, self.target)

    @property
    def file(self) -> str:
        """`fp32` or the variant that ships or that engines are built from."""
        return engines.built_from(self.recipe, self.bench.probe) if self.bench else self.recipe.shipped_file

    def patiently(self, measured: Callable[[], Measured]) -> Measured:
        """What is measured or built, after some attempts where the connection or the device fails. Errors: DeviceError."""
        for attempt in range(ATTEMPTS):
            try:
                return measured()
            except DeviceError as error:
                if attempt + 1 == ATTEMPTS or isinstance(self.target, Away) or refused(error):
                    raise
                progress.warn(f"{error.message}; trying again")
                time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


# --- before anything is pruned


def begun(meter: Meter) -> Budget:
    """The dense network and the narrowest ones: is a budget needed, and can it be met? `met` stands for: it may be."""
    goal = goal_ms(meter.recipe)
    assert goal
    settings = design.extremes(meter.groups, meter.design, meter.exact) if meter.groups.groups else ()
    for seconds in (PROBE_S, LONGER * PROBE_S):
        timings = meter.timings("floor", settings, seconds)
        samples = Samples.load(timings.samples.path)
        dense = samples.percentile_ms(0, meter.percentile)
        low, high = samples.percentile_ci95_ms(0, meter.percentile)
        ratios = budget.ratios(timings, meter.percentile)
        if settings and not ratios:
            raise DeviceError("no engine of narrower groups can be built", NARROW_HINT, public=UNBUILT)
        floor = min(ratios, key=lambda ratio: ratio.value, default=Ratio(1.0, 1.0, 1.0))
        if not (low <= goal <= high or floor.low * dense <= goal <= floor.high * dense):
            break
    verdict: BudgetVerdict = "not needed" if dense <= goal else "infeasible" if floor.value * dense > goal else "met"
    progress.note(
        f"dense network {dense:.4g} ms (p{meter.percentile}), budget {goal:.4g} ms, with every group at its narrowest "
        f"{floor.value * dense:.4g} ms{'' if verdict == 'met' else f': {verdict}'}"
    )
    if verdict == "met" and meter.bench and timings.build_s:
        took = (meter.bench.dense.seconds, *timings.build_s)
        each, more = sum(took) / len(took), _planned(meter) - len(settings) - 2
        progress.note(f"an engine took {each:.0f} s: up to {duration_text(each * more)} for the {more} that may follow")
    return Budget(goal, meter.percentile, dense, (low, high), floor.value, verdict, (), None, meter.facts)


def learned(meter: Meter) -> Staircase:
    """What widths cost on this device."""
    groups, wanted, exact = meter.groups, meter.design, meter.exact is not None
    timings: list[WidthTimings] = []
    multiple = meter.exact or alignment(meter)
    kinds = design.kinds_of(groups)
    options = design.options(groups, kinds, multiple, exact=exact)
    levels = design.levels(options, wanted.levels)
    settings = [
        *design.alone(kinds, design.levels(options, wanted.alone)),
        *design.together(groups, kinds, levels, wanted.together, meter.recipe.seed),
    ]
    for start in range(0, len(settings), meter.batch):
        timings.append(meter.timings("widths", settings[start : start + meter.batch], WIDTHS_S))
        progress.advance("networks measured", min(start + meter.batch, len(settings)), len(settings))
    if unbuilt := sum(len(item.unbuilt) for item in timings):
        progress.warn(
            f"{unbuilt} of {len(settings)} engines could not be built; the staircase is learned from the others"
        )
    if unbuilt == len(settings):
        raise DeviceError("no engine of narrower groups can be built", NARROW_HINT, public=UNBUILT)
    return meter.work.run(budget.learn, groups, tuple(timings), multiple, exact)


def _planned(meter: Meter) -> int:
    """Engines that are built at most: for the dense network twice, before any is chosen, for candidates, and for what ships."""
    goal = meter.recipe.prune.target
    assert isinstance(goal, LatencyTarget | FpsTarget)
    return 2 + meter.design.most(meter.groups, meter.exact) + goal.trials + 1


def alignment(meter: Meter) -> int:
    """The multiple of units that this runtime on this device works in."""
    wanted = meter.design
    tried = {multiple: steps for multiple in wanted.multiples if (steps := design.steps_of(meter.groups, multiple))}
    ratios: dict[int, tuple[float, float, float]] = {}
    at_once = 1 if wanted.stop else 2
    for start in range(0, len(tried), at_once):
        part = [*tried][start : start + at_once]
        settings = [setting for multiple in part for setting in tried[multiple]]
        timings = meter.timings("multiples", settings, WIDTHS_S)
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
        if not trials:
            raise DeviceError("no engine of a candidate can be built", NARROW_HINT, public=UNBUILT)
        while True:
            best = loop.best(trials, lambda widths: damage_at(approach.curves, widths), shift)
            plan = self._settle(scores, curves, approach, best.widths)
            shipped = meter.shipped(ship(self.groups, plan, meter.file))
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
