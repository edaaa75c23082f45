"""timm's families, tiny: what is found may be cut, trains, is stored and loaded, and goes through torch.export."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from families import FAMILIES, Family
from torch import nn

from cswap_deploy.artifacts import File, Network, PruningPlan
from cswap_deploy.checkpoint import save_state
from cswap_deploy.model import count
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.cut import cut_copy, masked_copy, rebuild, write_plan
from cswap_deploy.recipe import LeastSquaresCompensation

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def images(family: Family) -> torch.Tensor:
    return torch.randn(2, *family.spec.shape, generator=torch.Generator().manual_seed(3))


def half(family: Family) -> nn.Module:
    found = family.groups_found
    return cut_copy(family.build(), found.groups, zoo.half(found))


@every_family
def test_what_is_found_may_be_cut(family: Family) -> None:
    found, module = family.groups_found, family.build()
    assert len(found.groups) >= family.groups, [f"{item.name}: {item.reason}" for item in found.refused]
    assert sum(group.kind == "heads" for group in found.groups) >= family.heads
    assert tuple(map(round, found.cost({}))) == count(module, family.spec)
    keep = zoo.half(found, seed=1)
    smaller = cut_copy(module, found.groups, keep)
    assert tuple(map(round, found.cost(keep))) == count(smaller, family.spec)
    precise, x = copy.deepcopy(module).double(), images(family).double()
    cut = cut_copy(precise, found.groups, keep)(x)
    masked = masked_copy(precise, found.groups, keep)(x)
    assert float((cut - masked).abs().max()) <= 1e-9 * float(masked.abs().max())
    changed = float((masked - precise(x)).abs().max()) > 1e-6 * float(masked.abs().max())
    assert changed or not found.groups, "the mask changes nothing"


@every_family
@pytest.mark.filterwarnings(
    "ignore:The tensor attribute"
)  # timm's caches of attention biases, filled while it is exported
def test_half_of_it_trains_and_is_exported(family: Family) -> None:
    smaller, x = half(family).requires_grad_(True), images(family)
    program = torch.export.export(smaller.eval(), (x[:1],))
    assert torch.allclose(program.module()(x[:1]), smaller(x[:1]), rtol=1e-4, atol=1e-5)
    logits = smaller.train()(x)
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in smaller.parameters() if parameter.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.fitted], ids=lambda family: family.name)
def test_what_least_squares_writes_survives_the_cut(family: Family) -> None:
    """Layers that the fit does not know stay as they are; none of them reads what left."""
    found, entry = family.groups_found, zoo.Entry(family.build, family.spec, 0)
    keep = zoo.half(found, seed=2)
    masked = compensated(family.build(), found.groups, keep, zoo.batches(entry, 8), LeastSquaresCompensation())
    wanted = masked(images(family))
    cut = cut_copy(masked, found.groups, keep)(images(family))
    assert float((cut - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@every_family
def test_half_of_it_comes_back_from_its_plan(family: Family, tmp_path: Path) -> None:
    found, dense = family.groups_found, family.build()
    keep = zoo.half(found)
    smaller = cut_copy(dense, found.groups, keep)
    save_state(smaller, tmp_path / "weights.safetensors")
    weights = File.of(tmp_path / "weights.safetensors")
    network = Network(family.architecture, None, weights, family.spec, zoo.CLASSES, 0, 0, None)
    write_plan(tmp_path / "plan.json", dense, smaller, network, found.groups, PruningPlan(keep, (), None))
    network = replace(network, plan=File.of(tmp_path / "plan.json"))
    fresh = family.build()
    for tensor in fresh.parameters():
        tensor.zero_()
    again = rebuild(fresh, family.architecture, network.plan, weights)
    assert torch.equal(again(images(family)), smaller(images(family)))
