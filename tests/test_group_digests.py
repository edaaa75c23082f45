"""The networks that results were measured on have exactly the groups, in the order and at the cost, that they were measured with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
import zoo
from conftest import ROOT, benchmark
from torch import nn

from cswap_deploy import recipe
from cswap_deploy.artifacts import Architecture, InputSpec
from cswap_deploy.model import build
from cswap_deploy.prune.groups import find

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10}


def _resnet(depth: int) -> nn.Module:
    network: nn.Module = benchmark("cifar_resnet").CifarResNet(depth)
    return network


def _recipe(name: str) -> nn.Module:
    model = recipe.load(ROOT / "recipes" / name, []).model
    assert model.name
    return build(Architecture("timm", model.name, {**model.kwargs, "num_classes": model.num_classes}, ""))


NETWORKS = {
    "resnet20": (lambda: _resnet(20), 9, "2f706f6784019b13", "19b4067cab20137d"),
    "resnet56": (lambda: _resnet(56), 27, "f0efc68ae22e4e36", "f542244466f6d323"),
    "vit": (
        lambda: build(Architecture("timm", "vit_tiny_patch16_224", VIT, "")),
        12,
        "f60070809dd739fa",
        "ea9ed4d2a88e3e85",
    ),
    "quickstart": (lambda: _recipe("quickstart.yaml"), 14, "9ba2dd8682c41186", "b0eba7b1d8a1a8aa"),
    "quickstart-vit": (lambda: _recipe("quickstart-vit.yaml"), 8, "05e59fe57c89b934", "c896cf4a89dfce22"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_those_of_the_measurements(name: str) -> None:
    make, count, groups, terms = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = zoo.randomised(make()).eval()
    found = find(module, InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0))
    assert len(found.groups) == count
    assert not any(group.branch for group in found.groups)  # the results are of targets that keep some units of each
    assert (
        _digest([{key: value for key, value in asdict(group).items() if key != "branch"} for group in found.groups])
        == groups
    )
    assert _digest([asdict(term) for term in found.terms]) == terms


def _digest(values: list[dict[str, Any]]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
