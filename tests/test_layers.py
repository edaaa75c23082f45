"""Engine layers joined back to ONNX nodes and groups, from TensorRT's own names; and what a recipe needs of its target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import SHARED
from onnx import TensorProto, helper, numpy_helper
from test_doctor import ORIN_NANO, THOR, changed

from cswap_deploy import engine
from cswap_deploy.artifacts import File, Group, Groups, Slice
from cswap_deploy.device import exports, layers, needs
from cswap_deploy.device.layers import Node
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import Recipe

MINIMAL = {"name": "x", "model": {"name": "resnet18"}, "calibration": {"images": "images"}}
NODES = {
    name: Node(name, operator, module)
    for name, operator, module in (
        ("/a/Conv", "Conv", "a"), ("/relu", "Relu", ""), ("/b/Conv", "Conv", "b"), ("/add", "Add", ""), ("/pool", "GlobalAveragePool", ""),
        ("/q", "QuantizeLinear", ""),
    )
}  # fmt: skip
GROUPS = Groups(
    tuple(Group(n, "channels", 8, (Slice(n, "weight", 0, 0, 1), Slice("b", "weight", 1, 0, 1))) for n in ("a", "c")),
    (),
    (),
)


def rows(*names: str, information: list[Any] | None = None, nodes: dict[str, Node] = NODES) -> list[dict[str, Any]]:
    timed = [{"name": name, "op": "", "ms": 1.0} for name in names]
    answer = {"layers": timed, "layer_info": json.dumps({"Layers": information or list(names)})}
    return layers.joined(answer, nodes, GROUPS)


@pytest.mark.parametrize(
    ("name", "operator", "nodes", "groups"),
    [
        ("/a/Conv + /relu", "Conv", ["/a/Conv", "/relu"], ["a"]),
        ("/b/Conv + /add + /relu", "Conv", ["/b/Conv", "/add", "/relu"], ["a", "c"]),
        ("PWN(PWN(/add), /relu)", "Add", ["/add", "/relu"], []),
        ("{ForeignNode[/relu.../add]}", "Conv", ["/relu", "/b/Conv", "/add"], ["a", "c"]),
        ("Reformatting CopyNode for Input Tensor 0 to /a/Conv + /relu", "Reformat", [], []),
        ("something TensorRT has made up", "", [], []),
    ],
)
def test_names_of_layers_lead_to_nodes_and_groups(
    name: str, operator: str, nodes: list[str], groups: list[str]
) -> None:
    [row] = rows(name)
    assert (row["op"], row["nodes"], row["groups"]) == (operator, nodes, groups)


def test_what_tensorrt_notes_itself_comes_first() -> None:
    noted = {"Name": "gemm_7", "LayerType": "gemm", "Metadata": "[ONNX Layer: /b/Conv]\x1e[ONNX Layer: /relu]"}
    [row] = rows("gemm_7", information=[noted])
    assert (row["op"], row["nodes"]) == ("Conv", ["/b/Conv", "/relu"])


def test_a_reformat_that_quantizes_is_none() -> None:
    found = rows(
        "/q", "copy", information=[{"Name": "/q", "LayerType": "Reformat"}, {"Name": "copy", "LayerType": "Reformat"}]
    )
    assert [row["op"] for row in found] == ["QuantizeLinear", "Reformat"]
    assert layers.reformats(found) == {"layers": 2, "reformat": 1, "reformat_share": 0.5}


@pytest.mark.parametrize(("name", "reformat", "share"), [("fp16", 12, 0.0866), ("qat", 3, 0.0421)])
def test_reformats_of_a_real_engine_are_counted(name: str, reformat: int, share: float) -> None:
    folder = SHARED / "trtexec-logs"
    if not folder.is_dir():
        pytest.skip("the collected logs are not beside this checkout")
    profile, info = (
        (folder / f"v8.x-a100-resnet18-{name}.export{kind}.json").read_text() for kind in ("Profile", "LayerInfo")
    )
    operators = {
        "Conv": "Conv",
        "Relu": "Relu",
        "MaxPool": "MaxPool",
        "Add": "Add",
        "Gemm": "Gemm",
        "QuantizeLinear": "QuantizeLinear",
    }
    tokens = {token for layer in exports.profile(profile) for token in layer.name.split(" + ")}
    nodes = {
        t: Node(t, operators[t.split("_")[0]], "")
        for t in tokens
        if t.split("_")[0] in operators and "Reformat" not in t
    }
    found = layers.joined({"layers": [], "profile": profile, "layer_info": info}, nodes, None)
    counted = layers.reformats(found)
    assert counted["layers"] == len(found) == len(exports.profile(profile))
    assert counted["reformat"] == sum("Reformatting CopyNode" in row["name"] for row in found) == reformat
    assert counted["reformat_share"] == pytest.approx(share, abs=0.0005)


def test_modules_are_found_through_what_quantizes_their_weights(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["layer1.0.conv1.weight", "s", "z"], ["w8"], name="q"),
        helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["w"], name="dq"),
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node("Relu", ["y"], ["out"], name="relu"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("x", "out")]
    weights = {"layer1.0.conv1.weight": np.zeros((2, 2, 1, 1), "f4"), "s": np.float32(1), "z": np.int8(0)}
    given = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], given)), tmp_path / "m.onnx")
    found = layers.nodes_of(tmp_path / "m.onnx")
    assert found["conv"] == Node("conv", "Conv", "layer1.0.conv1") and found["relu"].module == ""


# --- what TensorRT's parser refuses


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ((1, "/relu", "Mystery", "No importer registered"), "node '/relu' (operator Mystery): No", "lower onnx.opset"),
        ((1, "", "", "INT64 is not supported"), "node 'relu' (operator Relu): INT64", "JetPack 6.1"),
        ((-1, "", "", "cannot be read"), "node -1: cannot be read", "another"),
    ],
)  # fmt: skip
def test_parser_errors_come_with_node_operator_and_hint(
    tmp_path: Path, fault: dict[str, Any], words: str, hint: str
) -> None:
    nodes = [helper.make_node(kind, ["x"], ["x"], name=kind.lower()) for kind in ("Abs", "Relu")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [])), tmp_path / "m.onnx")
    error = DeviceError("board: refused", "try another onnx.opset", public="TensorRT does not build", log="its log")
    error.parser = [dict(zip(("node", "name", "operator", "text"), fault, strict=True))]
    found = engine._explained(error, File.of(tmp_path / "m.onnx"))
    assert words in found.message and hint in found.hint and (found.log, found.public) == (error.log, error.public)


# --- needs


def recipe(**engine_settings: Any) -> Recipe:
    precision = engine_settings.pop("precision", "fp16")
    return Recipe.model_validate({**MINIMAL, "engine": {"precision": precision, **engine_settings}, "latency": {}})


@pytest.mark.parametrize(
    ("changes", "settings", "topic", "words", "fix"),
    [
        ({}, {"dla_core": 0}, "dla", "engine.dla_core is 0, the target has none", "remove engine.dla_core"),
        ({"tensorrt__dla_cores": 2}, {"dla_core": 2}, "dla", "the target has 2", "remove engine.dla_core"),
        ({"memory_free_mb": 1500}, {}, "memory", "1500 MiB of memory are free, the build takes up to 1024", "engine.workspace_mib"),
        ({"disk_free_mb": 100}, {}, "disk", "100 MiB are free", "df -h"),
        ({"tensorrt__compute_capability": "5.3"}, {"precision": "int8"}, "int8", "no instructions", "fp16"),
        ({"tensorrt__module": False}, {}, "tensorrt module", "trtexec alone", "python3-libnvinfer"),
        ({"tensorrt__version": None}, {}, "tensorrt", "an engine needs TensorRT", "sudo apt install"),
    ],
)  # fmt: skip
def test_what_a_target_lacks_for_a_recipe(
    changes: dict[str, Any], settings: dict[str, Any], topic: str, words: str, fix: str
) -> None:
    [need] = needs.shortfalls(recipe(**settings), changed(ORIN_NANO, **changes))
    assert need.topic == topic and words in need.text and fix in need.fix
    with pytest.raises(DeviceError, match="doctor RECIPE --on board") as caught:
        needs.require(recipe(**settings), changed(ORIN_NANO, **changes), "board")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("version", "opset", "most"),
    [("10.3.0", 20, None), ("10.3.0", 21, 20), ("10.9.0", 22, None), ("10.13.3.9", 22, None), ("8.6.1", 22, None)],
)
def test_opset_of_the_recipe_against_that_of_tensorrt(version: str, opset: int, most: int | None) -> None:
    wanted = Recipe.model_validate({**MINIMAL, "engine": {"precision": "fp16"}, "onnx": {"opset": opset}})
    found = list(needs.shortfalls(wanted, changed(ORIN_NANO, tensorrt__version=version)))
    assert [need.text for need in found] == (
        [f"onnx.opset is {opset}, TensorRT {version} reads up to {most}"] if most else []
    )


def test_a_target_that_has_everything_lacks_nothing() -> None:
    for probe in (ORIN_NANO, THOR):
        assert list(needs.shortfalls(recipe(), probe)) == []
        needs.require(recipe(), probe, "board")
    bare = {
        "schema": ORIN_NANO["schema"],
        "python": "3.10",
        "machine": "aarch64",
        "tensorrt": {"version": "10.3.0", "module": True},
    }
    assert list(needs.shortfalls(recipe(dla_core=1), bare)) == [], "what a probe does not say is no shortfall"
