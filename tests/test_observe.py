"""One layer seen from outside: whether what its output is added to was computed from it, whoever computed; calls by keyword."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

from cswap_deploy.prune.ablation import ablated, taps
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.observe import observe, outlet

Branch = Callable[[Tensor, Tensor], Tensor]
"""Of the layer's output and of what the layer reads."""


class Joined(nn.Module):
    """A convolution's output plus what a branch gives."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.branch = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), branch
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm(self.conv(x))
        out: Tensor = self.head((own + self.branch(own, x)).mean((2, 3)))
        return out


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(_context: object, values: Tensor) -> Tensor:
        return values * 2


def into_a_slice(own: Tensor, x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, 1:] = own[:, 1:]
    return made


def into_an_earlier_view(own: Tensor, x: Tensor) -> Tensor:
    made = x.clone()
    seen = made[:, :2]
    made.copy_(own)
    return torch.cat([seen, x[:, :1]], 1)


def out_of(own: Tensor, x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    torch.mul(own, 2, out=made)
    return made


def all_at_once(own: Tensor, x: Tensor) -> Tensor:
    made = x.clone()
    torch._foreach_add_([made], [own])
    return made


DEPENDENT: dict[str, Branch] = {
    "itself": lambda own, x: own,
    "a view": lambda own, x: own.flip(1).transpose(2, 3),
    "a module": lambda own, x: nn.Conv2d(3, 3, 1)(own),
    "a mask": lambda own, x: torch.where(own > 0, x, -x),
    "an index": lambda own, x: x[torch.arange(len(x))[:, None], own.mean((2, 3)).argsort(1)],
    "a slice": into_a_slice,
    "an earlier view": into_an_earlier_view,
    "out": out_of,
    "foreach": all_at_once,
    "data": lambda own, x: own.data * 2,
    "a function of its own": lambda own, x: Custom.apply(own),
    "a number": lambda own, x: x * own.sum().item(),
    "a decision": lambda own, x: x if own.sum() > 0 else -x,
    "a decision for the other": lambda own, x: -x if own.sum().isnan() else x,
    "a list": lambda own, x: torch.tensor(own.tolist()),
    "an array": lambda own, x: torch.from_numpy(np.tanh(own.numpy())),
}
APART: dict[str, Branch] = {
    "what it reads": lambda own, x: x,
    "computed later": lambda own, x: (x * 2).relu(),
    "in memory that was free again": lambda own, x: [own * 2, None][1] or x * 2,
    "of its size": lambda own, x: x * own.shape[1] + own.dim(),
    "written into": lambda own, x: torch.zeros_like(x).add_(x),
}


@torch.no_grad()
@pytest.mark.parametrize("branch", DEPENDENT)
def test_what_was_computed_from_the_output_is_no_shortcut(branch: str) -> None:
    module, images = Joined(DEPENDENT[branch]).eval(), torch.randn(2, 3, 8, 8)
    found = outlet(module, "conv", images)
    assert (found.summed, found.rectified, found.norm) == (False, False, "norm")
    assert observe(module, "conv", images, as_far_as_sum=True).shortcut is None


@torch.no_grad()
@pytest.mark.parametrize("branch", APART)
def test_what_was_not_computed_from_the_output_is_one(branch: str) -> None:
    module, images = Joined(APART[branch]).eval(), torch.randn(2, 3, 8, 8)
    assert outlet(module, "conv", images).summed
    shortcut = observe(module, "conv", images, as_far_as_sum=True).shortcut
    assert shortcut is not None and torch.equal(shortcut, APART[branch](images, images))


class AddedInto(nn.Module):
    """The output is added into what stands beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        beside = x * 2
        beside += self.conv(x)
        out: Tensor = self.head(beside.relu().mean((2, 3)))
        return out


@torch.no_grad()
def test_a_shortcut_that_becomes_the_sum_is_one() -> None:
    module, images = AddedInto().eval(), torch.randn(2, 3, 8, 8)
    found = outlet(module, "conv", images)
    assert found.summed and found.rectified
    shortcut = observe(module, "conv", images, as_far_as_sum=True).shortcut
    assert shortcut is not None and torch.equal(shortcut, images * 2)


# --- called by keyword


class ByName(nn.Module):
    def __init__(self, *, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.same, self.head = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Linear(6, zoo.CLASSES)
        self.named = named

    def forward(self, x: Tensor) -> Tensor:
        made = self.same(input=self.conv(input=x)) if self.named else self.same(self.conv(x))
        pooled = made.relu().mean((2, 3))
        out: Tensor = self.head(input=pooled) if self.named else self.head(pooled)
        return out


@torch.no_grad()
def test_layers_called_by_keyword_are_seen_and_ablated_as_others_are() -> None:
    entry = zoo.Entry(lambda: ByName(named=False), zoo.spec(8), 0)
    (group,), images = entry.groups.groups, torch.randn(2, 3, 8, 8)
    logits, places, read, rectified = [], [], [], []
    for named in (False, True):
        module = ByName(named=named).eval()
        rectified.append(outlet(module, "conv", images).rectified)
        places.append(observe(module, "head", images, as_far_as_sum=True))
        with taps(module, ["conv", "head"]) as seen:
            module(images)
        read.append(seen)
        with ablated(module, group, [0, 2]):
            logits.append(module(images))
    assert rectified == [True, True]
    assert torch.equal(places[0].inputs, places[1].inputs) and torch.equal(places[0].output, places[1].output)
    assert all(torch.equal(read[0][name][0], read[1][name][0]) for name in ("conv", "head"))
    assert torch.equal(*logits) and not torch.equal(logits[0], places[0].output)


@pytest.mark.parametrize("intervention", ["zero", "surgery"])
def test_effects_of_a_network_of_calls_by_keyword_are_those_of_the_other(intervention: Any) -> None:
    entry = zoo.Entry(lambda: ByName(named=False), zoo.spec(8), 0)
    found = []
    for named in (False, True):
        module = ByName(named=named).eval()
        ablations = Ablations.prepare(module, entry.groups.groups, zoo.batches(entry, 7), intervention)
        masks = [torch.ones(7, group.units, dtype=torch.bool) for group in ablations.groups]
        found += ablations.effects(masks)
    assert torch.equal(*found) and found[0].abs().max() > 0
