"""A whole build with an engine, on targets whose TensorRT is a double: built, judged, measured, shipped, verified.

The target is this machine, another one over a real sshd, with the module and with trtexec alone, or a board without a network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import boards
import numpy as np
import pytest
import sshd
from conftest import SHARED, Built, build, events, make_project, run
from sshd import Device
from test_agent_tensorrt import DOUBLE, NEW, OLD, cudart  # noqa: F401 - a fixture
from typer.testing import CliRunner

from cswap_deploy import cli, engine, manifest, outline, progress, recipe
from cswap_deploy.artifacts import File, Groups, InputSpec, sha256_of
from cswap_deploy.bundle import Bundle
from cswap_deploy.console import bundle_lines
from cswap_deploy.device import recorded
from cswap_deploy.device.building import Order
from cswap_deploy.engine_check import replay
from cswap_deploy.errors import VerifyError
from cswap_deploy.recipe import EngineSettings
from cswap_deploy.verify import verify

SURROUNDINGS: dict[str, str] = {}
"""Of the target, once it is there."""
SETTINGS = (
    "engine={precision: fp16}",
    "latency={warmup_s: 0, duration_s: 0.05}",
    "prune.round_to=1",
    "prune.steps=1",
    "device=cpu",
)


@pytest.fixture(scope="module")
def shipped(cudart: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:  # noqa: F811
    folder = tmp_path_factory.mktemp("engine")
    surroundings = {
        "PYTHONPATH": f"{DOUBLE}:{DOUBLE.parent}:{os.environ.get('PYTHONPATH', '')}",
        "LD_LIBRARY_PATH": str(cudart),
        "FAKE_TENSORRT_VERSION": OLD,
        "FAKE_TENSORRT_RECORD": str(folder / "record.jsonl"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    SURROUNDINGS.update(surroundings)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        built = make_project(folder / "project").build(*SETTINGS)
        again = events(built.recipe, built.overrides, built.work)
        assert set(again.values()) == {"up to date"}
        assert [*again] == [*outline.lines(recipe.load(built.recipe, built.overrides))], (
            "each has a line, in this order"
        )
    return built


def test_the_engine_ships_and_is_what_gate_and_latency_are_about(shipped: Built) -> None:
    found = shipped.manifest
    assert (found["verdict"], found["reasons"], found["shipped"]) == ("pass", [], "engine/model.engine")
    assert found["engine"]["built"] and found["engine"]["tensorrt"] == OLD and found["engine"]["precision"] == "fp16"
    assert found["accuracy"]["shipped"] == found["accuracy"]["engine"]
    assert found["accuracy"]["engine"]["correct"] == found["accuracy"]["pruned"]["correct"]
    assert (found["latency"]["runtime"], found["latency"]["precision"]) == ("tensorrt", "fp16")
    assert {"engine/model.engine", "engine/layers.json"} <= {entry["path"] for entry in found["files"]}
    assert list(manifest.faults(found, manifest.schema())) == []


def test_its_size_stands_beside_the_weights_since_the_dense_engine_stays_on_the_target(shipped: Built) -> None:
    size = shipped.manifest["size"]
    assert size["source_bytes"] is None
    assert (
        size["shipped_bytes"]
        == shipped.manifest["engine"]["bytes"]
        == (shipped.bundle.folder / "engine/model.engine").stat().st_size
    )
    text = "\n".join(bundle_lines(shipped.bundle))
    assert "size of the weights" in text and "  of the file" in text and "p50, both fp16" in text


def test_the_bundle_passes_its_checks(shipped: Built, on_the_device: pytest.MonkeyPatch) -> None:
    outcomes = {check.name: check.outcome for check in verify(shipped.bundle.folder)}
    assert outcomes.pop("pytorch") == "skipped" and set(outcomes.values()) == {"passed"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XDG_CACHE_HOME", "elsewhere", "not built on the target"),
        ("FAKE_TENSORRT_VERSION", NEW, "built for tensorrt 10.3.0, the target now has 11.4.0.106"),
    ],
)
def test_verify_refuses_an_engine_of_another_device(
    shipped: Built, on_the_device: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, words: str
) -> None:
    on_the_device.setenv(name, str(tmp_path / value) if name == "XDG_CACHE_HOME" else value)
    found = {check.name: check for check in verify(shipped.bundle.folder, require=["engine"])}["engine"]
    assert found.outcome == "failed" and words in found.detail


@pytest.fixture
def on_the_device(shipped: Built, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(DOUBLE))
    return monkeypatch


def test_layers_come_with_their_nodes_and_groups(shipped: Built) -> None:
    rows = json.loads((shipped.bundle.folder / "engine/layers.json").read_text())
    assert rows["reformats"] == {"layers": len(rows["layers"]), "reformat": 0, "reformat_share": 0}
    convolutions = [row for row in rows["layers"] if row["op"] == "Conv"]
    assert convolutions and all(row["nodes"] == [row["name"]] for row in convolutions)
    named = {group for row in convolutions for group in row["groups"]}
    assert named and named <= {group["name"] for group in shipped.manifest["pruned"]["groups"]}
    assert {row["op"] for row in shipped.manifest["latency"]["layers"]["pruned"]} >= {"Conv", "Gemm"}


def test_what_the_gpu_and_the_host_take_stand_side_by_side(shipped: Built) -> None:
    latency = shipped.manifest["latency"]
    for model in ("source", "pruned"):
        assert 0 < latency["gpu"][model]["p50_ms"] <= latency[model]["p50_ms"] and latency["cold_p50_ms"][model] > 0
        assert latency["models"][model]["cuda_graph"] is True
    page = (shipped.bundle.folder / "report.html").read_text("utf-8")
    assert "on the GPU alone" in page and "single calls after pauses" in page and "Layers that only reformat" in page


def test_the_bundle_s_readme_runs(shipped: Built, on_the_device: pytest.MonkeyPatch) -> None:
    text = (shipped.bundle.folder / "README.md").read_text("utf-8")
    [program] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "tensorrt" in block]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=shipped.bundle.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (shipped.bundle.folder / "labels.txt").read_text().splitlines()
    flags = re.findall(r"trtexec --loadEngine=engine/model.engine (.*)", text)[0].split()
    known = json.loads((DOUBLE.parent / "facts" / "trtexec.json").read_text())["flags"]
    assert {flag.partition("=")[0] for flag in flags} <= set(known["*"].split())


def test_a_failed_build_keeps_its_log(shipped: Built, on_the_device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_the_device.setenv("FAKE_TENSORRT_FAIL", "build")
    project = shutil.copytree(shipped.recipe.parent, tmp_path / "project")
    built = build(
        project / "recipe.yaml", (*SETTINGS, "engine={precision: fp16, optimization_level: 2}"), project / "work"
    )
    assert built.manifest["exit_code"] == 5 and built.manifest["engine"]["built"] is False
    assert "[E] Error Code 10" in (project / "work" / "engine.failed.log").read_text()


# --- on another machine, over ssh


@dataclass(frozen=True)
class Board:
    """The other machine with the doubles, in the files of /proc and /sys an Orin Nano."""

    device: Device
    files: Path
    """Where the doubles lie, for everyone to read."""

    @property
    def libraries(self) -> str:
        return f"{self.device.folder}/python/lib:{self.files}/lib"

    def with_module(self) -> Path:
        """A folder for PATH."""
        search = f"{self.files}/fake_tensorrt:{self.files}:{self.device.packages}"
        return self.device.python(
            "bin-module", self.device.interpreter, PYTHONPATH=search, LD_LIBRARY_PATH=self.libraries
        )

    def with_trtexec(self) -> Path:
        path = self.device.python(
            "bin-trtexec",
            self.device.interpreter,
            PYTHONPATH=f"{without_module(self.files)}:{self.device.packages}",
            LD_LIBRARY_PATH=self.libraries,
        )
        trtexec_of(path, path / "python3", self.files / "fake_tensorrt")
        return path

    def build(self, project: Path, path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        """The command, with a target whose sessions find `path`."""
        surroundings = {
            "PATH": str(path),
            "CSWAP_DEPLOY_ROOT": str(self.files / "root"),
            "FAKE_TENSORRT_RECORD": str(self.device.home / "record.jsonl"),
        }
        client = self.device.client(folder / "client")
        with self.device.serving(**surroundings) as server:
            sets = [f"--set={text}" for text in SETTINGS]
            command = ["build", project / "recipe.yaml", "--work", project / "work", "--on", server.name, *sets]
            return run("-m", "cswap_deploy", *command, PATH=f"{client}:{os.environ['PATH']}")


def without_module(folder: Path) -> Path:
    """For PYTHONPATH: a module of TensorRT that cannot be imported."""
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.10: cannot open shared object file')\n"
    )
    return folder / "broken"


def trtexec_of(folder: Path, python: Path, double: Path) -> None:
    (folder / "trtexec").write_text(f'#!/bin/sh\nexec {python} {double}/trtexec.py "$@"\n')
    (folder / "trtexec").chmod(0o755)


@pytest.fixture(scope="module")
def board(device: Device, cudart: Path) -> Board:  # noqa: F811
    files = device.folder / "tensorrt"
    for part in ("fake_tensorrt", "facts"):
        sshd.copy_tree(DOUBLE.parent / part, files / part)
    sshd.give(cudart / "libcudart.so", files / "lib" / "libcudart.so")
    boards.lay_out(NANO, files / "root")
    if device.own_user:
        sshd.copy_packages("onnx", device.packages)
    return Board(device, files)


NANO = "Orin Nano, JetPack 6"


@pytest.fixture
def project(shipped: Built, tmp_path: Path) -> Path:
    """A copy whose host half is up to date: what runs is the device's."""
    return shutil.copytree(shipped.recipe.parent, tmp_path / "project")


def test_a_build_over_ssh_brings_the_engine_its_accuracy_and_its_latency(
    shipped: Built, project: Path, board: Board, tmp_path: Path
) -> None:
    done = board.build(project, board.with_module(), tmp_path)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.read(project / "work" / "bundle")
    found, engine = bundle.manifest, bundle.manifest["engine"]
    assert (found["verdict"], found["shipped"], engine["tensorrt"]) == ("pass", "engine/model.engine", OLD)
    assert (engine["board"], engine["power_mode"]) == (boards.FACTS[NANO]["board"]["model"], "MAXN_SUPER")
    [listed] = [entry for entry in found["files"] if entry["path"] == "engine/model.engine"]
    assert listed["sha256"] == sha256_of(bundle.folder / "engine/model.engine")
    ledger = {path.name for path in (board.device.store / "engines").iterdir()}
    assert listed["sha256"] in ledger, "it was built there"
    assert found["accuracy"]["shipped"] == found["accuracy"]["engine"] == shipped.manifest["accuracy"]["engine"]
    latency = found["latency"]
    assert (
        latency["runtime"] == "tensorrt"
        and latency["pruned"]["samples"] > 10
        and latency["gpu"]["pruned"]["p50_ms"] > 0
    )
    conditions = latency["conditions"]
    assert (conditions["device"], conditions["l4t"], conditions["throttled"]) == (engine["board"], "36.4.3", False)
    assert (conditions["jetpack"], conditions["cuda"], conditions["rails_w"]["VDD_IN"]) == (
        "6.2",
        "12.6",
        pytest.approx(6.048),
    )
    assert conditions["power_w"] == pytest.approx(6.048)
    for path in (path for path in bundle.folder.rglob("*") if path.is_file()):
        text = path.read_bytes()
        assert b"127.0.0.1" not in text and board.device.user.encode() not in text, path


def test_a_build_over_ssh_by_trtexec_alone_is_measured_and_not_judged(
    project: Path, board: Board, tmp_path: Path
) -> None:
    done = board.build(project, board.with_trtexec(), tmp_path)
    assert done.returncode == 5, done.stderr
    bundle = Bundle.read(project / "work" / "bundle")
    found, engine = bundle.manifest, bundle.manifest["engine"]
    assert (found["verdict"], found["shipped"], engine["built"], engine["tensorrt"]) == (
        "fail",
        "model.fp16.onnx",
        True,
        OLD,
    )
    assert "keep_fp32 was not applied" in engine["note"]
    assert any("TensorRT's Python module cannot be used" in reason for reason in found["reasons"]), found["reasons"]
    assert found["accuracy"]["engine"] is None and (bundle.folder / "engine/model.engine").is_file()
    assert found["latency"]["pruned"]["p50_ms"] == 0.873472, "the double's own"
    assert list(manifest.faults(found, manifest.schema())) == []


# --- a board without a network


def command(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def prepared(project: Path) -> Path:
    code, text = command(
        "prepare", project / "recipe.yaml", "--work", project / "work", *(f"--set={s}" for s in SETTINGS)
    )
    assert code == 0 and "there: python3 device/agent.py" in " ".join(text.split()), text
    return project / "work"


def carried_out(work: Path, python: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The work folder on the board, and what came of it back in its place."""
    there = shutil.copytree(work, work.with_name("on the board"), symlinks=True)
    done = subprocess.run(
        [python, "device/agent.py"],
        cwd=there,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.copytree(there / "device", work / "device", dirs_exist_ok=True)
    return done


def test_a_board_without_a_network_answers_and_the_workstation_makes_the_bundle(
    shipped: Built, project: Path, tmp_path: Path
) -> None:
    work = prepared(project)
    done = carried_out(work, sys.executable, **{**SURROUNDINGS, "XDG_CACHE_HOME": str(tmp_path / "board")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(.*) \.\.\. [\d.]+ s$", done.stdout, re.M) == [
        "this board", "the engine", "layers of the engine", "24 hold-out images", "the dense engine",
        "layers of the dense engine", "latency, in turn", "its layers", "its layers",
    ]  # fmt: skip
    code, text = command("deploy", work)
    assert code == 0 and "from the board's answers" in " ".join(text.split()), text
    bundle = Bundle.read(work / "bundle")
    assert bundle.manifest["accuracy"]["engine"] == shipped.manifest["accuracy"]["engine"]
    assert bundle.manifest["shipped"] == "engine/model.engine" and bundle.manifest["latency"]["gpu"]
    built = sha256_of(bundle.folder / "engine/model.engine")
    assert (tmp_path / "board/cswap-deploy/engines" / built).is_file(), "the ledger of the board"
    (work / "device/files" / built).write_bytes(b"another engine")
    code, text = command("deploy", work, "--force", "engine")
    assert code == 5 and "missing or changed" in text


def test_answers_to_another_errand_are_refused(project: Path) -> None:
    work = prepared(project)
    (work / "device/answers.json").write_text(json.dumps({"errand": "0" * 64, "answers": []}))
    code, text = command("deploy", work)
    assert code == 5 and "answers another errand" in " ".join(text.split())
    prepared(project)
    assert not (work / "device/answers.json").exists(), "prepare removes answers to other requests"


def test_jetpack_5_s_python_carries_out_the_errand_with_its_trtexec(project: Path, tmp_path: Path) -> None:
    """Python 3.8 with nothing installed, and the flags that trtexec 8.5 has. What it built is marked as unchecked."""
    interpreter = sshd.python38()
    if interpreter is None:
        pytest.skip("there is no Python 3.8 on this machine")
    work, programs = prepared(project), tmp_path / "bin"
    programs.mkdir()
    trtexec_of(programs, Path(sys.executable), DOUBLE)
    done = carried_out(
        work,
        interpreter,
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHONPATH=str(without_module(tmp_path)),
        FAKE_TRTEXEC_VERSION="8.5",
        FAKE_TENSORRT_RECORD=str(tmp_path / "record.jsonl"),
        XDG_CACHE_HOME=str(tmp_path / "board"),
    )
    assert done.returncode == 1 and re.search(r"^24 hold-out images \.\.\. .*numpy", done.stdout, re.M), done.stdout
    assert "latency, in turn ... " in done.stdout and done.stdout.count(" s\n") == 8, done.stdout
    code, text = command("deploy", work)
    assert code == 5, text
    found = Bundle.read(work / "bundle").manifest
    assert found["engine"]["built"] and found["engine"]["tensorrt"] == "8.5.2"
    assert "TensorRT 8.5.2, that of JetPack 5, is unchecked" in found["engine"]["note"]
    assert found["latency"]["pruned"]["p50_ms"] == 0.873472, "the double's own"


def test_layers_beside_the_dla_are_counted_from_trtexec_s_log(tmp_path: Path) -> None:
    """The agent does not read trtexec's text; a real log of TensorRT 8.4 names what went to the GPU."""
    log = SHARED / "trtexec-logs" / "v8.4-orin-dla-many-fallbacks.txt"
    if not log.is_file():
        pytest.skip("the collected logs are not beside this checkout")
    settings = EngineSettings(precision="fp16", dla_core=0, dla_fallback=True)
    model, blob = File.of(sshd.classifier(tmp_path / "model.onnx", batch=1)), tmp_path / "files"
    blob.mkdir()
    (blob / "0").write_bytes(b"an engine of nobody")
    built = File.of(blob / "0")
    (blob / "0").rename(blob / built.sha256)
    spec = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    answer = {
        "engine": {"sha256": built.sha256, "bytes": built.bytes}, "tensorrt": "TensorRT v8400", "note": "", "gpu_layers": [],
        "seconds": 1.0, "gpu": None, "compute_capability": None, "board": None, "power_mode": None,
    }  # fmt: skip
    build_key = recorded.key_of(
        {"verb": "build", "model": {"sha256": model.sha256}, **Order(spec, settings, False).request}
    )
    layers_key = recorded.key_of(
        {"verb": "layers", "model": {"sha256": built.sha256}, **engine.order_of_layers(settings)}
    )
    answers = {build_key: (answer, log.read_text()), layers_key: ({"layers": []}, "")}
    target = recorded.Recorded("a board", (), answers, blob)
    found = engine.build(tmp_path, model, Order(spec, settings, False), Groups((), (), ()), {}, target)
    assert len(found.gpu_layers) == 6 and "6 layers run on the GPU, not on the DLA" in found.note
    assert "TensorRT 8.4.0, that of JetPack 5, is unchecked" in found.note


def test_an_engine_whose_layers_cannot_be_timed_is_kept(tmp_path: Path) -> None:
    model, blob = File.of(sshd.classifier(tmp_path / "model.onnx", batch=1)), tmp_path / "files"
    blob.mkdir()
    (blob / "0").write_bytes(b"an engine of nobody")
    built = File.of(blob / "0")
    (blob / "0").rename(blob / built.sha256)
    settings, spec = EngineSettings(precision="fp16"), InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    answer = {
        "engine": {"sha256": built.sha256, "bytes": built.bytes}, "tensorrt": "10.3.0", "note": "", "gpu_layers": [],
        "seconds": 1.0, "gpu": None, "compute_capability": None, "board": None, "power_mode": None,
    }  # fmt: skip
    order = Order(spec, settings, False)
    build_key = recorded.key_of({"verb": "build", "model": {"sha256": model.sha256}, **order.request})
    layers_key = recorded.key_of(
        {"verb": "layers", "model": {"sha256": built.sha256}, **engine.order_of_layers(settings)}
    )
    failed = {"error": {"kind": "engine", "message": "CUDA error 2", "hint": ""}}
    target = recorded.Recorded("a board", (), {build_key: (answer, ""), layers_key: (failed, "")}, blob)
    with progress.reporting(recording := progress.Recording()):
        found = engine.build(tmp_path, model, order, Groups((), (), ()), {}, target)
    assert found.file.sha256 == built.sha256 and found.note == "its layers were not timed"
    assert json.loads(found.layers.path.read_text())["layers"] == []
    [warning] = recording.of("warn")
    assert "the engine is kept" in warning and "CUDA error 2" in warning
    assert engine.LAYERS_S > engine.WAIT_S


def test_an_engine_is_not_held_to_test_vectors_that_promise_any_size(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (400000, 1000000), }"
    (tmp_path / "output.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    np.save(tmp_path / "input.npy", np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(VerifyError, match=r"output\.npy is not a plain array"):
        replay(File.of(tmp_path / "input.npy"), tmp_path / "input.npy", tmp_path / "output.npy", {})
