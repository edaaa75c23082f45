"""Groups that may leave whole: a constant stands for what read them, in the network, its file and the prediction of its latency."""

from __future__ import annotations

import copy
import io
import runpy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import test_budget
import torch
import zoo
from conftest import make_project
from safetensors.torch import save_file
from simulated import Simulated
from test_planning import SHORT, use
from torch import nn

from cswap_deploy import export, int8, planning
from cswap_deploy.artifacts import (
    Architecture,
    Axis,
    CostTerm,
    File,
    Group,
    Groups,
    Network,
    PruningPlan,
    Slice,
)
from cswap_deploy.budget import design, sizes
from cswap_deploy.budget import widths as widths_of
from cswap_deploy.budget.emptied import without_branches
from cswap_deploy.budget.narrow import Template, require_runnable
from cswap_deploy.budget.sizes import Numbers
from cswap_deploy.budget.staircase import Observation, Steps, learn
from cswap_deploy.budget.values import GroupSteps, LayerTime, Staircase
from cswap_deploy.bundle import load_pruned
from cswap_deploy.console.comparison import left_lines
from cswap_deploy.errors import ExportError, PruningError
from cswap_deploy.prune.absent import Constant, Nothing
from cswap_deploy.prune.compensate import compensated, with_systems
from cswap_deploy.prune.curves import Gauge, tried_widths
from cswap_deploy.prune.cut import cut_copy, masked_copy, positions, rebuild, write_plan
from cswap_deploy.prune.damage import Damage
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.recipe import LeastSquaresCompensation, OnnxSettings, Variant
from cswap_deploy.repeats import shorten
from cswap_deploy.runtime import Session
from cswap_deploy.wording import removed

FOUND = {
    "residual": ["layer1.conv1", "layer2.conv1", "layer3.conv1"],
    "squeeze-excite": ["reduce"],
    "channels-last": ["fc1"],
    "in-place": ["conv2"],
    "vit": ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
}
"""Inner channels of residual blocks (sums in place too), a gate's, MLP units."""
SHIPPED = ("residual", "squeeze-excite", "in-place", "vit")


def found(name: str) -> Groups:
    entry = zoo.ZOO[name]
    return find(entry.build(), entry.spec, emptied=True)


def branches(groups: Groups) -> list[str]:
    return [group.name for group in groups.groups if group.branch]


def emptied(groups: Groups) -> dict[str, tuple[int, ...]]:
    """Half of every group, nothing of the branches."""
    return {**zoo.half(groups), **dict.fromkeys(branches(groups), ())}


# --- which groups


@pytest.mark.parametrize("name", zoo.PRUNABLE)
def test_what_lies_beside_something_else_may_leave_whole(name: str) -> None:
    if name != "resnet":
        assert branches(found(name)) == FOUND.get(name, [])
    assert not branches(zoo.ZOO[name].groups), "only where it is asked for"
    plain = tuple(replace(group, branch=False) for group in found(name).groups)
    assert plain == zoo.ZOO[name].groups.groups


def test_inner_channels_of_a_timm_resnet_are_branches_its_streams_are_not() -> None:
    names = branches(found("resnet"))
    assert len(names) > 5
    assert {name.rpartition(".")[2] for name in names} == {"conv1"} and all("." in name for name in names)


def test_a_layer_that_pads_by_the_image_s_size_is_no_part_of_a_branch() -> None:
    class Padded(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    module = zoo.ZOO["in-place"].build()
    layer = Padded(6, 7, 3, padding=1)
    layer.load_state_dict(module.conv2.state_dict())
    module.conv2 = layer
    assert not branches(find(module, zoo.ZOO["in-place"].spec, emptied=True))


# --- the network


@pytest.mark.parametrize("name", FOUND)
def test_an_emptied_branch_gives_what_the_mask_does(name: str) -> None:
    entry, groups = zoo.ZOO[name], found(name)
    module, x = entry.build().double(), zoo.images(entry)
    for group in groups.groups:
        member = group.consumers[0].module
        if group.branch and module.get_submodule(member).bias is not None:
            nn.init.normal_(module.get_submodule(member).bias)
    for keep in (emptied(groups), dict.fromkeys(branches(groups), ())):
        with torch.no_grad():
            masked = masked_copy(module, groups.groups, keep)(x)
            cut = cut_copy(module, groups.groups, keep)
            assert float((cut(x) - masked).abs().max()) <= 1e-9 * float(masked.abs().max())
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in module.parameters())
    kinds = Counter(type(layer) for layer in cut.modules())
    assert kinds[Constant] == len({m.module for g in groups.groups if g.branch for m in g.consumers})
    assert kinds[Nothing] >= len(branches(groups))


def test_a_gate_within_a_branch_may_leave_before_or_after_it() -> None:
    import timm

    module = zoo.randomised(timm.create_model("efficientnet_b0", num_classes=3)).eval()
    groups = find(module, zoo.spec(32), emptied=True)
    gates = [name for name in branches(groups) if name.endswith("se.conv_reduce")]
    inner = [name for name in branches(groups) if name.endswith("conv_pw")]
    assert {name.rpartition(".")[0] for name in inner} & {name.rpartition(".se.")[0] for name in gates}
    x = torch.rand(2, 3, 32, 32)
    for keep in (dict.fromkeys([*gates, *inner], ()), dict.fromkeys([*inner, *gates], ()), dict.fromkeys(inner, ())):
        with torch.no_grad():
            wanted = masked_copy(module, groups.groups, keep)(x)
            given = cut_copy(module, groups.groups, keep)(x)
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_a_group_that_is_no_branch_keeps_a_unit() -> None:
    groups = found("residual")
    stream = next(group for group in groups.groups if not group.branch)
    with pytest.raises(PruningError, match="would lose all of its"):
        cut_copy(zoo.ZOO["residual"].build(), groups.groups, {stream.name: ()})


@pytest.mark.parametrize("name", FOUND)
def test_a_network_without_branches_is_rebuilt_from_its_plan_copied_and_pickled(name: str, tmp_path: Path) -> None:
    entry, groups = zoo.ZOO[name], found(name)
    dense, keep = entry.build(), emptied(groups)
    masked = compensated(dense, groups.groups, keep, zoo.batches(entry, 40), LeastSquaresCompensation(producer_steps=1))
    pruned = cut_copy(masked, groups.groups, keep)
    plan, weights = tmp_path / "plan.json", tmp_path / "weights.safetensors"
    save_file(pruned.state_dict(), weights)
    architecture = Architecture("timm", "unused", {}, "timm 0.0.1")
    network = Network(architecture, None, File.of(weights), entry.spec, zoo.CLASSES, 0, 0, None)
    write_plan(plan, dense, pruned, network, groups.groups, PruningPlan(keep, (), None))
    x = zoo.images(entry).float()
    with torch.no_grad():
        wanted = pruned(x)
        again = rebuild(entry.build(), architecture, File.of(plan), network.weights)
        assert torch.equal(again(x), wanted)
        assert torch.equal(copy.deepcopy(pruned)(x), wanted)
        buffer = io.BytesIO()
        torch.save(pruned, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)


# --- compensation and curves


def test_least_squares_puts_the_mean_of_a_branch_in_its_place() -> None:
    entry, groups = zoo.ZOO["in-place"], found("in-place")
    dense, batches = entry.build(), zoo.batches(entry, 70)
    settings = LeastSquaresCompensation(producer_steps=2)
    module = compensated(dense, groups.groups, {"conv2": ()}, batches, settings)
    with torch.no_grad():
        images = torch.cat([part for part, _ in batches])
        shortcut = torch.relu(dense.conv1(images) + 0.25)
        wanted = dense.conv3(torch.relu(dense.conv2(shortcut))).mean((0, 2, 3))
    assert not module.conv3.weight.any()
    torch.testing.assert_close(module.conv3.bias, wanted, rtol=0.05, atol=0.02)
    assert torch.equal(module.conv2.weight, dense.conv2.weight), "nothing reads what it makes: it is not moved"


@pytest.mark.parametrize("name", FOUND)
def test_the_damage_without_a_branch_is_that_of_the_network_really_made(name: str) -> None:
    entry, groups = zoo.ZOO[name], found(name)
    dense, batches, structure = entry.build(), zoo.batches(entry, 70), Structure()
    keep = {group.name: tuple(range(group.units)) for group in groups.groups}
    module, systems = with_systems(dense, groups.groups, keep, batches, LeastSquaresCompensation(), structure)
    examine(dense, structure, batches, ())
    damage = Damage.to(dense, batches, 4.0)
    curves = {c.group: c for c in Gauge(module, groups.groups, keep, systems, damage, structure).curves(1)}
    for group in groups.groups:
        assert (0 in curves[group.name].widths) == group.branch == (0 in tried_widths(group, group.units, 2))
        if group.branch:
            alone = masked_copy(module, [group], {group.name: ()})
            with torch.no_grad():
                for member in group.consumers:
                    system = systems[member.module]
                    left = [c for c in system.channels if c not in positions(member, range(group.units))]
                    system.write(alone, member.module, system.equations.solve(system.columns(left), system.start))
            wanted = damage.of(alone) - damage.of(module)
            assert curves[group.name].damage[-1] == pytest.approx(wanted, rel=2e-3, abs=2e-5)


# --- files


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_without_branches_has_the_nodes_of_the_network_that_was_cut_and_exported(
    name: str, tmp_path: Path
) -> None:
    entry, groups = zoo.ZOO[name], found(name)
    module = entry.build()
    template = test_budget.read(module, entry, groups, tmp_path)
    keep, path = emptied(groups), tmp_path / "narrow.onnx"
    path.write_bytes(template.narrowed({group: len(units) for group, units in keep.items()}, template.shared(tmp_path)))
    require_runnable(path)
    onnx.checker.check_model(str(path), full_check=True)
    cut = test_budget.exported(cut_copy(module, groups.groups, keep), entry, tmp_path / "cut.onnx")
    computing = {"Conv", "Gemm", "MatMul", "Softmax", "LayerNormalization", "Add"}
    made, real = (Counter(node.op_type for node in onnx.load(each).graph.node) for each in (path, cut))
    assert {op: made[op] for op in computing} == {op: real[op] for op in computing}
    assert name == "squeeze-excite" or not made["Expand"], (
        "only a gate's constant, of one value per channel, is given its shape"
    )
    dense = Counter(node.op_type for node in onnx.load(tmp_path / "dense.onnx").graph.node)
    assert sum(made[op] for op in computing) < sum(dense[op] for op in computing)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("residual", "int8"), ("squeeze-excite", "int8"), ("vit", "int8-arm"), ("residual", "int8-tensorrt")],
)
def test_quantised_files_lose_branches_too(name: str, kind: Variant, tmp_path: Path) -> None:
    entry, groups = zoo.ZOO[name], found(name)
    module, keep = entry.build(), emptied(groups)
    noise = [np.random.default_rng(0).standard_normal((1, *entry.spec.shape), np.float32)]

    def prepared(network: nn.Module) -> onnx.ModelProto:
        graph = onnx.load(test_budget.exported(network, entry, tmp_path / "graph.onnx"))
        return int8.prepared(graph, tmp_path / "prepared.onnx")

    narrower = [
        (
            each,
            Numbers.of(prepared(cut_copy(module, groups.groups, {key: range(width) for key, width in each.items()}))),
        )
        for each in sizes.settings(groups)
    ]
    known, widths = sizes.learned(groups, Numbers.of(prepared(module)), narrower), {k: len(v) for k, v in keep.items()}
    counts = []
    for network, narrowed in ((module, widths), (cut_copy(module, groups.groups, keep), {})):
        graph = onnx.load(test_budget.exported(network, entry, tmp_path / "graph.onnx"))
        quantiser = int8.Quantiser(graph, int8.KINDS[kind], lambda: noise, tmp_path)
        onnx.save(quantiser.graph(int8.Way("minmax")), tmp_path / "int8.onnx")
        if narrowed:
            template = Template.read(tmp_path / "int8.onnx", groups, known)
            (tmp_path / "int8.onnx").write_bytes(template.narrowed(narrowed, template.shared(tmp_path)))
            require_runnable(tmp_path / "int8.onnx")
        ops = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx", load_external_data=False).graph.node)
        counts.append({op: ops[op] for op in ("Conv", "Gemm", "MatMul", "Softmax")})
    assert counts[0] == counts[1]


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


class Wide(nn.Module):
    """Two branches that are added to each other and stand beside their input, a bottleneck, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.a1, self.a2, self.b1, self.b2 = conv(8, 6), conv(6, 8), conv(8, 7), conv(7, 8)
        self.c1, self.c2, self.c3 = conv(16, 6), conv(6, 5), conv(5, 16)
        self.d1, self.d2 = conv(16, 9), conv(9, 16)
        self.head = nn.Linear(16, zoo.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.a2(self.a1(x).relu()) + self.b2(self.b1(x).relu()), x], 1)
        x = (x + self.c3(self.c2(self.c1(x).relu()).relu())).relu()
        y = self.d2(self.d1(x).relu())
        y += x
        logits: torch.Tensor = self.head(y.relu().mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, Groups]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = zoo.randomised(Wide()).eval().requires_grad_(False)
    return module, find(module, zoo.spec(8), emptied=True)


def test_what_leads_to_another_branch_alone_leaves_with_it(wide: tuple[nn.Module, Groups]) -> None:
    module, groups = wide
    assert branches(groups) == ["a1.0", "b1.0", "c1.0", "c2.0", "d1.0"]
    assert groups.behind == {"c1.0": "c2.0"}
    assert groups.closed({"c1.0": 6, "c2.0": 0, "d1.0": 9}) == {"c1.0": 0, "c2.0": 0, "d1.0": 9}
    assert groups.closed({"c1.0": 0, "c2.0": 5}) == {"c1.0": 0, "c2.0": 5}
    assert not groups.without_branches.behind
    kinds = design.kinds_of(groups)
    assert [kind for kind, widths in design.emptied(groups, dict.fromkeys(kinds, (1,))).items() if 0 in widths] == [
        "a1.0", "b1.0", "c2.0", "d1.0",
    ]  # fmt: skip
    assert all(("c1.0", 0) not in each.items() for each in design.extremes(groups, design.OF_FILES, None))
    x = zoo.images(zoo.ZOO["residual"]).float()
    layers = tuple(
        LayerTime((term.name,), 0.0, (0.0,) * len(term.axes), 0.05, 1)
        for term in groups.terms
        if term.macs and term.axes
    )
    steps = Steps(groups, Staircase(1, 1, 1 - 0.05 * len(layers), layers, (), 0, ()))
    whole = {group.name: group.units for group in groups.groups}
    assert steps.total({**whole, "c2.0": 0}) == pytest.approx(1 - 0.15), "three layers"
    assert steps.changes(whole, "c2.0", (0,)) == pytest.approx([-0.15])
    with torch.no_grad():
        keep = {"c1.0": (), "c2.0": ()}
        torch.testing.assert_close(
            cut_copy(module, groups.groups, keep)(x), masked_copy(module, groups.groups, keep)(x), rtol=1e-5, atol=1e-6
        )


def test_widths_that_make_the_same_network_are_one_candidate(wide: tuple[nn.Module, Groups]) -> None:
    _, groups = wide
    now = {group.name: group.units for group in groups.groups}
    nothing = cast(Any, None)
    planner = planning._Planner(nothing, nothing, nothing, groups, nothing, nothing)
    assert planner._one_of_alike({**now, "c2.0": 0, "c1.0": 1}, now) == {**now, "c2.0": 0}
    assert planner._one_of_alike({**now, "c2.0": 1, "c1.0": 1}, now) == {**now, "c2.0": 1, "c1.0": 1}


@pytest.mark.parametrize("dynamic", [False, True], ids=["one image", "any batch"])
@pytest.mark.parametrize(
    "gone",
    [
        pytest.param(("a1.0",), marks=pytest.mark.slow),
        ("c2.0",),
        pytest.param(("d1.0",), marks=pytest.mark.slow),
        pytest.param(("b1.0", "a1.0"), marks=pytest.mark.slow),
        ("a1.0", "b1.0", "c2.0", "d1.0"),
    ],
)
def test_what_ships_and_what_is_measured_for_it_are_one_graph(
    gone: tuple[str, ...], dynamic: bool, wide: tuple[nn.Module, Groups], tmp_path: Path
) -> None:
    module, groups = wide
    settings, spec = OnnxSettings(dynamic_batch=dynamic), zoo.spec(8)

    def graph_of(network: nn.Module) -> onnx.ModelProto:
        onnx.save(export._export(network, spec, settings), tmp_path / "exported.onnx")
        assert export._run_onnxsim(tmp_path / "exported.onnx", tmp_path / "simplified.onnx") is None
        model = onnx.load(tmp_path / "simplified.onnx")
        shorten(model)
        return model

    narrower = [
        (
            each,
            Numbers.of(graph_of(cut_copy(module, groups.groups, {key: range(width) for key, width in each.items()}))),
        )
        for each in sizes.settings(groups)
    ]
    dense = graph_of(module)
    onnx.save(dense, tmp_path / "dense.onnx")
    template = Template.read(tmp_path / "dense.onnx", groups, sizes.learned(groups, Numbers.of(dense), narrower))
    path = tmp_path / "narrow.onnx"
    path.write_bytes(template.narrowed(dict.fromkeys(gone, 0), template.shared(tmp_path)))
    require_runnable(path)
    cut = cut_copy(module, groups.groups, dict.fromkeys(gone, ()))
    ships = graph_of(cut)
    onnx.save(ships, tmp_path / "ships.onnx")
    x = zoo.images(zoo.ZOO["residual"], 2).float()
    given = Session(tmp_path / "ships.onnx", threads=1).logits(x.numpy())
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(given), cut(x), rtol=1e-4, atol=1e-5)
    made, real = (Counter(n.op_type for n in onnx.load(each).graph.node) for each in (path, tmp_path / "ships.onnx"))
    assert (
        made["Conv"] == real["Conv"] == 10 - 3 * ("c2.0" in gone) - 2 * len([name for name in gone if name != "c2.0"])
    )
    if {"a1.0", "b1.0"} <= {*gone}:  # of their sum nothing else has the shape: it stays whole
        assert made["Expand"] == 2
    else:
        assert {op: made[op] for op in real} == dict(real) and made["Expand"] == real["BatchNormalization"] == 0


def test_a_weight_without_elements_that_is_still_read_is_an_error() -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 3, 8, 8)) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.zeros((3, 3, 1, 1), np.float32), "w")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = onnx.helper.make_model(graph)
    with pytest.raises(ExportError, match="still reads 'w'"):
        without_branches(model, {"w": (0, 3, 1, 1)}, {"w": "w"}, {"y": (1, 3, 8, 8)})
    with pytest.raises(ExportError, match="shape of 'y' cannot be inferred"):
        without_branches(model, {"w": (3, 0, 1, 1)}, {"w": "w"}, {})
    without_branches(model, {"w": (3, 0, 1, 1)}, {"w": "w"}, {"y": (1, 3, 8, 8)})
    assert [node.op_type for node in model.graph.node] == ["Reshape", "Expand"], (
        "an output of the network has its whole shape"
    )


def test_constants_keep_one_value_where_they_repeat_and_only_then() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 4, 8, 8))
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 4, 8, 8))
    flat = np.repeat(np.arange(4, dtype=np.float32), 64).reshape(1, 4, 8, 8)
    cases = {
        "added": (flat, [("Add", ["x", "c"], ["y"])], (1, 4, 1, 1)),
        "another value": (
            np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8),
            [("Add", ["x", "c"], ["y"])],
            (1, 4, 8, 8),
        ),
        "concatenated": (flat, [("Add", ["x", "c"], ["s"]), ("Concat", ["s", "c"], ["y"])], (1, 4, 8, 8)),
        "it gives the shape": (flat, [("ReduceMean", ["x"], ["m"]), ("Add", ["m", "c"], ["y"])], (1, 4, 8, 8)),
    }
    for name, (value, nodes, shape) in cases.items():
        made = [
            onnx.helper.make_node(op, inputs, outputs, **({"axis": 1} if op == "Concat" else {}))
            for op, inputs, outputs in nodes
        ]
        out = (
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 8, 8, 8))
            if name == "concatenated"
            else y
        )
        graph = onnx.helper.make_graph(made, "g", [x], [out], [onnx.numpy_helper.from_array(value, "c")])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
        shorten(model)
        assert tuple(model.graph.initializer[0].dims) == shape, name


# --- what it takes


def overhead(groups: Groups, widths: Mapping[str, int]) -> float:
    """The ratio on a device whose layers take as long as their MACs do once more, whatever their widths, as long as they are there."""
    there = [number for number, group in enumerate(groups.groups) if widths.get(group.name, group.units)]
    return test_budget.truth(groups, widths, 8) / 2 + 0.5 * len(there) / len(groups.groups)


def learned(groups: Groups) -> Steps:
    files, kinds = design.OF_FILES, design.kinds_of(groups)

    def seen(settings: Sequence[dict[str, int]]) -> list[Observation]:
        return [Observation(widths, test_budget.exact(overhead(groups, widths))) for widths in settings]

    alone = seen(design.alone(kinds, files.widths_alone(groups, kinds, 8, exact=False)))
    options = design.emptied(groups, widths_of(groups, alone, 8))
    together = seen(design.together(groups, kinds, options, files.together, 0))
    assert any(0 in item.widths.values() for item in together[len(together) // 2 :]), "not among the narrowest alone"
    return Steps(groups, learn(groups, kinds, options, 8, alone, together))


def test_what_a_layer_takes_by_being_there_is_told_from_what_its_width_takes() -> None:
    plain = test_budget.blocks(6, 32)
    groups = replace(plain, groups=tuple(replace(group, branch=True) for group in plain.groups))
    steps = learned(groups)
    random = Random(3)
    for _ in range(40):
        widths = {group.name: random.choice((0, 8, 16, 24, 32)) for group in groups.groups}
        assert steps.total(widths) == pytest.approx(overhead(groups, widths), rel=0.02)
    whole = {group.name: group.units for group in groups.groups}
    narrow, gone = steps.changes(whole, "b0", (8, 0))
    assert gone == pytest.approx(-1 / 12 - 0.4 / 6, rel=0.1) and narrow > gone / 2


def test_branches_and_others_are_not_of_one_kind_and_have_no_floor() -> None:
    plain = test_budget.blocks(4, 32)
    groups = replace(plain, groups=(*plain.groups[:2], *(replace(group, branch=True) for group in plain.groups[2:])))
    kinds = design.kinds_of(groups)
    assert kinds == {"b0": ("b0", "b1"), "b2": ("b2", "b3")}
    options = design.options(groups, kinds, 8)
    assert design.emptied(groups, options) == {"b0": (8, 16, 24), "b2": (0, 8, 16, 24)}
    extremes = design.extremes(groups, design.OF_FILES, None)
    gone = [each for each in extremes if each["b2"] == 0]
    assert len(gone) == len(extremes) - len(gone) == 4
    assert all(each["b3"] == each["b2"] and each["b0"] > 0 for each in extremes)
    every = replace(groups, groups=tuple(replace(group, branch=True) for group in groups.groups))
    first, *rest = design.extremes(every, design.OF_FILES, None)
    assert first == {f"b{number}": 0 for number in range(4)} and len(rest) == 4 and all(all(r.values()) for r in rest)
    alone = design.OF_FILES.widths_alone(groups, kinds, 8, exact=True)
    assert alone == {"b0": (8,), "b2": (0, 8)}


RESIDUAL = """

class Residual(Colours):
    def __init__(self):
        super().__init__()
        width = self.fc.in_features
        generator = torch.Generator().manual_seed(0)
        self.inner1 = nn.Conv2d(width, width, 3, padding=1)
        self.inner2 = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            for layer in (self.inner1, self.inner2):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 30)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 10)

    def forward(self, x):
        x = self.conv1(x).relu()
        x = self.bn2(self.conv2(x)).relu()
        y = self.inner2(self.inner1(x).relu())
        y += x
        return self.fc(y.mean((2, 3)))
"""


@pytest.mark.parametrize(
    ("dynamic", "ship"),
    [(False, "fp32"), (True, "fp32"), (False, "fp16"), (False, "int8")],
    ids=["one image", "any batch", "fp16", "int8"],
)
def test_a_build_empties_a_branch_where_being_there_is_what_costs(
    dynamic: bool, ship: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "project")
    source = project.folder / "net.py"
    source.write_text(source.read_text() + RESIDUAL)
    use(Simulated("local", (), step=8, base_ns=1_000_000, layer_ns=400_000, block_ns=100_000), monkeypatch)
    recipe = (f"model.factory={source}:Residual", f"onnx.dynamic_batch={str(dynamic).lower()}", f"ship={ship}", *SHORT)
    built = project.build("prune.target={latency_ms: 3.8}", *recipe)
    kept = {group["name"]: group["kept"] for group in built.manifest["pruned"]["groups"]}
    block = built.manifest["budget"]
    assert block["verdict"] == "met" and kept["inner1"] == 0 < min(kept["conv1"], kept["conv2"])
    assert block["dense_ms"] == pytest.approx(6.3, rel=0.02) and block["floor_ms"] < 3
    assert [kind["widths"][0] for kind in block["staircase"]["kinds"]][-1] == 0
    shipped = built.manifest["shipped"]
    assert shipped == ("model.onnx" if ship == "fp32" else f"model.{ship}.onnx")
    for name in {"model.onnx", shipped}:
        graph = onnx.load(built.bundle.file(name).path).graph
        assert Counter(node.op_type for node in graph.node)["Conv"] == 2
    network = runpy.run_path(str(source))["Residual"]
    module = load_pruned(built.bundle.folder, network)
    assert isinstance(module.inner2, Constant) and isinstance(module.inner1, Nothing)
    inputs = np.load(built.bundle.folder / "test_vectors" / "input.npy")
    wanted = np.load(built.bundle.folder / "test_vectors" / "output.npy")
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(inputs)).numpy(), wanted, rtol=1e-3, atol=1e-4)
    page = (built.bundle.folder / "report.html").read_text()
    assert "1 whole branch among them" in page and "1 whole branch among them" in " ".join(left_lines(built.bundle))


def test_whole_branches_are_counted_where_units_are() -> None:
    groups = [{"name": "a", "units": 4, "kept": 0}, {"name": "b", "units": 4, "kept": 1}]
    pruned = {"units": 8, "units_removed": 7, "groups": groups}
    assert removed(pruned) == "7 of 8 units removed, 1 whole branch among them"
    assert removed({**pruned, "groups": [groups[0], groups[0]]}).endswith("2 whole branches among them")
    assert removed({**pruned, "groups": [groups[1]]}) == "7 of 8 units removed"


def test_prices_below_a_multiple_leave_with_the_branch_that_all_of_them_lead_to() -> None:
    """`a` leads to `b` alone, `b` to `c`: without `c` neither takes anything, in `changes` as in `total`."""
    layers = ("a", "b", "c", "d")
    groups = tuple(
        Group(name, "channels", 64, (Slice(name, "weight", 0, 0, 1), Slice(reader, "weight", 1, 0, 1)), branch=True)
        for name, reader in pairwise(layers)
    )
    terms = tuple(
        CostTerm(f"{reader}.weight", 64, 6400, (Axis(64, ((name, 1),)),)) for name, reader in pairwise(layers)
    )
    network = Groups(groups, (), (CostTerm("stem.weight", 1, 6400, ()), *terms))
    assert network.behind == {"a": "b", "b": "c"}
    times = tuple(LayerTime((term.name,), 0.2, (0.0,), 0.02, 16) for term in terms)
    kinds = tuple(GroupSteps((name,), (4, 16, 32, 48, 64), {4: -0.01 * place}) for place, name in enumerate("abc", 1))
    steps, random = Steps(network, Staircase(16, 16, 1 - 0.22 * 3, times, kinds, 0, ())), Random(0)
    for _ in range(60):
        at = {name: random.choice((0, 4, 16, 64)) for name in "abc"}
        name, width = random.choice("abc"), random.choice((0, 4, 16, 64))
        (change,) = steps.changes(at, name, (width,))
        assert steps.total({**at, name: width}) - steps.total(at) == pytest.approx(change, abs=1e-12)
    assert steps.total({"a": 4, "b": 4}) < steps.total({"a": 16, "b": 16})
