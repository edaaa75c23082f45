"""A staircase over a real sshd: what is measured there is what is measured here, and a run whose connections are cut ends well."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sshd
from conftest import Built, events, make_project
from sshd import Device, Server

from cswap_deploy import export, metering, planning, prepared, prune, surveying
from cswap_deploy.artifacts import Groups, OnnxModel
from cswap_deploy.budget import design
from cswap_deploy.budget.sizes import Sizes
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Staircase
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import Recipe
from cswap_deploy.stage import Workdir

SHORT = ("latency.duration_s=0.1", "latency.warmup_s=0", "accuracy.max_drop=null", "model.kwargs={copies: 16}")

BATCH = 16


@pytest.fixture(autouse=True)
def settings(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{device.client(tmp_path / 'client')}:{os.environ['PATH']}")
    for module, name, value in ((surveying, "WIDTHS_S", 0.05), (metering, "PAUSE_S", 0.2)):
        monkeypatch.setattr(module, name, value)
    few = replace(design.OF_FILES, multiples=(16,), alone=2, together=4)
    monkeypatch.setattr(design, "OF_FILES", few)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, OnnxModel, Groups, Sizes]:
    """96 units in two layers; a recipe, its dense file and its groups."""
    project = make_project(tmp_path_factory.mktemp("net") / "project")
    recipe = project.load("prune.target={latency_ms: 1000}", *SHORT, "onnx.dynamic_batch=true")
    project.build("prune.target=null", *SHORT, "onnx.dynamic_batch=true", "latency={duration_s: 0.05, warmup_s: 0}")
    with Workdir(project.folder / "work").open() as work:
        _, ready = prepared.find(work)
        groups, dense = work.run(prune.find_groups, ready.source, ()), ready.dense["fp32"]
        return recipe, dense, groups, work.run(export.sizes_of, ready.source, groups, dense, recipe.onnx.graph, False)


def learned(
    net: tuple[Recipe, OnnxModel, Groups, Sizes], place: str, folder: Path, work: Callable[[Target], Any] = id
) -> Staircase:
    """A staircase in a work folder; `work` is told of the target."""
    recipe, dense, groups, sizes = net
    recipe = recipe.on(place)
    with Workdir(folder).open() as opened, planning.reached(recipe, opened) as (target, probe):
        work(target)
        meter = metering.Meter(recipe, opened, dense.graph, probe.facts("onnxruntime"), target, groups, sizes)
        assert surveying.asked(meter).verdict == "not needed"
        return surveying.learned(meter)


def assert_bounded(device: Device, most: int) -> None:
    """Files are whole and bear their digests; nothing unfinished is left."""
    files = [*(device.store / "files").iterdir()]
    assert 0 < len(files) <= most
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_widths_cost_there_what_they_cost_here(
    net: tuple[Recipe, OnnxModel, Groups, Sizes],
    server: Server,
    device: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches, and longer: a call that takes a tenth of a millisecond is mostly the machine's mood, which changes between the two."""
    monkeypatch.setattr(surveying, "WIDTHS_S", 0.4)
    recipe, *rest = net
    assert recipe.latency
    net = (recipe.model_copy(update={"latency": recipe.latency.model_copy(update={"batch": BATCH})}), *rest)
    here, there = (learned(net, place, tmp_path / name) for name, place in (("a", "local"), ("b", server.name)))
    groups = net[2]
    for width in (16, 48, 80):
        widths = {group.name: width for group in groups.groups}
        local, remote = (Steps(groups, found).total(widths) for found in (here, there))
        print(f"{width}: {local:.3f} here, {remote:.3f} there")
        assert local == pytest.approx(remote, rel=0.25)
    assert_bounded(device, 40)
    assert sum(path.stat().st_size for path in (device.store / "files").iterdir()) < 2_000_000


@pytest.mark.parametrize("cuts", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_whose_connections_are_cut_ends_well(
    cuts: int, net: tuple[Recipe, OnnxModel, Groups, Sizes], server: Server, device: Device, tmp_path: Path
) -> None:
    """So many times, at random moments: the run goes on, or the next one does from where it was."""
    random, left, lost, runs = Random(0), [cuts], 0, 0
    over = threading.Event()

    def cut() -> None:
        while left[0] and not over.wait(random.uniform(0.2, 2.5)):
            if sessions := server.sessions():
                sshd.end(*sessions)
                left[0] -= 1

    cutter = threading.Thread(target=cut, daemon=True)
    cutter.start()
    deadline = time.monotonic() + 240
    try:
        while left[0] or not runs:
            assert time.monotonic() < deadline, f"{left[0]} cuts left after {runs} runs and {lost} lost connections"
            try:
                learned(net, server.name, tmp_path / f"work-{runs}")
                runs += 1
            except DeviceError as error:
                assert "ended" in str(error) or "reached" in str(error), error
                lost += 1
    finally:
        over.set()
        cutter.join()
    print(f"{cuts} cuts: {runs} runs ended, {lost} reported a lost target and were run again")
    assert learned(net, server.name, tmp_path / "last").settings == 12
    sshd.wait_until(lambda: not server.agents())
    assert_bounded(device, 40)


def test_a_whole_build_meets_its_budget_there_and_goes_on_after_it_was_cut(
    server: Server, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed loop, what ships included. All connections after the first answer about widths are cut."""
    project, short = (
        make_project(tmp_path / "project"),
        (*SHORT, f"latency.target={server.name}", "prune.round_to=auto"),
    )
    results = project.folder / "work" / "stages" / "staircase"
    floor = budget_of(project.build("prune.target={latency_ms: 1.0e-6}", *short))
    assert floor["verdict"] == "infeasible" and floor["floor_ms"] < floor["dense_ms"]
    asked = f"prune.target={{latency_ms: {(floor['floor_ms'] + floor['dense_ms']) / 2}}}"
    before, over = len([*results.iterdir()]), threading.Event()

    def cut() -> None:
        while not over.wait(0.01):
            if len([*results.iterdir()]) > before and (sessions := server.sessions()):
                sshd.end(*sessions)

    cutter = threading.Thread(target=cut, daemon=True)
    cutter.start()
    with monkeypatch.context() as patch:
        patch.setattr(metering, "ATTEMPTS", 1)
        lost = project.build(asked, *short).manifest
    over.set()
    cutter.join()
    assert (lost["exit_code"], lost["budget"], lost["pruned"]["units_removed"]) == (5, None, 0), lost["reasons"]
    kept = {entry.name: entry.stat().st_mtime_ns for entry in results.iterdir()}
    assert len(kept) > before
    built = project.build(asked, *short)
    block = budget_of(built)
    assert {name: (results / name).stat().st_mtime_ns for name in kept} == kept
    assert block["trials"] >= 1 and built.manifest["pruned"]["units_removed"] > 0
    assert block["verdict"] == "met", block
    assert block["ratio"] < 0.9 and built.manifest["latency"]["target"] == "ssh", block["ratio"]
    assert set(events(project.recipe, (asked, *short), project.folder / "work").values()) == {"up to date"}
    assert_bounded(device, 60)


def budget_of(built: Built) -> dict[str, Any]:
    block: dict[str, Any] = built.manifest["budget"]
    return block
