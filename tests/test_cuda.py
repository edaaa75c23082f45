"""Pruning on a CUDA device: what the CPU finds, and the same bytes each time. Skipped where PyTorch sees no such device."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import zoo
from torch import Tensor

from cswap_deploy.artifacts import GroupScores
from cswap_deploy.prune.batches import resolve_device
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.criteria import scorer
from cswap_deploy.prune.cut import cut_copy
from cswap_deploy.prune.search import Bench, Search
from cswap_deploy.prune.select import Kept
from cswap_deploy.recipe import CausalCriterion, CriterionSettings, CurvesAllocation, LeastSquaresCompensation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
NETWORKS = ("residual", "separable", "concat", "normalised", "squeeze-excite", "vit")
CRITERIA: dict[str, CriterionSettings] = {
    "attribution": CausalCriterion(estimator="attribution"),
    "screened": CausalCriterion(estimator="screened", intervention="zero"),
    "exact": CausalCriterion(estimator="exact", intervention="mean"),
    "surgery": CausalCriterion(estimator="exact", intervention="surgery"),
}


def scored(name: str, criterion: CriterionSettings, device: str) -> tuple[GroupScores, ...]:
    entry = zoo.ZOO[name]
    dense = copy.deepcopy(entry.build()).requires_grad_(False).to(resolve_device(device))
    fit = replace(zoo.batches(entry, 30), device=device)
    return tuple(scorer(criterion, 0).score(dense, entry.groups.groups, fit))


def pruned(name: str, device: str) -> tuple[Kept, Tensor]:
    """To 60 % of the multiply-accumulates in two steps: the units that stay, and float32 logits of what ships, (40, classes)."""
    entry = zoo.ZOO[name]
    dense, groups = copy.deepcopy(entry.build()).requires_grad_(False).to(resolve_device(device)), entry.groups.groups
    fit, judge = (replace(zoo.batches(entry, count, seed=count), device=device) for count in (200, 40))
    criterion, fitted, few = (
        CausalCriterion(estimator="attribution"),
        LeastSquaresCompensation(),
        CurvesAllocation(images=60),
    )
    bench = Bench(dense, entry.groups, fit, criterion, fitted, few, 1)
    scores = tuple(scorer(criterion, 0).score(dense, groups, fit))
    module, systems = bench.compensated(bench.everything)
    curves = bench.gauge(module, systems, bench.everything, scores, bench.damage(few)).curves(1)
    keep = Search(bench, judge, scores, curves, 0).towards("macs", 0.6, 2).keep
    shipped = cut_copy(compensated(dense, groups, keep, fit, fitted), groups, keep)
    with torch.no_grad():
        return keep, torch.cat([shipped(images) for images, _ in judge]).cpu()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_those_of_the_cpu(name: str, criterion: str) -> None:
    for one, two in zip(*(scored(name, CRITERIA[criterion], device) for device in ("cpu", "cuda")), strict=True):
        assert one.units == two.units
        largest = max(abs(value) for value in one.keep_value)
        assert one.keep_value == pytest.approx(two.keep_value, rel=1e-3, abs=1e-4 * largest + 1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pruned_network_is_that_of_the_cpu(name: str) -> None:
    (kept, wanted), (also, found) = (pruned(name, device) for device in ("cpu", "cuda"))
    assert kept == also
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_gives_the_same_bytes_each_time(name: str) -> None:
    (kept, wanted), (also, found) = (pruned(name, "cuda") for _ in range(2))
    assert kept == also and torch.equal(wanted, found)
