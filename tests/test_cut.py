"""The intervention is the surgery: a cut network computes what the masked one does, and is rebuilt from text and tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from cswap_deploy.artifacts import Architecture, File, Network, PruningPlan, PruningStep, Slice
from cswap_deploy.errors import ModelError, PruningError
from cswap_deploy.model import build, count
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.cut import add_bias, cut_copy, fresh_copy, masked_copy, positions, rebuild, restore, write_plan
from cswap_deploy.recipe import CompensationSettings, LeastSquaresCompensation, NoCompensation

few = settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# --- oracle 1


@pytest.mark.parametrize("name", zoo.PRUNABLE)
@few
@given(data=st.data())
def test_cut_computes_what_the_mask_does(name: str, data: st.DataObject) -> None:
    entry = zoo.ZOO[name]
    keep = data.draw(zoo.keeps(entry.groups))
    module, x = entry.build().double(), zoo.images(entry)
    with torch.no_grad():
        dense = module(x)
        masked = masked_copy(module, entry.groups.groups, keep)(x)
        cut = cut_copy(module, entry.groups.groups, keep)(x)
    assert float((cut - masked).abs().max()) <= 1e-9 * float(dense.abs().max())


@pytest.mark.parametrize("name", zoo.PRUNABLE)
def test_half_a_network_trains_and_says_its_sizes(name: str) -> None:
    entry = zoo.ZOO[name]
    groups, keep, module = entry.groups.groups, zoo.half(entry.groups), entry.build()
    before = zoo.fingerprint(module)
    cut = cut_copy(module, groups, keep)
    logits = cut(zoo.images(entry).float())
    logits.square().sum().backward()
    assert logits.shape == (3, zoo.CLASSES)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in cut.parameters())
    assert zoo.same(before, zoo.fingerprint(module))
    for layer in cut.modules():
        _require_true_sizes(layer)
    gone: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        lost = sorted(set(range(group.units)) - set(keep[group.name]))
        for member in group.members:
            gone.setdefault((member.tensor, member.axis), set()).update(positions(member, lost))
    for (tensor, axis), indices in gone.items():
        assert cut.state_dict()[tensor].shape[axis] == module.state_dict()[tensor].shape[axis] - len(indices)


def _require_true_sizes(layer: Any) -> None:
    match layer:
        case nn.Conv2d():
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
            assert layer.bias is None or len(layer.bias) == layer.out_channels
        case nn.Linear():
            assert layer.weight.shape == (layer.out_features, layer.in_features)
            assert layer.bias is None or len(layer.bias) == layer.out_features
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            assert len(layer.running_mean) == len(layer.running_var) == layer.num_features
            assert layer.weight is None or len(layer.weight) == len(layer.bias) == layer.num_features
        case nn.PReLU():
            assert len(layer.weight) == layer.num_parameters


def test_a_copy_shares_no_hooks_and_keeps_no_tensor_of_former_forwards() -> None:
    module = nn.Linear(3, 2)
    module.bias_cache = defaultdict(dict)  # type: ignore[assignment]
    module.bias_cache["cpu"] = module(torch.ones(1, 3))
    copied = fresh_copy(module)
    assert copied.bias_cache == {} and set(module.bias_cache) == {"cpu"}
    copied.register_forward_hook(lambda *_: torch.zeros(1, 2))
    assert copied(torch.ones(1, 3)).tolist() == [[0, 0]] != module(torch.ones(1, 3)).tolist()


def test_depthwise_stays_depthwise_down_to_one_channel() -> None:
    entry = zoo.ZOO["separable"]
    cut: Any = cut_copy(entry.build(), entry.groups.groups, {"1.0": (3, 4, 9), "3.0": (7,)})
    assert (cut[2][0].groups, cut[2][0].in_channels, cut[2][0].out_channels) == (3, 3, 3)
    assert (cut[4].groups, cut[4].in_channels, cut[4].out_channels) == (1, 1, 1)


def test_attention_counts_the_heads_that_stay() -> None:
    entry = zoo.ZOO["vit"]
    module: Any = entry.build()
    cut: Any = cut_copy(module, entry.groups.groups, {"blocks.0.attn.heads": (0, 2)})
    assert (cut.blocks[0].attn.num_heads, cut.blocks[1].attn.num_heads) == (2, 3)
    assert (cut.blocks[0].attn.qkv.out_features, cut.blocks[0].attn.proj.in_features) == (3 * 16, 16)
    weight = module.blocks[0].attn.qkv.weight
    assert torch.equal(cut.blocks[0].attn.qkv.weight, weight.reshape(3, 3, 8, 24)[:, [0, 2]].reshape(48, 24))


def test_a_unit_before_a_flatten_owns_all_its_positions() -> None:
    entry = zoo.ZOO["flattened"]
    module: Any = entry.build()
    cut: Any = cut_copy(module, entry.groups.groups, {"1": (1, 4)})
    assert torch.equal(cut[5].weight, module[5].weight.reshape(9, 6, 16)[:, [1, 4]].reshape(9, 32))


def test_side_by_side_groups_keep_their_places_in_what_reads_both() -> None:
    entry = zoo.ZOO["concat"]
    module: Any = entry.build()
    cut: Any = cut_copy(module, entry.groups.groups, {"stem.0": (0, 3), "right.0": (5,)})
    assert torch.equal(cut.fuse.weight, module.fuse.weight[:, [0, 3, 4, 5, 6, 7, 8, 14]])


def test_an_empty_plan_changes_nothing_and_a_copy_keeps_its_kind() -> None:
    entry = zoo.ZOO["residual"]
    module = entry.build().double().requires_grad_(False)
    x = zoo.images(entry)
    for copy in (cut_copy(module, entry.groups.groups, {}), masked_copy(module, entry.groups.groups, {})):
        assert torch.equal(copy(x), module(x))
        assert zoo.same(zoo.fingerprint(copy), zoo.fingerprint(module))
    cut = cut_copy(module, entry.groups.groups, zoo.half(entry.groups))
    assert not any(p.requires_grad or p.dtype != torch.float64 for p in cut.parameters())


@pytest.mark.parametrize("name", zoo.PRUNABLE)
def test_nothing_reads_what_is_masked(name: str) -> None:
    entry = zoo.ZOO[name]
    keep, x = zoo.half(entry.groups), zoo.images(entry)
    masked = masked_copy(entry.build().double(), entry.groups.groups, keep)
    with torch.no_grad():
        before = masked(x)
        zoo.scramble(masked, entry.groups, keep)
        assert torch.equal(masked(x), before)


def test_positions_are_blocks_behind_an_offset() -> None:
    assert positions(Slice("qkv", "weight", 0, 24, 8), [0, 2]) == [*range(24, 32), *range(40, 48)]


def test_an_added_bias_is_zero_and_of_the_weight_s_kind() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).double()
    bias = add_bias(layer, "0")
    assert bias.dtype == torch.float64
    assert bias.tolist() == [0.0] * 4
    assert add_bias(layer, "0") is bias


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_a_group_cannot_lose_all_of_its_units(name: str) -> None:
    entry = zoo.ZOO[name]
    group = entry.groups.groups[-1]
    with pytest.raises(PruningError, match=f"group '{group.name}' would lose all of its {group.units} units"):
        cut_copy(entry.build(), entry.groups.groups, {group.name: ()})


# --- at rest


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
AT_REST: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "resnet": ("resnet18", {"channels": [8, 8, 16, 16], "num_classes": 5}),
    "vit without biases": ("vit_tiny_patch16_224", {**VIT, "qkv_bias": False, "proj_bias": False}),
}


def _bare_vit() -> nn.Module:
    import timm

    name, sizes = AT_REST["vit without biases"]
    module: nn.Module = timm.create_model(name, **sizes)
    return module


ENTRIES = {**zoo.ZOO, "vit without biases": zoo.Entry(_bare_vit, zoo.spec(16), 19)}


class Stored:
    """A dense network, half of it, and that half in files."""

    def __init__(self, name: str, folder: Path, compensation: CompensationSettings | None = None) -> None:
        self.entry = ENTRIES[name]
        self.architecture = Architecture("timm", *AT_REST[name], "timm 0.0.1")
        self.groups = self.entry.groups
        self.keep = zoo.half(self.groups)
        self.dense = self.entry.build()
        fit = zoo.batches(self.entry, 16)
        masked = compensated(self.dense, self.groups.groups, self.keep, fit, compensation or NoCompensation())
        self.pruned = cut_copy(masked, self.groups.groups, self.keep).requires_grad_(False)
        save_file(self.pruned.state_dict(), folder / "weights.safetensors")
        params, macs = count(self.pruned, self.entry.spec)
        weights = File.of(folder / "weights.safetensors")
        network = Network(self.architecture, None, weights, self.entry.spec, 5, params, macs, None)
        steps = (PruningStep(0.5, 0.5, dict.fromkeys(self.keep, (0,)), 1.5),)
        self.plan = PruningPlan(self.keep, steps, None)
        self.path = folder / "plan.json"
        write_plan(self.path, self.dense, self.pruned, network, self.groups.groups, self.plan)
        self.network = replace(network, plan=File.of(self.path))

    def tamper(self, *place: str, value: Any) -> Network:
        """The network with one entry of its plan changed."""
        document = json.loads(self.path.read_text())
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        self.path.write_text(json.dumps(document))
        return replace(self.network, plan=File.of(self.path))


@pytest.mark.parametrize("name", AT_REST)
def test_a_stored_network_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    stored = Stored(name, tmp_path, LeastSquaresCompensation())
    module = restore(stored.network)
    x = zoo.images(stored.entry).float()
    assert torch.equal(module(x), stored.pruned(x))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert count(module, stored.entry.spec) == (stored.network.params, stored.network.macs)
    document = json.loads(stored.path.read_text())
    assert {name: tuple(units) for name, units in document["keep"].items()} == stored.keep
    assert document["source"]["library"] == "timm 0.0.1"


def test_least_squares_gave_layers_biases_that_the_plan_knows(tmp_path: Path) -> None:
    """All layers from the maker of the first that lost inputs on: of this ViT none has a bias of its own, nor a BatchNorm behind it."""
    stored = Stored("vit without biases", tmp_path, LeastSquaresCompensation())
    added = [item["module"] for item in json.loads(stored.path.read_text())["rewrites"]]
    layers = ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    assert added == [f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers]


def test_least_squares_gives_no_bias_where_a_batchnorm_takes_it_up(tmp_path: Path) -> None:
    stored = Stored("resnet", tmp_path, LeastSquaresCompensation())
    assert json.loads(stored.path.read_text())["rewrites"] == []
    uncompensated = cut_copy(stored.dense, stored.groups.groups, stored.keep)
    assert stored.network.params == sum(parameter.numel() for parameter in uncompensated.parameters())
    assert not torch.equal(
        stored.pruned.get_buffer("layer1.0.bn2.running_mean"), stored.dense.get_buffer("layer1.0.bn2.running_mean")
    )


def test_the_same_plan_is_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    assert Stored("vit", tmp_path / "one").network.plan.sha256 == Stored("vit", tmp_path / "two").network.plan.sha256  # type: ignore[union-attr]


def test_a_dense_network_is_restored_without_a_plan(tmp_path: Path) -> None:
    stored = Stored("resnet", tmp_path)
    save_file(stored.dense.state_dict(), tmp_path / "dense.safetensors")
    dense = replace(stored.network, plan=None, weights=File.of(tmp_path / "dense.safetensors"))
    x = zoo.images(stored.entry).float()
    with torch.no_grad():
        assert torch.equal(restore(dense)(x), stored.dense(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_other_shapes_are_refused_with_both_versions(when: str, tmp_path: Path) -> None:
    stored = Stored("resnet", tmp_path)
    network = stored.tamper("shapes", when, "fc.weight", value=[7, 7])
    network = replace(network, architecture=replace(network.architecture, library="timm 9.9.9"))
    said = r"fc\.weight is \[5, \d+\], the plan says \[7, 7\] \(1 tensors differ\); made with timm 0\.0\.1, built here with timm 9\.9\.9"
    with pytest.raises(ModelError, match=said):
        restore(network)


@pytest.mark.parametrize(
    ("name", "change"), [("resnet", {"channels": [8, 8, 16, 24]}), ("vit", {"depth": 3}), ("vit", {"qkv_bias": False})]
)
def test_another_architecture_is_refused(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    stored = Stored(name, tmp_path)
    other = replace(stored.architecture, kwargs={**stored.architecture.kwargs, **change}, library="timm 9.9.9")
    with pytest.raises(
        ModelError, match=r"made for another network: .* made with timm 0\.0\.1, built here with timm 9\.9\.9"
    ):
        rebuild(build(other), other, stored.network.plan, stored.network.weights)


def test_a_plan_that_keeps_other_widths_is_refused(tmp_path: Path) -> None:
    stored = Stored("vit", tmp_path)
    group = stored.groups.groups[1]
    with pytest.raises(ModelError, match="made for another network"):
        restore(stored.tamper("keep", group.name, value=list(range(group.units))))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("schema", "cswap-deploy/plan/99", "has schema 'cswap-deploy/plan/99', expected 'cswap-deploy/plan/1'"),
        ("rewrites", [{"kind": "fuse", "module": "head"}], "unknown rewrite 'fuse'"),
    ],
)
def test_a_plan_from_the_future_is_refused(place: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        restore(Stored("vit", tmp_path).tamper(place, value=value))


def test_weights_of_the_dense_network_do_not_fit_the_plan(tmp_path: Path) -> None:
    stored = Stored("vit", tmp_path)
    save_file(stored.dense.state_dict(), tmp_path / "dense.safetensors")
    with pytest.raises(ModelError, match=r"dense\.safetensors does not fit the network: .* of another shape"):
        restore(replace(stored.network, weights=File.of(tmp_path / "dense.safetensors")))
