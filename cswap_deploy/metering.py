"""What measures networks with narrower groups on a target: as ONNX files, or as engines that are built there for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TypeVar

from cswap_deploy import budget, engines, latency, progress
from cswap_deploy.artifacts import Engine, File, Groups, InputSpec, LatencyReport, OnnxModel
from cswap_deploy.budget import design
from cswap_deploy.budget.account import in_doubt
from cswap_deploy.budget.design import Design
from cswap_deploy.budget.sizes import Sizes
from cswap_deploy.budget.values import Budget, Unbuilt, WidthTimings
from cswap_deploy.device.building import refused
from cswap_deploy.device.target import Away, Probe, Target
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import FpsTarget, LatencySettings, LatencyTarget, Recipe
from cswap_deploy.samples import Ratio, Samples
from cswap_deploy.stage import Workdir

BATCH = 8
"""Networks that are measured in turn with the dense one's twin in one request."""
ENGINES_BYTES = 1 << 30
"""Of all engines that are loaded at once, about: a board's memory is shared by all that runs there."""
WARMUP_S = 0.1
"""Running before the first sample, where the recipe's own would take longer than sampling."""
LONGER = 4
"""Times the sampling of a measurement that was too close to call."""
SLOWER = 1.5
"""Times the sampling that was made, from which on too little of it is made good."""
TAIL = 5
"""Calls of the dense network beyond a percentile, on average, that a measurement must see: of fewer, one slow call decides."""
ATTEMPTS, PAUSE_S = 3, 2.0
"""At a measurement whose connection ends, or that another one keeps waiting; seconds before the second, twice as many before the third."""
NOTHING = Groups((), (), ())

Widths = dict[str, int]
Measured = TypeVar("Measured")


def of_engines(
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
    fresh = Meter(recipe, work, graph, probe.facts("tensorrt"), target, groups)
    if not work.dry:
        progress.note(
            f"each network that is measured needs an engine, built on the target, as a rule up to {fresh.planned}; those that were "
            "measured before are not built again"
        )
    with progress.part("dense"):
        built = fresh.patiently(lambda: engines.build(recipe, dense, spec, groups, work, target, probe))
    return replace(fresh, bench=Bench(built, spec, probe))


def lasting(timing: LatencySettings, seconds: float) -> LatencySettings:
    """The same, with so much sampling of each model."""
    return timing.model_copy(update={"duration_s": seconds})


def sampling_s(percentile: int, call_ms: float, seconds: float) -> float:
    """Sampling of each model: `seconds`, or longer, in halves of a second, where `TAIL` calls beyond the percentile take longer."""
    needed = TAIL / (1 - percentile / 100) * call_ms / 1000
    return seconds if needed <= seconds else ceil(2 * needed) / 2


def timing_of(recipe: Recipe, asked: Budget | None) -> LatencySettings:
    """How what ships is measured: as the recipe says, long enough for the percentile that is `asked` for."""
    assert recipe.latency
    if asked is None:
        return recipe.latency
    return lasting(recipe.latency, sampling_s(asked.percentile, asked.call_ms, recipe.latency.duration_s))


def reported(
    timing: LatencySettings, asked: Budget | None, measure: Callable[[LatencySettings], LatencyReport]
) -> LatencyReport:
    """What the bundle says of latency: measured again where calls are so much slower here that too few lie beyond the percentile,
    and `LONGER` times as long where the interval holds the budget `asked` for. Errors: DeviceError."""
    report, seconds = measure(timing), timing.duration_s
    if asked:
        enough = sampling_s(asked.percentile, Samples.load(report.samples.path).percentile_ms(0, 50), seconds)
        seconds = (enough if enough > SLOWER * seconds else seconds) * (LONGER if in_doubt(asked, report) else 1)
    return report if seconds == timing.duration_s else measure(lasting(timing, seconds))


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
    facts: dict[str, str]
    target: Target
    groups: Groups = NOTHING
    sizes: Sizes = field(default_factory=lambda: Sizes(()))
    bench: Bench | None = None
    """None: ONNX Runtime runs the files."""
    call_ms: float = 0.0
    """Of the dense network, once that is known: how long it takes to see enough calls."""
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
    def planned(self) -> int:
        """Engines that are built, as a rule at most: for the dense network twice, before any is chosen, where the approach ends, for
        candidates, for what ships."""
        goal = self.recipe.prune.target
        assert isinstance(goal, LatencyTarget | FpsTarget)
        return 2 + self.design.most(self.groups, self.exact) + 1 + goal.trials + 1

    @property
    def batch(self) -> int:
        """Networks in one request."""
        fit = ENGINES_BYTES // self.bench.dense.file.bytes - 1 if self.bench else BATCH
        return max(1, min(BATCH, fit))

    def alone(self, seconds: float) -> Samples:
        """Of the dense network as it is, nothing beside it. Errors: DeviceError, after some attempts."""
        run, timing = self.bench.dense.file if self.bench else self.dense, lasting(self.timing, seconds)
        with progress.part("dense"):
            found = self.patiently(lambda: self.work.run(latency.alone, run, timing, self.facts, self.target))
        return Samples.load(found.samples.path)

    def sampling_s(self, seconds: float) -> float:
        """`seconds`, or longer where the percentile takes it."""
        return sampling_s(self.percentile, self.call_ms, seconds)

    def timings(self, what: str, settings: Sequence[Widths], seconds: float, warmup: float = WARMUP_S) -> WidthTimings:
        """In one request; `what` it is for is reported. Errors: DeviceError, after some attempts."""
        timing = lasting(self.timing, seconds).model_copy(update={"warmup_s": min(warmup, self.timing.warmup_s)})
        with progress.part(what):
            found = self.patiently(lambda: self._timed(tuple(settings), timing))
        self.unbuilt += [item for item in found.unbuilt if item not in self.unbuilt]
        return found

    def _timed(self, settings: tuple[Widths, ...], timing: LatencySettings) -> WidthTimings:
        if self.bench is None:
            return self.work.run(
                latency.of_widths, self.dense, self.groups, self.sizes, settings, timing, self.facts, self.target
            )
        order = engines.order(self.recipe, self.bench.spec)
        return self.work.run(
            latency.of_engines, self.dense, self.groups, self.sizes, settings, order, timing, self.facts, self.target
        )

    def ratio(self, widths: Widths, longer: bool) -> Ratio | None:
        """Of one candidate, as long as what ships, or `LONGER` times as long. None: no engine of it can be built."""
        seconds = self.sampling_s(self.timing.duration_s) * (LONGER if longer else 1)
        found = budget.ratios(self.timings("candidate", [widths], seconds, self.timing.warmup_s), self.percentile)
        return found[0] if found else None

    def shipped(self, models: Mapping[str, OnnxModel], asked: Budget) -> Ratio:
        """Of what ships, in turn with the dense twin, as the bundle reports it. Errors: DeviceError, as above."""
        report = self.patiently(lambda: self._reported(models, asked))
        return Samples.load(report.samples.path).ratio(1, 0, self.percentile)

    def _reported(self, models: Mapping[str, OnnxModel], asked: Budget) -> LatencyReport:
        graphs = run = self.dense, models[self.file].graph
        if self.bench:
            probe, spec = self.bench.probe, self.bench.spec
            built = engines.build(self.recipe, models, spec, self.groups, self.work, self.target, probe)
            run = self.bench.dense.file, built.file

        def measure(timing: LatencySettings) -> LatencyReport:
            return self.work.run(latency.measure, *run, graphs, self.groups, timing, self.facts, self.target)

        return reported(timing_of(self.recipe, asked), asked, measure)

    @property
    def file(self) -> str:
        """`fp32` or the variant that ships or that engines are built from."""
        return engines.built_from(self.recipe, self.bench.probe.typed) if self.bench else self.recipe.shipped_file

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
