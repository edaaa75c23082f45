"""verify says what was checked, with numbers; whatever a bundle holds, it answers, and runs and reads nothing else."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Built, run
from onnx import TensorProto, helper, numpy_helper

from cswap_deploy import external_data, isolated, vectors
from cswap_deploy import verify as module
from cswap_deploy.artifacts import File, sha256_of
from cswap_deploy.bundle import Bundle
from cswap_deploy.digests import sealed
from cswap_deploy.errors import UsageError, VerifyError
from cswap_deploy.external_data import TENSORS, locations, locations_in
from cswap_deploy.verify import ALWAYS, Check, verify

LIGHT = """
import sys
BLOCKED = set("torch timm PIL scipy onnx safetensors onnxsim onnxscript torch_pruning".split())

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
PRINT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from cswap_deploy.verify import verify
print(json.dumps([asdict(check) for check in verify(Path(sys.argv[1]))]))
assert not BLOCKED & {name.split(".")[0] for name in sys.modules} if "BLOCKED" in globals() else True
"""


def checks(folder: Path, *require: str, factory: Callable[..., Any] | None = None) -> dict[str, Check]:
    return {check.name: check for check in verify(folder, require, factory)}


def outcomes(found: dict[str, Check]) -> dict[str, str]:
    return {name: check.outcome for name, check in found.items()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    change(document)
    with suppress(ValueError):  # what is no number cannot be sealed
        document = sealed(document)
    path.write_text(json.dumps(document), "utf-8")


def put(folder: Path, name: str, content: bytes) -> None:
    """A file of the bundle with this content, its digest in the manifest right."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    entry = {"path": name, "sha256": sha256_of(folder / name), "bytes": len(content)}
    edit(folder, lambda m: m.update(files=[*(item for item in m["files"] if item["path"] != name), entry]))


def put_variant(folder: Path, kind: str, content: bytes, max_abs: float, name: str = "") -> None:
    name = name or f"model.{kind.replace('-', '.')}.onnx"
    put(folder, name, content)
    edit(folder, lambda m: m["onnx"].update(variants={**(m["onnx"].get("variants") or {}), kind: entry(name, max_abs)}))


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def shifted(folder: Path, by: float, output: int | None = None) -> bytes:
    """The bundle's model with logits that are larger by this much, all of them or one."""
    model = onnx.load(folder / "model.onnx")
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    offset = np.full(classes, by, np.float32) if output is None else by * np.eye(classes, dtype=np.float32)[output]
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    last.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(offset, "offset"))
    model.graph.node.append(helper.make_node("Add", ["before", "offset"], [model.graph.output[0].name]))
    return bytes(model.SerializeToString())


def graph_of(nodes: list[Any], initializers: list[Any], shape: tuple[int, ...] = (1, 3, 32, 32)) -> bytes:
    """A model from `input` to `logits`, both of this shape."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "logits")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def external(location: str, name: str = "w") -> Any:
    """A tensor of four floats whose data lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about the files: the networks are not run."""
    for name in ("_onnx", "_pytorch"):
        monkeypatch.setattr(module, name, lambda *_: "not run")


# --- a sound bundle


def test_a_sound_bundle_passes_with_its_numbers(quickstart: Built):
    found = checks(quickstart.bundle.folder, *ALWAYS)
    assert outcomes(found) == dict.fromkeys(ALWAYS, "passed"), found
    assert tuple(found) == ALWAYS
    files, size = quickstart.manifest["files"], sum(item["bytes"] for item in quickstart.manifest["files"])
    assert found["files"].detail == f"{len(files)} files, {size / 2**20:.1f} MiB, sizes and sha256 agree"
    assert "quickstart, verdict pass, made by cswap-deploy" in found["manifest"].detail
    largest = np.abs(np.load(quickstart.bundle.folder / "test_vectors/output.npy")).max()
    for name in ("onnx", "pytorch"):
        assert found[name].detail.startswith("4 test vectors differ from PyTorch by up to ")
        assert f"tolerance {1e-3 * largest:.2e}" in found[name].detail


def test_it_needs_numpy_and_onnxruntime_only(quickstart: Built, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(LIGHT)
    code = "from sitecustomize import BLOCKED\n" + PRINT
    done = run("-W", "error", "-c", code, quickstart.bundle.folder, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {item["name"]: item for item in json.loads(done.stdout)}
    assert {name: item["outcome"] for name, item in found.items()} == {
        **dict.fromkeys(ALWAYS, "passed"),
        "pytorch": "skipped",
    }
    assert found["pytorch"]["detail"] == 'torch is not installed; pip install "cswap-deploy[host]"'


def test_without_onnxruntime_its_checks_are_skipped(quickstart: Built, tmp_path: Path):
    blocked = LIGHT.replace("onnx safetensors", "onnx onnxruntime safetensors")
    (tmp_path / "sitecustomize.py").write_text(blocked)
    done = run("-c", PRINT, quickstart.bundle.folder, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    found = {item["name"]: item for item in json.loads(done.stdout)}
    assert found["onnx"]["outcome"] == "skipped"
    assert found["onnx"]["detail"] == "onnxruntime is not installed; pip install onnxruntime"


def test_an_onnxruntime_that_cannot_be_imported_is_not_the_bundle_s_fault(quickstart: Built, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    found = checks(quickstart.bundle.folder)["onnx"]
    assert found.outcome == "skipped" and "cannot be imported: libcudart.so.12" in found.detail


def test_a_factory_network_is_reloaded_with_the_caller_s_factory_only(colours: Built, monkeypatch):
    spec = importlib.util.spec_from_file_location("net_of_a_test", colours.recipe.with_name("net.py"))
    assert spec and spec.loader
    net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(net)
    found = checks(colours.bundle.folder, factory=net.colours)
    assert outcomes(found) == dict.fromkeys(ALWAYS, "passed"), found
    monkeypatch.setattr(module, "_onnx", lambda *_: "not run")
    without = checks(colours.bundle.folder)["pytorch"]
    assert without.outcome == "skipped" and "comes from a factory" in without.detail

    def broken(**_: Any) -> None:
        raise KeyError("no such width")

    failed = checks(colours.bundle.folder, factory=broken)["pytorch"]
    assert failed.outcome == "failed" and "cannot be rebuilt: KeyError" in failed.detail


# --- require


def test_a_required_check_that_is_skipped_has_failed(colours: Built, monkeypatch):
    monkeypatch.setattr(module, "_onnx", lambda *_: "not run")
    found = checks(colours.bundle.folder, "pytorch", "files")
    assert found["pytorch"].outcome == "failed"
    assert found["pytorch"].detail.startswith("required, but skipped: the network comes from a factory")
    assert found["files"].outcome == "passed"


@pytest.mark.parametrize("name", ["onnx:fp16", "engine", "hashes", ""])
def test_requiring_a_check_that_there_is_not_is_a_usage_error(quickstart: Built, name):
    with pytest.raises(UsageError, match=r"has no check .* \(choose from manifest, files, unlisted, onnx, pytorch,"):
        verify(quickstart.bundle.folder, ["files", name])


def test_no_bundle_is_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="not a bundle"):
        verify(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"schema": "cswap-deploy/manifest/1"}'])
def test_a_broken_manifest_fails_and_the_rest_is_skipped(copy: Path, content):
    (copy / "manifest.json").write_bytes(content)
    found = checks(copy)
    assert outcomes(found) == {**dict.fromkeys(ALWAYS, "skipped"), "manifest": "failed"}
    assert checks(copy, "onnx:int8", "onnx")["onnx:int8"].detail == "required, but skipped: the manifest cannot be read"
    with pytest.raises(UsageError, match="no check 'x'"):
        verify(copy, ["x"])


# --- files


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_changed_file_is_named_and_not_run(copy: Path):
    flip(copy / "model.onnx")
    found = checks(copy)
    assert outcomes(found) == {**dict.fromkeys(ALWAYS, "passed"), "files": "failed", "onnx": "skipped"}, found
    assert " files: model.onnx: its sha256 is wrong" in found["files"].detail
    assert found["onnx"].detail == "model.onnx: its sha256 is wrong, see files"


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("weights.safetensors", {"pytorch"}), ("plan.json", {"pytorch"}), ("labels.txt", set()),
        ("test_vectors/output.npy", {"onnx", "pytorch"}),
    ],
)  # fmt: skip
def test_a_changed_file_stops_only_what_needs_it(copy: Path, monkeypatch, name, skipped):
    monkeypatch.setattr(isolated, "run", lambda *_: (np.load(copy / "test_vectors/output.npy"), "0"))
    flip(copy / name)
    found = checks(copy)
    assert found["files"].outcome == "failed"
    assert {check.name for check in found.values() if check.outcome == "skipped"} == skipped
    assert all(found[check].detail == f"{name}: its sha256 is wrong, see files" for check in skipped)


def outside(copy: Path) -> None:
    (copy / "labels.txt").rename(copy.parent / "labels.txt")
    (copy / "labels.txt").symlink_to(copy.parent / "labels.txt")


def circle(copy: Path) -> None:
    (copy / "labels.txt").unlink()
    (copy / "labels.txt").symlink_to("labels.txt")


def folder_instead(copy: Path) -> None:
    (copy / "labels.txt").unlink()
    (copy / "labels.txt").mkdir()


def huge(copy: Path) -> None:
    os.truncate(copy / "labels.txt", 1 << 40)
    edit(copy, lambda m: [item.update(bytes=1 << 40) for item in m["files"] if item["path"] == "labels.txt"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda copy: (copy / "labels.txt").unlink(), "labels.txt: is missing"),
        (lambda copy: (copy / "labels.txt").write_text("0"), "labels.txt: has 1 bytes instead of 20"),
        (folder_instead, "labels.txt: is not a file"),
        (outside, "labels.txt: leads out of the bundle"),
        (circle, "labels.txt: "),
        (huge, "more than any file of this tool"),
        (lambda copy: edit(copy, lambda m: m["files"].append(m["files"][0])), "is listed twice"),
        (lambda copy: edit(copy, lambda m: m.update(files=[])), "lists 0 files"),
        (lambda copy: edit(copy, lambda m: m.update(files=m["files"] * 200)), "files, expected 1 to 1000"),
        (lambda copy: edit(copy, lambda m: m["files"].append({"path": "a" * 300, "sha256": "", "bytes": 1})), "aaa: "),
    ],
)  # fmt: skip
def test_each_fault_of_the_files_is_named(copy: Path, files_only, change, words):
    change(copy)
    found = checks(copy)["files"]
    assert found.outcome == "failed" and words in found.detail


@pytest.mark.parametrize(
    "name", ["extra.bin", ".hidden", "test_vectors/more.npy", "engine/model.engine", "line\nbreak"]
)
def test_a_file_that_the_manifest_does_not_list_fails(copy: Path, files_only, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).touch()
    found = checks(copy)
    assert outcomes(found) == {**dict.fromkeys(ALWAYS, "passed"), "unlisted": "failed"}
    assert f"1 not in the manifest: {name!a}" in found["unlisted"].detail


def test_unlisted_links_and_empty_folders_are_seen_and_not_followed(copy: Path, files_only):
    (copy / "everything").symlink_to("/")
    (copy / "nothing").symlink_to("/nowhere")
    (copy / "empty" / "deep").mkdir(parents=True)
    assert "3 not in the manifest: 'empty/deep/', 'everything', 'nothing'" in checks(copy)["unlisted"].detail


# --- ONNX files


def test_variants_are_compared_with_the_difference_of_their_build(copy: Path, monkeypatch):
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    largest = float(np.abs(np.load(copy / "test_vectors/output.npy")).max())
    put_variant(copy, "fp16", shifted(copy, 0.01), 0.01)
    put_variant(copy, "int8-tensorrt", shifted(copy, 0.1), 0.01)
    found = checks(copy)
    assert tuple(found) == ("manifest", "files", "unlisted", "onnx", "onnx:fp16", "onnx:int8-tensorrt", "pytorch")
    assert found["onnx:fp16"].outcome == "passed"
    assert f"up to 1.00e-02, tolerance {1e-3 * largest + 0.015:.2e}, top-1 agrees" in found["onnx:fp16"].detail
    assert found["onnx:int8-tensorrt"].outcome == "failed"
    assert "by up to 1.00e-01, tolerance" in found["onnx:int8-tensorrt"].detail


def test_top1_of_a_variant_must_agree_unless_the_best_two_are_close():
    wanted = np.array([[1.0, 0.9, 0.0], [2.0, 0.5, 0.0]], np.float32)
    close, far = wanted + np.float32([[-0.1, 0.1, 0], [0, 0, 0]]), wanted + np.float32([[0, 0, 0], [-0.8, 0.8, 0]])
    assert "top-1 agrees" in vectors.compare("it", close, wanted, 0.1)
    with pytest.raises(module.VerifyError, match="top-1 of 1 differs, though their best logit leads by more"):
        vectors.compare("it", far, wanted, 0.6)
    assert "more than the largest logit (2.00e+00) and proves little" in vectors.compare("it", wanted, wanted, 9.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_logits_that_are_no_numbers_are_no_agreement(bad):
    wanted = np.ones((2, 3), np.float32)
    with pytest.raises(module.VerifyError, match="differ from PyTorch by up to"):
        vectors.compare("it", np.full((2, 3), bad, np.float32), wanted, 1.0)


def test_a_network_of_one_class_has_no_runner_up():
    assert "top-1 agrees" in vectors.compare("it", np.ones((2, 1), np.float32), np.ones((2, 1), np.float32), 0.1)


def entry(file: str, max_abs: Any = 0.01) -> dict[str, Any]:
    return {
        "file": file,
        "opset": 18,
        "parity": {"images": 16, "max_abs": max_abs, "sqnr_db": 60.0},
        "nodes": 9,
        "note": "",
    }


@pytest.mark.parametrize(
    ("variants", "check", "outcome", "words"),
    [
        ({}, "manifest", "passed", "verdict"),
        ({"fp8": entry("model.fp8.onnx")}, "manifest", "passed", "does not know and cannot check: fp8"),
        ([], "manifest", "failed", "onnx.variants: expected object"),
        ({"int8": "model.int8.onnx"}, "manifest", "failed", "onnx.variants.int8: expected object"),
        ({"int8": {}}, "manifest", "failed", "'file' is missing"),
        ({"int8": entry("x.onnx", float("nan"))}, "manifest", "failed", "max_abs: expected number"),
        ({"int8": entry("x.onnx")}, "onnx:int8", "failed", "lists no file 'x.onnx'"),
        ({"int8": entry("../x.onnx")}, "onnx:int8", "failed", "lists no file"),
        ({"int8": entry("plan.json")}, "onnx:int8", "failed", "is not named .onnx"),
    ],
)
def test_variants_that_the_manifest_names_wrongly(copy: Path, monkeypatch, variants, check, outcome, words):
    monkeypatch.setattr(isolated, "run", lambda *_: (np.load(copy / "test_vectors/output.npy"), "0"))
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    edit(copy, lambda m: m["onnx"].update(variants=variants))
    found = checks(copy)[check]
    assert found.outcome == outcome and words in found.detail


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot run on the test vectors"),
        (b"not a model at all", "is not an ONNX file"),
        (b"\x3a\xff\xff\xff\xff\x07", "ends in the middle"),
        (b"\x08\x0a", "cannot run on the test vectors"),
        (graph_of([helper.make_node("NoSuchOperator", ["input"], ["logits"])], []), "cannot open model.onnx"),
        (graph_of([helper.make_node("Relu", ["input"], ["logits"])], []), "returns (4, 3, 32, 32), the test vectors hold"),
        (graph_of([helper.make_node("Relu", ["input"], ["logits"])], [], (1, 5)), "InvalidArgument"),
    ],
)  # fmt: skip
def test_broken_onnx_files_fail_with_a_reason(copy: Path, monkeypatch, content, words):
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    put(copy, "model.onnx", content)
    found = checks(copy)["onnx"]
    assert found.outcome == "failed" and words in found.detail and "\n" not in found.detail


def test_a_truncated_model_fails_with_a_reason(copy: Path, monkeypatch):
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    put(copy, "model.onnx", (copy / "model.onnx").read_bytes()[:-100])
    assert "is not an ONNX file: it ends in the middle" in checks(copy)["onnx"].detail


def test_a_model_that_never_ends_is_stopped(copy: Path, monkeypatch):
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["x"], ["y"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    loop = helper.make_node("Loop", ["times", "yes", "input"], ["logits"], body=body)
    limits = [numpy_helper.from_array(np.array(2**62), "times"), numpy_helper.from_array(np.array(True), "yes")]
    put(copy, "model.onnx", graph_of([loop], limits))
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    monkeypatch.setattr(isolated, "SECONDS", 1.5)
    found = checks(copy)["onnx"]
    assert found.outcome == "failed" and found.detail.startswith("model.onnx did not end within 1.5 s")


def test_a_model_that_crashes_the_runtime_fails(copy: Path, monkeypatch):
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    monkeypatch.setattr(isolated, "RUN", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    found = checks(copy)["onnx"]
    assert found.outcome == "failed" and "ended ONNX Runtime by signal 9 (Killed)" in found.detail


def test_a_model_with_other_weights_and_the_right_digest_fails(copy: Path):
    put(copy, "model.onnx", shifted(copy, 0.5))
    found = checks(copy)
    assert outcomes(found) == {**dict.fromkeys(ALWAYS, "passed"), "onnx": "failed"}, found
    assert "differ from PyTorch by up to 5.00e-01, tolerance" in found["onnx"].detail


def test_a_flatbuffer_is_not_taken_for_an_onnx_file(copy: Path, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    onnxruntime.InferenceSession(str(copy / "model.onnx"), options, providers=["CPUExecutionProvider"])
    put(copy, "model.onnx", (tmp_path / "model.ort").read_bytes())
    assert "is not an ONNX file" in checks(copy)["onnx"].detail
    put_variant(copy, "fp16", (tmp_path / "model.ort").read_bytes(), 1.0, "model.ort")
    assert "'model.ort' is not named .onnx" in checks(copy)["onnx:fp16"].detail


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "labels.txt", "*/_ORT_MEM_ADDR_/*"])
def test_weights_in_other_files_are_not_read(copy: Path, monkeypatch, location):
    (copy.parent / "secret.bin").write_bytes(bytes(16))
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    monkeypatch.setattr(isolated, "run", lambda *_: pytest.fail("it was run"))
    nodes = [helper.make_node("Add", ["input", "w"], ["logits"])]
    put(copy, "model.onnx", graph_of(nodes, [external(location)], (1, 3, 32, 4)))
    found = checks(copy)["onnx"]
    assert found.outcome == "failed" and "model.onnx keeps weights in other files" in found.detail


def nested(tensor: Any) -> Iterator[Any]:
    """Models that hold this tensor, one for each place where a tensor can be."""
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [])
    sparse = onnx.SparseTensorProto(values=tensor)
    attributes: list[dict[str, Any]] = [
        {"value": tensor}, {"values": [tensor]}, {"body": inner}, {"bodies": [inner]}, {"sparse_value": sparse},
        {"sparse_values": [sparse]}, {"body": helper.make_graph([], "g", [], [], [tensor])},
        {"sparse_value": onnx.SparseTensorProto(indices=tensor)},
    ]  # fmt: skip
    for attribute in attributes:
        yield helper.make_model(helper.make_graph([helper.make_node("X", [], ["y"], **attribute)], "g", [], []))
    plain = helper.make_graph([], "g", [], [])
    yield helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    yield helper.make_model(helper.make_graph([], "g", [], [], sparse_initializer=[sparse]))
    yield helper.make_model(plain, functions=[helper.make_function("d", "F", [], ["c"], [constant], [])])
    default = helper.make_attribute("value", tensor)
    yield helper.make_model(
        plain, functions=[helper.make_function("d", "F", [], [], [], [], attribute_protos=[default])]
    )
    for part in ("initialization", "algorithm"):
        model = helper.make_model(plain)
        getattr(model.training_info.add(), part).CopyFrom(inner)
        yield model


def test_data_elsewhere_is_found_wherever_a_tensor_can_be():
    inside = numpy_helper.from_array(np.ones(4, np.float32), "location external_data")
    assert [locations(model.SerializeToString()) for model in nested(inside)] == [set()] * 14
    assert [locations(model.SerializeToString()) for model in nested(external("x"))] == [{"x"}] * 14
    unnamed = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    assert [locations(model.SerializeToString()) for model in nested(unnamed)] == [{""}] * 14


def test_places_of_tensors_are_those_of_onnx_proto():
    """Oracle: the descriptors of the onnx package; whatever a later onnx.proto adds shows up here."""
    kinds: dict[str, Any] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        kind = waiting.pop()
        if kind.name not in kinds:
            kinds[kind.name] = {field.number: field.message_type for field in kind.fields if field.message_type}
            waiting += kinds[kind.name].values()
    leading, before = {"TensorProto"}, set[str]()
    while leading != before:
        before = set(leading)
        leading |= {name for name, fields in kinds.items() if {kind.name for kind in fields.values()} & leading}
    expected = {
        name: {number: kind.name for number, kind in kinds[name].items() if kind.name in leading} for name in leading
    }
    assert dict(TENSORS) == expected
    fields = onnx.TensorProto.DESCRIPTOR.fields_by_name
    assert (fields["external_data"].number, fields["data_location"].number) == (
        external_data.EXTERNAL_DATA,
        external_data.DATA_LOCATION,
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\xba\x80\x80\x80\x10\x00",  # field 7, with a bit that some parsers drop
        b"\x3a\x85\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # a length without end
        b"\x3b\x3c", b"\x3e", b"\x3f", b"\x02\x00", b"\x3a", b"\x3a\x02\x00", b"\x3d\x00\x00", b"\x80",
    ],
)  # fmt: skip
def test_what_parsers_may_read_differently_is_refused(content):
    with pytest.raises(ValueError, match=r"no protobuf message|ends in the middle"):
        locations(content)


def test_a_model_of_endless_fields_is_not_read_to_its_end(copy: Path, monkeypatch):
    monkeypatch.setattr(external_data, "MOST_FIELDS", 1000)
    put(copy, "model.onnx", b"\x08\x08" * 1001)
    found = checks(copy)["onnx"]
    assert found.outcome == "failed" and "it has more than 1000 fields" in found.detail
    with pytest.raises(ValueError, match="described in 5"):
        locations(graph_of([], [external("x" * 5000)]))


def test_a_model_that_protobuf_cannot_hold_is_not_mapped(tmp_path: Path):
    with (tmp_path / "model.onnx").open("wb") as stream:
        stream.truncate(external_data.LARGEST)  # without content: it takes no room
    with pytest.raises(ValueError, match="it has 2147483648 bytes, expected less"):
        locations_in(tmp_path / "model.onnx")


def test_weights_lie_beside_their_model_in_a_folder_too(copy: Path):
    """ONNX reads the name relative to the model's own folder, not to the bundle."""
    values = np.arange(4, dtype=np.float32)
    add = helper.make_node("Add", ["input", "w"], ["logits"])
    (copy / "more").mkdir()
    for location, listed in (("model.onnx.data", True), ("more/model.onnx.data", True), ("model.onnx.data", False)):
        put(copy, "more/model.onnx.data", values.tobytes())
        put(copy, "more/model.onnx", graph_of([add], [external(location)], (1, 3, 4, 4)))
        if not listed:
            edit(
                copy, lambda m: m.update(files=[each for each in m["files"] if each["path"] != "more/model.onnx.data"])
            )
        contents = module._read_files(Bundle.read(copy))
        path = contents.path("more/model.onnx")
        if (location, listed) == ("model.onnx.data", True):
            module._require_plain_file(contents, "fp32", "more/model.onnx", path)
            continue
        with pytest.raises(VerifyError, match="keeps weights in other files"):
            module._require_plain_file(contents, "fp32", "more/model.onnx", path)


def test_deep_nesting_is_read_without_recursion():
    graph = b""
    for _ in range(2000):
        attribute = b"\x32" + _length(graph) + graph
        node = b"\x2a" + _length(attribute) + attribute
        graph = b"\x0a" + _length(node) + node
    assert locations(b"\x3a" + _length(graph) + graph) == set()


def _length(content: bytes) -> bytes:
    size, out = len(content), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size])


def test_no_module_comes_from_the_folder_that_one_stands_in(copy: Path, monkeypatch):
    monkeypatch.setattr(module, "_pytorch", lambda *_: "not run")
    for name in ("numpy", "onnxruntime", "pathlib"):
        (copy / f"{name}.py").write_text(f"open({str(copy.parent / 'imported')!r}, 'w'); raise SystemExit(7)")
    monkeypatch.chdir(copy)
    found = checks(Path())
    assert found["onnx"].outcome == "passed", found["onnx"]
    assert found["unlisted"].outcome == "failed" and not (copy.parent / "imported").exists()


# --- test vectors


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def header(shape: str, data: bytes = b"") -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize("name", ["input", "output"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a plain array"),
        (b"PK\x03\x04", "is not a plain array"),
        (header("(4, 3, 1000000, 1000000)"), "is not a plain array"),
        (header("(4294967296, 4294967296)"), "is not a plain array"),
        (header("(-1, 4)", bytes(64)), "is not a plain array"),
        (header("(" * 3000), "is not a plain array"),
        (npy(np.zeros((4, 10))), "is not an array of float32"),
        (npy(np.zeros((4, 10), ">f4")), "is not an array of float32"),
        (npy(np.zeros((0, 10), np.float32)), "is not "),
        (npy(np.zeros(7, np.float32)), "expected images and as many rows of logits"),
        (npy(np.zeros((4, 3, 32), np.float32)), "expected images and as many rows of logits"),
    ],
)  # fmt: skip
def test_test_vectors_that_are_no_arrays_fail_with_a_reason(copy: Path, monkeypatch, name, content, words):
    monkeypatch.setattr(isolated, "run", lambda *_: pytest.fail("it was run"))
    put(copy, f"test_vectors/{name}.npy", content)
    found = checks(copy)
    for check in ("onnx", "pytorch"):
        assert found[check].outcome == "failed" and words in found[check].detail
    assert found["files"].outcome == "passed"


def test_pickled_test_vectors_are_not_unpickled(copy: Path, tmp_path: Path):
    put(copy, "test_vectors/input.npy", npy(np.array([Bomb(tmp_path / "exploded")], object), allow_pickle=True))
    assert outcomes(checks(copy))["onnx"] == "failed"
    assert not (tmp_path / "exploded").exists()


def test_huge_test_vectors_are_not_read(copy: Path, monkeypatch):
    monkeypatch.setattr(vectors, "LARGEST", 1000)
    found = checks(copy)
    assert "at most 1000 are read" in found["onnx"].detail and found["pytorch"].outcome == "failed"


def test_other_numbers_in_the_test_vectors_fail_both_networks(copy: Path):
    wanted = np.load(copy / "test_vectors/output.npy")
    put(copy, "test_vectors/output.npy", npy(wanted + 1))
    found = checks(copy)
    assert "differ from PyTorch by up to 1.00e+00" in found["onnx"].detail
    assert "differs from the recorded test vectors by 1.00e+00" in found["pytorch"].detail
    put(copy, "test_vectors/output.npy", npy(wanted * np.float32("nan")))
    assert "not finite" in checks(copy)["onnx"].detail


# --- PyTorch and engine


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model"].update(name="hf_hub:timm/resnet18"),
        lambda m: m["model"].update(name="no_such_model"),
        lambda m: m["model"]["kwargs"].update(checkpoint_path="x"),
        lambda m: m["model"]["kwargs"].update(num_classes="many"),
        lambda m: m["model"]["kwargs"].update(num_classes=10**15),
    ],
)
def test_a_network_that_cannot_be_rebuilt_fails_with_a_reason(copy: Path, monkeypatch, change):
    monkeypatch.setattr(module, "_onnx", lambda *_: "not run")
    edit(copy, change)
    found = checks(copy)["pytorch"]
    assert found.outcome == "failed" and found.detail


def engine(built: bool, reason: str = "") -> dict[str, Any]:
    return {"built": built, "reason": reason, "precision": "fp16", "tensorrt": "10.3.0", "gpu": "Orin", "bytes": 11}


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (engine(False, "no TensorRT on the target"), "not built: no TensorRT on the target"),
        (engine(False), "gives no reason"),
        (engine(True), "needs the device: cswap-deploy measure"),
    ],
)
def test_an_engine_is_never_run(copy: Path, files_only, block, words):
    put(copy, "engine/model.engine", b"native code")
    edit(copy, lambda m: m.update(engine=block))
    found = checks(copy)
    assert found["engine"].outcome == "skipped" and words in found["engine"].detail
    assert checks(copy, "engine")["engine"].outcome == "failed"


def test_an_engine_that_is_said_to_be_built_must_be_there(copy: Path, files_only):
    edit(copy, lambda m: m.update(engine=engine(True)))
    found = checks(copy)["engine"]
    assert found.outcome == "failed" and "lists no file 'engine/model.engine'" in found.detail
    put(copy, "engine/model.engine", b"native code")
    flip(copy / "engine/model.engine")
    assert checks(copy)["engine"].detail == "engine/model.engine: its sha256 is wrong, see files"


@pytest.mark.parametrize("block", [{}, [], "yes", {**engine(True), "built": "true"}])
def test_an_engine_s_block_of_another_shape_is_a_broken_manifest(copy: Path, block):
    edit(copy, lambda m: m.update(engine=block))
    assert outcomes(checks(copy)) == {**dict.fromkeys(ALWAYS, "skipped"), "manifest": "failed"}


def test_a_copy_elsewhere_and_behind_a_link_is_the_same_bundle(quickstart: Built, tmp_path, files_only):
    shutil.copytree(quickstart.bundle.folder, tmp_path / "elsewhere")
    (tmp_path / "latest").symlink_to(tmp_path / "elsewhere")
    assert outcomes(checks(tmp_path / "latest")) == dict.fromkeys(ALWAYS, "passed")
    assert File.of(tmp_path / "latest" / "model.onnx").sha256 == quickstart.bundle.file("model.onnx").sha256
