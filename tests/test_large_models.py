"""Models beyond 2 GB, and those of very many classes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import COLOURS, Built, Project, make_project, reseal

from cswap_deploy import onnx_file
from cswap_deploy.verify import verify


def test_ten_thousand_classes(tmp_path: Path) -> None:
    """A network of 10,000 outputs, six of which have images."""
    project = make_project(tmp_path / "project")
    source = project.folder / "net.py"
    source.write_text(source.read_text() + MANY)
    names = [*COLOURS, *(f"class {number}, 第{number}" for number in range(10_000 - len(COLOURS)))]
    (project.folder / "labels.txt").write_text("\n".join(names) + "\n", "utf-8")
    project.recipe.write_text(project.recipe.read_text().replace("net.py:colours", "net.py:many"))
    built = project.build(
        "calibration.labels=" + str(project.folder / "labels.txt"), "prune.target=null", "variants=[fp16]"
    )
    folder = built.bundle.folder
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == names
    assert np.load(folder / "test_vectors" / "output.npy").shape == (4, 10_000)
    assert built.manifest["accuracy"]["shipped"]["top1"] == 1.0
    assert (folder / "MODEL_CARD.md").stat().st_size < 20_000 and (folder / "report.html").stat().st_size < 400_000
    assert {check.name: check.outcome for check in verify(folder)}["onnx:fp16"] == "passed"


MANY = """

def many():
    net = Colours()
    wide = nn.Linear(net.fc.in_features, 10_000)
    with torch.no_grad():
        wide.weight.zero_()
        wide.bias.fill_(-9.0)
        wide.weight[:len(COLOURS)] = net.fc.weight
        wide.bias[:len(COLOURS)] = 0
    net.fc = wide
    return net
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The colours, with a limit so low that they are beyond it."""
    project: Project = make_project(tmp_path_factory.mktemp("large") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "LARGEST_PROTOBUF", 5000)
        yield project.build(
            "prune.target=null", "variants=[fp16, int8]", "onnx.image_input=true", "onnx.ort_format=true"
        )


def test_a_model_beyond_2_gb_keeps_its_weights_in_one_file_beside_it(large: Built) -> None:
    folder = large.bundle.folder
    assert [path.name for path in folder.glob("*.data")] == ["model.onnx.data"]
    assert (folder / "model.onnx").stat().st_size < 0.5 * (folder / "model.onnx.data").stat().st_size
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    assert {check.outcome for check in verify(folder)} == {"passed", "skipped"}
    assert large.manifest["onnx"]["beside"] == ["model.onnx.data"] and large.manifest["exit_code"] == 6
    assert [reason.partition(":")[0] for reason in large.manifest["reasons"]] == [
        f"variant {kind}" for kind in ("fp16", "int8", "ort", "image")
    ]
    assert all("the model is beyond 2 GB" in reason for reason in large.manifest["reasons"])
    assert large.manifest["accuracy"]["exported"]["top1"] == 1.0
    both = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert large.manifest["size"]["shipped_bytes"] == both


def test_its_weights_count_as_much_as_its_graph(large: Built, tmp_path: Path) -> None:
    folder = shutil.copytree(large.bundle.folder, tmp_path / "bundle")
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[:4096] = bytes(4096)
    (folder / "model.onnx.data").write_bytes(content)
    found = {check.name: check for check in verify(folder)}
    assert found["files"].outcome == "failed" and "model.onnx.data: its sha256 is wrong" in found["files"].detail
    assert found["onnx"].outcome != "passed"
    reseal(folder)
    assert {check.name: check for check in verify(folder)}["onnx"].outcome == "failed"


@pytest.mark.slow
def test_a_file_that_is_really_beyond_2_gb_is_written_checked_and_run(tmp_path: Path) -> None:
    """Rows of a table of 2.2 GB, of which the last is not zero; needs 7 GB of memory."""
    import onnxruntime
    from onnx import TensorProto, helper

    rows, width = 550_000, 1000
    content = bytearray(4 * rows * width)
    content[-4 * width :] = np.arange(width, dtype="<f4").tobytes()
    ends = [
        helper.make_tensor_value_info("input", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, width]),
    ]
    graph = helper.make_graph([helper.make_node("Gather", ["table", "input"], ["logits"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    table = model.graph.initializer.add()  # in place: a message beyond 2 GB cannot be copied
    table.name, table.data_type = "table", TensorProto.FLOAT
    table.dims.extend([rows, width])
    table.raw_data = bytes(content)
    del content
    assert onnx_file.is_large(model)
    onnx_file.write(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    assert (tmp_path / "model.onnx.data").stat().st_size == 4 * rows * width
    assert len(table.raw_data) == 4 * rows * width
    del model, graph, table
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.array([rows - 1])})[0].tolist() == [list(range(width))]
