"""The agent's TensorRT half, run for real against doubles of the Python module, of libcudart and of trtexec.

Nothing here is a measurement, and nothing says that TensorRT behaves so: the doubles have the names, signatures and types
of the versions that they imitate (tests/facts) and do the least that the agent can notice. See tests/fake_tensorrt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT
from onnx import TensorProto, helper, numpy_helper

from cswap_deploy import latency
from cswap_deploy.artifacts import File
from cswap_deploy.device import exports
from cswap_deploy.device.target import Probe, reach
from cswap_deploy.device.trtexec import banner_version
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import LatencySettings

AGENT = ROOT / "cswap_deploy" / "device" / "agent.py"
DOUBLE = Path(__file__).parent / "fake_tensorrt"
OLDEST, OLD, THOR, LAST, TYPED, NEW = "8.6.1", "10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106"
VERSIONS = (OLDEST, OLD, THOR, LAST, TYPED, NEW)
CLASSES, SHAPE = 5, (3, 6, 6)
SETTINGS = {
    "precision": "fp16",
    "workspace_mib": 512,
    "optimization_level": 4,
    "dla_core": None,
    "batch": {"min": 1, "opt": 2, "max": 4},
    "keep_fp32": "auto",
}
INPUT = {"name": "input", "shape": list(SHAPE)}


@dataclass
class Device:
    """A folder that plays the target: its cache, the environment of its agent, and what the doubles have recorded."""

    folder: Path
    environment: dict[str, str]
    model: dict[str, str] = field(default_factory=dict)

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        """The agent's answer; what it printed is in `log`."""
        with self.running(verb, **request) as process:
            assert process.stdout
            document: dict[str, Any] = json.loads(process.stdout.read())
        return document

    @contextmanager
    def running(self, verb: str, **request: Any) -> Iterator[subprocess.Popen[bytes]]:
        """The agent with a request; standard input is held open: the agent ends with its connection."""
        surroundings = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder)} | self.environment
        surroundings["FAKE_TENSORRT_RECORD"] = str(self.record)
        line = json.dumps({"schema": "cswap-deploy/agent/1", "verb": verb, **request}).encode() + b"\n"
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(AGENT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=surroundings,
            )
        with process:
            assert process.stdin
            process.stdin.write(line)
            process.stdin.flush()
            yield process

    def build(self, **settings: Any) -> dict[str, Any]:
        """`dynamic` and `model` are the request's own, the rest are settings of the engine."""
        model, dynamic = settings.pop("model", self.model), settings.pop("dynamic", False)
        return self.ask("build", model=model, settings=SETTINGS | settings, input=INPUT, dynamic=dynamic)

    @property
    def record(self) -> Path:
        return self.folder / "record.jsonl"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def given(self, call: str) -> list[list[Any]]:
        """The arguments of each call of this name."""
        return [entry["with"] for entry in self.calls if entry["call"] == call]

    def of(self, call: str) -> list[str]:
        """The names of the objects whose method this was."""
        return [entry["of"] for entry in self.calls if entry["call"] == call]

    def ledger(self) -> set[str]:
        return {path.name for path in (self.folder / "cswap-deploy" / "engines").iterdir()}

    def with_(self, **environment: str) -> Device:
        return Device(self.folder, self.environment | environment, self.model)


def small_model(path: Path, batch: int | str = 1, operator: str = "Relu", quantized: bool = False) -> dict[str, str]:
    """A convolution, a pooling, a classifier and a softmax; its weights are of no importance."""
    random = np.random.default_rng(0)
    weights = {"w": (8, 3, 3, 3), "b": (8,), "v": (CLASSES, 8), "c": (CLASSES,)}
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["x1"], name="/conv1/Conv", pads=[1] * 4),
        helper.make_node(operator, ["x1"], ["x2"], name="/relu"),
        helper.make_node("GlobalAveragePool", ["x2"], ["x3"], name="/pool"),
        helper.make_node("Flatten", ["x3"], ["x4"], name="/flat"),
        helper.make_node("Gemm", ["x4", "v", "c"], ["x5"], name="/fc/Gemm", transB=1),
        helper.make_node("Softmax", ["x5"], ["logits"], name="/softmax"),
    ]
    if quantized:
        nodes[1].input[0] = "dequantized"
        for place, (kind, given, made) in enumerate([("Quantize", "x1", "q"), ("Dequantize", "q", "dequantized")], 1):
            nodes.insert(place, helper.make_node(f"{kind}Linear", [given, "scale", "zero"], [made], name=f"/{kind}"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [
            *(numpy_helper.from_array(random.normal(size=size).astype("f4"), name) for name, size in weights.items()),
            *([numpy_helper.from_array(np.float32(0.1), "scale")] if quantized else []),
            *([numpy_helper.from_array(np.int8(0), "zero")] if quantized else []),
        ],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return named(path)


def named(path: Path) -> dict[str, str]:
    """A file as a request to a local target names it."""
    return {"path": str(path), "name": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(scope="session")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcudart.so made from cudart.c."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to compile the double of libcudart with")
    folder = tmp_path_factory.mktemp("cudart")
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(folder / "libcudart.so"),
        str(DOUBLE / "cudart.c"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def make(cudart: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Device]:
    def made(version: str, **environment: str) -> Device:
        folder = tmp_path_factory.mktemp("device")
        own = {
            "PYTHONPATH": f"{DOUBLE}:{DOUBLE.parent}",
            "LD_LIBRARY_PATH": str(cudart),
            "PATH": os.environ["PATH"],
            "FAKE_TENSORRT_VERSION": version,
        }
        return Device(folder, own | environment, small_model(folder / "model.onnx"))

    return made


@dataclass(frozen=True)
class Built:
    device: Device
    answer: dict[str, Any]

    @property
    def engine(self) -> dict[str, str]:
        return {"sha256": self.answer["engine"]["sha256"], "name": "the engine"}


@pytest.fixture(scope="session", params=(OLDEST, OLD, NEW))
def built(request: pytest.FixtureRequest, make: Callable[..., Device]) -> Built:
    """An fp16 engine of three versions, one for each dialect; tests only read it and what was recorded until then."""
    device = make(request.param)
    answer = device.build()
    assert "error" not in answer, (answer, device.log)
    frozen = Device(device.folder, device.environment, device.model)
    shutil.copy(device.record, device.folder / "first.jsonl")
    return Built(frozen, answer)


def first(built: Built, call: str) -> list[list[Any]]:
    lines = (built.device.folder / "first.jsonl").read_text().splitlines()
    return [entry["with"] for entry in map(json.loads, lines) if entry["call"] == call]


def version_of(built: Built) -> str:
    return built.device.environment["FAKE_TENSORRT_VERSION"]


# --- build -----------------------------------------------------------------------------------------------------------


def test_build_says_what_it_has_built_and_enters_it(built: Built) -> None:
    answer = built.answer
    assert answer["tensorrt"] == version_of(built) and answer["compute_capability"] == "8.7"
    assert answer["seconds"] > 0 and answer["engine"]["bytes"] > 0
    assert answer["engine"]["sha256"] in built.device.ledger()
    stored = built.device.folder / "cswap-deploy" / "files" / answer["engine"]["sha256"]
    assert sha256(stored.read_bytes()).hexdigest() == answer["engine"]["sha256"]


def test_fp16_flags_and_pins_to_10_and_none_from_11(built: Built) -> None:
    flags = [name for [name] in first(built, "IBuilderConfig.set_flag")]
    lines = (built.device.folder / "first.jsonl").read_text().splitlines()
    pinned = [entry["of"] for entry in map(json.loads, lines) if entry["call"] == "ILayer.precision"]
    if version_of(built) in (TYPED, NEW):
        assert flags == [] and pinned == []
    else:
        assert flags == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
        assert pinned == ["/pool", "/softmax"]
        assert first(built, "ILayer.set_output_type") == [[0, "FLOAT"], [0, "FLOAT"]]


def test_settings_reach_the_builder(built: Built) -> None:
    assert first(built, "IBuilderConfig.set_memory_pool_limit") == [["WORKSPACE", 512 << 20]]
    assert first(built, "IBuilderConfig.builder_optimization_level") == [[4]]
    assert first(built, "IBuilderConfig.profiling_verbosity") == [["DETAILED"]]
    assert first(built, "IBuilderConfig.add_optimization_profile") == []
    assert first(built, "IBuilderConfig.DLA_core") == []


def test_network_has_an_explicit_batch_where_there_is_another(built: Built) -> None:
    [[flags]] = first(built, "Builder.create_network")
    assert (flags == 0) == (version_of(built) in (TYPED, NEW))


BY_FLAGS = (OLDEST, OLD, THOR, LAST)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", ["fp32", "fp16", "int8", "dynamic batch", "DLA"])
def test_every_version_passes_the_contract_run(make: Callable[..., Device], version: str, case: str) -> None:
    """Built, judged, measured as a graph, and explained layer by layer."""
    device, settings, request = make(version), dict[str, Any](precision="fp16"), dict[str, Any]()
    match case:
        case "fp32" | "fp16":
            settings["precision"] = case
        case "int8":
            settings |= {
                "precision": case,
                "model": small_model(device.folder / "q.onnx", quantized=True),
                "keep_fp32": ["/fc/*"],
            }
        case "dynamic batch":
            settings |= {"model": small_model(device.folder / "open.onnx", "batch"), "dynamic": True}
            request["batch"] = 3
        case "DLA":
            settings |= {"dla_core": 1, "dla_fallback": True}
    answer = device.build(**settings)
    assert "error" not in answer, (answer, device.log)
    by_flags, flags = version in BY_FLAGS, [name for [name] in device.given("IBuilderConfig.set_flag")]
    expected = {"int8": ["INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"], "fp32": [], "DLA": ["FP16"]}
    assert flags == (expected.get(case, ["FP16", "OBEY_PRECISION_CONSTRAINTS"]) if by_flags else []) + [
        "GPU_FALLBACK"
    ] * (case == "DLA")
    assert device.of("ILayer.precision") == (
        {"int8": ["/fc/Gemm"], "fp32": [], "DLA": []}.get(case, PINNED) if by_flags else []
    )
    assert device.given("IBuilderConfig.clear_flag") == ([["TF32"]] if case == "fp32" else [])
    if case == "dynamic batch":
        assert device.given("IOptimizationProfile.set_shape") == [["input", *([batch, *SHAPE] for batch in (1, 2, 4))]]
    if case == "DLA":
        assert device.given("IBuilderConfig.default_device_type") == [["DLA"]] and device.given(
            "IBuilderConfig.DLA_core"
        ) == [[1]]
        assert answer["gpu_layers"] == ["/pool", "/flat", "/softmax"] and answer["note"].startswith(
            "3 of 6 layers run on the GPU"
        )
        assert device.given("Runtime.DLA_core") == []
    built = Built(device, answer)
    document = measured(device, built.engine, **request)
    assert "error" not in document, (document, device.log)
    assert document["models"][0]["cuda_graph"] is True and document["models"][0]["graph_note"] == ""
    assert [*map(len, document["rounds"][0])] == [*map(len, document["gpu_rounds"][0])]
    if case == "DLA":
        assert device.given("Runtime.DLA_core") == [[1]]
    assert built.device.ask("layers", runtime="tensorrt", model=built.engine, **request)["layers"][0]["ms"] > 0
    if case != "dynamic batch":
        infer(built, device)


PINNED = ["/pool", "/softmax"]


def test_jetpack_5_s_tensorrt_lacks_the_optimization_level(make: Callable[..., Device]) -> None:
    """8.6.1 without two names that came with it: of 8.5 there is no list of names, so this is no contract run."""
    device = make(OLDEST, FAKE_TENSORRT_LACKS="IBuilderConfig.builder_optimization_level LayerType.NORMALIZATION")
    answer = device.build()
    assert "error" not in answer, (answer, device.log)
    assert device.given("IBuilderConfig.builder_optimization_level") == []
    assert device.of("ILayer.precision") == PINNED


@pytest.mark.parametrize(
    ("fail", "settings", "words", "hint"),
    [
        ("", {"dla_core": 0}, "the DLA cannot run /pool, /flat, /softmax", "set engine.dla_fallback: true"),
        ("", {"dla_core": 2}, "the target has 2 DLA cores, no core 2", "change engine.dla_core"),
        ("no-dla", {"dla_core": 0}, "the target has 0 DLA cores, no core 0", "change engine.dla_core"),
        (
            "",
            {"dynamic": True, "batch": {"min": 4, "opt": 2, "max": 1}},
            "TensorRT refuses the batches",
            "see engine.batch",
        ),
    ],
)
def test_settings_that_this_device_cannot_obey(
    make: Callable[..., Device], fail: str, settings: dict[str, Any], words: str, hint: str
) -> None:
    device = make(OLD, FAKE_TENSORRT_FAIL=fail)
    if settings.get("dynamic"):
        settings = settings | {"model": small_model(device.folder / "open.onnx", "batch")}
    error = device.build(**settings)["error"]
    assert error["kind"] == "engine" and words in error["message"] and hint in error["hint"], error
    assert device.ledger() == set()


def test_a_quantized_network_needs_its_flag(make: Callable[..., Device]) -> None:
    """Of the double: were the agent to forget INT8, it would fail here as on TensorRT to 10.x."""
    device = make(OLD)
    error = device.build(precision="fp16", model=small_model(device.folder / "q.onnx", quantized=True))["error"]
    assert "could not build" in error["message"] and "INT8 flag is not set" in device.log


@pytest.mark.parametrize("version", [OLDEST, OLD])
def test_parser_errors_name_node_and_operator_where_the_version_does(make: Callable[..., Device], version: str) -> None:
    device = make(version)
    error = device.build(model=small_model(device.folder / "other.onnx", operator="Mystery"))["error"]
    [fault] = error["parser"]
    assert fault["node"] == 1 and "Mystery" in fault["text"]
    assert (fault["name"], fault["operator"]) == (("", "") if version == OLDEST else ("/relu", "Mystery"))


def test_timing_cache_is_reused_and_a_foreign_one_replaced(make: Callable[..., Device]) -> None:
    device = make(OLD)
    for environment in ({}, {}, {"FAKE_TENSORRT_FAIL": "cache"}):
        assert "error" not in device.with_(**environment).build()
    created = [text for [text] in device.given("IBuilderConfig.create_timing_cache")]
    assert created[0] == created[3] == "0 bytes", created
    assert created[1] != "0 bytes" != created[2], created
    assert device.given("IBuilderConfig.set_timing_cache") == [["ITimingCache", False]] * 4
    [stored] = (device.folder / "cswap-deploy" / "timing").iterdir()
    assert stored.name.startswith("10.3.0_") and "8.7" in stored.name
    assert stored.read_bytes().count(b"a timing") == 1, "the refused cache was kept"


@pytest.mark.parametrize(
    ("operator", "fail", "words", "log"),
    [
        ("Mystery", "", ["cannot read the ONNX file", "In node 1 with name: /relu", "Mystery"], ""),
        ("Relu", "build", ["TensorRT 10.3.0 could not build the engine"], "[E] Error Code 10"),
    ],
)
def test_build_that_fails(make: Callable[..., Device], operator: str, fail: str, words: list[str], log: str) -> None:
    device = make(OLD, FAKE_TENSORRT_FAIL=fail)
    error = device.build(model=small_model(device.folder / "other.onnx", operator=operator))["error"]
    assert error["kind"] == "engine" and all(word in error["message"] for word in words), error
    assert device.ledger() == set() and log in device.log


def test_build_refuses_what_is_no_onnx_file(make: Callable[..., Device]) -> None:
    device = make(NEW)
    (device.folder / "no.onnx").write_bytes(b"no model")
    error = device.build(model=named(device.folder / "no.onnx"))["error"]
    assert "Failed to parse" in error["message"] and error["parser"][0]["node"] == -1


# --- run -------------------------------------------------------------------------------------------------------------


def test_probe_describes_tensorrt(built: Built) -> None:
    found = built.device.ask("probe")["tensorrt"]
    assert found["version"] == version_of(built) and found["module"] is True and found["reason"] == ""
    assert found["precision"] == ("typed" if version_of(built) in (TYPED, NEW) else "flags")
    assert (found["compute_capability"], found["dla_cores"]) == ("8.7", 2)


def test_probe_says_why_tensorrt_cannot_start(make: Callable[..., Device]) -> None:
    found = make(OLD, FAKE_TENSORRT_FAIL="start").ask("probe")["tensorrt"]
    assert found["version"] is None and found["module"] is False and "nullptr" in found["reason"]


def infer(built: Built, device: Device) -> None:
    """Outcomes of 70 images, by the agent, are those of ONNX Runtime's logits."""
    images = np.random.default_rng(1).integers(0, 256, (70, *SHAPE), dtype=np.uint8)
    labels = np.random.default_rng(2).integers(0, CLASSES, 70)
    np.save(device.folder / "images.npy", images)
    answer = device.ask(
        "infer", runtime="tensorrt", model=built.engine, images=named(device.folder / "images.npy"),
        mean=[0.5] * 3, std=[0.25] * 3, labels=labels.tolist(),
    )  # fmt: skip
    assert "error" not in answer, (answer, device.log)
    found = np.load(device.folder / "cswap-deploy" / "files" / answer["outcomes"]["sha256"])
    session = onnxruntime.InferenceSession(device.model["path"], providers=["CPUExecutionProvider"])
    pixels = ((images.astype("f4") / 255 - 0.5) / 0.25).astype("f4")
    expected = np.concatenate([session.run(None, {"input": pixels[n : n + 1]})[0] for n in range(len(images))])
    atol = 0.2 if "q.onnx" in str(device.given("OnnxParser.parse_from_file")) else 1e-6
    np.testing.assert_allclose(found["logits"], expected[:64], atol=atol)
    assert len({row.tobytes() for row in found["logits"]}) == 64 == len(set(found["crc32"][:64])), (
        "each image has its own result"
    )
    if atol < 0.1:
        np.testing.assert_array_equal(found["top"], np.argsort(-expected, axis=1, kind="stable")[:, :5])
        np.testing.assert_allclose(found["true"], expected[np.arange(70), labels], atol=1e-6)
    assert found["finite"].all() and {len(found[key]) for key in ("top", "true", "crc32", "finite")} == {70}


def test_infer_equals_onnx_runtime(built: Built) -> None:
    infer(built, built.device)


def test_infer_waits_until_its_images_have_arrived(old: Built) -> None:
    infer(old, old.device.with_(DOUBLE_LATE_COPIES="1"))


def test_layers_are_timed_and_described(built: Built) -> None:
    answer = built.device.ask("layers", runtime="tensorrt", model=built.engine)
    assert "error" not in answer, (answer, built.device.log)
    names = ["/conv1/Conv", "/relu", "/pool", "/flat", "/fc/Gemm", "/softmax"]
    assert [layer["name"] for layer in answer["layers"]] == names
    assert all(layer["ms"] > 0 for layer in answer["layers"])
    assert [layer["Name"] for layer in json.loads(answer["layer_info"])["Layers"]] == names


def measured(device: Device, *engines: dict[str, str], **request: Any) -> dict[str, Any]:
    settings = {"runtime": "tensorrt", "models": list(engines), "warmup_s": 0.01, "duration_s": 0.02, "block_s": 0.01}
    return device.ask("measure", **settings | request)


def test_two_engines_are_measured_in_turn(make: Callable[..., Device]) -> None:
    """Of one open and one fixed batch; an inference counts from the enqueueing to the end of its stream."""
    device = make(NEW)
    engines = [Built(device, device.build()).engine]
    open_batch = small_model(device.folder / "open.onnx", "batch")
    engines.append(Built(device, device.build(model=open_batch, dynamic=True)).engine)
    answer = measured(device, *engines)
    assert "error" not in answer, (answer, device.log)
    assert answer["rounds"]
    assert all(len(blocks) == 2 and all(blocks) and min(map(min, blocks)) > 0 for blocks in answer["rounds"])
    assert [model["runtime"] for model in answer["models"]] == [f"tensorrt {NEW}"] * 2
    assert [model["device_mb"] for model in answer["models"]] == [3, 3] and answer["memory"] is None
    for blocks, gpus in zip(answer["rounds"], answer["gpu_rounds"], strict=True):
        for host, gpu in zip(blocks, gpus, strict=True):
            assert all(0 < inside <= outside for inside, outside in zip(gpu, host, strict=True)), (
                "the GPU's part is a part"
            )


@pytest.mark.parametrize(
    ("fail", "words"),
    [("capture", "cudaStreamEndCapture failed on the target with CUDA error 901"), ("loop", "did not enqueue")],
)
def test_an_engine_that_is_no_graph_is_launched_kernel_by_kernel(old: Built, fail: str, words: str) -> None:
    answer = measured(old.device.with_(FAKE_TENSORRT_FAIL=fail), old.engine)
    assert "error" not in answer, answer
    [facts] = answer["models"]
    assert facts["cuda_graph"] is False and words in facts["graph_note"] and answer["gpu_rounds"]


def test_single_calls_after_pauses_are_timed(old: Built) -> None:
    answer = measured(old.device, old.engine, old.engine, cold=3, pause_s=0.001)
    assert [len(times) for times in answer["cold"]] == [3, 3] and min(map(min, answer["cold"])) > 0


@pytest.mark.parametrize(
    ("fail", "batch", "words"),
    [
        ("context", 1, "TensorRT 10.3.0 cannot load the engine"),
        ("enqueue", 1, "TensorRT did not run the engine"),
        ("fault", 1, "cudaStreamSynchronize failed on the target with CUDA error 719"),
        ("", 3, "the engine does not take a batch of 3"),
    ],
)
def test_engine_that_does_not_run(old: Built, fail: str, batch: int, words: str) -> None:
    device = old.device.with_(FAKE_TENSORRT_FAIL=fail)
    error = device.ask("layers", runtime="tensorrt", model=old.engine, batch=batch)["error"]
    assert error["kind"] == "engine" and words in error["message"], error


@pytest.fixture(scope="session")
def old(make: Callable[..., Device]) -> Built:
    device = make(OLD)
    return Built(device, device.build())


def test_engine_of_another_version_is_refused(old: Built) -> None:
    error = measured(old.device.with_(FAKE_TENSORRT_VERSION=THOR), old.engine)["error"]
    assert error["message"] == "the engine was built for tensorrt 10.3.0, the target now has 10.13.3.9"
    assert error["hint"] == "build it again on this target"
    trusted = measured(old.device.with_(FAKE_TENSORRT_VERSION=THOR), old.engine, trust=[old.engine["sha256"]])["error"]
    assert "TensorRT 10.13.3.9 cannot load the engine" in trusted["message"], "TensorRT itself has the last word"


def test_engine_of_another_board_is_refused(old: Built, tmp_path: Path) -> None:
    """A home folder may be shared, or a disk moved."""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson Orin NX\0")
    error = measured(old.device.with_(CSWAP_DEPLOY_ROOT=str(tmp_path)), old.engine)["error"]
    assert (
        error["kind"] == "engine"
        and "built for board None, the target now has NVIDIA Jetson Orin NX" in error["message"]
    )


def test_only_engines_of_this_device_or_trusted_ones_are_loaded(old: Built, make: Callable[..., Device]) -> None:
    other = make(OLD)
    path = other.folder / "model.engine"
    shutil.copy(old.device.folder / "cswap-deploy" / "files" / old.engine["sha256"], path)
    error = measured(other, named(path))["error"]
    assert error["kind"] == "engine" and "not built on the target" in error["message"]
    assert old.engine["sha256"] in error["hint"] and other.calls == [], "TensorRT was reached before the refusal"
    assert "error" not in measured(other, named(path), trust=[old.engine["sha256"]])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}"])
def test_a_broken_entry_of_the_ledger_is_passed_over(make: Callable[..., Device], content: str) -> None:
    device = make(OLD)
    request = {"model": device.model, "settings": SETTINGS, "input": INPUT, "dynamic": False, "passing": True}
    first = device.ask("build", **request)
    entry = device.folder / "cswap-deploy" / "engines" / ("0" * 64)
    entry.write_text(content)
    assert device.ask("build", **request) == {**first, "reused": True}
    (entry.parent / first["engine"]["sha256"]).write_text(content)
    again = device.ask("build", **request)
    assert "error" not in again and "reused" not in again, again
    (entry.parent / again["engine"]["sha256"]).write_text(content)
    file = {"sha256": again["engine"]["sha256"], "name": "the engine"}
    refused = device.ask("measure", runtime="tensorrt", models=[file], warmup_s=0, duration_s=0.1)["error"]
    assert refused["kind"] == "engine" and "was not built on the target" in refused["message"]


def test_an_engine_of_a_model_of_a_gigabyte_is_built(make: Callable[..., Device]) -> None:
    """Four times its weights are beyond what is kept here at most, and need only be free meanwhile."""
    device = make(OLD)
    device.ask("probe")
    weights = device.folder / "cswap-deploy" / "files" / ("1" * 64)
    with weights.open("wb") as stream:
        stream.truncate(1100 << 20)
    if shutil.disk_usage(device.folder).free < 5 << 30:
        pytest.skip("the disk of this machine has less than 5 GiB free")
    answer = device.ask(
        "build", model=device.model, settings=SETTINGS, input=INPUT, dynamic=False, beside=[{"sha256": "1" * 64}]
    )
    assert "error" not in answer, answer


def test_missing_libcudart_is_named(make: Callable[..., Device]) -> None:
    """The agent looks in CUDA's own folder too: where there is a real one, there is nothing to miss."""
    if any(Path("/usr/local/cuda/lib64").glob("libcudart.so*")) or "cudart" in ldconfig():
        pytest.skip("this machine has a libcudart of its own")
    found = make(OLD, LD_LIBRARY_PATH="").ask("probe")["tensorrt"]
    assert "libcudart.so" in found["reason"] and found["version"] is None


def ldconfig() -> str:
    program = shutil.which("ldconfig", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    return subprocess.run([program, "-p"], capture_output=True, text=True, check=False).stdout if program else ""


# --- trtexec ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_module(tmp_path: Path) -> Callable[..., Device]:
    """A target whose TensorRT has no Python module that can be loaded, but trtexec."""
    programs, broken = tmp_path / "bin", tmp_path / "broken"
    programs.mkdir()
    broken.mkdir()
    (broken / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    (programs / "trtexec").write_text(f'#!/bin/sh\nexec {sys.executable} {DOUBLE / "trtexec.py"} "$@"\n')
    (programs / "trtexec").chmod(0o755)

    def made(version: str, **environment: str) -> Device:
        own = {"PYTHONPATH": str(broken), "PATH": f"{programs}:{os.environ['PATH']}", "FAKE_TRTEXEC_VERSION": version}
        return Device(tmp_path, own | environment, small_model(tmp_path / "model.onnx"))

    return made


def options_of(device: Device) -> dict[str, str]:
    """Of the last call: flag → value."""
    return {flag: value for flag, _, value in (text.partition("=") for text in device.given("trtexec")[-1])}


@pytest.mark.parametrize(
    ("version", "named_version", "precision"),
    [
        ("8.6.1", "8.6.1", "flags"),
        ("10.3", "10.3.0", "flags"),
        ("10.13", "10.13.3", "flags"),
        ("11.1", "11.1.0", "typed"),
    ],
)
def test_probe_asks_trtexec(
    without_module: Callable[..., Device], version: str, named_version: str, precision: str
) -> None:
    found = without_module(version).ask("probe")["tensorrt"]
    assert (found["version"], found["precision"], found["module"]) == (None, precision, False)
    assert banner_version(f"[{found['banner']}]") == named_version
    assert "libnvinfer.so.10" in found["reason"] and found["trtexec"].endswith("bin/trtexec")


def test_measure_without_any_tensorrt_says_so(without_module: Callable[..., Device]) -> None:
    device = without_module("10.3")
    engine = Built(device, device.build()).engine
    (device.folder / "bin" / "trtexec").unlink()
    error = measured(device, engine)["error"]
    assert error["kind"] == "runtime" and "TensorRT is not on the target" in error["message"]


@pytest.mark.parametrize(
    ("version", "precision", "flags"),
    [
        ("8.5", "fp16", {"--fp16"}),
        ("8.6.1", "int8", {"--int8", "--fp16"}),
        ("10.3", "fp16", {"--fp16"}),
        ("10.3", "fp32", set()),
        ("11.1", "int8", set()),
    ],
)
def test_trtexec_builds(without_module: Callable[..., Device], version: str, precision: str, flags: set[str]) -> None:
    device = without_module(version)
    answer = device.build(precision=precision)
    assert "error" not in answer, (answer, device.log)
    options = options_of(device)
    assert {"--fp16", "--int8", "--best", "--stronglyTyped"} & options.keys() == flags
    assert options["--memPoolSize"] == "workspace:512" and options["--timingCacheFile"].endswith(".cache")
    assert options.get("--builderOptimizationLevel") == (None if version == "8.5" else "4")
    assert {"--skipInference", "--buildOnly"} & options.keys() == {
        "--buildOnly" if version == "8.5" else "--skipInference"
    }
    assert answer["engine"]["sha256"] in device.ledger()
    assert ("keep_fp32 was not applied" in answer["note"]) == (precision != "fp32" and version != "11.1")
    assert ("--noTF32" in options) == (precision == "fp32")


def test_trtexec_is_given_the_shapes_and_the_dla(without_module: Callable[..., Device]) -> None:
    device = without_module("10.3")
    open_batch = small_model(device.folder / "open.onnx", "batch")
    assert "error" not in device.build(model=open_batch, dynamic=True, dla_core=0)
    options = options_of(device)
    shapes = [options[f"--{key}Shapes"] for key in ("min", "opt", "max")]
    assert shapes == ["input:1x3x6x6", "input:2x3x6x6", "input:4x3x6x6"]
    assert options["--useDLACore"] == "0"


def test_trtexec_s_exports_come_as_they_are(without_module: Callable[..., Device]) -> None:
    device = without_module("11.1")
    engine = Built(device, device.build()).engine
    answer = measured(device, engine, engine)
    assert "error" not in answer, (answer, device.log)
    assert len(answer["times"]) > 1 and all(len(texts) == 2 for texts in answer["times"])
    assert exports.times(answer["times"][0][1]).latency_ms == (0.873472, 0.8448, 2.31027)
    assert answer["models"] == [{"runtime": "trtexec"}] * 2 and answer["overhead"] is None
    options = options_of(device)
    assert {"--noDataTransfers", "--useSpinWait", "--useCudaGraph"} <= options.keys()
    assert options["--warmUp"] == "10" and int(options["--duration"]) >= 1
    assert "=== Performance summary ===" in device.log


def test_the_host_reads_what_trtexec_has_measured(
    without_module: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version, rounds and runtime; a run that reports an error is not believed, though it ends with PASSED."""
    device = without_module("10.3")
    path = device.folder / "cswap-deploy" / "files" / Built(device, device.build()).engine["sha256"]
    for name, value in {"XDG_CACHE_HOME": str(device.folder), **device.environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_TENSORRT_RECORD", str(device.record))
    settings = LatencySettings(runtime="tensorrt", warmup_s=0, duration_s=0.05)
    with reach("local") as target:
        assert Probe.of(target).facts("tensorrt")["runtime"] == "tensorrt 10.3.0"
        taken = latency.take(target, [File.of(path)] * 2, settings)
        assert taken.runtime == "tensorrt 10.3.0 by trtexec" and taken.samples.percentile_ms(1, 50) == 0.873472
        assert taken.samples.count(0) == 18 and taken.cold_ms == () and taken.on_gpu is None
        monkeypatch.setenv("FAKE_TRTEXEC_FAIL", "error")
        with pytest.raises(DeviceError, match=r"trtexec reports errors: .*Cask"):
            latency.take(target, [File.of(path)] * 2, settings)


def test_trtexec_tells_where_the_time_goes(without_module: Callable[..., Device]) -> None:
    device = without_module("10.3")
    answer = device.ask("layers", runtime="tensorrt", model=Built(device, device.build()).engine)
    assert "error" not in answer, (answer, device.log)
    assert [layer.name for layer in exports.profile(answer["profile"])] == ["/conv1/Conv + /relu", "/fc/Gemm"]
    assert [layer.name for layer in exports.layer_info(answer["layer_info"])] == ["/conv1/Conv + /relu", "/fc/Gemm"]
    assert "--separateProfileRun" in options_of(device)


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("build", "trtexec ended with 1"),
        ("crash", "trtexec ended with -6"),
    ],
)
def test_trtexec_that_fails_is_a_fault(without_module: Callable[..., Device], fail: str, words: str) -> None:
    device = without_module("10.3", FAKE_TRTEXEC_FAIL=fail)
    error = device.build()["error"]
    assert error["kind"] == "engine" and words in error["message"], error
    if fail == "build":
        assert "&&&& FAILED TensorRT.trtexec" in device.log


def test_a_trtexec_that_the_system_kills_says_nothing_of_the_file(without_module: Callable[..., Device]) -> None:
    """Else the staircase would keep it as a network of which no engine can be built."""
    error = without_module("10.3", FAKE_TRTEXEC_FAIL="killed").build()["error"]
    assert error["kind"] == "runtime" and error["message"] == "trtexec ended with -9"


def test_trtexec_says_which_option_it_does_not_know(without_module: Callable[..., Device]) -> None:
    """Were the agent to write an option of another version, trtexec's own words would reach the user."""
    device = without_module("10.3")
    (device.folder / "bin" / "trtexec").write_text(
        f'#!/bin/sh\nexec {sys.executable} {DOUBLE / "trtexec.py"} "$@" $([ "$1" = --help ] || echo --workspace=2048)\n'
    )
    error = device.build()["error"]
    assert error["message"] == "trtexec ended with 1" and "[E] Unknown option: --workspace 2048" in device.log
    assert device.ledger() == set()


def test_trtexec_measures_the_batch_that_was_asked_for(without_module: Callable[..., Device]) -> None:
    """Else it is refused: a number of one image is not that of four."""
    device = without_module("10.3")
    open_batch = small_model(device.folder / "open.onnx", "batch")
    engine = Built(device, device.build(model=open_batch, dynamic=True)).engine
    assert "error" not in measured(device, engine, batch=4) and options_of(device)["--shapes"] == "input:4x3x6x6"
    assert "does not take a batch of 5" in measured(device, engine, batch=5)["error"]["message"]
    fixed = Built(device, device.build()).engine
    assert "does not take a batch of 2" in measured(device, fixed, batch=2)["error"]["message"]


def test_trtexec_ends_with_its_agent(without_module: Callable[..., Device]) -> None:
    device = without_module("10.3", FAKE_TRTEXEC_FAIL="hang")
    with device.running("build", model=device.model, settings=SETTINGS, input=INPUT, dynamic=False) as process:
        while not any(text.startswith("--onnx") for given in device.given("trtexec") for text in given):
            assert process.poll() is None
            time.sleep(0.02)
        assert process.stdin
        process.stdin.close()
        process.wait(10)
    number, deadline = int(device.of("trtexec")[-1]), time.monotonic() + 2
    program = Path(f"/proc/{number}/cmdline")
    try:
        while program.exists() and "trtexec" in program.read_text():  # empty: it has ended, nobody asked for its status
            assert time.monotonic() < deadline, "it still runs"
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_trtexec_refuses_a_file_that_is_no_engine(without_module: Callable[..., Device]) -> None:
    device = without_module("10.3")
    path = device.folder / "model.engine"
    path.write_bytes(b"something else")
    error = measured(device, named(path), trust=[named(path)["sha256"]])["error"]
    assert error["message"] == "trtexec ended with 1" and "[E] Engine deserialization failed" in device.log


def test_trtexec_too_runs_no_engine_of_unknown_origin(without_module: Callable[..., Device]) -> None:
    device = without_module("10.3")
    path = device.folder / "model.engine"
    path.write_bytes(b"NO ENGINE, A TEST DOUBLE OF TRTEXEC\n")
    assert "not built on the target" in measured(device, named(path))["error"]["message"]
    assert device.calls == []


# --- the doubles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_double_has_the_names_of_its_version_only(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from facts.versions import FACTS, Facts, members

    monkeypatch.syspath_prepend(str(DOUBLE))
    monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
    for name in ("double", "behaviour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import double

    names, facts = double.module(version), Facts(version)
    for name in ("double", "behaviour"):
        monkeypatch.delitem(sys.modules, name)
    parts = [name for part in ("classes", "enums") for name in FACTS[part] if facts.has(name) and "." not in name]
    assert names.keys() == {*parts, *members("module", "", version)}
    for name in parts:
        public = {member for member in vars(names[name]) if not member.startswith("_")}
        known = members("enums", name, version) if name in FACTS["enums"] else facts.members(name)
        assert public - {"name", "value"} == {m for m in known if not m.startswith("_")} - {"name", "value"}, name


def test_doubles_are_not_shipped() -> None:
    """The package's own files know nothing of them, and the wheel holds the package only."""
    texts = [path.read_text("utf-8") for path in (ROOT / "cswap_deploy").rglob("*.py")]
    assert not any("fake_tensorrt" in text or "TEST DOUBLE" in text for text in texts)
    assert 'packages = ["cswap_deploy"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert onnx.defs.has("Conv") and not onnx.defs.has("Mystery"), "what the double calls an unknown operator"
