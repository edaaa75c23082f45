"""A latency budget where an engine ships, end to end against the doubles of TensorRT and libcudart, whose latency is a formula.

Not run on TensorRT: what is shown is that engines are built, left out, measured, taken again and removed as they should be.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import Built, build, events, make_project
from test_agent_tensorrt import DOUBLE, NEW, OLD, cudart  # noqa: F401 - a fixture
from test_branches import RESIDUAL

from cswap_deploy import budget, export, latency, manifest, outline, prepared, progress, prune, recipe, surveying
from cswap_deploy.artifacts import Groups, InputSpec
from cswap_deploy.budget import design
from cswap_deploy.budget.sizes import Sizes
from cswap_deploy.budget.values import WidthTimings
from cswap_deploy.device import protocol
from cswap_deploy.device import target as device
from cswap_deploy.device.building import Order
from cswap_deploy.device.target import Probe, Target, reach
from cswap_deploy.errors import DeviceError
from cswap_deploy.prepared import Prepared
from cswap_deploy.recipe import EngineSettings, LatencySettings
from cswap_deploy.stage import Workdir

STEP, BASE_US, BLOCK_US = 8, 500, 200
COPIES = 8
"""48 units in both layers: the dense network is 6 + 36 + 6 blocks."""
DENSE_MS = (BASE_US + BLOCK_US * (6 * 1 + 6 * 6 + 1 * 6)) / 1000
SETTINGS = (
    "engine={precision: fp16}",
    "latency={warmup_s: 0, duration_s: 0.1}",
    f"model.kwargs={{copies: {COPIES}}}",
    "prune.steps=1",
    "prune.round_to=auto",
    "accuracy.max_drop=null",
)
SMALL = replace(design.OF_ENGINES["fp16"], multiples=(8,), narrowest=(8,), together=8)
TIMING = LatencySettings(runtime="tensorrt", warmup_s=0, duration_s=0.05)


def asked(latency_ms: float) -> str:
    return f"prune.target={{latency_ms: {latency_ms}}}"


@pytest.fixture(scope="module")
def surroundings(cudart: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("device")
    return {
        "PYTHONPATH": f"{DOUBLE}:{DOUBLE.parent}:{os.environ.get('PYTHONPATH', '')}",
        "LD_LIBRARY_PATH": str(cudart),
        "FAKE_TENSORRT_VERSION": OLD,
        "FAKE_TENSORRT_STEPS": f"{STEP} {BASE_US} {BLOCK_US} 0",
        "FAKE_TENSORRT_RECORD": str(folder / "record.jsonl"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def met(surroundings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Built, list[str]]]:
    """A whole build towards half of the dense latency, and what it noted."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        patch.setattr(surveying, "WIDTHS_S", 0.1)
        patch.setitem(design.OF_ENGINES, "fp16", SMALL)
        heard = progress.Recording()
        with progress.reporting(heard):
            project = make_project(tmp_path_factory.mktemp("met") / "project")
            built = project.build(asked(DENSE_MS / 2), *SETTINGS)
        yield built, heard.of("note")


def builds(surroundings: dict[str, str]) -> int:
    """Engines that were built so far."""
    lines = Path(surroundings["FAKE_TENSORRT_RECORD"]).read_text().splitlines()
    return sum(json.loads(line)["call"] == "Builder.build_serialized_network" for line in lines)


def test_an_engine_meets_its_budget_and_is_what_ships(met: tuple[Built, list[str]]) -> None:
    found = met[0].manifest
    block = found["budget"]
    assert (block["verdict"], found["exit_code"], found["shipped"]) == ("met", 0, "engine/model.engine")
    assert block["dense_ms"] == pytest.approx(DENSE_MS, rel=0.02)
    assert 0.4 < block["ratio"] <= 0.5 and block["ratio"] == pytest.approx(1 / found["latency"]["speedup"], rel=0.05)
    assert block["staircase"]["multiple"] == 8 and 1 <= block["trials"] <= 8 and block["unbuilt"] == 0
    widths = [group["kept"] for group in found["pruned"]["groups"]]
    assert all(width % STEP == 0 for width in widths), widths
    assert (found["latency"]["runtime"], found["latency"]["precision"]) == ("tensorrt", "fp16")


def test_it_is_said_how_many_engines_may_be_built_and_how_long_one_takes(met: tuple[Built, list[str]]) -> None:
    _, notes = met
    [planned] = [
        re.search(r"built on the target, as a rule up to (\d+)", note) for note in notes if "needs an engine" in note
    ]
    dense, floors, multiple, together, approach, trials, ships = 2, 2, 3, 8, 1, 8, 1
    assert planned and int(planned[1]) == dense + floors + multiple + together + approach + trials + ships
    assert any(re.search(r"an engine took \d+ s: up to .* for the 22 that may follow", note) for note in notes), notes


def test_a_second_run_builds_nothing(met: tuple[Built, list[str]], surroundings: dict[str, str]) -> None:
    built, before = met[0], builds(surroundings)
    found = events(built.recipe, built.overrides, built.work)
    assert set(found.values()) == {"up to date"} and builds(surroundings) == before
    wanted = outline.lines(recipe.load(built.recipe, built.overrides))
    assert list(found) == list(dict.fromkeys(wanted))


def test_only_what_was_built_there_is_loaded_and_little_of_it_stays(
    met: tuple[Built, list[str]], surroundings: dict[str, str]
) -> None:
    store = Path(surroundings["XDG_CACHE_HOME"]) / "cswap-deploy"
    ledger = {path.name: json.loads(path.read_text()) for path in (store / "engines").iterdir()}
    passing = [entry for entry in ledger.values() if "answer" in entry]
    assert 10 <= len(passing) <= 24 and len(ledger) - len(passing) == 2  # dense, and what ships
    onnx_files = [path for path in (store / "files").iterdir() if path.name not in ledger]
    assert all(path.suffix == "" for path in onnx_files)


@pytest.mark.parametrize(("latency_ms", "verdict", "code"), [(0.3, "infeasible", 8), (2 * DENSE_MS, "not needed", 0)])
def test_a_budget_below_the_floor_or_above_the_dense_latency_takes_no_staircase(
    met: tuple[Built, list[str]], surroundings: dict[str, str], latency_ms: float, verdict: str, code: int
) -> None:
    built, before = met[0], builds(surroundings)
    found = build(built.recipe, (asked(latency_ms), *SETTINGS), built.work).manifest
    assert (found["budget"]["verdict"], found["exit_code"], found["budget"]["trials"]) == (verdict, code, 0)
    assert builds(surroundings) - before <= 2  # the dense network again, as what ships


LAYER_US = 1500
"""Of a network of five layers; 33 blocks as a whole: 3 of the first layer and of the last, 9 of each between."""


def test_an_engine_loses_a_branch_where_being_there_is_what_costs(
    surroundings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_TENSORRT_STEPS", f"{STEP} {BASE_US} {BLOCK_US} {LAYER_US}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(surveying, "WIDTHS_S", 0.1)
    monkeypatch.setitem(design.OF_ENGINES, "fp16", SMALL)
    project = make_project(tmp_path / "project")
    source = project.folder / "net.py"
    source.write_text(source.read_text() + RESIDUAL)
    settings = [item for item in SETTINGS if not item.startswith("model.kwargs")]
    narrowest = (BASE_US + 5 * (BLOCK_US + LAYER_US)) / 1000
    built = project.build(asked(narrowest - 1), *settings, f"model.factory={source}:Residual")
    kept = {group["name"]: group["kept"] for group in built.manifest["pruned"]["groups"]}
    block = built.manifest["budget"]
    assert block["verdict"] == "met" and kept["inner1"] == 0 < min(kept["conv1"], kept["conv2"])
    assert block["dense_ms"] == pytest.approx((BASE_US + 33 * BLOCK_US + 5 * LAYER_US) / 1000, rel=0.02)
    assert built.manifest["shipped"] == "engine/model.engine" and block["achieved_ms"] <= narrowest - 1


# --- one batch


@dataclass(frozen=True)
class Listening(Target):
    heard: list[dict[str, Any]] = field(default_factory=list)

    def ask_with_log(self, verb: str, seconds: float, **request: Any) -> tuple[dict[str, Any], str]:
        self.heard.append({"schema": device.SCHEMA, "verb": verb, **request})
        return {}, ""


def test_the_protocol_knows_passing_engines_and_the_weights_beside_them() -> None:
    spec = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    target, order = Listening("local", ()), Order(spec, EngineSettings(precision="int8"), False)
    order.build(target, {"sha256": "a", "name": "b"}, {"path": "c", "sha256": "d"})
    order.build(target, {"sha256": "a"})
    assert [request.get("passing") for request in target.heard] == [True, None]
    assert all(list(manifest.faults(request, protocol.request_schema("build"))) == [] for request in target.heard)


@pytest.fixture
def ready(met: tuple[Built, list[str]]) -> tuple[Prepared, Groups, Sizes]:
    with Workdir(met[0].work).open() as work:
        asked, found = prepared.find(work)
        groups = work.run(prune.find_groups, found.source, ())
        return (
            found,
            groups,
            work.run(export.sizes_of, found.source, groups, found.dense["fp32"], asked.onnx.graph, False),
        )


Batch = Callable[..., WidthTimings]


@pytest.fixture
def batch(ready: tuple[Prepared, Groups, Sizes], tmp_path: Path) -> Batch:
    """Measures settings of widths on the doubles; `far`: files are sent, as over a connection."""

    def measured(settings: tuple[dict[str, int], ...], *, far: bool = False, file: str = "fp32") -> Any:
        model, groups, sizes = ready
        order = Order(model.source.input, EngineSettings(precision="fp16"), False)
        graph = model.dense[file].graph
        (tmp_path / "out").mkdir(exist_ok=True)
        with reach("local") as near:
            target = replace(near, name="ssh://board") if far else near
            facts = Probe.of(target).facts("tensorrt")
            return latency.of_engines.function(
                tmp_path / "out", graph, groups, sizes, settings, order, TIMING, facts, target
            )

    return measured


def test_one_engine_that_cannot_be_built_is_left_out(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", "units-24")
    heard = progress.Recording()
    with progress.reporting(heard):
        timings = batch(({"conv1": 16}, {"conv1": 24}, {"conv1": 32, "conv2": 32}))
    assert [item["conv1"] for item in timings.settings] == [16, 32]
    assert [item.widths for item in timings.unbuilt] == [{"conv1": 24}]
    assert "could not build the engine" in heard.of("warn")[0]
    found = [item.ratio.value for item in budget.observed(timings, 50)]
    truth = [(BASE_US + BLOCK_US * (2 + 12 + 6)) / 1000, (BASE_US + BLOCK_US * (4 + 16 + 4)) / 1000]
    assert found == pytest.approx([ms / DENSE_MS for ms in truth], rel=0.02)


@pytest.mark.parametrize("version", [OLD, NEW])
def test_files_go_once_and_weights_are_found_beside_them(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """From 11 on the fp16 file is built, whose types carry the precision."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
    timings = batch(({"conv1": 24, "conv2": 24},), far=True, file="fp16" if version == NEW else "fp32")
    [found] = budget.ratios(timings, 50)
    assert found.value == pytest.approx((BASE_US + BLOCK_US * (3 + 9 + 3)) / 1000 / DENSE_MS, rel=0.02)
    files = [*(tmp_path / "cache" / "cswap-deploy" / "files").iterdir()]
    assert len(files) == 2 + 2 + 1  # twin and narrow: a file and an engine each; and their weights
    assert all(sha256(path.read_bytes()).hexdigest() == path.name for path in files)


def test_engines_of_a_request_that_failed_are_not_built_again(
    batch: Batch, surroundings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ({"conv1": 40}, {"conv1": 8, "conv2": 8})
    with monkeypatch.context() as patch, pytest.raises(DeviceError):
        patch.setenv("FAKE_TENSORRT_FAIL", "context")
        batch(settings)
    before = builds(surroundings)
    timings = batch(settings)
    assert builds(surroundings) == before
    assert timings.build_s == () and len(timings.settings) == 2


def test_a_device_that_fails_otherwise_ends_the_batch(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "AGENT", Path(os.devnull))
    with pytest.raises(DeviceError):
        batch(({"conv1": 16},))


def test_the_oldest_passing_engines_leave(
    batch: Batch, surroundings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = device.AGENT.read_text()
    assert "PASSING, TIMINGS = 24," in text
    (tmp_path / "agent.py").write_text(text.replace("PASSING, TIMINGS = 24,", "PASSING, TIMINGS = 4,"))
    monkeypatch.setattr(device, "AGENT", tmp_path / "agent.py")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for width in (8, 16, 24):
        batch(({"conv1": width}, {"conv2": width}))
    store = tmp_path / "cache" / "cswap-deploy"
    ledger = {path.name: json.loads(path.read_text()) for path in (store / "engines").iterdir()}
    assert ["answer" in entry for entry in ledger.values()].count(True) == 4
    assert len(ledger) == 4
    assert all((store / "files" / sha256).is_file() for sha256 in ledger)
