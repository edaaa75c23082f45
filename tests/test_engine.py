"""A whole build with an engine, on a local target whose TensorRT is the double: built, judged, measured, shipped, verified."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Built, build, events, make_project
from test_agent_tensorrt import DOUBLE, NEW, OLD, cudart  # noqa: F401 - a fixture

from cswap_deploy import manifest
from cswap_deploy.console import bundle_lines
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
        assert set(events(built.recipe, built.overrides, built.work).values()) == {"up to date"}
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
