"""What may leave, what may not and why, and what each unit costs, against the real counts of the cut network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cswap_deploy.artifacts import Axis, CostTerm, Group, Groups, Slice, UnitAttribute
from cswap_deploy.errors import PruningError
from cswap_deploy.model import count
from cswap_deploy.progress import Recording, reporting
from cswap_deploy.prune.cut import cut_copy
from cswap_deploy.prune.groups import find

few = settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def widths(found: Groups) -> dict[str, int]:
    return {group.name: group.units for group in found.groups}


def refusals(found: Groups) -> dict[str, str]:
    return {item.name: item.reason for item in found.refused}


# --- what is found


def test_a_residual_network_couples_what_its_sums_couple() -> None:
    found = zoo.ZOO["residual"].groups
    assert widths(found) == {
        "stem.0": 6,
        "layer1.conv1": 8,
        "layer2.conv1": 8,
        "layer2.conv2": 8,
        "layer3.conv1": 6,
    }
    stream = found.by_name["layer2.conv2"]
    assert {member.module for member in stream.members if member.axis == 0} == {
        "layer2.conv2",
        "layer2.bn2",
        "layer2.downsample.0",
        "layer2.downsample.1",
        "layer3.conv2",
        "layer3.bn2",
    }
    assert {member.module for member in stream.consumers} == {"layer3.conv1", "head"}
    assert refusals(found) == {"head": "its units are outputs of the network"}


def test_a_timm_resnet_has_its_streams_and_its_inner_channels() -> None:
    found = widths(zoo.ZOO["resnet"].groups)
    inner = {f"layer{stage}.{block}.conv1": width for stage, width in enumerate((8, 8, 16, 16), 1) for block in (0, 1)}
    assert found == {"conv1": 64, **inner, **{f"layer{n}.0.conv2": w for n, w in enumerate((8, 8, 16, 16), 1)}}


def test_a_vision_transformer_has_heads_and_mlp_units() -> None:
    found = zoo.ZOO["vit"].groups
    assert {name: (group.kind, group.units) for name, group in found.by_name.items()} == {
        "blocks.0.attn.heads": ("heads", 3),
        "blocks.0.mlp.fc1": ("channels", 96),
        "blocks.1.attn.heads": ("heads", 3),
        "blocks.1.mlp.fc1": ("channels", 96),
    }
    heads = found.by_name["blocks.1.attn.heads"]
    thirds = {
        Slice("blocks.1.attn.qkv", parameter, 0, offset, 8)
        for parameter in ("weight", "bias")
        for offset in (0, 24, 48)
    }
    assert set(heads.members) == {*thirds, Slice("blocks.1.attn.proj", "weight", 1, 0, 8)}
    assert UnitAttribute("blocks.1.attn", "num_heads", 1) in heads.attributes
    assert found.by_name["blocks.0.mlp.fc1"].consumers == (Slice("blocks.0.mlp.fc2", "weight", 1, 0, 1),)


def test_a_convolution_before_a_flatten_owns_blocks_of_the_linear_layer() -> None:
    assert zoo.ZOO["flattened"].groups.by_name["1"].consumers == (Slice("5", "weight", 1, 0, 16),)


def test_a_gate_belongs_to_what_it_gates() -> None:
    group = zoo.ZOO["squeeze-excite"].groups.by_name["stem.0"]
    assert {member.module for member in group.members} == {"stem.0", "stem.1", "reduce", "expand", "act", "next"}


def test_groups_come_in_the_order_of_the_layers() -> None:
    for name in zoo.PRUNABLE:
        order = [layer for layer, _ in zoo.ZOO[name].build().named_modules()]
        found = [group.members[0].module for group in zoo.ZOO[name].groups.groups]
        assert found == sorted(found, key=order.index)


@pytest.mark.parametrize("name", zoo.PRUNABLE)
def test_finding_leaves_the_module_as_it_was_and_is_repeatable(name: str) -> None:
    entry = zoo.ZOO[name]
    module = entry.build()
    next(module.parameters()).requires_grad_(False)
    before, state = zoo.fingerprint(module), torch.random.get_rng_state()
    found = find(module, entry.spec)
    assert zoo.same(before, zoo.fingerprint(module))
    assert torch.equal(state, torch.random.get_rng_state())
    assert found == entry.groups


def test_finding_leaves_training_mode_on() -> None:
    module = zoo.ZOO["mlp"].build().train()
    find(module, zoo.ZOO["mlp"].spec)
    assert all(layer.training for layer in module.modules())


def test_finding_needs_no_gradient_mode_of_its_caller() -> None:
    entry = zoo.ZOO["residual"]
    with torch.no_grad():
        assert find(entry.build(), entry.spec) == entry.groups


def test_the_forward_sees_batches_only() -> None:
    seen: set[int] = set()

    def watch(x: Tensor) -> Tensor:
        seen.add(x.ndim)
        return x

    between(watch)
    assert seen == {4}


def test_each_proof_is_reported() -> None:
    recording = Recording()
    with reporting(recording):
        find(zoo.ZOO["mlp"].build(), zoo.ZOO["mlp"].spec)
    assert recording.events == [("advance", "groups proven", "2/2")]


# --- skip


def test_skip_leaves_alone_every_group_with_a_member_that_matches() -> None:
    entry = zoo.ZOO["residual"]
    found = find(entry.build(), entry.spec, skip=["layer2.downsample*", "layer1.conv1"])
    assert set(widths(found)) == {"layer2.conv1", "layer3.conv1"}
    assert refusals(found) == {
        "head": "its units are outputs of the network",
        "stem.0": "prune.skip names it (layer2.downsample*)",
        "layer1.conv1": "prune.skip names it (layer1.conv1)",
        "layer2.conv2": "prune.skip names it (layer2.downsample*)",
    }


def test_skip_reaches_heads_by_the_layers_inside() -> None:
    entry = zoo.ZOO["vit"]
    assert set(widths(find(entry.build(), entry.spec, skip=["blocks.*.attn.*"]))) == {
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1",
    }


def test_a_skip_pattern_that_matches_nothing_is_refused() -> None:
    entry = zoo.ZOO["residual"]
    with pytest.raises(
        PruningError, match=r"prune\.skip: pattern 'layer9\*' matches no module of the network"
    ) as caught:
        find(entry.build(), entry.spec, skip=["layer1*", "layer9*"])
    assert "'stem.0', 'stem.1', 'stem.2'" in caught.value.hint


# --- refusals


class Between(nn.Module):
    """Something between the convolution `made`, whose 6 units are in question, and the convolution that reads them."""

    def __init__(self, layer: nn.Module | Callable[[Tensor], Tensor], made: int = 6, read: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.made = nn.Conv2d(6, made, 1)
        self.layer = layer
        self.read = nn.Conv2d(read, 4, 1)
        self.head = zoo.pooled(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.read(self.layer(self.made(self.first(x))))))
        return out


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 6).reshape(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


FAILS = "the network fails without some of its units: "


def between(layer: Any, made: int = 6, read: int = 6) -> Groups:
    torch.manual_seed(0)
    return find(zoo.randomised(Between(layer, made, read)).eval(), zoo.spec(8))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.GroupNorm(3, 6), "a GroupNorm normalises over its units"),
        (nn.LayerNorm([6, 6, 6]), "a LayerNorm normalises over its units"),
        (nn.ConvTranspose2d(6, 6, 2), "transposed convolutions are not pruned"),
        (lambda x: x * x.mean(1, keepdim=True).sigmoid(), "mean in Between mixes its units"),
        (lambda x: x.softmax(1), "softmax in Between mixes its units"),
        (lambda x: F.normalize(x, dim=1), "linalg_vector_norm in Between mixes its units"),
        (lambda x: x.roll(1, 1), "roll in Between moves its units"),
        (lambda x: x.flip(1), "flip in Between moves its units"),
        (lambda x: x[:, [3, 1, 2, 0, 5, 4]], "a step of the forward that picks by number reads its units"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), "pad in Between puts other units beside its units"),
        (
            lambda x: x * torch.linspace(0.5, 1.5, 6).reshape(6, 1, 1),
            "a tensor that is neither a parameter nor a buffer",
        ),
        (lambda x: torch.fft.fft2(x).real, r"_fft_c2c in Between is no operator whose units can be followed"),
    ],
    ids="group-norm layer-norm transposed mean softmax l2 roll flip index pad constant unknown".split(),
)
def test_units_that_something_mixes_are_refused(layer: Any, reason: str) -> None:
    import re

    found = between(layer)
    assert set(widths(found)) == {"first", "read"}
    assert re.match(reason, refusals(found)["made"])


@pytest.mark.parametrize(
    ("layer", "read", "units"),
    [
        (nn.InstanceNorm2d(6, affine=True), 6, 6),
        (nn.Conv2d(6, 6, 1, groups=2), 6, 2),
        (nn.Conv2d(6, 12, 1, groups=6), 12, 6),
        (nn.ChannelShuffle(2), 6, 3),
        (lambda x: torch.cat([x, -x], 1), 12, 6),
        (lambda x: torch.cat([part.relu() for part in x.chunk(3, 1)], 1), 6, 2),
        (lambda x: F.pixel_unshuffle(x, 2), 24, 6),
        (nn.GLU(1), 3, 3),
    ],
    ids="instance-norm grouped multiplier shuffle twice chunk unshuffle glu".split(),
)
def test_units_that_are_only_arranged_anew_may_leave(layer: Any, read: int, units: int) -> None:
    assert widths(between(layer, read=read))["made"] == units


def test_grouped_convolutions_keep_equal_groups() -> None:
    torch.manual_seed(0)
    module: Any = zoo.randomised(Between(nn.Conv2d(6, 6, 1, groups=3))).eval()
    found = find(module, zoo.spec(8))
    cut: Any = cut_copy(module, found.groups, {"made": (0, 2)})
    assert (cut.layer.groups, cut.layer.weight.shape[:2], cut.layer.in_channels) == (2, (4, 2), 4)
    assert torch.equal(cut.made.weight, module.made.weight[[0, 1, 4, 5]])


def test_what_a_grouped_convolution_reads_leaves_by_whole_groups_only() -> None:
    """Where those must stay, its inputs stay: nothing else knows a column of such a weight as several channels."""
    found = between(nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.ChannelShuffle(2)))
    assert "a grouped convolution reads it by its place in each group" in refusals(found)["made"]
    assert found.by_name["layer.0"].units == 3


def test_a_single_unit_is_refused() -> None:
    assert refusals(between(nn.Identity(), made=1, read=1))["made"] == "it has one unit only"


def test_a_bare_parameter_leaves_with_its_units() -> None:
    assert Slice("layer", "gamma", 1, 0, 1) in between(Scale()).by_name["made"].members


def test_only_what_nothing_normalises_is_left() -> None:
    found = zoo.ZOO["normalised"].groups
    assert widths(found) == {"grouped": 4, "free": 6}
    assert refusals(found) == {
        "stem": "a GroupNorm normalises over its units",
        "tokens": "a LayerNorm normalises over its units",
        "head": "its units are outputs of the network",
    }


def test_the_embedding_of_a_vision_transformer_is_refused() -> None:
    reasons = refusals(zoo.ZOO["vit"].groups)
    assert "a LayerNorm normalises over its units" in reasons.values()
    assert reasons["head"] == "its units are outputs of the network"


def test_a_padded_shortcut_is_refused() -> None:
    found = zoo.ZOO["padded-shortcut"].groups
    assert set(widths(found)) == {"conv1.0"}
    assert refusals(found)["stem.0"] == "pad in PaddedShortcut puts other units beside its units"


def test_one_head_is_refused() -> None:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 5}
    found = find(timm.create_model("vit_tiny_patch16_224", **sizes).eval(), zoo.spec(16))
    assert "a product of two activations sums over it" in refusals(found)["blocks.0.attn.qkv"]
    assert set(widths(found)) == {"blocks.0.mlp.fc1"}


def test_a_weight_that_two_layers_share_is_refused() -> None:
    """Cutting gives each layer its own tensor: the network would gain parameters by losing units."""

    shared = {"first", "second"}
    for group in zoo.ZOO["shared"].groups.groups:
        assert not shared & {member.module for member in group.members}, group.name


# --- a user's own module


class Own(nn.Module):
    """A skip connection, a split by a stored number, a concatenation; `step` is what happens to the second part."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 1)
        self.here, self.there = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.fuse = nn.Conv2d(9, 8, 1)
        self.head = zoo.pooled(8)
        self.first, self.step = 4, step

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        wide = F.relu(self.wide(x))
        first, second = wide[:, : self.first], wide[:, self.first :]
        joined = torch.cat([first + self.here(first), self.there(self.step(second))], 1)
        out: Tensor = self.head(x + self.fuse(joined))
        return out


class Halves(nn.Module):
    """Splits by a list that it stores, into parts of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(3, 8, 1), (4, 4)
        self.first, self.second = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.head = zoo.pooled(5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).split(self.parts, 1)
        out: Tensor = self.head(self.first(first) * self.second(second))
        return out


def test_a_list_of_equal_sizes_belongs_to_the_parts_in_their_order() -> None:
    found = find(zoo.randomised(Halves()).eval(), zoo.spec(8))
    named = {group.name: [a.name for a in group.attributes] for group in found.groups}
    assert named == {"stem": ["parts.0"], "stem[4:]": ["parts.1"], "first": []}


class SharedKeys(nn.Module):
    """Attention whose heads share one key and one value, of which the value alone may lose dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(3, 4)
        self.head = nn.Linear(8, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        query = self.query(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
        key, value = self.key(tokens).unsqueeze(1), self.value(tokens).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.head(mixed.transpose(1, 2).flatten(2)).mean(1)
        return out


def test_an_attention_whose_values_grow_narrower_costs_what_is_counted() -> None:
    module = zoo.randomised(SharedKeys()).eval()
    found = find(module, zoo.spec(8))
    assert widths(found) == {"value": 4}
    for keep in ({}, {"value": (0, 3)}):
        assert tuple(map(round, found.cost(keep))) == count(cut_copy(module, found.groups, keep), zoo.spec(8))


class Double(torch.autograd.Function):
    """Without a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


@torch.library.custom_op("cswap_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() * 2)


def own(step: Callable[[Tensor], Tensor]) -> tuple[Any, Groups]:
    torch.manual_seed(0)
    module = zoo.randomised(Own(step)).eval().requires_grad_(False)
    return module, find(module, zoo.spec(8))


class Told(nn.Module):
    """Two convolutions in a row; `step` comes between the second one and the head. `doubled`: the end is in float64."""

    def __init__(self, step: Callable[[Tensor], Tensor], doubled: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8, zoo.CLASSES)
        self.register_buffer("table", torch.eye(zoo.CLASSES, dtype=torch.float64))
        self.step, self.doubled = step, doubled

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.step(F.relu(self.second(F.relu(self.first(x))))))
        return (x.double() @ self.table).to(x.dtype) if self.doubled else x


def test_a_network_that_cannot_run_in_float32_throughout_is_searched_in_float64() -> None:
    """The reshape stops the second group; looking for it in float32 would end at the table, which is of float64."""
    found = find(zoo.randomised(Told(lambda x: x.reshape(-1, 8, 16).mean(2), True)), zoo.spec(4))
    assert widths(found) == {"first": 6} and "shape '[-1, 8, 16]' is invalid" in refusals(found)["second"]


def test_a_difference_that_float32_cannot_tell_is_told_in_float64() -> None:
    found = find(zoo.randomised(Told(lambda x: x.mean((2, 3)) + 1e-6 * x.shape[1], False)), zoo.spec(4))
    assert widths(found) == {"first": 6} and "not the same as masking them" in refusals(found)["second"]


@pytest.mark.parametrize("step", [torch.relu, Double.apply], ids=["relu", "function"])
def test_a_skip_a_split_and_a_concatenation_are_followed(step: Callable[[Tensor], Tensor]) -> None:
    module, found = own(step)
    assert widths(found) == {"stem": 8, "wide": 4, "wide[4:]": 6, "there": 5}
    first = found.by_name["wide"]
    assert first.attributes == (UnitAttribute("", "first", 1),)
    assert {member.module for member in first.consumers} == {"here", "fuse"}
    cut: Any = cut_copy(module, found.groups, {"wide": (1, 3), "wide[4:]": (0,), "there": (2, 3)})
    assert (cut.first, cut.wide.out_channels, cut.fuse.in_channels) == (2, 3, 4)
    assert torch.equal(cut.fuse.weight, module.fuse.weight[:, [1, 3, 6, 7]])


def test_an_operator_in_python_is_named_where_it_stops_a_group() -> None:
    _, found = own(lambda x: doubled(x))
    assert widths(found) == {"stem": 8, "wide": 4, "there": 5}
    assert refusals(found)["wide[4:]"] == "cswap_tests::doubled in Own is no operator whose units can be followed"


def test_what_leaves_torch_and_comes_back_is_left_alone() -> None:
    _, found = own(through_numpy)
    assert widths(found) == {"stem": 8, "wide": 4, "there": 5}
    assert refusals(found)["wide[4:]"] == "no layer reads it through its weights"


def test_a_layer_that_runs_twice_loses_what_it_makes_and_reads_at_once() -> None:
    found = zoo.ZOO["recurrent"].groups
    shared = found.by_name["stem.0"]
    assert {(member.module, member.axis) for member in shared.members if member.module == "again"} == {
        ("again", 0),
        ("again", 1),
    }
    assert {"again", "wide"} <= {member.module for member in shared.consumers}


def test_what_cannot_be_traced_is_an_error_with_a_way_out() -> None:
    def raising(x: Tensor) -> Tensor:
        raise RuntimeError("no such luck\nat line 2")

    torch.manual_seed(0)
    said = r"structure could not be traced: RuntimeError: no such luck \("
    with pytest.raises(PruningError, match=said) as caught:
        find(Between(raising).eval(), zoo.spec(8))
    assert caught.value.hint == "set prune.target: null to export it without pruning"


def test_an_error_while_tracing_leaves_the_module_as_it_was() -> None:
    def raising(x: Tensor) -> Tensor:
        raise ValueError("odd")

    module = Between(raising).eval().requires_grad_(False)
    before = zoo.fingerprint(module)
    with pytest.raises(PruningError):
        find(module, zoo.spec(8))
    assert zoo.same(before, zoo.fingerprint(module))


def test_an_error_without_a_message_is_named() -> None:
    """A bare `assert` in the user's forward."""

    def raising(x: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(PruningError, match="structure could not be traced: AssertionError"):
        find(Between(raising).eval(), zoo.spec(8))


def test_a_forward_that_refuses_smaller_layers_without_a_message_is_a_refusal() -> None:
    def six(x: Tensor) -> Tensor:
        if x.shape[1] != 6:
            raise AssertionError
        return x

    assert refusals(between(six))["made"].startswith(FAILS)


# --- cost


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_dense_cost_is_the_network_s(name: str) -> None:
    entry = zoo.ZOO[name]
    assert entry.groups.cost({}) == count(entry.build(), entry.spec)


@pytest.mark.parametrize("name", zoo.PRUNABLE)
@few
@given(data=st.data())
def test_the_cost_of_a_plan_is_the_cut_network_s(name: str, data: st.DataObject) -> None:
    entry = zoo.ZOO[name]
    keep = data.draw(zoo.keeps(entry.groups))
    cut = cut_copy(entry.build(), entry.groups.groups, keep)
    predicted = entry.groups.cost(keep)
    assert predicted == pytest.approx(count(cut, entry.spec), rel=1e-6)
    assert (round(predicted[0]), round(predicted[1])) == count(cut, entry.spec)


def test_cost_by_hand() -> None:
    """Two coupled layers of 4 -> 6 -> 3, the second reading a unit twice, after 5 inputs of no group."""
    group = Group("a", "channels", 6, ())
    terms = (
        CostTerm("a.weight", 24, 240, (Axis(6, (("a", 1),)),)),
        CostTerm("a.bias", 6, 0, (Axis(6, (("a", 1),)),)),
        CostTerm("b.weight", 51, 510, (Axis(17, (("a", 2),)),)),
        CostTerm("b.bias", 3, 0, ()),
    )
    found = Groups((group,), (), terms)
    assert found.cost({}) == (84, 750)
    assert found.cost({"a": (0, 5)}) == pytest.approx((8 + 2 + 27 + 3, 80 + 270))


# --- what no gradient goes through


class Frozen(nn.Module):
    """Two layers with units; what `way` names is done to the images or around the first of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.inner, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), zoo.pooled(5)
        if way == "gate":
            self.reduce, self.expand = nn.Conv2d(5, 3, 1), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "writes":
            x.sub_(0.5)
        if self.way == "writes past autograd":
            x.data.sub_(0.5)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.way != "backbone"):
            x = F.relu(self.inner(F.relu(self.stem(x))))
        if self.way == "detached":
            x = x.detach()
        if self.way == "gate":
            with torch.no_grad():
                gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True))).sigmoid()
            x = x * gate
        if self.way == "breaks":
            x = _NoSlope.apply(x)
        out: Tensor = self.head(x)
        return out.detach() if self.way == "logits" else out


class _NoSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            raise NotImplementedError("no slope")
        return x.clone()


@pytest.mark.parametrize(
    ("way", "message", "way_out"),
    [
        ("writes", "writes into the images", "x = x.clone()"),
        ("writes past autograd", "writes into the images", "x = x.clone()"),
        (
            "backbone",
            "computes what inner reads without a gradient (torch.no_grad",
            "take that out of the forward, or set",
        ),
        ("detached", "computes what head.2 reads without a gradient", "take that out of the forward, or set"),
        ("logits", "computes its logits without a gradient", "take that out of the forward, or set"),
        ("gate", "computes what reduce reads without a gradient", "list 'reduce', 'expand' under prune.skip"),
        ("breaks", "does not run with gradients: NotImplementedError: no slope", "let it run with gradients"),
    ],
)
def test_a_network_that_cannot_be_scored_is_refused_before_it_is(way: str, message: str, way_out: str) -> None:
    module = Frozen(way).eval()
    before = zoo.fingerprint(module)
    with pytest.raises(PruningError) as caught:
        find(module, zoo.spec(8))
    assert caught.value.exit_code == 4
    assert message in caught.value.message
    assert way_out in caught.value.hint and "prune.target: null" in caught.value.hint
    assert zoo.same(before, zoo.fingerprint(module))


def test_a_branch_without_a_gradient_may_be_left_alone_by_name() -> None:
    assert set(widths(find(Frozen("gate").eval(), zoo.spec(8), skip=["reduce", "expand"]))) == {"stem"}


def test_what_does_not_depend_on_the_image_needs_no_gradient() -> None:
    """A table of biases that a small network computes from constants, as in Swin V2."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.linspace(-1, 1, 4)[:, None])
            self.wide, self.narrow, self.head = nn.Linear(1, 7), nn.Linear(7, 4), nn.Linear(4, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            table: Any = self.narrow(F.relu(self.wide(self.places)))
            out: Tensor = self.head(x.mean((2, 3)).mean(1, keepdim=True) * table.mean(0))
            return out

    assert "wide" in widths(find(Table().eval(), zoo.spec(8)))


def test_a_layer_whose_weight_is_used_without_calling_it_reads_no_group() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(12, 7), nn.Linear(7, 6), nn.Linear(6, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc3(F.relu(F.linear(F.relu(self.fc1(x.flatten(1))), self.fc2.weight, self.fc2.bias)))
            return out

    found = find(Functional().eval(), zoo.spec(2))
    assert widths(found) == {"fc2": 6}
    assert refusals(found)["fc1"] == "the forward uses the weight of fc2 without calling the layer"


def test_attention_of_pytorch_s_own_has_its_price() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.head = nn.Linear(8, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))
            return out

    module = Tokens().eval()
    found = find(module, zoo.spec(16))
    assert widths(found) == {"layer.linear1": 12}
    keep = {"layer.linear1": (0, 3, 5)}
    for kept, network in (({}, module), (keep, cut_copy(module, found.groups, keep))):
        assert found.cost(kept) == pytest.approx(count(network, zoo.spec(16)), rel=1e-9)
