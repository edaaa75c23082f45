"""The same network in fewer bits: what each kind promises to those who read its file, and what is refused."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import NO_VNNI, ROOT, VNNI
from onnx import TensorProto, numpy_helper
from PIL import Image as Pictures

from cswap_deploy import data, export, half, model, onnx_file, progress, variants
from cswap_deploy.artifacts import File, Image, ImageSet, Network, OnnxModel, sha256_of
from cswap_deploy.errors import DataError, ExportError
from cswap_deploy.images import load as pixels_of
from cswap_deploy.images import normalise
from cswap_deploy.int8 import KINDS as INT8_KINDS
from cswap_deploy.int8 import METHODS, Quantiser, Way, weights_only
from cswap_deploy.recipe import Int8Settings, ModelSettings, OnnxSettings, Variant
from cswap_deploy.recipe import load as load_recipe
from cswap_deploy.runtime import Session
from cswap_deploy.stage import Workdir

KINDS: tuple[Variant, ...] = ("fp16", "int8", "int8-arm", "int8-tensorrt")
INT8 = KINDS[1:]
FLOORS = {"fp16": 60.0, "int8": 30.0, "int8-arm": 30.0, "int8-tensorrt": 28.0}
"""dB; measured on the CNN 71, 37, 37, 34 and on the transformer 74, 39, 39, 41."""
SIZES = {"fp16": (0.45, 0.55), "int8": (0.2, 0.35), "int8-arm": (0.2, 0.35), "int8-tensorrt": (0.95, 1.1)}
"""Of the float32 file; TensorRT reads float32 weights and rounds them itself."""
WEIGHTED = ("Conv", "Gemm", "MatMul")
FACTORIES = """
import zoo
from torch import nn


def sound():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.Flatten(), nn.Linear(192, 3))
    net.apply(lambda layer: nn.init.ones_(layer.weight) if isinstance(layer, nn.Conv2d) else None)
    return net


def excite(): return zoo.ZOO["squeeze-excite"].build()
def mixed(): return zoo.ZOO["channels-last"].build()
"""


@dataclass(frozen=True)
class Source:
    """What a variant is made from."""

    model: OnnxModel
    network: Network
    fit: ImageSet
    selection: ImageSet
    settings: OnnxSettings

    def make(self, out: Path, kind: Variant, int8: Int8Settings = Int8Settings()) -> OnnxModel:  # noqa: B008
        out.mkdir(parents=True, exist_ok=True)
        return variants.make(out, self.model, self.network, self.fit, self.selection, kind, self.settings, int8)

    @cached_property
    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.model.graph.path)


@dataclass(frozen=True)
class Made:
    source: Source
    kind: Variant
    model: OnnxModel

    @cached_property
    def file(self) -> onnx.ModelProto:
        return onnx.load(self.model.graph.path)

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.file.graph.initializer}

    @cached_property
    def makers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.file.graph.node for name in node.output}

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.file.graph.node if node.op_type in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


def quickstart_source(folder: Path, recipe: str, settings: OnnxSettings) -> Source:
    asked = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", ())
    (out := folder / recipe).mkdir()
    network = model.load(out, asked.model)
    images = asked.calibration.images
    split = data.divide(data.catalogue(images, None, network.outputs, sha256_of), 256, 64, 0)
    fit = ImageSet(split.fit, images)
    selection = ImageSet(split.selection, images)
    return Source(export.to_onnx(out, network, split.labels, fit, settings), network, fit, selection, settings)


@pytest.fixture(scope="module")
def cnn(folder: Path) -> Source:
    return quickstart_source(folder, "quickstart", OnnxSettings())


@pytest.fixture(scope="module")
def vit(folder: Path) -> Source:
    """Opset 20 has Gelu as one operator."""
    return quickstart_source(folder, "quickstart-vit", OnnxSettings(opset=20, dynamic_batch=True))


@pytest.fixture(scope="module")
def small(folder: Path) -> Callable[[str], Source]:
    """A network of FACTORIES by its name, with 20 images of noise."""
    (folder / "nets.py").write_text(FACTORIES)
    random, found = np.random.default_rng(0), []
    for number in range(20):
        path = folder / f"{number}.png"
        Pictures.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        found.append(Image(path.name, sha256_of(path), 0))
    images, sources = ImageSet(tuple(found), folder), dict[str, Source]()

    def source(name: str) -> Source:
        if name not in sources:
            (out := folder / name).mkdir()
            network = model.load(out, ModelSettings(factory=f"{folder / 'nets.py'}:{name}", input={"size": 8}))
            exported = export.to_onnx(out, network, tuple("abcde")[: network.outputs], images, OnnxSettings())
            sources[name] = Source(exported, network, images, images, OnnxSettings())
        return sources[name]

    return source


@pytest.fixture(scope="module")
def made(folder: Path, request: pytest.FixtureRequest) -> Callable[[str, Variant], Made]:
    """A variant of `cnn` or `vit`, made once."""
    known: dict[tuple[str, str], Made] = {}

    def made(name: str, kind: Variant) -> Made:
        if (name, kind) not in known:
            source: Source = request.getfixturevalue(name)
            known[name, kind] = Made(source, kind, source.make(folder / f"{name}-{kind}", kind))
        return known[name, kind]

    return made


@pytest.fixture(params=[(name, kind) for name in ("cnn", "vit") for kind in KINDS], ids=lambda pair: "-".join(pair))
def any_made(request: pytest.FixtureRequest, made: Callable[[str, Variant], Made]) -> Made:
    return made(*request.param)


@pytest.fixture(params=[(name, kind) for name in ("cnn", "vit") for kind in INT8], ids=lambda pair: "-".join(pair))
def quantized(request: pytest.FixtureRequest, made: Callable[[str, Variant], Made]) -> Made:
    return made(*request.param)


def sqnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()))


# --- every kind


def test_logits_stay_close_to_pytorchs(any_made: Made) -> None:
    if any_made.kind in ("int8", "int8-arm") and not VNNI:
        pytest.skip(NO_VNNI)
    found, floor = any_made.model.parity, FLOORS[any_made.kind]
    assert found.images == onnx_file.PARITY_IMAGES
    assert floor < found.sqnr_db < 100 and found.max_abs > 0
    given, wanted = (np.load(file.path) for file in (any_made.model.vectors.input, any_made.model.vectors.output))
    logits = Session(any_made.model.graph.path).logits(given)
    assert sqnr(logits, wanted) > floor - 3
    assert np.array_equal(logits.argmax(1), wanted.argmax(1))


def test_file_is_written_as_the_source_was(any_made: Made) -> None:
    source, file = any_made.source, any_made.file
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", source.settings.opset)]
    assert {node.domain for node in file.graph.node} == {""}
    assert (any_made.model.opset, any_made.model.ir_version) == (source.model.opset, source.model.ir_version)
    assert file.ir_version == source.graph.ir_version <= 10
    assert any_made.model.nodes == len(file.graph.node)
    for which in ("input", "output"):
        found, wanted = (list(getattr(m.graph, which)) for m in (file, source.graph))
        assert [(value.name, value.type) for value in found] == [(value.name, value.type) for value in wanted]
        assert {value.type.tensor_type.elem_type for value in found} == {TensorProto.FLOAT}


def test_nodes_are_in_topological_order(any_made: Made) -> None:
    graph = any_made.file.graph
    known = {"", *(value.name for value in graph.input), *any_made.constants}
    for node in graph.node:
        assert set(node.input) <= known, node.name
        known |= set(node.output)


def test_file_tells_of_us_and_of_no_tool_or_machine(any_made: Made) -> None:
    metadata = [(entry.key, entry.value) for entry in any_made.file.metadata_props]
    assert metadata == [(entry.key, entry.value) for entry in any_made.source.graph.metadata_props]
    assert {key for key, _ in metadata} == {"cswap.labels", "cswap.preprocess"}
    assert (any_made.file.producer_name, any_made.file.producer_version) == ("cswap-deploy", "")
    content = any_made.model.graph.path.read_bytes()
    places = map(str, (ROOT, Path.home(), tempfile.gettempdir(), sys.prefix))
    traces = ("site-packages", "onnx.quant", "onnx.infer", "microsoft", ".py")
    assert [word for word in (*places, *traces) if word != "/" and word.encode() in content] == []


def test_folder_holds_the_file_and_the_sources_vectors(any_made: Made) -> None:
    out, vectors = any_made.model.graph.path.parent, any_made.source.model.vectors
    pictures = {f"image_{number}.png" for number in range(4)}
    assert {path.name for path in out.iterdir()} == {"model.onnx", "input.npy", "output.npy", "pixels.npy", *pictures}
    assert any_made.model.graph == File.of(out / "model.onnx")
    assert any_made.model.vectors.input == replace(vectors.input, path=out / "input.npy")
    assert any_made.model.vectors.output == replace(vectors.output, path=out / "output.npy")


def test_size(any_made: Made) -> None:
    low, high = SIZES[any_made.kind]
    assert low < any_made.model.graph.bytes / any_made.source.model.graph.bytes < high


def test_note_says_what_stays_in_float(any_made: Made) -> None:
    note = any_made.model.note
    assert ("only Conv, Gemm, MatMul in 8 bits" in note) == (
        any_made.kind != "fp16" and any_made.source.settings.opset == 20
    )
    assert ("weights are stored as float32" in note) == (any_made.kind == "int8-tensorrt")
    assert bool(note) == ("8 bits" in note)


@pytest.mark.parametrize("kind", KINDS)
def test_open_batch_stays_open(kind: Variant, made: Callable[[str, Variant], Made]) -> None:
    open_ = made("vit", kind)
    session = Session(open_.model.graph.path, threads=1)
    inputs = np.load(open_.model.vectors.input.path)
    together, singly = session.logits(inputs), np.concatenate([session.logits(image[None]) for image in inputs])
    np.testing.assert_allclose(together, singly, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("cnn", "fp16"), ("cnn", "int8-tensorrt"), ("vit", "int8")])
def test_again_gives_the_same_bytes(
    name: str, kind: Variant, made: Callable[[str, Variant], Made], tmp_path: Path
) -> None:
    first = made(name, kind)
    assert first.source.make(tmp_path / "again", kind).graph.sha256 == first.model.graph.sha256


@pytest.mark.parametrize("name", ["excite", "mixed"])
def test_other_networks(name: str, small: Callable[[str], Source], tmp_path: Path) -> None:
    """Sigmoid, PRelu and a gate; a MatMul without Gemm beside a convolution."""
    for kind in ("fp16", "int8-tensorrt", "int8"):
        if (name, kind) == ("mixed", "int8") and not VNNI:
            pytest.skip(NO_VNNI)
        made = small(name).make(tmp_path / kind, kind)
        assert made.parity.sqnr_db > (45 if kind == "fp16" else 15), kind


def test_nodes_without_names_are_told_apart(small: Callable[[str], Source], tmp_path: Path) -> None:
    source = small("sound")
    nameless = onnx.load(source.model.graph.path)
    for node in nameless.graph.node:
        node.name = ""
    onnx.save(nameless, tmp_path / "nameless.onnx")
    other = replace(source, model=replace(source.model, graph=File.of(tmp_path / "nameless.onnx")))
    for kind in ("fp16", "int8"):
        assert other.make(tmp_path / kind, kind).parity == source.make(tmp_path / f"named-{kind}", kind).parity


# --- float16


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_fp16_computes_in_half_between_casts_of_input_and_logits(
    name: str, made: Callable[[str, Variant], Made]
) -> None:
    half = made(name, "fp16")
    assert {t.data_type for t in half.constants.values()} <= {TensorProto.FLOAT16, TensorProto.INT64}
    counts = Counter(node.op_type for node in half.file.graph.node)
    readers = sum("input" in node.input for node in half.source.graph.graph.node)
    assert counts - Counter(node.op_type for node in half.source.graph.graph.node) == Counter(Cast=readers + 1)


def scaled(source: Source, folder: Path, factors: tuple[float, float]) -> Source:
    """The convolutions of `sound` times these."""
    graph = onnx.load(source.model.graph.path)
    for tensor, factor in zip([t for t in graph.graph.initializer if len(t.dims) == 4], factors, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(np.float32(factor) * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(graph, folder / "scaled.onnx")
    return replace(source, model=replace(source.model, graph=File.of(folder / "scaled.onnx")))


@pytest.mark.parametrize("factors", [(1e6, 1e-6), (5e4, 1e-4)], ids=["weights", "activations"])
def test_a_network_beyond_half_is_refused(
    factors: tuple[float, float], small: Callable[[str], Source], tmp_path: Path
) -> None:
    """The second one has sound weights, and ONNX Runtime's CPU kernels would hide that it overflows on a device."""
    words = r"^variant fp16: '\w+' reaches \d\.\d+e\+0\d in float32, and float16 ends at 65504"
    with pytest.raises(ExportError, match=words) as caught:
        scaled(small("sound"), tmp_path, factors).make(tmp_path / "out", "fp16")
    assert caught.value.exit_code == 6 and "fp16" in caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_beyond_half_become_infinite_and_are_refused(
    small: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter would clip them in silence."""
    monkeypatch.setattr(half, "_require_within", lambda ranges: None)
    with pytest.raises(ExportError, match=r"^variant fp16: the logits of 16 of 16 images are NaN or infinite"):
        scaled(small("sound"), tmp_path, (1e6, 1e-6)).make(tmp_path / "out", "fp16")


def test_a_network_within_half_is_not_refused(small: Callable[[str], Source], tmp_path: Path) -> None:
    assert small("sound").make(tmp_path, "fp16").parity.sqnr_db > 40


# --- int8


def zero_points(made: Made, kind: str) -> Iterator[tuple[onnx.NodeProto, np.ndarray]]:
    for node in made.nodes(kind):
        yield node, numpy_helper.to_array(made.constants[node.input[2]])


def weights_of(made: Made) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """(weighted layer, the DequantizeLinear before its weight); products of two activations have none."""
    for node in made.nodes(*WEIGHTED):
        restored = made.makers[node.input[1]]
        assert restored.op_type == "DequantizeLinear"
        origin = restored.input[0]
        if origin in made.makers:
            origin = made.makers[origin].input[0]
        if origin in made.constants:
            yield node, restored


def test_weights_are_signed_and_per_output_channel(quantized: Made) -> None:
    layers = list(weights_of(quantized))
    assert len(layers) == (23 if quantized.source.settings.opset == 18 else 18)
    for node, restored in layers:
        scale, zero = (quantized.constants[name] for name in restored.input[1:])
        axis = next(attribute.i for attribute in restored.attribute if attribute.name == "axis")
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        assert axis == (0 if node.op_type == "Conv" or transposed else 1)
        assert zero.data_type == TensorProto.INT8 and not numpy_helper.to_array(zero).any()
        made_of = quantized.makers.get(restored.input[0])
        weight = quantized.constants[made_of.input[0] if made_of else restored.input[0]]
        assert list(scale.dims) == list(zero.dims) == [weight.dims[axis]]
        assert weight.data_type == (TensorProto.FLOAT if quantized.kind == "int8-tensorrt" else TensorProto.INT8)


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize(("kind", "dtype"), [("int8", np.uint8), ("int8-arm", np.int8), ("int8-tensorrt", np.int8)])
def test_activations(name: str, kind: Variant, dtype: type, made: Callable[[str, Variant], Made]) -> None:
    activations = [
        zero
        for node, zero in zero_points(made(name, kind), "QuantizeLinear")
        if node.input[0] in made(name, kind).makers
    ]
    assert len(activations) > 20
    assert {zero.dtype for zero in activations} == {np.dtype(dtype)}
    assert {zero.ndim for zero in activations} == {0}
    assert kind == "int8" or not any(zero.any() for zero in activations), "symmetric around zero"


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_tensorrt_rules(name: str, made: Callable[[str, Variant], Made]) -> None:
    """Symmetric int8 alone, Q and DQ in pairs, biases in float, outputs of weighted layers never rounded for their own sake."""
    found = made(name, "int8-tensorrt")
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        for _, zero in zero_points(found, kind):
            assert zero.dtype == np.int8 and not zero.any()
    assert {found.makers[node.input[0]].op_type for node in found.nodes("DequantizeLinear")} == {"QuantizeLinear"}
    biases = [node.input[2] for node in found.nodes("Conv", "Gemm") if len(node.input) > 2]
    assert biases and {found.constants[bias].data_type for bias in biases} == {TensorProto.FLOAT}
    assert found.makers["logits"].op_type not in ("QuantizeLinear", "DequantizeLinear")


def test_tensorrt_reads_residual_sums_in_8_bits(made: Callable[[str, Variant], Made]) -> None:
    found = made("cnn", "int8-tensorrt")
    sums = found.nodes("Add")
    assert len(sums) == 8
    assert {found.makers[name].op_type for node in sums for name in node.input} == {"DequantizeLinear"}


@pytest.mark.parametrize("kind", ["int8", "int8-arm"])
def test_every_operator_of_a_cnn_lies_between_dequantise_and_quantise(
    kind: Variant, made: Callable[[str, Variant], Made]
) -> None:
    """What QNN and ONNX Runtime fuse to one operator of 8 bits; in uint8 the rectifiers are the ends of the ranges."""
    found = made("cnn", kind)
    readers = {name: {node.op_type for node in found.file.graph.node if name in node.input} for name in found.makers}
    between = found.nodes("Conv", "Add", "MaxPool", "Gemm", "Relu")
    assert len(between) > 30
    for node in between:
        assert {found.makers[name].op_type for name in node.input if name in found.makers} == {"DequantizeLinear"}
        assert readers[node.output[0]] == {"QuantizeLinear"}
    assert bool(found.nodes("Relu")) == (kind == "int8-arm")


@pytest.mark.parametrize("kind", ["int8", "int8-arm"])
def test_biases_are_of_32_bits(kind: Variant, made: Callable[[str, Variant], Made]) -> None:
    found = made("cnn", kind)
    biases = [found.makers[node.input[2]] for node in found.nodes("Conv", "Gemm")]
    assert {node.op_type for node in biases} == {"DequantizeLinear"}
    assert {found.constants[node.input[0]].data_type for node in biases} == {TensorProto.INT32}


@pytest.mark.parametrize("kind", INT8)
def test_a_transformer_keeps_what_is_sensitive_in_float(kind: Variant, made: Callable[[str, Variant], Made]) -> None:
    found = made("vit", kind)
    for operator in ("LayerNormalization", "Softmax", "Gelu"):
        wanted = [node.op_type for node in found.source.graph.graph.node].count(operator)
        assert len(found.nodes(operator)) == wanted > 0
    readers = {name: [node for node in found.file.graph.node if name in node.input] for name in found.makers}
    for node in found.nodes("QuantizeLinear"):
        beyond = {reader.op_type for restored in readers[node.output[0]] for reader in readers[restored.output[0]]}
        maker = found.makers.get(node.input[0])
        assert beyond & set(WEIGHTED) or (maker and maker.op_type in WEIGHTED), node.name


def quantiser(source: Source, folder: Path, kind: Variant = "int8", images: int = 32) -> tuple[Quantiser, np.ndarray]:
    """It, and the normalised images that its ranges come from."""
    pixels, _ = pixels_of(ImageSet(source.fit.images[:images], source.fit.root), source.network.input)
    inputs = normalise(pixels, source.network.input)
    return Quantiser(source.graph, INT8_KINDS[kind], lambda: iter(inputs[:, None]), folder), inputs


def input_range(graph: onnx.ModelProto) -> tuple[float, int]:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    first = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "input")
    return float(constants[first.input[1]]), int(constants[first.input[2]])


def test_ranges_end_at_the_extremes_or_within(cnn: Source, tmp_path: Path) -> None:
    made, inputs = quantiser(cnn, tmp_path)
    scales = {method: input_range(made.graph(Way(method))) for method in METHODS}
    scale, zero = scales["minmax"]
    assert scale == pytest.approx((inputs.max() - inputs.min()) / 255)
    assert abs(zero + inputs.min() / scale) <= 0.51
    assert all(0 < scales[method][0] <= scale * 1.001 for method in METHODS)


def test_nodes_stay_in_float_or_are_alone_in_8_bits(cnn: Source, tmp_path: Path) -> None:
    made, _ = quantiser(cnn, tmp_path)
    weights = {node.name: node.input[1] for node in cnn.graph.graph.node if node.op_type in WEIGHTED}
    assert set(made.nodes) == set(weights)
    chosen = made.nodes[3]
    for way, rounded in (
        (Way("minmax", in_float=(chosen,)), set(made.nodes) - {chosen}),
        (Way("minmax", only=chosen), {chosen}),
    ):
        kinds = {tensor.name: tensor.data_type for tensor in made.graph(way).graph.initializer}
        found = {name for name, weight in weights.items() if kinds.get(f"{weight}_quantized") == TensorProto.INT8}
        assert found == rounded
        assert kinds.get(weights[chosen]) == (TensorProto.FLOAT if chosen not in rounded else None)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_weights_alone(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Activations are not touched: the logits are those of a network whose weights were rounded."""
    source: Source = request.getfixturevalue(name)
    copy = onnx.load_from_string(source.graph.SerializeToString())
    onnx.save(weights_only(copy), tmp_path / "weights.onnx")
    onnx.checker.check_model(copy, full_check=True)
    kinds = Counter(tensor.data_type for tensor in copy.graph.initializer)
    assert kinds[TensorProto.INT8] == sum(node.op_type == "DequantizeLinear" for node in copy.graph.node) > 15
    assert not [node for node in copy.graph.node if node.op_type == "QuantizeLinear"]
    inputs = np.load(source.model.vectors.input.path)
    wanted = Session(source.model.graph.path).logits(inputs)
    assert sqnr(Session(tmp_path / "weights.onnx").logits(inputs), wanted) > 30
    assert (tmp_path / "weights.onnx").stat().st_size < 0.35 * source.model.graph.bytes


@pytest.mark.parametrize(("name", "steps"), [("cnn", range(1, 129)), ("vit", range(1, 129))])
def test_calibration_goes_image_by_image(
    name: str, steps: range, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with progress.reporting(recording := progress.Recording()):
        request.getfixturevalue(name).make(tmp_path, "int8")
    told = [event[2] for event in recording.events if event[:2] == ("advance", "calibration images")]
    assert told == [f"{done}/128" for done in steps] * len(METHODS)


def test_an_open_batch_takes_any_number_of_calibration_images(vit: Source, tmp_path: Path) -> None:
    """12 are no multiple of any batch above 6; histograms are made of as many values of each."""
    few = replace(vit, fit=ImageSet(vit.fit.images[:12], vit.fit.root))
    with progress.reporting(recording := progress.Recording()):
        found = few.make(tmp_path, "int8").parity
    told = [event[2] for event in recording.events if event[:2] == ("advance", "calibration images")]
    assert told == [f"{done}/12" for done in range(1, 13)] * len(METHODS) and found.sqnr_db > 10


def test_a_variants_failure_tells_no_folder_of_this_machine(
    small: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*arguments: object) -> None:
        raise RuntimeError(f"Load model from {tmp_path}/a b/model.onnx failed: node '/conv/Conv' of {tmp_path / 'x'}")

    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(variants, "to_half", stumble)
    with pytest.raises(ExportError, match=r"Load model from model\.onnx failed: node '/conv/Conv' of x \(") as caught:
        small("sound").make(tmp_path / "out", "fp16")
    assert str(tmp_path) not in str(caught.value)


# --- manners


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_tools_are_silent_and_leave_nothing_behind(
    kind: Variant,
    small: Callable[[str], Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = small("sound")
    (here := tmp_path / "cwd").mkdir()
    monkeypatch.chdir(here)
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    beside = sorted(source.model.graph.path.parent.iterdir())
    with monkeypatch.context() as without_tmp:
        without_tmp.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        source.make(tmp_path / "out", kind)
        assert tempfile.tempdir == str(tmp_path / "nowhere")
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert (root.level, root.handlers) == before
    assert list(here.iterdir()) == []
    assert sorted(source.model.graph.path.parent.iterdir()) == beside


def test_results_are_stored_by_kind(small: Callable[[str], Source], tmp_path: Path) -> None:
    source, kinds = small("excite"), KINDS[:2]
    for word in ("finished", "up to date"):
        with progress.reporting(recording := progress.Recording()), Workdir(tmp_path / "work").open() as work:
            half, byte = (
                work.run(
                    variants.make,
                    source.model,
                    source.network,
                    source.fit,
                    source.selection,
                    kind,
                    source.settings,
                    Int8Settings(),
                )
                for kind in kinds
            )
        assert recording.of(word) == ["variants", "variants"]
        assert half.graph.sha256 != byte.graph.sha256


# --- refusals


def test_a_changed_image_is_the_datas_fault(small: Callable[[str], Source], tmp_path: Path) -> None:
    source = small("sound")
    images = (replace(source.fit.images[0], sha256="0"), *source.fit.images[1:])
    with pytest.raises(DataError, match="changed since it was indexed"):
        replace(source, fit=replace(source.fit, images=images)).make(tmp_path / "out", "int8")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_not_onnx_is_refused(small: Callable[[str], Source], tmp_path: Path) -> None:
    source = small("sound")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    broken = replace(source.model, graph=File.of(tmp_path / "broken.onnx"))
    with pytest.raises(ExportError, match=r"^variant int8-arm: broken\.onnx is not an ONNX file"):
        replace(source, model=broken).make(tmp_path / "out", "int8-arm")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda graph: graph.opset_import[0].__setattr__("version", 19), "the written file has opset 19"),
        (lambda graph: graph.graph.node[0].input.__setitem__(0, "nobody"), "the converted graph is not valid ONNX: "),
        (lambda graph: graph.graph.output[0].__setattr__("name", "y"), "the conversion changed the graph's output"),
        (lambda graph: 1 / 0, "the conversion failed: ZeroDivisionError"),
    ],
    ids=["opset", "invalid", "output", "raises"],
)
def test_a_converter_that_goes_wrong(
    edit: Callable[[onnx.ModelProto], None],
    words: str,
    small: Callable[[str], Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(original: onnx.ModelProto, *_: object) -> tuple[onnx.ModelProto, str, None]:
        edit(copy := onnx.load_from_string(original.SerializeToString()))
        return copy, "", None

    monkeypatch.setattr(variants, "_int8", wrong)
    with pytest.raises(ExportError, match=f"^variant int8: {re.escape(words)}") as caught:
        small("sound").make(tmp_path, "int8")
    assert caught.value.exit_code == 6 and caught.value.hint
