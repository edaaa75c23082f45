"""The progressive search: repeatable, within its target with all that compensation adds, and it says why each unit left."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from cswap_deploy import prune
from cswap_deploy.artifacts import Groups, GroupScores, PruningPlan, Scores
from cswap_deploy.codec import canonical, encode
from cswap_deploy.errors import PruningError
from cswap_deploy.progress import Recording, reporting
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria import scorer
from cswap_deploy.prune.cut import cut_copy
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.search import Bench, Search, State, correct
from cswap_deploy.prune.select import ranking
from cswap_deploy.recipe import (
    AllocationSettings,
    CausalCriterion,
    CompensationSettings,
    CriterionSettings,
    CurvesAllocation,
    GlobalAllocation,
    LeastSquaresCompensation,
    MagnitudeCriterion,
    MeanCompensation,
    NoCompensation,
    TaylorCriterion,
)

ATTRIBUTION, LEAST_SQUARES = CausalCriterion(estimator="attribution"), LeastSquaresCompensation()
FEW = CurvesAllocation(images=20)


@dataclass(frozen=True)
class Case:
    criterion: CriterionSettings = ATTRIBUTION
    compensate: CompensationSettings = LEAST_SQUARES
    allocation: AllocationSettings = FEW

    def search(self, dense: nn.Module, groups: Groups, entry: zoo.Entry, round_to: int = 1) -> Search:
        """From the beginning: scores and curves of the dense network included."""
        dense, fit = copy.deepcopy(dense).requires_grad_(False), zoo.batches(entry, 30)
        scores: Sequence[GroupScores] = scorer(self.criterion, 0).score(dense, groups.groups, fit)
        bench = Bench(dense, groups, fit, self.criterion, self.compensate, self.allocation, round_to)
        curves: tuple[Any, ...] = ()
        if isinstance(self.allocation, CurvesAllocation):
            module, systems = bench.compensated(bench.everything)
            gauge = bench.gauge(module, systems, bench.everything, scores, bench.damage(self.allocation))
            curves = gauge.curves(round_to)
        return Search(bench, zoo.batches(entry, 40, seed=1), tuple(scores), curves, 0)

    def of(self, name: str, round_to: int = 1) -> Search:
        entry = zoo.ZOO[name]
        return self.search(entry.build(), entry.groups, entry, round_to)


CASES = {
    "curves, surgery": Case(),
    "curves, zero": Case(CausalCriterion(estimator="attribution", intervention="zero")),
    "curves, taylor, mean": Case(TaylorCriterion(), MeanCompensation()),
    "curves, magnitude, none": Case(MagnitudeCriterion(), NoCompensation()),
    "global": Case(allocation=GlobalAllocation()),
}


def text(state: State) -> str:
    return canonical(encode((state.keep, state.steps, state.scores), Path("/")))


@pytest.mark.parametrize("case", CASES)
def test_the_same_search_gives_the_same_bytes(case: str) -> None:
    one, two = (text(CASES[case].of("residual").towards("macs", 0.6, 2)) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("name", ["residual", "vit", "concat"])
@pytest.mark.parametrize("case", CASES)
def test_the_scores_of_a_step_are_those_of_the_units_that_left_in_it(name: str, case: str) -> None:
    search = CASES[case].of(name)
    state = search.towards("macs", 0.5, 3)
    left = search.bench.everything
    for number, step in enumerate(state.steps):
        scored = not (number and search.bench.eliminates)  # elimination needs no scores of later networks
        assert {item.group: item.units for item in step.scores} == (step.removed if scored else {})
        assert all(len(item.keep_value) == len(item.units) > 0 for item in step.scores)
        assert all(set(units) <= set(left[group]) for group, units in step.removed.items()), "it had left already"
        left = {
            group: tuple(unit for unit in units if unit not in step.removed.get(group, ()))
            for group, units in left.items()
        }
    assert left == state.keep
    assert [step.macs for step in state.steps] == sorted((step.macs for step in state.steps), reverse=True)
    assert state.steps[-1].macs <= 0.5
    assert {item.group: item.units for item in state.scores}.keys() == state.keep.keys()


def test_the_first_step_goes_by_the_scores_that_were_stored() -> None:
    search = CASES["global"].of("residual")
    (step,) = search.towards("macs", 0.8, 1).steps
    stored = {item.group: dict(zip(item.units, item.keep_value, strict=True)) for item in search.scores}
    for item in step.scores:
        assert item.keep_value == tuple(stored[item.group][unit] for unit in item.units)


class Proportional:
    """MACs as a part of the dense network's."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def total(self, widths: Mapping[str, int]) -> float:
        keep = {name: tuple(range(width)) for name, width in widths.items()}
        return self.groups.cost(keep)[1] / self.groups.cost({})[1]

    def changes(self, at: Mapping[str, int], name: str, widths: Sequence[int]) -> list[float]:
        return [self.total({**at, name: width}) - self.total(at) for width in widths]


@pytest.mark.parametrize("case", ["curves, taylor, mean", "curves, magnitude, none"])
def test_where_units_are_ranked_by_scores_the_last_step_of_a_latency_goes_by_those_of_the_network_as_it_is(
    case: str,
) -> None:
    search = CASES[case].of("residual")
    groups = search.bench.groups
    allowed = {group.name: range(1, group.units + 1) for group in groups.groups}
    state = search.start()
    for target in (0.8, 0.6):
        state = search.approach(state, Proportional(groups), allowed, target)
    assert len(state.steps) == 2
    fresh = search.criterion.score(state.module, groups.groups, search.bench.fit)
    ranked = {item.group: [unit for unit, _ in ranking(item, state.keep[item.group])] for item in fresh}
    for curve in state.curves:
        assert [*reversed(curve.order)] == ranked[curve.group]
    assert {item.group: item.units for item in state.scores} == state.keep


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.8, 0.4])
def test_a_target_is_met_closely(kind: Any, fraction: float) -> None:
    """No unit could stay without exceeding it; each of these groups has units of at most 4 % of the cost."""
    for name in ("residual", "vit"):
        search = Case(MagnitudeCriterion(), NoCompensation()).of(name)
        step = search.towards(kind, fraction, 2).steps[-1]
        assert fraction - 0.05 < getattr(step, kind) <= fraction


def test_round_to_holds_after_every_step() -> None:
    search = CASES["curves, surgery"].of("residual", round_to=2)
    keep = search.towards("macs", 0.6, 2).keep
    assert {len(units) % 2 for units in keep.values()} == {0}


# --- what compensation adds


class Bare(nn.Module):
    """No layer has a bias, and none a BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, bias=False) for inputs, outputs in ((12, 9), (9, 8), (8, 7), (7, zoo.CLASSES))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        out: torch.Tensor = self.layers[-1](x)
        return out


@pytest.mark.parametrize("method", [LEAST_SQUARES, MeanCompensation(), NoCompensation()])
@pytest.mark.parametrize("allocation", [FEW, GlobalAllocation()])
@pytest.mark.parametrize("fraction", [0.85, 0.5, 0.35])
def test_a_params_target_counts_the_biases_that_are_added(
    method: CompensationSettings, allocation: AllocationSettings, fraction: float
) -> None:
    """The finished network keeps to it, though 27 biases are a tenth of this one; and it is not far below."""
    entry = zoo.Entry(Bare, zoo.spec(2), 20)
    dense = entry.build()
    search = Case(MagnitudeCriterion(), method, allocation).search(dense, find(dense, entry.spec), entry)
    state = search.towards("params", fraction, 2)
    final = cut_copy(state.module, search.bench.groups.groups, state.keep)
    params = sum(parameter.numel() for parameter in final.parameters())
    biased = sum(parameter.numel() for name, parameter in final.named_parameters() if name.endswith("bias"))
    assert bool(biased) == (method != NoCompensation())
    whole = sum(parameter.numel() for parameter in dense.parameters())
    assert fraction - 0.15 < params / whole <= fraction


def test_where_a_batchnorm_takes_the_bias_up_nothing_is_counted() -> None:
    search, bare = (
        Case(MagnitudeCriterion(), method, GlobalAllocation()).of("residual")
        for method in (LEAST_SQUARES, MeanCompensation())
    )
    assert search.bench.priced.cost({}) == search.bench.groups.cost({})
    assert bare.bench.priced.cost({})[0] > bare.bench.groups.cost({})[0]
    assert bare.bench.priced.cost({})[1] == bare.bench.groups.cost({})[1]


# --- a drop as the target


@pytest.mark.parametrize("case", ["curves, surgery", "global"])
def test_a_drop_target_keeps_every_step_within_it(case: str) -> None:
    search = CASES[case].of("mlp")
    state = search.within(12.0)
    assert state.steps and all(step.drop_pp <= 12.0 for step in state.steps)
    reference = correct(search.bench.dense, search.selection)
    lost = 100 * (reference - correct(state.module, search.selection)) / len(search.selection)
    assert state.steps[-1].drop_pp == pytest.approx(lost)
    for number, step in enumerate(state.steps):
        scored = not (number and search.bench.eliminates)
        assert {item.group: item.units for item in step.scores} == (step.removed if scored else {})


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_where_all_may_stay_nothing_leaves_for_the_biases_that_are_added(kind: Any) -> None:
    def unbiased() -> nn.Module:
        return nn.Sequential(zoo.conv_bn(3, 6), nn.Conv2d(6, 6, 1, bias=False), nn.ReLU(), zoo.pooled(6))

    entry = zoo.Entry(unbiased, zoo.spec(8), 3)
    search = CASES["curves, surgery"].search(entry.build(), entry.groups, entry)
    assert search.bench.priced.cost({})[0] > search.bench.groups.cost({})[0]
    state = search.towards(kind, 1.0, 2)
    assert (state.keep, state.steps) == (search.bench.everything, ())
    scores = Scores("causal", 30, search.scores)
    assert prune._plan_of(state, search.bench, scores, None) == PruningPlan(search.bench.everything, (), None, scores)


# --- refusals


def test_what_cannot_be_reached_is_refused_before_anything_is_scored() -> None:
    search, recording = CASES["curves, surgery"].of("residual", round_to=4), Recording()
    with (
        reporting(recording),
        pytest.raises(PruningError, match=r"asks to keep 0\.05 of the macs; .*round_to 4\) 0\.\d+ is left"),
    ):
        search.towards("macs", 0.05, 2)
    assert recording.of("note") == []


def test_a_network_without_groups_is_refused_with_the_reasons() -> None:
    entry = zoo.Entry(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, zoo.CLASSES)), zoo.spec(2), 0)
    dense = entry.build()
    search = CASES["global"].search(dense, find(dense, entry.spec), entry)
    with pytest.raises(PruningError, match=r"nothing in this network can be pruned \(.*outputs of the network\)"):
        search.towards("macs", 0.5, 1)


def test_the_dense_network_is_left_as_it_was() -> None:
    search = CASES["curves, surgery"].of("residual")
    before = zoo.fingerprint(search.bench.dense)
    search.towards("macs", 0.7, 2)
    assert zoo.same(before, zoo.fingerprint(search.bench.dense))


def test_images_are_judged_by_their_most_likely_class() -> None:
    entry = zoo.ZOO["linear"]
    module, batches = entry.build(), zoo.batches(entry, 70)
    with torch.no_grad():
        likely = torch.cat([module(images).argmax(1) for images, _ in batches])
    assert correct(module, batches) == int((likely == torch.from_numpy(batches.labels)).sum())
    assert correct(module, Batches(batches.pixels, likely.numpy(), batches.spec, "cpu")) == 70
