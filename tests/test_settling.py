"""How a latency budget ends: what is cut, exported and measured in the end, where the loop begins, how long is measured.

No network is pruned here: latencies are formulas, and of a plan only its widths count.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import make_project
from test_budget import FILES, Device, blocks, exact, learned, measured, truth, whole

from cswap_deploy import metering, planning, progress, surveying
from cswap_deploy.artifacts import Curves, File, Groups, LatencyReport, Network, PruningPlan, Scores, Split
from cswap_deploy.budget import account, design
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Approach, Budget, WidthTimings
from cswap_deploy.errors import UnshippableError
from cswap_deploy.metering import Meter
from cswap_deploy.prune.allocate import damage_at
from cswap_deploy.recipe import LatencySettings, Recipe
from cswap_deploy.samples import Ratio, Samples
from cswap_deploy.stage import Workdir

GROUPS = blocks(12, 64)
Widths = Mapping[str, int]


class Planner(planning._Planner):
    """Of networks that are nothing but widths; `asked_for`: how far the approaches went."""

    asked_for: list[float]

    def _scored(self) -> tuple[Scores, Curves]:
        curves = tuple(measured(self.groups, Random(0), 16))
        return Scores("causal", 0, ()), Curves(1.0, 0, curves)

    def _approach(self, earlier: Approach, ratio: float) -> Approach:
        self.asked_for.append(ratio)
        width = self.reaches[len(self.asked_for) - 1] if self.reaches else 64
        keep = {name: tuple(range(width)) for name in whole(self.groups)}
        return Approach(keep, earlier.curves, (), ())

    def _settle(self, scores: Scores, curves: Curves, approach: Approach, widths: Widths) -> PruningPlan:
        return PruningPlan({name: tuple(range(width)) for name, width in widths.items()}, (), None)

    reaches: tuple[int, ...] = ()
    """Units of each group where each step of the approach ends; all where it is empty."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_project(tmp_path / "project").load(
        "prune.target={latency_ms: 7, trials: 2}", "prune.steps=8", "latency={}"
    )


def settled(
    recipe: Recipe,
    device: Device,
    slower: list[float],
    reaches: tuple[int, ...] = (),
    ship: Any = lambda _s, _g, plan, _n: plan,
) -> tuple[tuple[float, ...], float, str, list[Widths], list[float]]:
    """Ratios of candidates, that of what ships, the verdict, what was shipped in turn, and how far the approaches went.

    `slower`: what each network that ships takes as a part of what its candidate did.
    """
    staircase, made = learned(GROUPS, 16), list[Widths]()
    planner = Planner(recipe, cast(Network, None), cast(Split, None), GROUPS, cast(Workdir, None), staircase)
    object.__setattr__(planner, "asked_for", [])
    object.__setattr__(planner, "reaches", reaches)

    def shipped(plan: Any, asked: Budget) -> Ratio:
        made.append({name: len(units) for name, units in plan.keep.items()})
        return exact(slower[len(made) - 1] * device.takes(made[-1]))

    meter = SimpleNamespace(ratio=device.measure, shipped=shipped, file="fp32")
    first = Budget(7.0, 50, 10.0, (10.0, 10.0), 0.1, "met", (), None, {})
    plan, found = planner.settled(cast(Meter, meter), first, ship)
    widths = {name: len(units) for name, units in plan.keep.items()}
    ratio = slower[made.index(widths)] * device.takes(widths)
    return tuple(trial.ratio for trial in found.trials), ratio, found.verdict, made, planner.asked_for


def test_where_what_ships_misses_an_earlier_candidate_that_meets_the_budget_is_made(recipe: Recipe) -> None:
    """Both trials are used up: the first left room, the second fits, and what ships of it takes 4 % more."""
    candidates, ratio, verdict, made, _ = settled(recipe, Device(GROUPS, 0.85), [1.04, 1.04])
    assert len(candidates) == 2 and candidates[0] < candidates[1] <= 0.7 < 1.04 * candidates[1]
    assert (verdict, len(made)) == ("met", 2) and ratio == pytest.approx(1.04 * candidates[0])


def test_what_met_the_budget_ships_and_not_what_is_more_damaged(recipe: Recipe) -> None:
    """The first that ships leaves room, so the loop goes on; nothing that comes later replaces it unless it loses less."""
    candidates, ratio, verdict, made, _ = settled(recipe, Device(GROUPS, 1.0), [0.9, 1.2, 1.2])
    curves = measured(GROUPS, Random(0), 16)
    assert verdict == "met" and ratio <= 0.7 and len(candidates) == 2
    met = [
        widths
        for widths, slower in zip(made, [0.9, 1.2, 1.2], strict=False)
        if slower * truth(GROUPS, widths, 16) <= 0.7
    ]
    assert damage_at(curves, made[0]) == min(damage_at(curves, widths) for widths in met)


def test_where_all_that_ships_misses_the_fastest_of_it_ships(recipe: Recipe) -> None:
    _, ratio, verdict, made, _ = settled(recipe, Device(GROUPS, 0.85), [1.5, 1.4])
    assert verdict == "missed" and len(made) == 2
    assert ratio == pytest.approx(
        min(slower * 0.85 * truth(GROUPS, widths, 16) for slower, widths in zip([1.5, 1.4], made, strict=True))
    )


def test_a_budget_that_is_missed_before_all_trials_says_why(tmp_path: Path) -> None:
    heard = progress.Recording()
    recipe = make_project(tmp_path / "project").load("prune.target={latency_ms: 7, trials: 50}", "latency={}")
    with progress.reporting(heard):
        candidates, _, verdict, _, _ = settled(recipe, Device(GROUPS, 1.0), [9.0] * 50)
    said = f"the budget is missed after {len(candidates)} of 50 candidates: the widths that pay allow no faster one"
    assert verdict == "missed" and len(candidates) < 50 and heard.of("note")[-1] == said


def test_candidates_of_which_no_engine_can_be_built_count_as_trials(recipe: Recipe) -> None:
    class Refusing(Device):
        asked = 0

        def measure(self, widths: Widths, longer: bool) -> Any:
            self.asked += 1
            return None if self.asked == 1 else super().measure(widths, longer)

    candidates, _, verdict, _, _ = settled(recipe, Refusing(GROUPS, 1.0), [1.0])
    assert len(candidates) == 1 and verdict == "met", "two in all"
    first = Budget(7.0, 50, 10.0, (10.0, 10.0), 0.1, "missed", (), None, {}, refused=1)
    assert account.account(first, GROUPS, None)["trials"] == 1
    assert account.foreseen(first)[0].text.endswith("missed after 1 trial")


def test_where_the_approach_is_faster_than_the_budget_already_candidates_begin_a_step_earlier(
    recipe: Recipe,
) -> None:
    """Where 0.8 of the dense latency are predicted before the last step, the device takes 0.67."""
    way = [0.9375, 0.875, 0.8125, 0.75]
    faster, begun = Device(GROUPS, 1.0, power=1.8), list[Widths]()
    measure = faster.measure

    def remembered(widths: Widths, longer: bool) -> Ratio:
        begun.append(widths)
        return measure(widths, longer)

    faster.measure = remembered  # type: ignore[method-assign]
    candidates, _, verdict, _, went = settled(recipe, faster, [1.0, 1.0], (63, 62, 60, 48))
    assert went == way and verdict == "met"
    assert [{*widths.values()} for widths in begun[:2]] == [{48}, {60}]
    assert 0.6 < candidates[0] <= 0.7, "the first candidate knows what the approach took: else it took 0.51"
    begun.clear()
    faster = Device(GROUPS, 1.0, power=1.8, width=0.06)
    measure = faster.measure
    faster.measure = remembered  # type: ignore[method-assign]
    settled(recipe, faster, [1.0, 1.0], (63, 62, 60, 48))
    assert {*begun[0].values()} == {48} and {*begun[1].values()} != {60}, "its interval holds the budget"


@pytest.mark.parametrize(
    ("steps", "ratio", "way"),
    [
        (5, 0.9, []),
        (5, 0.775, [0.9]),
        (5, 0.65, [0.9, 0.8, 0.7]),
        (5, 0.425, [0.9, 0.8, 0.7, 0.6, 0.5]),
        (1, 0.4, []),
        (8, 0.8, [0.9375, 0.875]),
    ],
)
def test_budgets_share_the_way_to_them(steps: int, ratio: float, way: list[float]) -> None:
    """`steps` equal ones to half of the dense latency, and the last at least half as long as the others."""
    assert planning.rungs(steps, ratio) == way


def test_where_a_better_one_cannot_be_made_what_was_within_the_budget_ships(recipe: Recipe) -> None:
    """The first that ships leaves room; of the second no file can be made."""

    def ship(source: Any, groups: Any, plan: Any, name: str) -> Any:
        made.append(plan)
        if len(made) > 1:
            raise UnshippableError("a value is beyond float16")
        return plan

    made: list[Any] = []
    candidates, ratio, verdict, shipped, _ = settled(recipe, Device(GROUPS, 1.0), [0.9], ship=ship)
    assert (verdict, len(made), len(shipped)) == ("met", 2, 1) and ratio == pytest.approx(0.9 * candidates[0])
    made[:] = [None]
    with pytest.raises(UnshippableError):
        settled(recipe, Device(GROUPS, 1.0), [0.9], ship=ship)


# --- how long


@pytest.mark.parametrize(
    ("percentile", "call_ms", "seconds"), [(50, 8.0, 5.0), (99, 8.0, 5.0), (99, 100.0, 50.0), (90, 200.3, 10.5)]
)
def test_a_percentile_is_measured_until_some_calls_lie_beyond_it(
    percentile: int, call_ms: float, seconds: float
) -> None:
    assert metering.sampling_s(percentile, call_ms, 5.0) == pytest.approx(seconds)


def test_calls_that_are_slower_than_where_it_was_planned_for_are_measured_longer(
    recipe: Recipe, tmp_path: Path
) -> None:
    """Planned for a p99 of calls of 8 ms, which here take 100 ms."""
    taken: list[float] = []

    def measure(timing: LatencySettings) -> LatencyReport:
        taken.append(timing.duration_s)
        calls = [100_000_000] * max(2, round(timing.duration_s * 5))
        Samples.of([[calls, calls], [calls, calls]]).save(tmp_path / f"{len(taken)}.npz")
        return LatencyReport(File.of(tmp_path / f"{len(taken)}.npz"), "onnxruntime 1", (), None, {"device": "B"}, {})

    planned = Budget(5.0, 99, 8.0, (8.0, 8.0), 0.5, "met", (), None, {"device": "A"}, call_ms=8.0)
    report = metering.reported(metering.timing_of(recipe, planned), planned, measure)
    assert taken == [5.0, 50.0] and report.samples.path.name == "2.npz"
    metering.reported(metering.timing_of(recipe, None), None, measure)
    assert taken[2:] == [5.0], "nothing is asked for"


@pytest.mark.parametrize(("part", "longer"), [(0.9, False), (0.95, True), (0.975, False), (1.0, True), (1.04, False)])
def test_what_may_leave_too_much_or_miss_is_measured_longer(
    part: float, longer: bool, recipe: Recipe, tmp_path: Path
) -> None:
    """Known within about 1 %; 5 % of the budget may be left."""
    taken: list[float] = []

    def measure(timing: LatencySettings) -> LatencyReport:
        taken.append(timing.duration_s)
        ours = [round(part * 62_500_000 * (1 + 0.001 * (-1) ** number)) for number in range(20)]
        Samples.of([[[100_000_000], [call]] for call in ours]).save(tmp_path / "s.npz")
        return LatencyReport(File.of(tmp_path / "s.npz"), "onnxruntime 1", (), None, {}, {})

    planned = Budget(5.0, 50, 8.0, (8.0, 8.0), 0.5, "met", (), None, {}, call_ms=8.0, tolerance=0.05)
    metering.reported(metering.timing_of(recipe, planned), planned, measure)
    ratio = Samples.load(tmp_path / "s.npz").ratio(1, 0, 50)
    print(f"{ratio.low / 0.625:.3f} {ratio.value / 0.625:.3f} {ratio.high / 0.625:.3f}")
    assert taken == ([5.0, 20.0] if longer else [5.0])


def test_the_dense_network_is_measured_as_long_as_its_percentile_takes(recipe: Recipe) -> None:
    taken: list[float] = []

    def alone(seconds: float) -> Samples:
        """100 ms, and 8 % of the calls take half as long again: fewer than one in ten."""
        taken.append(seconds)
        count = max(2, round(seconds / 0.1))
        calls = [150_000_000 if number % 25 in (3, 16) else 100_000_000 for number in range(count)]
        return Samples.of([[part] for part in (calls[: count // 2], calls[count // 2 :])])

    meter = SimpleNamespace(recipe=recipe, percentile=99, timing=recipe.latency, alone=alone, facts={})
    first = surveying.asked(cast(Meter, meter))
    assert recipe.latency and taken == [recipe.latency.duration_s, 50.0], "by the median, whatever the tail is"
    assert first.dense_ms == 150.0 and first.verdict == "met" and first.floor is None


def test_the_dense_latency_of_a_sweep_is_known_well_enough_for_each_of_its_budgets(recipe: Recipe) -> None:
    """7 ms are clear of 10 ms within 1 %, 10.05 ms are not: both are then parts of the longer measurement."""
    taken: list[float] = []

    def alone(seconds: float) -> Samples:
        taken.append(seconds)
        return Samples.of([[[round(1e7 * (1 + 0.01 * (-1) ** number))] * 10] for number in range(20)])

    meter = cast(Meter, SimpleNamespace(recipe=recipe, percentile=50, timing=recipe.latency, alone=alone, facts={}))
    surveying.asked(meter, [5.0, 7.0])
    surveying.asked(meter, [7.0, 10.05])
    assert recipe.latency and [seconds / recipe.latency.duration_s for seconds in taken] == [1, 1, metering.LONGER]


# --- the floor


def test_the_floor_is_of_what_candidates_may_be(recipe: Recipe, tmp_path: Path) -> None:
    """Groups of 512 in multiples of 16 have no narrower width; of 48 they may have a single unit."""
    groups = Groups(blocks(2, 512).groups, (), blocks(2, 512).terms)
    staircase = learned(groups, 16)
    assert staircase.multiple == 16
    allowed = Steps(groups, staircase).allowed
    corners = design.extremes(groups, FILES, None)
    assert design.narrowest(corners, allowed) == ({"b0": 16, "b1": 16},)
    small = blocks(2, 48)
    corners = design.extremes(small, FILES, None)
    assert design.narrowest(corners, Steps(small, learned(small, 16)).allowed) == corners

    asked: list[tuple[dict[str, int], ...]] = []

    def timings(what: str, settings: tuple[dict[str, int], ...], seconds: float) -> WidthTimings:
        asked.append(settings)
        ratios = [1.0, *(truth(groups, widths, 16) for widths in settings)]
        Samples.of([[[round(1e7 * ratio)] * 5 for ratio in ratios] for _ in range(8)]).save(tmp_path / "samples.npz")
        return WidthTimings(File.of(tmp_path / "samples.npz"), settings, "none", {})

    meter = SimpleNamespace(
        groups=groups,
        design=FILES,
        exact=None,
        percentile=50,
        batch=8,
        sampling_s=lambda seconds: seconds,
        timings=timings,
        bench=None,
    )
    narrowest = 10 * truth(groups, {"b0": 16, "b1": 16}, 16)
    for goal, verdict in ((narrowest * 1.2, "met"), (narrowest * 0.9, "infeasible")):
        first = Budget(goal, 50, 10.0, (10.0, 10.0), 0.01, "met", (), None, {})
        found = surveying.reachable(cast(Meter, meter), first, staircase)
        assert found.verdict == verdict and found.floor == pytest.approx(narrowest / 10, rel=0.01)
    assert asked[0] == ({"b0": 16, "b1": 16},)
