"""One ONNX file that computes what PyTorch does, says what it takes, and tells nothing about the machine that made it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image as Pictures

from cswap_deploy import export, onnx_file, progress
from cswap_deploy.artifacts import Image, ImageSet, Network, OnnxModel, sha256_of
from cswap_deploy.attention import spelt
from cswap_deploy.errors import ExportError
from cswap_deploy.images import load as pixels_of
from cswap_deploy.images import normalise
from cswap_deploy.model import load
from cswap_deploy.preprocess import preprocess
from cswap_deploy.prune.cut import restore
from cswap_deploy.recipe import ModelSettings, OnnxSettings
from cswap_deploy.runtime import AT_ONCE, Session, without_folders

LABELS = ("tabby", "Löwe", "日本 🐈")
NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )
    for layer in (module[1], module[4]):
        for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2)
    return module


class Windows(nn.Module):  # attention over (batch, windows, heads, tokens, dims)
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.bias, self.head = nn.Linear(3, 24), nn.Parameter(torch.randn(32, 32)), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.qkv(x.unflatten(2, (2, 4)).flatten(3).permute(0, 2, 3, 1))
        query, key, value = tokens.unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)
        return self.head(mixed.transpose(2, 3).flatten(3)).mean((1, 2))


class Clipped(nn.Module):  # one tensor, three times, between bounds that are buffers
    def __init__(self):
        super().__init__()
        self.net, self.heads = net(), nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        for number in range(3):
            self.register_buffer(f"low{number}", torch.tensor(-0.1 * number))
            self.register_buffer(f"high{number}", torch.tensor(0.1 + number))

    def forward(self, x):
        x, bounds = self.net(x), dict(self.named_buffers(recurse=False))
        clipped = [torch.clamp(x, bounds[f"low{number}"], bounds[f"high{number}"]) for number in range(3)]
        return sum(head(part) for head, part in zip(self.heads, clipped))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else -self.net(x)


class Shy(Branches):
    def forward(self, x):
        assert not torch.compiler.is_exporting()
        return self.net(x)
"""
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
STATIC18, DYNAMIC20 = OnnxSettings(opset=18), OnnxSettings(opset=20, dynamic_batch=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def images(folder: Path) -> ImageSet:
    random, found = np.random.default_rng(0), []
    for number in range(20):
        path = folder / f"{number}.png"
        Pictures.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        found.append(Image(path.name, sha256_of(path), number % 3))
    return ImageSet(tuple(found), folder)


@pytest.fixture(scope="module")
def network(folder: Path) -> Callable[[str], Network]:
    """A network by its name: a function of NET, or the transformer."""
    (folder / "net.py").write_text(NET)

    def network(name: str) -> Network:
        out = folder / name
        out.mkdir(exist_ok=True)
        torch.manual_seed(0)
        if name == "vit":
            settings = ModelSettings(
                name="vit_tiny_patch16_224", kwargs=VIT, num_classes=3, pretrained=False, input={"size": 8}
            )
        else:
            settings = ModelSettings(factory=f"{folder / 'net.py'}:{name}", input={"size": 8})
        return load(out, settings)

    return network


Exported = tuple[Network, OnnxModel, OnnxSettings]


@pytest.fixture(scope="module")
def conv(folder: Path, images: ImageSet, network: Callable[[str], Network]) -> Exported:
    return exported(folder / "conv18", network("net"), images, STATIC18)


@pytest.fixture(scope="module")
def vit(folder: Path, images: ImageSet, network: Callable[[str], Network]) -> Exported:
    return exported(folder / "vit20", network("vit"), images, DYNAMIC20)


@pytest.fixture(scope="module")
def simple_conv(folder: Path, images: ImageSet, conv: Exported) -> Exported:
    return simplified(folder / "conv18s", conv, images)


@pytest.fixture(scope="module")
def simple_vit(folder: Path, images: ImageSet, vit: Exported) -> Exported:
    return simplified(folder / "vit20s", vit, images)


@pytest.fixture(params=["conv", "simple_conv", "vit", "simple_vit"])
def either(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


def exported(out: Path, made: Network, images: ImageSet, settings: OnnxSettings) -> Exported:
    out.mkdir()
    return made, export.to_onnx(out, made, LABELS, images, settings), settings


def simplified(out: Path, whole: Exported, images: ImageSet) -> Exported:
    out.mkdir(exist_ok=True)
    made, model, settings = whole
    return made, export.simplify(out, model, made, images, settings), settings


def graph_of(model: OnnxModel) -> onnx.ModelProto:
    return onnx.load(model.graph.path, load_external_data=False)


# --- the written file


def test_opset_ir_and_domains_are_as_asked(either: Exported) -> None:
    _, model, settings = either
    written = graph_of(model)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", settings.opset)]
    assert (model.opset, model.ir_version) == (settings.opset, written.ir_version)
    assert written.ir_version <= 10
    assert model.nodes == len(written.graph.node)


def test_file_stands_alone(either: Exported) -> None:
    _, model, _ = either
    onnx.checker.check_model(graph_of(model), full_check=True)
    beside = {path.name for path in model.graph.path.parent.iterdir()}
    pictures = {f"image_{number}.png" for number in range(4)}
    assert beside == {"model.onnx", "input.npy", "output.npy", "pixels.npy", *pictures}
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in graph_of(model).graph.initializer)
    assert model.graph.sha256 == sha256_of(model.graph.path)


def test_file_tells_nothing_about_this_machine(either: Exported) -> None:
    content = either[1].graph.path.read_bytes()
    places = (Path(__file__).parents[1], Path.home(), tempfile.gettempdir(), sys.prefix, torch.__path__[0])
    traces = ("site-packages", "stack_trace", "pkg.torch", "namespace", ".py", "onnxsim", "removed")
    assert [word for word in (*map(str, places), *traces) if word != "/" and word.encode() in content] == []


def test_names_and_shapes(either: Exported) -> None:
    _, model, settings = either
    graph = graph_of(model).graph
    batch = "batch" if settings.dynamic_batch else 1
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"input": [batch, 3, 8, 8], "logits": [batch, 3]}
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {TensorProto.FLOAT}


def test_labels_and_preprocessing_lie_in_the_file(either: Exported) -> None:
    made, model, _ = either
    stored = {entry.key: entry.value for entry in graph_of(model).metadata_props}
    assert set(stored) == {"cswap.labels", "cswap.preprocess"}
    assert tuple(json.loads(stored["cswap.labels"])) == LABELS
    assert json.loads(stored["cswap.preprocess"]) == preprocess(made.input)
    assert LABELS[2] in stored["cswap.labels"]
    assert graph_of(model).producer_name == "cswap-deploy"


@pytest.mark.parametrize("which", ["conv", "simple_conv"])
def test_batch_norm_is_folded_and_weights_keep_their_names(which: str, request: pytest.FixtureRequest) -> None:
    made, model, _ = request.getfixturevalue(which)
    graph = graph_of(model).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    weights = {t.name: tuple(t.dims) for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    own = {name: tuple(tensor.shape) for name, tensor in restore(made).state_dict().items()}
    assert weights.pop("0.bias", (6,)) == (6,)
    assert {"0.weight", "3.weight", "3.bias", "8.weight", "8.bias"} <= set(weights)
    assert {name: shape for name, shape in weights.items() if name in own} == {
        name: own[name] for name in ("0.weight", "3.weight", "3.bias", "8.weight", "8.bias")
    }


def test_weights_of_a_transformer_keep_their_names(simple_vit: Exported) -> None:
    """All but the matrices of linear layers inside, which the exporter transposes."""
    made, model, _ = simple_vit
    names = {tensor.name for tensor in graph_of(model).graph.initializer}
    assert {"pos_embed", "patch_embed.proj.weight", "head.weight"} <= names & set(restore(made).state_dict())


# --- the numbers


def test_parity_is_close(either: Exported) -> None:
    parity = either[1].parity
    assert parity.images == onnx_file.PARITY_IMAGES
    assert 0 <= parity.max_abs < 1e-4 and 60 < parity.sqnr_db <= onnx_file.MAX_SQNR
    assert either[1].note == ""


def test_vectors_are_preprocessed_images_and_pytorchs_logits(either: Exported, images: ImageSet) -> None:
    made, model, _ = either
    given, wanted = np.load(model.vectors.input.path), np.load(model.vectors.output.path)
    pixels, _ = pixels_of(ImageSet(images.images[: export.VECTORS], images.root), made.input)
    assert np.array_equal(given, normalise(pixels, made.input))
    assert (given.dtype, wanted.dtype) == (np.float32, np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(restore(made)(torch.from_numpy(given)).numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(Session(model.graph.path).logits(given), wanted, atol=1e-5)
    assert np.ptp(wanted, axis=0).min() > 0


def test_reference_evaluator_agrees(either: Exported) -> None:
    """onnx's own evaluator shares no kernel with ONNX Runtime."""
    _, model, settings = either
    given, wanted = np.load(model.vectors.input.path), np.load(model.vectors.output.path)
    evaluator = ReferenceEvaluator(graph_of(model))
    sizes = (1, 3) if settings.dynamic_batch else (1,)
    for size in sizes:
        found = evaluator.run(["logits"], {"input": given[:size]})[0]
        np.testing.assert_allclose(found, wanted[:size], atol=1e-5)


def test_dynamic_batch_takes_any(simple_vit: Exported, images: ImageSet) -> None:
    made, model, _ = simple_vit
    session = Session(model.graph.path, threads=1)
    pixels, _ = pixels_of(images, made.input)
    inputs = normalise(pixels, made.input)
    together = session.logits(inputs)
    singly = np.concatenate([session.logits(inputs[i : i + 1]) for i in range(len(inputs))])
    np.testing.assert_allclose(together, singly, atol=1e-6)


def test_two_exports_are_the_same_bytes(folder: Path, conv: Exported, images: ImageSet) -> None:
    made, first, settings = conv
    elsewhere = replace(made, weights=replace(made.weights, path=folder / "copied.safetensors"))
    shutil.copyfile(made.weights.path, elsewhere.weights.path)
    _, second, _ = exported(folder / "again", elsewhere, images, settings)
    assert second.graph.sha256 == first.graph.sha256
    assert second.vectors.output.sha256 == first.vectors.output.sha256


@pytest.mark.parametrize("factor", [1.1, -1.0, float("nan")])
def test_a_wrong_graph_is_refused(conv: Exported, images: ImageSet, tmp_path: Path, factor: float) -> None:
    made, model, _ = conv
    wrong = graph_of(model)
    tensor = next(tensor for tensor in wrong.graph.initializer if tensor.name == "8.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.float32(factor) * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(wrong, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"the ONNX file differs from PyTorch by up to .* on 16 images") as caught:
        export._checked(tmp_path / "model.onnx", made, images, "")
    assert caught.value.exit_code == 6 and caught.value.hint


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime .* cannot open model\.onnx: \w+") as caught:
        Session(tmp_path / "model.onnx")
    assert caught.value.exit_code == 6


# --- what cannot be exported


@pytest.mark.parametrize(("name", "words"), [("Branches", "Could not guard on data"), ("Shy", "AssertionError \\(")])
def test_a_network_that_cannot_be_exported(
    name: str, words: str, network: Callable[[str], Network], images: ImageSet, tmp_path: Path
) -> None:
    logger = logging.getLogger("torch")
    before = logger.level
    with pytest.raises(ExportError, match=f"PyTorch cannot export the network to ONNX: .*{words}") as caught:
        exported(tmp_path / "out", network(name), images, STATIC18)
    assert caught.value.hint == "the forward must not branch on the values of tensors"
    assert logger.level == before


def test_attention_over_windows_is_exported(
    network: Callable[[str], Network], images: ImageSet, tmp_path: Path
) -> None:
    """PyTorch's exporter takes attention of four axes only. `exported` compares the file with PyTorch."""
    _, model, _ = exported(tmp_path / "out", network("Windows"), images, STATIC18)
    assert "Softmax" in {node.op_type for node in graph_of(model).graph.node}


def test_a_tensor_that_is_clipped_more_than_once_is_exported(
    network: Callable[[str], Network], images: ImageSet, tmp_path: Path
) -> None:
    """The exporter's rewriting names the bounds alike and loses all but the last. `exported` compares the file with PyTorch."""
    _, model, _ = exported(tmp_path / "out", network("Clipped"), images, STATIC18)
    assert len({tuple(node.input) for node in graph_of(model).graph.node if node.op_type == "Clip"}) == 3


@pytest.mark.parametrize("how", [{}, {"attn_mask": "rows"}, {"attn_mask": "bias"}, {"is_causal": True}, {"scale": 0.3}])
def test_attention_that_is_spelt_out_is_pytorchs(how: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 4, 5, 8, generator=generator, dtype=torch.float64)
    masks = {
        "rows": torch.eye(5, dtype=torch.bool) | (torch.arange(5) < 2),
        "bias": torch.randn(5, 5, generator=generator).double(),
    }
    how = {**how, **({"attn_mask": masks[how["attn_mask"]]} if "attn_mask" in how else {})}
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, **how)
    assert torch.allclose(spelt(query, key, value, **how), wanted, rtol=0, atol=1e-12)


def small(opset: int = 18, batch: int | str = 1, domain: str = "") -> onnx.ModelProto:
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 2])
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["y"])], "g", [value], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2]))
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets)


@pytest.mark.parametrize(
    ("model", "words", "hint"),
    [
        (small(opset=17), "has opset 17, onnx.opset asks for 18", "set onnx.opset: 17"),
        (small(batch="n"), "batch axis is not what onnx.dynamic_batch asks for", "report"),
        (small(domain="com.microsoft"), "needs operators of the domains com.microsoft", "report"),
    ],
)
def test_a_file_that_is_not_as_asked(tmp_path: Path, model: onnx.ModelProto, words: str, hint: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=words) as caught:
        onnx_file.require_as_asked(path, STATIC18)
    assert hint in caught.value.hint


def test_ir_version_is_lowered_and_an_invalid_graph_refused(tmp_path: Path) -> None:
    model = small()
    model.ir_version = 13
    onnx_file.write(model, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx").ir_version == 10
    model.graph.node[0].input[0] = "nobody"
    with pytest.raises(ExportError, match="the exported graph is not valid ONNX: "):
        onnx_file.write(model, tmp_path / "model.onnx")


def test_traces_are_removed_from_branches_and_functions_too() -> None:
    model = small(domain="unused.domain")
    inner = helper.make_node("Constant", [], ["c"], value_float=1.0)
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [])])
    choice = helper.make_node("If", ["input"], ["z"], then_branch=branch, else_branch=branch)
    function = helper.make_function("own", "f", ["x"], ["x2"], [helper.make_node("Relu", ["x"], ["x2"])], [])
    for holder in (model, model.graph, choice, choice.attribute[0].g.node[0], function, function.node[0]):
        holder.doc_string = "SECRET"
        holder.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="SECRET")
    model.graph.node.append(choice)
    model.functions.append(function)
    model.producer_name = model.producer_version = "SECRET"
    assert b"SECRET" not in onnx_file.without_traces(model).SerializeToString()
    assert [entry.domain for entry in model.opset_import] == [""]


# --- simplification


def test_many_images_go_through_an_open_batch_in_parts(vit: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(vit[1].graph.path)
    images = np.random.default_rng(0).normal(size=(2 * AT_ONCE + 3, 3, 8, 8)).astype(np.float32)
    whole = session._session.run(None, {"input": images})[0]
    calls: list[int] = []

    class Counting:
        def run(self, names: None, feeds: dict[str, np.ndarray]) -> Any:
            calls.append(len(feeds["input"]))
            return real.run(names, feeds)

    real = session._session
    monkeypatch.setattr(session, "_session", Counting())
    assert np.allclose(session.logits(images), whole, atol=1e-5)
    assert calls == [AT_ONCE, AT_ONCE, 3]


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (
            "Load model from {}/work/model.onnx failed: File {}/x y/m.onnx",
            "Load model from model.onnx failed: File m.onnx",
        ),
        ('File "{}/gone/away/m.py", line 3', 'File "m.py", line 3'),
        ("node '/conv1/Conv' of graph main, 3/4 of them; see https://onnx.ai/onnx", None),
        ("at {}", "at {last}"),
        ("and/or, a / b, " + "/x" * 300, None),
    ],
)
def test_a_librarys_message_loses_the_folders_of_this_machine(text: str, bare: str | None, tmp_path: Path) -> None:
    (tmp_path / "x y").mkdir()
    said = text.replace("{}", str(tmp_path))
    assert without_folders(said) == (said if bare is None else bare.replace("{last}", tmp_path.name))


def test_simplification_changes_no_output(vit: Exported, simple_vit: Exported) -> None:
    assert simple_vit[1].nodes < vit[1].nodes
    assert simple_vit[1].vectors.output.sha256 == vit[1].vectors.output.sha256


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"onnxsim was ended by signal 11 \(.*\)"),
        (
            "import time; time.sleep(60)",
            r"onnxsim did not end within 0\.5 s; a machine that is busy .*: --force simplified tries again",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"onnxsim was ended by signal 9 \(.*\); a machine that is .* short of memory may be why: --force simplified tries again",
        ),
        (
            "import sys; sys.exit('cannot load ' + sys.argv[1])",
            "onnxsim failed with exit code 1: cannot load model.onnx",
        ),
        ("pass", "onnxsim wrote no file"),
        ("raise ValueError('no such pass')", "onnxsim failed with exit code 1: ValueError: no such pass"),
        ("import sys; sys.exit(3)", "onnxsim failed with exit code 3: no message"),
        (r"import sys; sys.stderr.buffer.write(b'\xff'); sys.exit(3)", "onnxsim failed with exit code 3: \ufffd"),
        ("import sys; open(sys.argv[2], 'w').write('text')", "model.onnx is not an ONNX file"),
        ("import sys; open(sys.argv[2], 'w')", "the exported graph is not valid ONNX: .*"),
        (
            "import sys, onnx; m = onnx.load(sys.argv[1]); m.opset_import[0].version = 21; onnx.save(m, sys.argv[2])",
            "the written file has opset 21, onnx.opset asks for 18",
        ),
        (
            "import sys, onnx; m = onnx.load(sys.argv[1]); t = m.graph.initializer[0]; t.raw_data = bytes(len(t.raw_data));"
            "onnx.save(m, sys.argv[2])",
            "the ONNX file differs from PyTorch by up to .*",
        ),
    ],
    ids=[
        "crash",
        "hang",
        "killed",
        "folder",
        "nothing",
        "error",
        "exit",
        "not text",
        "garbage",
        "empty",
        "opset",
        "wrong",
    ],
)
def test_a_failing_simplifier_costs_nothing_but_the_folding(
    program: str,
    reason: str,
    conv: Exported,
    images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "SIMPLIFY", program)
    monkeypatch.setattr(export, "SIMPLIFY_SECONDS", 0.5 if "sleep" in program else 60)
    with progress.reporting(recording := progress.Recording()):
        _, model, _ = simplified(tmp_path, conv, images)
    assert model.graph.sha256 == conv[1].graph.sha256
    assert (model.nodes, model.parity) == (conv[1].nodes, conv[1].parity)
    assert re.fullmatch(f"not simplified: {reason}", model.note), model.note
    assert recording.of("warn") == [f"the graph is shipped unsimplified: {model.note.removeprefix('not simplified: ')}"]
