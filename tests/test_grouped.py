"""Grouped and depthwise convolutions behind a cut are fitted group by group: the same as one least-squares problem each."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from timm.layers import Conv2dSame
from torch import Tensor, nn

from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.grouped import grouped_rows
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.recipe import LeastSquaresCompensation

STILL = LeastSquaresCompensation(producer_steps=0)


def built(groups: int, *, behind: nn.Module) -> Any:
    """A cut between the first two layers; the third has several groups and lost nothing."""
    torch.manual_seed(1)
    net = nn.Sequential(
        zoo.conv_bn(3, 10, stride=2),
        zoo.conv_bn(10, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=groups),
        behind,
        zoo.pooled(8),
    )
    return zoo.randomised(net).eval()


def pruned(net: nn.Module, structure: Structure | None = None) -> tuple[Any, Batches]:
    entry = zoo.Entry(lambda: net, zoo.spec(8), 0)
    batches = zoo.batches(entry, 90)
    keep = {"0.0": (0, 2, 4, 6, 8)}
    return compensated(net, find(net, entry.spec).groups, keep, batches, STILL, structure), batches


def at(module: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer reads and gives."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _layer, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        module(images)
    hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_fit_is_numpy_s_least_squares_of_each_group(groups: int) -> None:
    net = built(groups, behind=nn.ReLU6())  # no rectifier that the fit may lean on
    module, batches = pruned(net)
    images = torch.cat([batch for batch, _ in batches])
    read, _ = at(module, module[2], images)
    _, wanted = at(net, net[2], images)
    found, size = module[2], 8 // groups
    for group in range(groups):
        own = read[:, group * size : (group + 1) * size]
        fields = F.unfold(own, 3, padding=1).transpose(1, 2).flatten(0, 1).double().numpy()
        fields = np.concatenate([fields, np.ones((len(fields), 1))], 1)
        target = wanted[:, group * size : (group + 1) * size].flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()
        best = np.linalg.lstsq(fields, target, rcond=None)[0]
        weights = found.weight[group * size : (group + 1) * size].detach().flatten(1).T.double().numpy()
        weights = np.concatenate([weights, found.bias[group * size : (group + 1) * size].detach()[None].double()])
        least = np.square(fields @ best - target).sum()
        assert np.square(fields @ weights - target).sum() <= 1.001 * least + 1e-9


@pytest.mark.parametrize(("behind", "less"), [(nn.ReLU(), 0.97), (nn.ReLU6(), 0.99)])
def test_what_follows_is_nearer_to_the_dense_network_than_without(behind: nn.Module, less: float) -> None:
    net = built(8, behind=behind)
    module, batches = pruned(net)
    images = torch.cat([batch for batch, _ in batches])
    before = copy.deepcopy(module)
    before[2].load_state_dict(net[2].state_dict())
    wanted = at(net, net[3], images)[1]
    error, without = (float((at(one, one[3], images)[1] - wanted).square().sum()) for one in (module, before))
    assert error < less * without


def test_a_depthwise_layer_within_the_pruned_group_is_fitted_for_the_units_that_stay() -> None:
    entry = zoo.ZOO["separable"]
    net, batches = entry.build(), zoo.batches(entry, 90)
    group = next(group for group in entry.groups.groups if any(member.module == "2.0" for member in group.members))
    first = entry.groups.groups[0]
    keep = {first.name: tuple(range(0, first.units, 2)), group.name: tuple(range(0, group.units, 2))}
    module = compensated(net, entry.groups.groups, keep, batches, STILL)
    assert not torch.equal(module[2][0].weight, net[2][0].weight)
    assert torch.equal(module[2][1].weight, net[2][1].weight), "the BatchNorm takes up the bias and nothing else"
    assert not torch.equal(module[2][1].running_mean, net[2][1].running_mean)
    assert module[2][0].bias is None


def test_nothing_changes_where_nothing_has_left_before() -> None:
    net = built(8, behind=nn.ReLU())
    entry = zoo.Entry(lambda: net, zoo.spec(8), 0)
    found = find(net, entry.spec)
    last = [group for group in found.groups if group.name not in ("0.0", "1.0")]
    keep = {group.name: tuple(range(group.units - 1)) for group in last}
    module = compensated(net, found.groups, keep, zoo.batches(entry, 40), STILL)
    assert torch.equal(module[1][0].weight, net[1][0].weight)


class Lying(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "fits"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), True),
        (nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2, bias=False), True),
        (nn.Conv2d(4, 8, 3, padding=1), False),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4), False),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), False),
        (Lying(4, 4, 3, padding=1, groups=4), False),
        (Conv2dSame(4, 8, 3, stride=2, groups=4), False),
        (nn.Linear(9, 4), False),
    ],
)
def test_which_layers_can_be_fitted_group_by_group(layer: Any, fits: bool) -> None:
    images = torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        assert (grouped_rows(layer, images, layer(images), 10) is not None) == fits


def test_a_network_is_examined_once_for_all_fits() -> None:
    net, structure = built(8, behind=nn.ReLU()), Structure()
    one, batches = pruned(net, structure)
    examine(net, structure, batches, ())
    assert list(structure.grouped) == ["2"] and structure.sites["2"] is None
    two, _ = pruned(net, structure)
    assert torch.equal(one[2].weight, two[2].weight)
