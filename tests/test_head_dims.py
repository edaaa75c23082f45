"""Dimensions within attention heads: what is found may be cut, the rotation changes nothing and gathers what counts, scales stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import zoo
from families import FAMILIES
from safetensors.torch import save_file
from simulated import weights
from test_budget import exported, read
from test_search import Case
from torch import Tensor, nn

from cswap_deploy import recipe, units
from cswap_deploy.artifacts import Architecture, File, Groups, HeadDims, Network, PruningPlan
from cswap_deploy.budget.narrow import require_runnable
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import LayerTime, Staircase
from cswap_deploy.codec import decode, encode
from cswap_deploy.errors import PruningError, UsageError
from cswap_deploy.model import count
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.cut import cut_copy, masked_copy, rebuild, write_plan
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.rotation import logit_scores, rotated
from cswap_deploy.prune.search import Search
from cswap_deploy.recipe import LeastSquaresCompensation, MagnitudeCriterion, MeanCompensation


class Separate(nn.Module):
    """Attention whose queries, keys and values are layers of their own; how it reshapes, scales and looks at its heads is to say."""

    def __init__(self, way: str = "stored") -> None:
        super().__init__()
        self.way, self.num_heads, self.head_dim, self.width = way, 2, 6, 12
        self.patches = nn.Conv2d(3, 10, 4, 4)
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 12, bias=False), nn.Linear(10, 12)
        self.proj, self.head = nn.Linear(12, 10), nn.Linear(10, zoo.CLASSES)
        self.norm = nn.LayerNorm(6) if way == "norm" else nn.Identity()
        self.gate = nn.Linear(10, 12) if way == "gate" else None
        self.scale = 6**-0.5

    def heads(self, x: Tensor) -> Tensor:
        size = self.head_dim if self.way in ("stored", "rooted", "constant") else -1
        return x.reshape(*x.shape[:2], self.num_heads, size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        q = self.norm(q)
        match self.way:
            case "rooted":
                y = (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v
            case "constant":
                y = (q @ k.mT * 0.4).softmax(-1) @ v
            case "linear":
                y = F.softplus(q) @ (F.softplus(k).mT @ v)
            case "stored":
                y = (q * self.scale @ k.mT).softmax(-1) @ v
            case "rotary":
                angle = torch.linspace(0, 1, q.shape[-1], dtype=q.dtype)
                y = F.scaled_dot_product_attention(q * angle.cos(), k * angle.cos(), v)
            case _:
                y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).flatten(2)
        y = y * self.gate(x).sigmoid() if self.gate is not None else y
        out: Tensor = self.head((x + self.proj(y)).mean(1))
        return out


def separate(way: str) -> zoo.Entry:
    return zoo.Entry(lambda: Separate(way), zoo.spec(12), 0)


def one_head() -> nn.Module:
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": zoo.CLASSES}
    return cast(nn.Module, timm.create_model("vit_tiny_patch16_224", **sizes))


def family(name: str) -> zoo.Entry:
    found = next(item for item in FAMILIES if item.name == name)
    return zoo.Entry(found.build, found.spec, 0)


def made(entry: zoo.Entry) -> nn.Module:
    return entry.build().eval().requires_grad_(False)


SWIN, LEVIT = "swin_tiny_patch4_window7_224", "levit_128s"
NETS: dict[str, tuple[zoo.Entry, dict[str, int]]] = {
    "vit": (zoo.ZOO["vit"], {f"blocks.{n}.attn.dims": 8 for n in (0, 1)}),
    "one head": (zoo.Entry(one_head, zoo.spec(16), 0), {"blocks.0.attn.dims": 8}),
    "swin": (family(SWIN), {f"layers.{n}.attn.dims": 6 for n in ("0.blocks.0", "0.blocks.1", "1.blocks.0")}),
    "levit": (
        family(LEVIT),
        {f"stages.{n}.qk_dims": 8 for n in (
            "0.blocks.0.attn", "1.downsample.attn_downsample", "1.blocks.0.attn", "2.downsample.attn_downsample", "2.blocks.0.attn"
        )} | {f"stages.{n}.downsample.attn_downsample.v_dims": 32 for n in (1, 2)}
        | {f"stages.{n}.blocks.0.attn.v_dims": 16 for n in (1, 2)},
    ),
    "bound by a number": (separate("stored"), {"dims": 6}),
    "by the root of a number": (separate("rooted"), {"dims": 6}),
    "apart": (separate("fused"), {"qk_dims": 6, "v_dims": 6}),
}  # fmt: skip
every_net = pytest.mark.parametrize("name", NETS)


@cache
def found_in(name: str) -> Groups:
    entry = NETS[name][0]
    return find(made(entry), entry.spec, heads="dims")


def inner(found: Groups) -> list[HeadDims]:
    return [group for group in found.groups if isinstance(group, HeadDims)]


# --- groups


@every_net
def test_what_is_found_may_be_cut(name: str) -> None:
    entry, wanted = NETS[name]
    found, module = found_in(name), made(entry)
    assert {group.name: group.units for group in inner(found)} == wanted
    assert tuple(map(round, found.cost({}))) == count(module, entry.spec)
    precise, x = copy.deepcopy(module).double(), zoo.images(entry)
    for seed in range(3):
        keep = zoo.half(found, seed)
        assert tuple(map(round, found.cost(keep))) == count(cut_copy(module, found.groups, keep), entry.spec)
        within = {group.name: keep[group.name] for group in inner(found)}
        cut, masked = (change(precise, found.groups, within)(x) for change in (cut_copy, masked_copy))
        assert float((cut - masked).abs().max()) <= 1e-9 * float(masked.abs().max())
        assert float((masked - precise(x)).abs().max()) > 1e-7 * float(masked.abs().max()), "the mask changes nothing"


@pytest.mark.parametrize("name", ["apart", "levit"])
def test_the_two_products_of_an_attention_are_priced_apart(name: str) -> None:
    """Were each MAC to take the same time, dimensions would save the time of their MACs."""
    found = found_in(name)
    whole = found.cost({})[1]
    layers = tuple(
        LayerTime((term.name,), term.macs / whole, (0.0,) * len(term.axes), 0.0, 1)
        for term in found.terms
        if term.macs and term.axes
    )
    rest = 1 - sum(layer.product for layer in layers)
    steps = Steps(found, Staircase(1, 1, rest, layers, (), 0, ()))
    for group in found.groups:
        keep = {group.name: tuple(range(group.units // 2))}
        assert steps.total({group.name: group.units // 2}) == pytest.approx(found.cost(keep)[1] / whole, abs=1e-9)


def test_heads_stay_whole_unless_asked_otherwise() -> None:
    entry = zoo.ZOO["vit"]
    assert find(made(entry), entry.spec, heads="whole") == entry.groups
    assert not inner(entry.groups)
    others = {group for group in found_in("vit").groups if not isinstance(group, HeadDims)}
    assert others == {group for group in entry.groups.groups if group.kind == "channels"}


def test_skip_holds_for_dimensions_too() -> None:
    entry = zoo.ZOO["vit"]
    found = find(made(entry), entry.spec, ["blocks.1.attn.qkv"], "dims")
    assert [group.name for group in inner(found)] == ["blocks.0.attn.dims"]
    reasons = {item.name: item.reason for item in found.refused}
    assert reasons["blocks.1.attn.dims"] == "prune.skip names it (blocks.1.attn.qkv)"


APART = "its heads cannot be rotated: more than a product is between their queries and keys, or their values and a projection"


@pytest.mark.parametrize(
    ("way", "group", "reason"),
    [
        ("norm", "q", "a LayerNorm normalises over its units"),
        ("rotary", "qk_dims", "a tensor that is neither a parameter nor a buffer is coupled to it, in Separate"),
        ("linear", "qk_dims", APART),
        ("constant", "dims", "cutting its units is not the same as masking them"),
        ("gate", "", ""),
    ],
)
def test_what_cannot_lose_dimensions_says_why(way: str, group: str, reason: str) -> None:
    """Where values alone may leave they do, rotated or not."""
    entry = separate(way)
    found = find(made(entry), entry.spec, heads="dims")
    reasons = {item.name: item.reason for item in found.refused}
    assert not [item for item in inner(found) if item.queries and way != "gate"]
    if reason:
        assert any(name.startswith(group) and reason in told for name, told in reasons.items()), reasons
    values = [item for item in inner(found) if not item.queries]
    assert all((item.values is None) == (way == "gate") for item in values)


# --- rotation


@every_net
def test_the_rotation_changes_nothing(name: str) -> None:
    entry, found = NETS[name][0], found_in(name)
    module, x = made(entry).double(), zoo.images(entry)
    turned = rotated(module, found.groups, Precise(zoo.batches(entry, 20)))
    assert float((turned(x) - module(x)).abs().max()) <= 1e-9 * float(module(x).abs().max())
    moved = {group.name: group for group in inner(found) if group.queries or group.values}
    before, after = module.state_dict(), turned.state_dict()
    for group in moved.values():
        makers = [member.tensor for member in group.members if member.axis == 0 and member.parameter == "weight"]
        assert any(not torch.equal(before[tensor], after[tensor]) for tensor in makers), group.name
    owned = {member.tensor for group in moved.values() for member in group.members}
    biases = {f"{rows.last}.bias" for group in moved.values() for rows in (group.queries, group.keys) if rows}
    assert all(torch.equal(before[key], after[key]) for key in before if key not in owned | biases)


class Precise:
    """Batches in float64."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images.double(), labels) for images, labels in self.batches)


def test_what_two_dimensions_carry_is_gathered_in_two() -> None:
    """Queries and keys, and values and projection, of rank 2 behind a random change of basis: the other four of each head may leave."""
    entry = separate("fused")
    module: Any = made(entry)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (module.q, module.k, module.v):
            for head in (0, 6):
                basis = torch.randn(6, 2, generator=generator)
                layer.weight[head : head + 6] = basis @ torch.randn(2, 10, generator=generator)
                if layer.bias is not None:
                    layer.bias[head : head + 6] = basis @ torch.randn(2, generator=generator)
    found, batches = found_in("apart"), zoo.batches(entry, 40)
    keep = {group.name: (0, 1) for group in inner(found)}
    wanted, x = module(zoo.images(entry).float()), zoo.images(entry).float()
    turned = cut_copy(rotated(module, found.groups, batches), found.groups, keep)(x)
    plain = cut_copy(module, found.groups, keep)(x)
    assert float((turned - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_dimensions_come_in_the_order_of_what_they_add_to_the_logits() -> None:
    entry, found = zoo.ZOO["vit"], found_in("vit")
    batches = zoo.batches(entry, 20)
    turned = logit_scores(rotated(made(entry), found.groups, batches), inner(found), batches)
    plain = logit_scores(made(entry), inner(found), batches)
    for after, before in zip(turned, plain, strict=True):
        assert list(after.keep_value) == sorted(after.keep_value, reverse=True)
        assert sum(after.keep_value[4:]) < 0.5 * sum(sorted(before.keep_value)[:4])


# --- the scale of the softmax


@pytest.mark.parametrize("fused", [True, False])
def test_both_ways_of_timms_attention_keep_the_dense_scale(fused: bool) -> None:
    """`scaled_dot_product_attention` divides by the root of what is left, the other way by a number that the module stores."""
    entry, found = zoo.ZOO["vit"], found_in("vit")
    keep = {group.name: tuple(range(3)) for group in inner(found)}
    cut: Any = cut_copy(made(entry).double(), found.groups, keep)
    masked = masked_copy(made(entry).double(), found.groups, keep)
    for network in (cut, masked):
        for block in cast(Any, network).blocks:
            block.attn.fused_attn = fused
    assert (cut.blocks[0].attn.scale, cut.blocks[0].attn.head_dim, cut.blocks[0].attn.attn_dim) == (3**-0.5, 3, 9)
    x = zoo.images(entry)
    assert float((cut(x) - masked(x)).abs().max()) < 1e-12


# --- at rest


@every_net
def test_it_comes_back_from_its_plan(name: str, tmp_path: Path) -> None:
    entry, found = NETS[name][0], found_in(name)
    dense = made(entry)
    keep = zoo.half(found)
    smaller = cut_copy(dense, found.groups, keep)
    state = {key: tensor.contiguous() for key, tensor in smaller.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    weights, architecture = File.of(tmp_path / "weights.safetensors"), Architecture("timm", name, {}, "timm 0.0.1")
    network = Network(architecture, None, weights, entry.spec, zoo.CLASSES, 0, 0, None)
    write_plan(tmp_path / "plan.json", dense, smaller, network, found.groups, PruningPlan(keep, (), None))
    fresh = made(entry)
    for tensor in fresh.parameters():
        tensor.detach().zero_()
    again = rebuild(fresh, architecture, File.of(tmp_path / "plan.json"), weights)
    x = zoo.images(entry).float()
    assert torch.equal(again(x), smaller.eval()(x))


def test_groups_are_the_same_after_they_were_stored(tmp_path: Path) -> None:
    found = found_in("apart")
    assert decode(Groups, encode(found, tmp_path), tmp_path) == found


@pytest.mark.parametrize("change", [{"scales": (("", "width"),)}, {"scales": (("", "nothing"),)}])
def test_a_plan_that_scales_something_else_is_refused(change: dict[str, Any]) -> None:
    entry, found = NETS["bound by a number"][0], found_in("bound by a number")
    strange = replace(inner(found)[0], **change)
    with pytest.raises(PruningError, match=r"the network has no number '.*' that could scale logits"):
        cut_copy(made(entry), [strange], {"dims": (0, 1)})


def test_rows_beyond_a_layer_are_refused() -> None:
    entry, group = NETS["apart"][0], inner(found_in("apart"))[0]
    assert group.queries
    strange = replace(group, queries=replace(group.queries, offsets=(0, 8)))
    with pytest.raises(PruningError, match="q has 12 rows, group 'qk_dims' owns more"):
        cut_copy(made(entry), [strange], {"qk_dims": (0, 1)})


# --- compensation and search


@pytest.mark.parametrize("name", ["vit", "swin", "apart", "bound by a number"])
@pytest.mark.parametrize("method", [LeastSquaresCompensation(), MeanCompensation()])
def test_what_compensation_writes_survives_the_cut(name: str, method: recipe.CompensationSettings) -> None:
    """The fit of a layer aims at all that it gave, and the makers move; yet what left is not brought back."""
    entry, found = NETS[name][0], found_in(name)
    batches = zoo.batches(entry, 200 if name == "vit" else 24)
    dense = rotated(made(entry), found.groups, batches)
    keep = {group.name: tuple(range((group.units + 1) // 2)) for group in found.groups}
    masked = compensated(dense, found.groups, keep, batches, method)
    x = zoo.images(entry).float()
    wanted = masked(x)
    assert float((cut_copy(masked, found.groups, keep)(x) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    for group in inner(found):
        for layer, rows in group.silenced(range((group.units + 1) // 2, group.units)).items():
            assert not masked.get_submodule(layer).weight[list(rows)].any()


def search_in(name: str, case: Case) -> Search:
    """On a network that was rotated."""
    entry, found = NETS[name][0], found_in(name)
    return case.search(rotated(made(entry), found.groups, zoo.batches(entry, 30)), found, entry)


@pytest.mark.parametrize("name", ["vit", "apart"])
@pytest.mark.parametrize("case", [Case(), Case(MagnitudeCriterion(), MeanCompensation())], ids=["surgery", "magnitude"])
def test_the_last_dimensions_leave_first(name: str, case: Case) -> None:
    search = search_in(name, case)
    state = search.towards("macs", 0.5, 3)
    groups = search.bench.groups
    assert groups.cost(state.keep)[1] <= 0.5 * groups.cost({})[1]
    queries = [group for group in inner(groups) if group.queries]
    assert any(len(state.keep[group.name]) < group.units for group in inner(groups))
    for group in queries:
        assert state.keep[group.name] == tuple(range(len(state.keep[group.name])))
    scores = {item.group: item for item in state.scores}
    assert all(not scores[group.name].verdict and scores[group.name].keep_value for group in queries)
    x = zoo.images(NETS[name][0]).float()
    cut = cut_copy(state.module, groups.groups, state.keep)(x)
    assert float((cut - state.module(x)).abs().max()) <= 1e-4 * float(cut.abs().max())


def test_curves_measure_what_the_masked_network_loses() -> None:
    """Without compensation a point of a curve is the damage of the mask."""
    search = search_in("vit", Case(MagnitudeCriterion(), recipe.NoCompensation()))
    bench = search.bench
    damage = bench.damage(cast(recipe.CurvesAllocation, bench.allocation))
    for curve in search.curves:
        if curve.group.endswith("dims"):
            for width, lost in zip(curve.widths, curve.damage, strict=True):
                keep = {curve.group: tuple(range(width))}
                found = damage.of(masked_copy(bench.dense, bench.groups.groups, keep))
                assert lost == pytest.approx(found, rel=1e-3, abs=1e-6)


# --- ONNX


def answer(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_the_smaller_network_is_exported_and_its_shapes_are_known_before(tmp_path: Path) -> None:
    entry, found = NETS["vit"][0], found_in("vit")
    module, x = made(entry), zoo.images(entry, 1).float()
    keep = {group.name: tuple(range(3)) for group in inner(found)}
    smaller = cut_copy(module, found.groups, keep)
    given = answer(exported(smaller, entry, tmp_path / "cut.onnx"), x)
    assert float((given - smaller(x)).abs().max()) < 1e-4 * float(smaller(x).abs().max())
    template = read(module, entry, found, tmp_path)
    (tmp_path / "narrow.onnx").write_bytes(template.narrowed(dict.fromkeys(keep, 3), template.shared(tmp_path)))
    require_runnable(tmp_path / "narrow.onnx")
    assert weights(tmp_path / "narrow.onnx") == weights(tmp_path / "cut.onnx") != weights(tmp_path / "dense.onnx")


# --- recipe and console


def test_dimensions_have_no_place_in_one_ranking(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: n\nmodel: {name: resnet18}\ncalibration: {images: .}\nprune:\n  heads: dims\n  allocation: global\n"
    )
    with pytest.raises(
        UsageError, match=r"recipe.yaml:5.*prune.heads: dimensions within heads have no place in one ranking"
    ):
        recipe.load(path, [])


def described(tell: Callable[[dict[str, Any]], Iterator[str]], index: int) -> str:
    groups = [
        {
            "name": "b.dims",
            "kind": "dims",
            "units": 4,
            "members": [{"module": "b.qkv", "axis": 0}],
            "queries": {"modules": ["b.qkv"], "offsets": [0]},
        }
    ]
    scored = [{"group": "b.dims", "units": [0, 1, 2, 3], "keep_value": [4.0, 3.0, 2.0, 1.0], "effect": [], "error": [],
               "verdict": [], "verified": []}]  # fmt: skip
    scores = {
        "criterion": "causal",
        "images": 9,
        "estimator": "screened",
        "intervention": "surgery",
        "alpha": 0.05,
        "groups": scored,
    }
    step = {"macs": 0.5, "drop_pp": 0.0, "removed": {"b.dims": [2, 3]}, "scores": []}
    plan = {"schema": "cswap-deploy/plan/1", "groups": groups, "keep": {"b.dims": [0, 1]}, "steps": [step], "scores": scores,
            "dense_scores": scores, "dense_order": {"b.dims": [3, 2, 1, 0]}}  # fmt: skip
    return "\n".join(
        tell(units.describe(plan, {"allocation": "curves", "compensation": "least_squares"}, f"b.dims:{index}"))
    )


def test_show_says_how_dimensions_were_ordered() -> None:
    from cswap_deploy.console.unit import unit_lines

    told = described(unit_lines, 3)
    assert "b.dims:3 left in step 1 of 1" in told
    assert "Its group went from 4 to 2 dims" in told
    assert "the last leave first" in told
    assert "keep value  " in told
    assert "screened" not in told
    assert "gives no effect" not in told
