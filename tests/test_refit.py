"""The refit of everything behind the first cut: where a layer's output goes, who takes up its bias, what is fitted and to what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from cswap_deploy import progress, prune
from cswap_deploy.artifacts import Architecture, File, Groups, Image, ImageSet, Network
from cswap_deploy.prune import refit
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import with_systems
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.observe import Outlet, outlet
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.prune.systems import Systems
from cswap_deploy.recipe import LeastSquaresCompensation


def fitted(
    dense: nn.Module,
    groups: Groups,
    keep: Mapping[str, tuple[int, ...]],
    batches: Batches,
    structure: Structure | None = None,
    steps: int = 2,
) -> tuple[Any, Systems]:
    settings = LeastSquaresCompensation(producer_steps=steps)
    return with_systems(dense, groups.groups, keep, batches, settings, structure or Structure())


def built(module: nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return zoo.randomised(module).eval()


def outlet_of(module: nn.Module, name: str, side: int = 8) -> Outlet:
    with torch.no_grad():
        return outlet(module, name, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)))


def conv(inputs: int, outputs: int, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **more)


# --- where the output goes


@pytest.mark.parametrize(
    ("name", "layer", "summed", "rectified", "norm"),
    [
        ("chain", "0.0", False, True, "0.1"),
        ("chain", "2", False, False, ""),
        ("residual", "layer1.conv1", False, True, "layer1.bn1"),
        ("residual", "layer1.conv2", True, True, "layer1.bn2"),
        ("residual", "layer2.downsample.0", True, True, "layer2.downsample.1"),
        ("residual", "head", False, False, ""),
        ("in-place", "conv1", False, False, ""),
        ("in-place", "conv2", False, True, ""),
        ("in-place", "conv3", True, False, ""),
        ("in-place", "conv4", False, True, ""),
        ("recurrent", "wide", False, True, ""),
        ("squeeze-excite", "stem.0", False, True, "stem.1"),
        ("squeeze-excite", "expand", False, False, ""),
        ("separable", "3.0", False, True, "3.1"),
        ("separable", "5", False, False, ""),
        ("padded-shortcut", "conv2", True, True, ""),
        ("inert", "1", False, True, "2"),
        ("resnet", "conv1", False, True, "bn1"),
        ("resnet", "layer2.0.conv1", False, True, "layer2.0.bn1"),
        ("resnet", "layer2.0.conv2", True, True, "layer2.0.bn2"),
        ("resnet", "layer2.0.downsample.0", True, True, "layer2.0.downsample.1"),
        ("resnet", "fc", False, False, ""),
        ("vit", "patch_embed.proj", False, False, ""),
        ("vit", "blocks.0.attn.qkv", False, False, ""),
        ("vit", "blocks.0.attn.proj", True, False, ""),
        ("vit", "blocks.1.mlp.fc1", False, False, ""),
        ("vit", "blocks.1.mlp.fc2", True, False, ""),
    ],
)
def test_where_a_layer_s_output_goes(name: str, layer: str, summed: bool, rectified: bool, norm: str) -> None:
    """By hand, from the code of the networks; a clamp, GELU and ReLU6 are no rectifiers."""
    entry = zoo.ZOO[name]
    module = entry.build()
    before = zoo.fingerprint(module)
    found = outlet_of(module, layer, entry.spec.shape[1])
    assert (found.summed, found.rectified, found.norm) == (summed, rectified, norm)
    assert zoo.same(before, zoo.fingerprint(module))


def test_scale_and_shift_are_what_happens_to_a_channel_on_the_way() -> None:
    entry = zoo.ZOO["residual"]
    module: Any = entry.build()
    found = outlet_of(module, "layer1.conv2")
    values = torch.randn(2, 6, 8, 8)
    assert found.scale is not None and found.shift is not None
    with torch.no_grad():
        wanted = module.layer1.bn2(values)
    assert torch.allclose(values * found.scale[:, None, None] + found.shift[:, None, None], wanted, atol=1e-5)


class BatchNormAct(nn.Module):
    """timm's BatchNorm that carries its activation along."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        from timm.layers import BatchNormAct2d

        self.conv, self.norm = conv(3, 6), BatchNormAct2d(6, act_layer=act)
        self.head = zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)))
        return out


@pytest.mark.parametrize(("act", "rectified"), [(nn.ReLU, True), (nn.SiLU, False)])
def test_a_batchnorm_that_carries_its_activation(act: type[nn.Module], rectified: bool) -> None:
    found = outlet_of(built(BatchNormAct(act)), "conv")
    assert (found.summed, found.rectified, found.norm) == (False, rectified, "norm")


class PreActivation(nn.Module):
    """The sum is read twice: by a ReLU, and as it is by the next sum."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        from timm.layers import LayerScale2d

        self.stem, self.first, self.second = conv(3, 6), conv(6, 6), conv(6, 6)
        self.scale = LayerScale2d(6, 0.5) if scaled else nn.Identity()
        self.head = zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale(self.first(x.relu()))
        x = x + self.scale(self.second(x.relu()))
        out: Tensor = self.head(x.relu())
        return out


@pytest.mark.parametrize("scaled", [False, True])
def test_a_sum_that_something_else_reads_too_is_not_rectified(scaled: bool) -> None:
    module = built(PreActivation(scaled=scaled))
    first, second = outlet_of(module, "first"), outlet_of(module, "second")
    assert (first.summed, first.rectified, first.norm) == (True, False, "")
    assert (second.summed, second.rectified) == (True, True)
    assert outlet_of(module, "stem").rectified is False
    if scaled:
        assert second.scale is not None and second.scale.tolist() == [0.5] * 6


class NormBehindTheSum(nn.Module):
    """The only reader of the last sum is a BatchNorm with a ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = zoo.conv_bn(3, 6), conv(6, 6), nn.BatchNorm2d(6)
        self.head = zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(self.norm(x + self.conv(x)).relu())
        return out


def test_a_relu_behind_a_batchnorm_of_the_sum_does_not_rectify_the_sum() -> None:
    found = outlet_of(built(NormBehindTheSum()), "conv")
    assert (found.summed, found.rectified, found.norm, found.scale) == (True, False, "", None)


def test_the_last_sum_of_a_preactivation_resnet_is_not_rectified() -> None:
    import timm

    found = outlet_of(built(timm.create_model("resnetv2_18", pretrained=False)), "stages.3.blocks.1.conv2", 32)
    assert (found.summed, found.rectified, found.norm) == (True, False, "")


class TwoReaders(nn.Module):
    """What a BatchNorm normalises is also read as it is: it cannot take up a bias for both."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.kind = conv(3, 6), nn.BatchNorm2d(6), zoo.pooled(6), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        match self.kind:
            case "after":
                both = self.norm(x).relu() * x.sigmoid()
            case "before":
                both = x.sigmoid() * self.norm(x).relu()
            case _:
                both = x.data.sigmoid() * self.norm(x).relu()
        out: Tensor = self.head(both)
        return out


@pytest.mark.parametrize("kind", ["after", "before", "through a property"])
def test_a_batchnorm_that_is_not_the_only_reader_takes_up_no_bias(kind: str) -> None:
    found = outlet_of(built(TwoReaders(kind)), "conv")
    assert (found.rectified, found.norm) == (False, "")


class Stage(nn.Module):
    """Two inverted residuals as at the start of a stage: the first without a skip, its output is the skip of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide1, self.wide2 = zoo.conv_bn(3, 8), zoo.conv_bn(8, 10, 1), zoo.conv_bn(6, 12, 1)
        self.narrow1, self.norm1 = nn.Conv2d(10, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.narrow2, self.norm2 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.narrow1(self.wide1(self.stem(x))))
        out: Tensor = self.head(self.norm2(self.narrow2(self.wide2(x))) + x)
        return out


def test_what_reads_a_layer_s_output_is_no_shortcut_for_it() -> None:
    module = built(Stage())
    first, second = outlet_of(module, "narrow1"), outlet_of(module, "narrow2")
    assert (first.summed, first.rectified, first.norm) == (False, False, "norm1")
    assert (second.summed, second.rectified, second.norm) == (True, False, "norm2")


def test_the_first_block_of_a_stage_of_mobilenetv2_has_no_shortcut() -> None:
    import timm

    module = built(timm.create_model("mobilenetv2_100", pretrained=False))
    first, second = (outlet_of(module, f"blocks.1.{number}.conv_pwl", 32) for number in (0, 1))
    assert (first.summed, first.rectified, first.norm) == (False, False, "blocks.1.0.bn3")
    assert (second.summed, second.rectified, second.norm) == (True, False, "blocks.1.1.bn3")


def test_a_layer_does_not_make_up_for_what_a_later_block_lost() -> None:
    dense = built(Stage())
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    groups, lost = find(dense, entry.spec), {"wide1.0": tuple(range(0, 10, 2))}
    one, two = (
        fitted(dense, groups, keep, zoo.batches(entry, 60), steps=0)[0]
        for keep in (lost, {**lost, "wide2.0": (0, 5, 7)})
    )
    assert not torch.equal(one.narrow1.weight, dense.narrow1.weight)
    assert torch.equal(one.narrow1.weight, two.narrow1.weight)
    assert torch.equal(one.norm1.running_mean, two.norm1.running_mean)


class ByName(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = zoo.conv_bn(3, 8), nn.Linear(8, 10), nn.Linear(10, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        out: Tensor = self.head(input=self.fc(input=x).relu())
        return out


@pytest.mark.parametrize("steps", [0, 2])
def test_layers_that_are_called_by_keyword_are_fitted(steps: int) -> None:
    dense = built(ByName())
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    module, systems = fitted(dense, find(dense, entry.spec), {"fc": (0, 3, 4)}, zoo.batches(entry, 400), steps=steps)
    assert set(systems) == {"fc", "head"} and changed(module, dense) == ({"fc", "head"} if steps else {"head"})


# --- who takes up the bias


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "resnet"])
def test_a_batchnorm_takes_up_a_bias_exactly(name: str) -> None:
    entry = zoo.ZOO[name]
    dense, batches = entry.build(), zoo.batches(entry, 40)
    module, systems = fitted(dense, entry.groups, zoo.half(entry.groups), batches)
    module, images = module.double(), next(iter(batches))[0].double()  # in float32 rounding depends on the processor
    behind = {layer: system for layer, system in systems.items() if system.norm}
    assert behind
    with torch.no_grad():
        for layer, system in behind.items():
            weights = system.equations.solve(system.columns(system.channels), system.start)
            system.write(module, layer, weights)
            taken_up = module(images)
            norm = module.get_submodule(system.norm)
            assert system.mean is not None and module.get_submodule(layer).bias is None
            norm.running_mean.copy_(system.mean)
            handle = module.get_submodule(layer).register_forward_hook(
                lambda _layer, _inputs, output, bias=weights[-1]: output + bias[:, None, None]
            )
            added = module(images)
            handle.remove()
            norm.running_mean.copy_(system.mean - weights[-1])
            assert torch.allclose(added, taken_up, rtol=0, atol=1e-6 * float(taken_up.abs().max()))


def test_a_layer_with_a_bias_of_its_own_keeps_it_though_a_batchnorm_follows() -> None:
    dense = built(nn.Sequential(zoo.conv_bn(3, 6), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), zoo.pooled(8)))
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    module, systems = fitted(dense, find(dense, entry.spec), {"0.0": (0, 3)}, zoo.batches(entry, 30))
    assert systems["1"].norm == "" and systems["1"].mean is None
    assert not torch.equal(module[1].bias, dense[1].bias)
    assert torch.equal(module[2].running_mean, dense[2].running_mean)


class OneNorm(nn.Module):
    """Two layers in turn share one BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = zoo.conv_bn(3, 6)
        self.first, self.second, self.norm = conv(6, 6), conv(6, 6), nn.BatchNorm2d(6)
        self.head = zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(self.first(x)).relu()
        out: Tensor = self.head(self.norm(self.second(x)).relu())
        return out


class OneWeight(nn.Module):
    """Two layers hold one weight, and what the first of them reads has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = zoo.conv_bn(3, 6), nn.Conv2d(6, 8, 1)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.head = zoo.pooled(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x)).relu()
        out: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return out


@pytest.mark.parametrize("kind", [OneNorm, OneWeight])
def test_what_two_layers_share_is_not_fitted_to_one_of_them(kind: type[nn.Module]) -> None:
    dense = built(kind())
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    module, _ = fitted(dense, find(dense, entry.spec), {"stem.0": (0, 3, 4)}, zoo.batches(entry, 40))
    shared = "norm.running_mean" if kind is OneNorm else "first.weight"
    assert torch.equal(module.state_dict()[shared], dense.state_dict()[shared])


# --- what is fitted


def changed(module: nn.Module, dense: nn.Module) -> set[str]:
    before = dense.state_dict()
    return {
        name.removesuffix(".weight")
        for name, value in module.state_dict().items()
        if name.endswith(".weight") and not torch.equal(value, before[name])
    }


def test_all_layers_behind_the_first_cut_are_fitted_and_none_before_it() -> None:
    """Also those that lost no input: what they read is no longer what it was. And what makes the units, if it may."""
    entry = zoo.ZOO["residual"]
    dense, batches = entry.build(), zoo.batches(entry, 60)
    module, systems = fitted(dense, entry.groups, {"layer2.conv1": (0, 2, 5)}, batches, steps=0)
    behind = {"layer2.conv2", "layer3.conv1", "layer3.conv2", "head"}
    assert changed(module, dense) == behind
    moved, _ = fitted(dense, entry.groups, {"layer2.conv1": (0, 2, 5)}, batches)
    assert changed(moved, dense) == {"layer2.conv1", *behind}
    assert set(systems) == {member.module for group in entry.groups.groups for member in group.consumers}


def test_a_layer_that_no_group_feeds_is_fitted_too() -> None:
    """There is one group; the layers behind its consumer read what has changed, and have no system of their own."""
    entry = zoo.ZOO["residual"]
    dense, batches = entry.build(), zoo.batches(entry, 60)
    groups = replace(entry.groups, groups=(entry.groups.by_name["layer2.conv1"],))
    module, systems = fitted(dense, groups, {"layer2.conv1": (0, 2, 5)}, batches)
    assert changed(module, dense) == {"layer2.conv1", "layer2.conv2", "layer3.conv1", "layer3.conv2", "head"}
    assert set(systems) == {"layer2.conv2"}


def test_a_layer_that_lost_nothing_makes_up_for_what_was_lost_before_it() -> None:
    entry = zoo.ZOO["residual"]
    dense, batches = entry.build(), zoo.batches(entry, 60)
    module, _ = fitted(dense, entry.groups, {"layer2.conv1": (0, 2, 5)}, batches)
    fitted_error = error(module, dense, batches)
    for name in ("layer3.conv1", "layer3.conv2", "head"):
        module.get_submodule(name).load_state_dict(dense.get_submodule(name).state_dict())
    for name in ("layer3.bn1", "layer3.bn2"):
        module.get_submodule(name).load_state_dict(dense.get_submodule(name).state_dict())
    assert fitted_error < 0.95 * error(module, dense, batches)


def test_systems_know_what_has_left_and_give_what_was_written() -> None:
    entry = zoo.ZOO["vit"]
    dense, batches = entry.build(), zoo.batches(entry, 40)
    keep = {"blocks.0.attn.heads": (0, 2), "blocks.1.mlp.fc1": tuple(range(0, 96, 2))}
    module, systems = fitted(dense, entry.groups, keep, batches)
    assert set(systems) == {member.module for group in entry.groups.groups for member in group.consumers}
    assert systems["blocks.0.attn.proj"].gone == set(range(8, 16))
    assert systems["blocks.1.mlp.fc2"].gone == set(range(1, 96, 2))
    assert systems["blocks.0.mlp.fc2"].gone == set()
    for name, system in systems.items():
        weights = system.equations.solve(system.columns(system.channels), system.start)
        assert torch.allclose(module.get_submodule(name).weight, weights[:-1].T, atol=1e-6)
        assert torch.allclose(module.get_submodule(name).bias, weights[-1], atol=1e-6)


def test_with_nothing_gone_there_are_systems_and_no_change() -> None:
    entry = zoo.ZOO["residual"]
    dense = entry.build()
    module, systems = fitted(dense, entry.groups, {}, zoo.batches(entry, 20))
    assert zoo.same(zoo.fingerprint(dense), zoo.fingerprint(module))
    assert set(systems) == {member.module for group in entry.groups.groups for member in group.consumers}
    for name, system in systems.items():
        weights = system.equations.solve(system.columns(system.channels), system.start)[:-1]
        assert torch.allclose(
            weights.T.reshape(dense.get_submodule(name).weight.shape), dense.get_submodule(name).weight, atol=1e-3
        )


def test_a_network_of_which_nothing_has_left_is_walked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same equations, and the same to be remembered of the dense network, as two walks."""
    entry, visited = zoo.ZOO["residual"], list[str]()
    dense, batches = entry.build(), zoo.batches(entry, 20)
    visit, visits = refit.Walk.visit, refit._visits

    def counted(walk: refit.Walk, name: str, *, as_far_as_sum: bool) -> Any:
        visited.append(name)
        return visit(walk, name, as_far_as_sum=as_far_as_sum)

    monkeypatch.setattr(refit.Walk, "visit", counted)
    once, twice = Structure(), Structure()
    _, one = fitted(dense, entry.groups, {}, batches, once)
    assert len(visited) == len(set(visited)) and set(one) <= set(visited)
    there = refit.Walk(dense, batches, once.reuse)
    monkeypatch.setattr(refit, "_visits", lambda site, name, here, _, own: visits(site, name, here, there, own))
    visited.clear()
    _, two = fitted(dense, entry.groups, {}, batches, twice)
    assert len(visited) == 2 * len(set(visited))
    for name, system in one.items():
        assert torch.equal(system.equations.gram, two[name].equations.gram)
        assert torch.equal(system.equations.cross, two[name].equations.cross)
    assert set(once.wanted) == set(twice.wanted) == set(visited)
    for name, parts in once.wanted.items():
        assert all(torch.equal(own, other) for own, other in zip(parts, twice.wanted[name], strict=True))


# --- rectifiers


def error(module: nn.Module, dense: nn.Module, batches: Batches, part: str = "") -> float:
    """Squared difference of what `part` gives, over that of the dense network."""
    off = total = 0.0
    with torch.no_grad():
        for images, _ in batches:
            given = []
            for network in (module, dense):
                seen: list[Tensor] = []
                handle = network.get_submodule(part).register_forward_hook(
                    lambda *call, seen=seen: seen.append(call[2].clone())
                )
                network(images)
                handle.remove()
                given.append(seen[0])
            off += float((given[0] - given[1]).square().sum())
            total += float((given[1] - given[1].mean(0)).square().sum())
    return math.sqrt(off / total)


@pytest.mark.parametrize(("negative", "less", "clear"), [(False, 0.99, 5), (True, 0.98, 2)])
def test_where_a_relu_follows_the_fit_spends_nothing_on_what_it_cuts_off(
    negative: bool, less: float, clear: int
) -> None:
    """Compared behind the ReLU with the fit that knows nothing of it: on the images of the fit and on others.

    It helps each of eight networks, the one of the seed `clear` by a percent or two.
    """
    ratios = [rectified_gain(negative, seed) for seed in range(8)]
    assert max(max(pair) for pair in ratios) < 1, ratios
    seen, unseen = ratios[clear]
    assert seen < less and unseen < 0.995


def rectified_gain(negative: bool, seed: int) -> tuple[float, float]:
    """Errors of the fit, on its images and on others, as parts of those of the fit without the rectifier."""
    torch.manual_seed(seed)
    dense = built(nn.Sequential(zoo.conv_bn(3, 10, stride=2), zoo.conv_bn(10, 8), zoo.pooled(8)))
    with torch.no_grad():
        dense[1][1].bias.fill_(-0.4)
        dense[1][1].weight[::2] *= -1 if negative else 1
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    found, batches, knowing, ignorant = find(dense, entry.spec), zoo.batches(entry, 200), Structure(), Structure()
    for structure in (knowing, ignorant):
        examine(dense, structure, batches, ())
    site = knowing.sites["1.0"]
    assert site is not None and site.outlet.rectified and ("1.0" in found.by_name)
    assert (site.outlet.sign(8) < 0).tolist() == [negative and channel % 2 == 0 for channel in range(8)]
    ignorant.sites["1.0"] = replace(site, outlet=replace(site.outlet, rectified=False))
    one, two = (
        fitted(dense, found, {"0.0": (0, 2, 4, 6, 8)}, batches, structure, steps=0)[0]
        for structure in (knowing, ignorant)
    )
    seen, unseen = (
        error(one, dense, images, "1") / error(two, dense, images, "1")
        for images in (batches, zoo.batches(entry, 100, seed=5))
    )
    return seen, unseen


def test_a_channel_that_its_scale_closes_is_fitted_plainly() -> None:
    """What cannot be passed on in either direction has no rectifier: the fit stays finite."""
    dense = built(nn.Sequential(zoo.conv_bn(3, 6), zoo.conv_bn(6, 5), zoo.pooled(5)))
    with torch.no_grad():
        dense[1][1].weight[2] = 0
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    module, _ = fitted(dense, find(dense, entry.spec), {"0.0": (0, 1, 4)}, zoo.batches(entry, 40))
    assert bool(F.relu(module(next(iter(zoo.batches(entry, 8)))[0])).isfinite().all())
    assert error(module, dense, zoo.batches(entry, 40)) < 1


def test_structures_of_one_key_are_examined_once_and_fit_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, looked = zoo.ZOO["residual"], list[int]()
    dense, batches = entry.build(), zoo.batches(entry, 70)
    groups = find(dense, entry.spec)
    keep = {group.name: tuple(range(1, group.units)) for group in groups.groups}

    find_structure = refit._found

    def counted(*arguments: Any) -> Structure:
        looked.append(1)
        return find_structure(*arguments)

    monkeypatch.setattr(refit, "_found", counted)
    monkeypatch.setattr(refit, "_examined", {})
    fits = [
        fitted(dense, groups, keep, batches, Structure(key))[0].state_dict() for key in ("", "a", "a", "", "b", "c")
    ]
    assert len(looked) == 5  # the second "a" asks no one
    for other in fits[1:]:
        assert other.keys() == fits[0].keys() and all(
            torch.equal(value, fits[0][name]) for name, value in other.items()
        )
    assert [*refit._examined] == ["b", "c"] and not any(found.wanted for found in refit._examined.values())


def test_a_structure_is_of_one_network_of_some_images_on_one_device(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"a")
    weights = File.of(tmp_path / "weights")
    spec = zoo.spec(8)
    source = Network(Architecture("timm", "resnet18", {}, "1"), None, weights, spec, 4, 1, 1, None)
    fit = ImageSet(tuple(Image(f"{name}.png", name, 0) for name in "abc"), tmp_path)

    def seen(images: int, copies: int = 0, device: str = "cpu") -> Batches:
        pixels = np.zeros((images + copies, 3, 8, 8), np.uint8)
        return Batches(pixels, np.zeros(images + copies, np.int64), spec, device, copies=copies)

    others = [
        (replace(source, weights=replace(weights, sha256="b")), fit, seen(2)),
        (replace(source, architecture=Architecture("timm", "resnet34", {}, "1")), fit, seen(2)),
        (replace(source, input=zoo.spec(16)), fit, seen(2)),
        (source, replace(fit, images=fit.images[::-1]), seen(2)),
        (source, fit, seen(3)),
        (source, fit, seen(2, copies=1)),
        (source, fit, seen(2, device="cuda")),
    ]
    keys = {prune._key(*asked) for asked in [(source, fit, seen(2)), *others]}
    assert len(keys) == 1 + len(others)
    same = replace(fit, images=(*fit.images[:2], Image("d.png", "d", 0)), root=tmp_path / "elsewhere")
    assert prune._key(source, same, seen(2)) == prune._key(source, fit, seen(2))


def test_a_layer_that_is_not_fitted_is_told_of_by_each_stage_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = progress.Recording()
    monkeypatch.setattr(refit, "_examined", {})
    monkeypatch.setattr(refit, "MOST_COLUMNS", 1)
    entry = zoo.ZOO["residual"]
    dense, batches = entry.build(), zoo.batches(entry, 10)
    with progress.reporting(heard):
        examine(dense, Structure("a"), batches, ())
        assert heard.of("warn") == []
        for _ in range(2):
            examine(dense, Structure("a"), batches, ("layer1.conv2",))
    wide = "layer1.conv2 is not refitted: the fit of its"
    said = heard.of("warn")
    assert len(said) == 2 and all(message.startswith(wide) for message in said)
