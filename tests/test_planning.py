"""A latency that is asked for, from the recipe to the bundle, on a device whose latency is a formula: blocks of 8 channels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Built, Project, events, faults, make_project
from simulated import Simulated

from cswap_deploy import planning, schemas

SHORT = ("latency.duration_s=0.1", "latency.warmup_s=0", "prune.round_to=auto", "accuracy.max_drop=null")
BASE_NS, BLOCK_NS = 1_000_000, 100_000
DENSE = 1 + 0.1 * (3 * 1 + 3 * 3 + 1 * 3)
"""Milliseconds: 24 units in both layers, three blocks of 8 each, before six classes."""

pytestmark = pytest.mark.usefixtures("cheap_export")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose network has been loaded, scored and measured once; tests copy it."""
    project = make_project(tmp_path_factory.mktemp("begun") / "project")
    with pytest.MonkeyPatch.context() as patch:
        use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS), patch)
        project.build(asked(1.9), *SHORT)
    return project


@pytest.fixture
def project(begun: Project, tmp_path: Path) -> Project:
    return Project(shutil.copytree(begun.folder, tmp_path / "project"))


@pytest.fixture
def fresh(project: Project) -> Project:
    """Nothing was measured on the target yet."""
    for name in ("staircase", "latency"):
        shutil.rmtree(project.folder / "work" / "stages" / name)
    return project


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    return use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS), monkeypatch)


def use(device: Simulated, monkeypatch: pytest.MonkeyPatch) -> Simulated:
    """It answers as the local target."""

    @contextmanager
    def reach(name: str) -> Iterator[Simulated]:
        yield device

    monkeypatch.setattr(planning, "reach", reach)
    monkeypatch.setattr(planning, "PAUSE_S", 0.0)
    return device


def asked(latency_ms: float, **more: Any) -> str:
    settings = "".join(f", {key}: {value}" for key, value in more.items())
    return f"prune.target={{latency_ms: {latency_ms}{settings}}}"


def budget_of(built: Built) -> dict[str, Any]:
    assert list(faults(built.manifest, schemas.of(manifest=True))) == []
    block: dict[str, Any] = built.manifest["budget"]
    return block


def test_a_budget_is_met_and_what_ships_was_measured(fresh: Project, device: Simulated) -> None:
    built = fresh.build(asked(1.9), *SHORT)
    block, latency = budget_of(built), built.manifest["latency"]
    assert block["verdict"] == "met" and built.manifest["exit_code"] == 0 and block["proven"]
    assert block["dense_ms"] == pytest.approx(DENSE, rel=0.01)
    assert block["achieved_ms"] == pytest.approx(latency["pruned"]["p50_ms"], rel=0.01)
    assert 0.7 * 1.9 < block["achieved_ms"] <= 1.9 and block["staircase"]["multiple"] == 8
    assert 1 <= block["trials"] == len(block["candidates"]) <= 8
    widths = {group["name"]: group["kept"] for group in built.manifest["pruned"]["groups"]}
    assert all(width in (2, 4) or width % 8 == 0 for width in widths.values()), widths
    assert built.manifest["pruned"]["trace"][-1]["macs"] < 1


def test_a_second_run_measures_nothing_and_decides_the_same(project: Project, device: Simulated) -> None:
    plan = project.folder / "work" / "bundle" / "plan.json"
    before = plan.read_bytes()
    found = events(project.recipe, (asked(1.9), *SHORT), project.folder / "work")
    assert set(found.values()) == {"up to date"} and set(device.asked) <= {"probe"}
    assert plan.read_bytes() == before


def test_another_budget_replays_the_staircase(project: Project, device: Simulated) -> None:
    block = budget_of(project.build(asked(1.6), *SHORT))
    assert block["achieved_ms"] <= 1.6 and device.asked.count("measure") <= block["trials"] * 2 + 2


def test_another_device_gets_a_staircase_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe; the device has another processor, on which blocks are smaller."""
    device = Simulated("local", (), step=4, base_ns=BASE_NS, block_ns=BLOCK_NS // 4, processor="another")
    use(device, monkeypatch)
    assert budget_of(project.build(asked(1.9), *SHORT))["staircase"]["multiple"] == 4


def test_a_budget_that_the_dense_network_meets_is_not_needed(fresh: Project, device: Simulated) -> None:
    built = fresh.build(asked(5), *SHORT)
    block = budget_of(built)
    assert (block["verdict"], block["trials"], built.manifest["exit_code"]) == ("not needed", 0, 0)
    assert built.manifest["pruned"]["units_removed"] == 0
    assert built.manifest["pruned"]["macs"] == built.manifest["model"]["macs"]
    assert device.asked.count("measure") == 2  # the first probe, and what ships beside its twin


def test_a_budget_below_the_floor_is_infeasible_and_says_so(fresh: Project, device: Simulated) -> None:
    built = fresh.build(asked(1.1), *SHORT)
    block = budget_of(built)
    assert (block["verdict"], built.manifest["exit_code"], built.manifest["verdict"]) == ("infeasible", 8, "fail")
    assert block["floor_ms"] == pytest.approx(1.3, rel=0.02)
    assert any("cannot be reached" in reason for reason in built.manifest["reasons"])
    assert built.manifest["pruned"]["units_removed"] == 0 and device.asked.count("measure") == 2


def test_a_budget_that_no_candidate_meets_is_missed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ships is slower than any candidate said."""
    use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, slower=2.0), monkeypatch)
    built = project.build(asked(1.4, trials=2), *SHORT)
    block = budget_of(built)
    assert (block["verdict"], built.manifest["exit_code"], block["trials"]) == ("missed", 8, 2)
    assert block["achieved_ms"] > 1.4 and any("was missed after 2 trials" in text for text in built.manifest["reasons"])


def test_where_what_ships_is_slower_the_loop_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, slower=1.08), monkeypatch)
    block = budget_of(project.build(asked(1.9), *SHORT))
    assert block["verdict"] == "met" and block["achieved_ms"] <= 1.9


@pytest.mark.parametrize("percentile", [90, 99])
def test_a_rate_is_a_latency_and_other_percentiles_count(project: Project, device: Simulated, percentile: int) -> None:
    built = project.build(f"prune.target={{fps: 500, percentile: {percentile}}}", *SHORT)
    block = budget_of(built)
    assert (block["latency_ms"], block["percentile"], block["verdict"]) == (2.0, percentile, "met")


def test_a_multiple_of_the_recipe_is_kept(project: Project, device: Simulated) -> None:
    built = project.build(asked(1.9), *SHORT[:2], "accuracy.max_drop=null", "prune.round_to=6")
    widths = {group["kept"] for group in built.manifest["pruned"]["groups"]}
    assert budget_of(built)["staircase"]["multiple"] == 6 and all(width % 6 == 0 for width in widths)


@pytest.mark.parametrize("at", [1, 5])
def test_a_connection_that_ends_is_tried_again(fresh: Project, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    device = Simulated("ssh://board", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, failing=[at])
    use(device, monkeypatch)
    assert budget_of(fresh.build(asked(1.9), *SHORT))["verdict"] == "met"


def test_what_was_measured_before_the_target_was_lost_is_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Simulated("ssh://board", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, failing=[4, 5, 6])
    use(device, monkeypatch)
    lost_bundle = fresh.build(asked(1.9), *SHORT).manifest
    assert (lost_bundle["exit_code"], lost_bundle["budget"], lost_bundle["pruned"]["units_removed"]) == (5, None, 0)
    assert any("the connection ended" in reason for reason in lost_bundle["reasons"])
    lost = device.asked.count("measure")
    built = fresh.build(asked(1.9), *SHORT)
    kept = len([*(built.work / "stages" / "staircase").iterdir()])
    assert budget_of(built)["verdict"] == "met"
    assert device.asked.count("measure") - lost < kept
