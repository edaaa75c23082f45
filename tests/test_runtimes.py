"""What the recipe's runtimes can read: refused early where they cannot, and an older IR version where one needs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cswap_deploy import recipe, runtimes
from cswap_deploy.errors import RecipeError
from cswap_deploy.recipe import OnnxSettings

HEAD = "name: small\nmodel: {name: resnet18}\ncalibration: {images: images}\n"


def load(folder: Path, onnx: str) -> recipe.Recipe:
    path = folder / "recipe.yaml"
    path.write_text(f"{HEAD}onnx:\n  {onnx}\n")
    return recipe.load(path)


@pytest.mark.parametrize(
    ("wish", "opset", "words"),
    [
        ("onnxruntime==1.13.1", 18, "older than this tool writes for (onnxruntime 1.14 or newer)"),
        ("onnxruntime>=1.14", 19, "reads ONNX up to opset 18, and onnx.opset is 19"),
        ("onnxruntime-web>=1.17.0", 21, "reads ONNX up to opset 20"),
        ("tensorrt==8.6.1", 18, "reads ONNX up to opset 17, and onnx.opset is 18"),
        ("tensorrt==10.3", 21, "reads ONNX up to opset 20"),
        ("tensorrt>=8.2", 18, "older than this tool writes for (tensorrt 8.5 or newer)"),
    ],
)
def test_a_runtime_that_cannot_read_the_file_is_refused_with_its_line(
    tmp_path: Path, wish: str, opset: int, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"opset: {opset}\n  runtimes: ['onnxruntime>=1.22', '{wish}']")
    assert caught.value.exit_code == 2
    assert words in str(caught.value) and wish in str(caught.value) and "recipe.yaml:6" in str(caught.value)
    assert "onnxruntime>=1.22" not in str(caught.value)


@pytest.mark.parametrize(
    "wish", ["onnxruntime", "onnxruntime>1.18", "onnxruntime>=1", "tflite>=2.0", "tensorrt==10.x", "$(id)>=1.0"]
)
def test_a_wish_that_cannot_be_read_is_refused(tmp_path: Path, wish: str) -> None:
    with pytest.raises(
        RecipeError, match="expected onnxruntime, onnxruntime-web, onnxruntime-node or tensorrt with >= or =="
    ):
        load(tmp_path, f"runtimes: ['{wish}']")


@pytest.mark.parametrize(
    ("wishes", "ir"),
    [([], 10), (["onnxruntime>=1.18"], 10), (["onnxruntime>=1.17"], 9), (["onnxruntime-node==1.15.1", "tensorrt==10.3"], 8),
     (["tensorrt>=10.0"], 10), (["onnxruntime>=1.99"], 10)],
)  # fmt: skip
def test_the_lowest_of_the_ir_versions_is_written(wishes: list[str], ir: int) -> None:
    assert OnnxSettings(opset=18, runtimes=wishes).ir_version == ir == runtimes.ir_version(wishes)


def test_a_range_is_judged_by_its_lowest_version() -> None:
    assert (
        runtimes.Runtime.of("onnxruntime>=1.18").limits == runtimes.Runtime.of("onnxruntime==1.18.1").limits == (21, 10)
    )
    assert runtimes.Runtime.of("tensorrt==10.13.3.9").limits == (22, 10)


@pytest.mark.parametrize(
    ("wish", "file", "faults"),
    [
        ("onnxruntime>=1.18", (18, 10, ["Conv"], True), []),
        ("onnxruntime==1.17", (18, 10, ["Conv"], False), ["reads up to IR version 9, the file has 10"]),
        ("tensorrt==10.3", (18, 10, ["Conv", "DynamicQuantizeLinear"], False), ["has no DynamicQuantizeLinear"]),
        ("tensorrt==10.3", (18, 10, ["Conv"], True), ["reads int8 around zero only"]),
        ("tensorrt==8.6", (18, 10, ["Conv"], False), ["reads up to opset 17, the file has 18"]),
    ],
)
def test_a_written_file_is_held_to_each_runtime(
    wish: str, file: tuple[int, int, list[str], bool], faults: list[str]
) -> None:
    assert list(runtimes.misfits(wish, *file)) == faults


def test_this_onnxruntime_reads_what_the_table_says_of_it() -> None:
    """The table's last row, on the version that is installed: opset 22, IR version 10."""
    import onnxruntime
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=runtimes.MAX_IR)
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
