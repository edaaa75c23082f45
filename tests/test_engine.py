"""A whole build with an engine, on a local target whose TensorRT is the double: built, judged, measured, shipped, verified."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Built, events, make_project
from test_agent_tensorrt import DOUBLE, OLD, cudart  # noqa: F401 - a fixture

from cswap_deploy import manifest, pipeline, recipe
from cswap_deploy.console import bundle_lines
from cswap_deploy.verify import verify

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
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        built = make_project(folder / "project").build(*SETTINGS)
        again = events(built.recipe, built.overrides, built.work)
        assert set(again.values()) == {"up to date"}
        assert [*again] == [*pipeline.lines(recipe.load(built.recipe, built.overrides))], (
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


def test_the_bundle_passes_its_checks(shipped: Built) -> None:
    outcomes = {check.name: check.outcome for check in verify(shipped.bundle.folder)}
    assert outcomes.pop("engine") in ("passed", "skipped") and outcomes.pop("pytorch") == "skipped"
    assert set(outcomes.values()) == {"passed"}
