"""A latency that is asked for, from the recipe to the bundle, on a device whose latency is a formula: blocks of 8 channels."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import Built, Project, events, faults, make_project
from simulated import Simulated
from test_budget import apart
from typer.testing import CliRunner

from cswap_deploy import (
    accuracy,
    checks,
    data,
    export,
    latency,
    metering,
    pipeline,
    planning,
    prepared,
    progress,
    prune,
    report,
    schemas,
    sweeping,
    variants,
)
from cswap_deploy.artifacts import File, Groups, ImageSet, LatencyReport
from cswap_deploy.budget import account, sizes
from cswap_deploy.budget.narrow import Template, require_runnable
from cswap_deploy.budget.values import Budget, BudgetVerdict
from cswap_deploy.bundle import Bundle
from cswap_deploy.cli import app
from cswap_deploy.console import bundle_lines
from cswap_deploy.console.front import sweep_lines
from cswap_deploy.device.target import Away
from cswap_deploy.errors import DeviceError, ExportError, UsageError, VerifyError
from cswap_deploy.recipe import Variant
from cswap_deploy.report import words
from cswap_deploy.samples import Samples
from cswap_deploy.stage import Workdir

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
    monkeypatch.setattr(metering, "PAUSE_S", 0.0)
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
    assert all(width in (1, 2, 4) or width % 8 == 0 for width in widths.values()), widths
    assert built.manifest["pruned"]["trace"][-1]["macs"] < 1


def test_a_second_run_measures_nothing_and_decides_the_same(project: Project, device: Simulated) -> None:
    plan = project.folder / "work" / "bundle" / "plan.json"
    before = plan.read_bytes()
    found = events(project.recipe, (asked(1.9), *SHORT), project.folder / "work")
    assert set(found.values()) == {"up to date"} and set(device.asked) <= {"probe"}
    assert plan.read_bytes() == before
    block = budget_of(project.build(asked(1.9), *SHORT))
    for proven, said in ((True, " asked for, proven at 95 %);"), (False, " asked for, not proven at 95 %);")):
        assert said in words.budget({**block, "proven": proven})
    assert block["proven"]
    said = checks.check(project.load(asked(1.9), *SHORT), project.folder / "work").facts["budget"]
    assert said == "1.9 ms (p50); met when it was planned last"
    said = checks.check(project.load(asked(1.8), *SHORT), project.folder / "work").facts["budget"]
    assert said == f"1.8 ms (p50); {checks.BEGINS}"


def test_another_budget_replays_the_staircase(project: Project, device: Simulated) -> None:
    block = budget_of(project.build(asked(1.6), *SHORT))
    assert block["achieved_ms"] <= 1.6 and device.asked.count("measure") <= block["trials"] * 2 + 2


def test_budgets_share_their_steps_and_other_numbers_of_trials_too(project: Project, device: Simulated) -> None:
    """With four steps to half of 2.4 ms: what an eighth leaves is on the way to all of these."""
    settings, work = ("prune.steps=4", *SHORT), project.folder / "work"
    first = events(project.recipe, (asked(1.6), *settings), work)
    ways = [name for name in first if name.startswith("plan (step ")]
    assert ways and first[ways[0]] == "finished"
    for other in (asked(1.5), asked(1.6, trials=5), asked(1.6, tolerance=0.1)):
        later = events(project.recipe, (other, *settings), work)
        told = [state for name, state in later.items() if name.startswith("plan (step ")]
        assert told[: len(ways)] == ["up to date"] * len(ways), later


def test_another_device_gets_a_staircase_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe; the device has another processor, on which blocks are smaller."""
    device = Simulated("local", (), step=4, base_ns=BASE_NS, block_ns=BLOCK_NS // 4, processor="another")
    use(device, monkeypatch)
    assert budget_of(project.build(asked(1.9), *SHORT))["staircase"]["multiple"] == 4


def test_a_budget_that_the_dense_network_meets_is_not_needed(fresh: Project, device: Simulated) -> None:
    stages = fresh.folder / "work" / "stages"
    shutil.rmtree(stages / "groups")
    built = fresh.build(asked(5), *SHORT)
    block = budget_of(built)
    assert (block["verdict"], block["trials"], built.manifest["exit_code"]) == ("not needed", 0, 0)
    assert built.manifest["pruned"]["units_removed"] == 0
    assert built.manifest["pruned"]["macs"] == built.manifest["model"]["macs"]
    assert device.asked.count("measure") == 2  # the dense network alone, and as it ships
    assert "floor_ms" not in block and not (stages / "groups").exists(), "nothing else was looked for"


def test_a_budget_below_the_floor_is_infeasible_and_says_so(fresh: Project, device: Simulated) -> None:
    built = fresh.build(asked(1.1), *SHORT)
    block = budget_of(built)
    assert (block["verdict"], built.manifest["exit_code"], built.manifest["verdict"]) == ("infeasible", 8, "fail")
    assert block["floor_ms"] == pytest.approx(1.3, rel=0.02)
    assert any("cannot be reached" in reason for reason in built.manifest["reasons"])
    assert built.manifest["pruned"]["units_removed"] == 0
    # the dense network alone, the first probe, and what ships beside its twin
    assert device.asked.count("measure") == 3
    said = "\n".join(bundle_lines(built.bundle)), report.render(built.manifest, "html")
    assert not any("blocks of channels" in text for text in said)


def test_a_network_of_which_nothing_left_is_asked_once(
    fresh: Project, device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_of: list[str] = []
    really = accuracy._torch
    monkeypatch.setattr(
        accuracy, "_torch", lambda network, where: asked_of.append(network.weights.sha256) or really(network, where)
    )
    shutil.rmtree(fresh.folder / "work" / "stages" / "accuracy", ignore_errors=True)
    found = fresh.build(asked(5), *SHORT).manifest["accuracy"]
    assert len(asked_of) == 1 and found["source"] == found["pruned"]
    fresh.build("prune.target={macs: 0.6}", *SHORT, "latency=null")
    assert len(asked_of) == len({*asked_of}) == 2, "the dense network once for both"


@pytest.mark.parametrize(("verdict", "there_ms", "found"), [
    ("not needed", 20.0, "missed"), ("not needed", 3.0, "not needed"), ("infeasible", 3.0, "not needed"), ("infeasible", 20.0, "missed"),
])  # fmt: skip
def test_on_another_device_the_dense_network_is_judged_anew(
    verdict: BudgetVerdict, there_ms: float, found: str, tmp_path: Path
) -> None:
    """Asked for 5 ms, and what ships is the dense network."""
    samples = Samples.of([[[round(there_ms * 1e6)] * 200] * 2] * 2)
    samples.save(tmp_path / "samples.npz")
    report = LatencyReport(File.of(tmp_path / "samples.npz"), "onnxruntime 1", (), None, {"device": "B"}, {})
    planned = Budget(5.0, 50, 4.0, (4.0, 4.0), 0.5, verdict, (), None, {"device": "A"})
    block = account.account(planned, Groups((), (), ()), report)
    assert (block["verdict"], block["dense_ms"], block["achieved_ms"]) == (found, there_ms, there_ms)
    said = account.reasons(block)
    assert [reason.exit_code for reason in said] == ([8] if found == "missed" else [])
    assert not said or "that it was not planned for" in said[0].text
    home = account.account(replace(planned, facts={"device": "B"}), Groups((), (), ()), report)
    assert home["verdict"] == verdict
    slowed = replace(planned, facts={"device": "B", "power_mode": "15W"})
    assert account.account(slowed, Groups((), (), ()), report)["dense_ms"] == there_ms
    other_agent = replace(planned, facts={"device": "B", "agent": "an older one", "cores": "2"})
    assert account.account(other_agent, Groups((), (), ()), report)["planned_here"]


def test_on_another_device_nothing_of_this_one_is_told_as_its_own(project: Project, device: Simulated) -> None:
    """Floor, candidates and staircase are parts of the latency of the device that was planned for."""
    with Workdir(project.folder / "work").open() as work:
        _, ready = prepared.find(work)
    planned = ready.budget
    assert planned and planned.trials and planned.staircase
    report = slow_report(planned, project.folder, {"device": "B"})
    block = account.account(planned, ready.groups, report)
    assert not block["planned_here"] and block["candidates"] == [] and block["staircase"] is None
    assert "floor_ms" not in block and block["trials"] == len(planned.trials)
    home = account.account(planned, ready.groups, slow_report(planned, project.folder, planned.facts))
    assert home["floor_ms"] < home["dense_ms"] and home["candidates"] and home["staircase"]


def slow_report(planned: Budget, folder: Path, facts: dict[str, str]) -> LatencyReport:
    """Of a device that takes twice as long as it did when the budget was set; what ships is within the budget's part."""
    dense = round(2e6 * planned.dense_ms)
    samples = Samples.of([[[dense] * 200, [round(0.99 * planned.ratio * dense)] * 200]] * 2)
    samples.save(folder / "samples.npz")
    return LatencyReport(File.of(folder / "samples.npz"), "onnxruntime 1", (), None, facts, {})


def test_a_device_that_became_slower_than_when_the_budget_was_set_is_told_of(
    project: Project, device: Simulated
) -> None:
    with Workdir(project.folder / "work").open() as work:
        _, ready = prepared.find(work)
    planned = ready.budget
    assert planned
    block = account.account(planned, ready.groups, slow_report(planned, project.folder, planned.facts))
    assert block["verdict"] == "met" and block["achieved_ms"] < planned.latency_ms < block["took_ms"]
    assert "the device was slower: what ships took" in words.budget(block)
    took = block["achieved_ms"] / 1.5
    sooner = {**block, "took_ms": took, "took_ci95_ms": [0.98 * took, 1.02 * took]}
    assert "the device was faster: what ships took" in words.budget(sooner) and "--force staircase" in words.budget(
        sooner
    )
    same = {
        **block,
        "took_ms": block["achieved_ms"],
        "took_ci95_ms": [0.98 * block["achieved_ms"], block["achieved_ms"]],
    }
    assert "the device was" not in words.budget(same)
    assert "slower" not in words.budget(budget_of(project.build(asked(1.9), *SHORT)))


@pytest.mark.parametrize("verdict", ["met", "missed", "not needed"])
def test_a_budget_is_not_met_where_nothing_was_measured(verdict: BudgetVerdict) -> None:
    planned = Budget(5.0, 50, 8.0, (8.0, 8.0), 0.5, verdict, (), None, {"device": "A"})
    block = account.account(planned, Groups((), (), ()), None)
    assert block["verdict"] == "missed" and not block["proven"]
    [reason] = account.reasons(block)
    assert reason.exit_code == 8 and "not shown to be met: what ships was not measured" in reason.text
    assert words.budget(block).startswith("Not shown to be met")
    assert [each.exit_code for each in account.foreseen(planned)] == ([8] if verdict == "missed" else [])


def test_what_met_the_budget_ships_although_the_search_for_a_better_one_was_cut_off(
    fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ships is faster than its candidate, so the loop goes on, and the device answers no more."""
    use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, slower=0.8), monkeypatch)
    really, cut_off = planning.Loop.run, list[float]()

    def run(loop: Any, earlier: Any = (), shift: float = 1.0) -> Any:
        if earlier:
            cut_off.append(shift)
            raise DeviceError("the connection ended", "try again")
        return really(loop)

    monkeypatch.setattr(planning.Loop, "run", run)
    heard = progress.Recording()
    with progress.reporting(heard):
        built = fresh.build(asked(1.9), *SHORT)
    assert cut_off == [pytest.approx(0.8, rel=0.02)]
    assert budget_of(built)["ratio"] < 0.95 * budget_of(built)["ratio_asked"]
    assert (budget_of(built)["verdict"], built.manifest["exit_code"]) == ("met", 0)
    assert built.manifest["pruned"]["units_removed"] > 0
    told = [note for note in heard.of("note") if "of the budget is left" in note]
    assert len(told) == 1 and "a better one could not be made or measured" in told[0], heard.of("note")


def test_each_target_that_answered_is_remembered(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board that is away after another one was asked: what it was is still known."""
    recipe = project.load(asked(1.9), *SHORT)
    here, there = (recipe.on(name) for name in ("local", "ssh://board"))
    with Workdir(project.folder / "work").open() as work:
        for each, cpu in ((here, "one"), (there, "another")):
            use(Simulated(each.target, (), step=8, processor=cpu), monkeypatch)
            with planning.reached(each, work) as (target, _):
                assert not isinstance(target, Away)

        @contextmanager
        def off(name: str) -> Iterator[Simulated]:
            raise DeviceError(f"{name} cannot be reached")
            yield

        monkeypatch.setattr(planning, "reach", off)
        for each, cpu in ((here, "one"), (there, "another")):
            with planning.reached(each, work) as (target, probe):
                assert isinstance(target, Away) and probe.document["cpu"]["model"] == cpu


def test_prepare_says_that_a_budget_cannot_be_met(project: Project, device: Simulated) -> None:
    answer = prepare(project, asked(1.1))
    assert any("cannot be reached" in reason for reason in answer["reasons"])
    assert prepare(project, asked(5))["reasons"] == []


def prepare(project: Project, *overrides: str) -> dict[str, Any]:
    settings = [part for setting in (*overrides, *SHORT) for part in ("--set", setting)]
    work = str(project.folder / "work")
    result = CliRunner().invoke(app, ["prepare", str(project.recipe), "--work", work, "--json", *settings])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_deploy_after_the_target_was_lost_says_that_it_cannot_prune(
    fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It measures the dense network; what goes on is the build."""
    use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, failing=[*range(1, 9)]), monkeypatch)
    lost = fresh.build(asked(1.9), *SHORT).manifest
    assert lost["exit_code"] == 5 and lost["budget"] is None
    assert any("the same build, prepare or sweep again goes on" in reason for reason in lost["reasons"])
    assert not any("deploy" in reason for reason in lost["reasons"])
    settings = [part for setting in (asked(1.9), *SHORT) for part in ("--set", setting)]
    said = CliRunner().invoke(
        app, ["prepare", str(fresh.recipe), "--work", str(fresh.folder / "work"), "--quiet", *settings]
    )
    assert "failed: target" in said.stdout and "next " not in said.stdout, said.output


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


def test_what_ships_is_measured_longer_where_that_is_too_close_to_call(
    project: Project, device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "in_doubt", lambda asked, report: True)
    built = project.build(asked(1.8), *SHORT)
    assert built.manifest["latency"]["duration_s"] == pytest.approx(0.4) and budget_of(built)["verdict"] == "met"
    found = events(project.recipe, (asked(1.8), *SHORT), project.folder / "work")
    assert set(found.values()) == {"up to date"}


@pytest.mark.parametrize(("times", "code"), [(2, 0), (9, 5)])
def test_the_loop_decides_on_the_longer_measurement_or_not_at_all(
    times: int, code: int, project: Project, device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(times, monkeypatch)
    built = project.build(asked(1.8), *SHORT)
    assert built.manifest["exit_code"] == code
    if code == 0:
        assert built.manifest["latency"]["duration_s"] == pytest.approx(0.4) and budget_of(built)["verdict"] == "met"
    else:
        assert built.manifest["budget"] is None and built.manifest["pruned"]["units_removed"] == 0


def test_where_a_board_was_asked_once_and_measuring_longer_fails_the_first_measurement_stands(
    project: Project, device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another device than was planned for, so that what ships is measured there."""
    work, settings = project.folder / "work", [part for setting in (asked(1.9), *SHORT) for part in ("--set", setting)]
    prepared_there = CliRunner().invoke(app, ["prepare", str(project.recipe), "--work", str(work), *settings])
    assert prepared_there.exit_code == 0, prepared_there.output
    use(Simulated("local", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, processor="another"), monkeypatch)
    failing(9, monkeypatch)
    with Workdir(work).open() as opened:
        found = pipeline.deploy(*prepared.find(opened), opened)
    assert found.manifest["latency"]["duration_s"] == pytest.approx(0.1)
    block = found.manifest["budget"]
    assert (found.manifest["exit_code"], block["verdict"], block["planned_here"]) == (0, "met", False)


def failing(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement of what ships is in doubt, and the longer one fails so many times."""
    really, left = latency.take, [times]

    def take(target: Any, files: Any, timing: Any, **more: Any) -> Any:
        if timing.duration_s > 0.3 and len(files) == 2 and left[0]:
            left[0] -= 1
            raise DeviceError("the connection ended", "try again")
        return really(target, files, timing, **more)

    monkeypatch.setattr(metering, "in_doubt", lambda asked, report: True)
    monkeypatch.setattr(latency, "take", take)


def test_a_network_that_cannot_be_made_as_it_ships_fails_its_bundle_and_a_sweep_goes_on(
    fresh: Project, device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its float16 file overflows, say; that of the dense network does not."""
    really, made = variants.make.function, list[str]()

    def make(out: Path, model: Any, network: Any, *more: Any) -> Any:
        made.append(network.weights.sha256)
        if network.weights.sha256 != made[0]:
            raise ExportError("a value is beyond float16", "ship fp32")
        return really(out, model, network, *more)

    monkeypatch.setattr(pipeline.variants, "make", replace(variants.make, function=make))
    recipes = [
        fresh.load(*SHORT, "ship=fp16", *sweeping.overrides_of(fresh.load(asked(1), *SHORT), value))
        for value in (5.0, 1.9)
    ]
    with Workdir(fresh.folder / "work").open() as work:
        front = sweeping.sweep(recipes, work)
    assert front["dense"]["top1_precision"] == "fp16"  # as the first bundle holds it
    needless, unmade = front["points"]
    assert (needless["verdict"], needless["exit_code"], needless["precision"]) == ("not needed", 0, "fp16")
    assert (unmade["verdict"], unmade["exit_code"], unmade["achieved_ms"]) == (None, 6, None)
    manifest = Bundle.read(fresh.folder / "work" / unmade["bundle"]).manifest
    assert any("beyond float16" in reason and "choose another ship" in reason for reason in manifest["reasons"])
    assert manifest["pruned"]["units_removed"] == 0


@pytest.mark.parametrize("percentile", [90, 99])
def test_a_rate_is_a_latency_and_other_percentiles_count(project: Project, device: Simulated, percentile: int) -> None:
    built = project.build(f"prune.target={{fps: 500, percentile: {percentile}}}", *SHORT)
    block = budget_of(built)
    assert (block["latency_ms"], block["percentile"], block["verdict"]) == (2.0, percentile, "met")
    seconds = built.manifest["latency"]["duration_s"]
    assert seconds == {90: 0.5, 99: 1.5}[percentile] >= metering.TAIL / (1 - percentile / 100) * DENSE / 1000


def test_a_rate_is_of_images_not_of_batches(project: Project) -> None:
    recipes = [
        project.load("prune.target={fps: 500}", f"latency={{batch: {batch}}}", "onnx.dynamic_batch=true")
        for batch in (1, 4)
    ]
    assert [recipe.goal_ms for recipe in recipes] == [2.0, 8.0]


def test_a_multiple_that_the_staircase_will_find_is_not_guessed_before(project: Project) -> None:
    asked_for = [
        project.load(target, "engine={precision: int8}", "latency={}")
        for target in ("prune.target={macs: 0.6}", asked(1.9))
    ]
    assert [pipeline.round_to(recipe) for recipe in asked_for] == [32, 1]


def test_a_multiple_of_the_recipe_is_kept(project: Project, device: Simulated) -> None:
    built = project.build(asked(1.9), *SHORT[:2], "accuracy.max_drop=null", "prune.round_to=6")
    widths = {group["kept"] for group in built.manifest["pruned"]["groups"]}
    assert budget_of(built)["staircase"]["multiple"] == 6 and all(width % 6 == 0 for width in widths)


@pytest.mark.parametrize("at", [1, 5])
def test_a_connection_that_ends_is_tried_again(fresh: Project, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    device = Simulated("ssh://board", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, failing=[at])
    use(device, monkeypatch)
    assert budget_of(fresh.build(asked(1.9), *SHORT))["verdict"] == "met"


def test_what_was_measured_before_the_target_was_lost_is_kept(fresh: Project, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- several latencies


def test_a_sweep_makes_a_bundle_for_each_latency_from_one_staircase(project: Project, device: Simulated) -> None:
    recipe = project.load(asked(1, trials=6), *SHORT)
    wanted = sweeping.latencies_of("1.6, 1.9,5")
    recipes = [project.load(*SHORT, *sweeping.overrides_of(recipe, value)) for value in wanted]
    with Workdir(project.folder / "work").open() as work:
        front = sweeping.sweep(recipes, work)
    points = front["points"]
    assert [point["latency_ms"] for point in points] == [5, 1.9, 1.6]
    assert [point["verdict"] for point in points] == ["not needed", "met", "met"]
    assert device.asked.count("measure") <= 3 * sum(point["trials"] for point in points) + 4, device.asked
    folder = project.folder / "work"
    for point in points:
        manifest = Bundle.read(folder / point["bundle"]).require_sealed().manifest
        assert manifest["budget"]["achieved_ms"] == point["achieved_ms"] <= point["latency_ms"]
        top = (folder / point["bundle"] / "report.html").read_text().partition("</header>")[0]
        assert ("Met: a p50 of" if point["verdict"] == "met" else "No pruning was needed: a p50 of") in top
    with (folder / "sweep.csv").open() as stream:
        rows = [*csv.DictReader(stream)]
    assert [float(row["achieved_ms"]) for row in rows] == [point["achieved_ms"] for point in points]
    assert json.loads((folder / "sweep.json").read_text())["points"] == points
    assert all((row["percentile"], row["precision"], row["threads"]) == ("50", "fp32", "1") for row in rows)
    page = (folder / "sweep.html").read_text()
    assert (
        page.count("<circle") == 4
        and 'href="bundle-1.9ms/report.html"' in page
        and "default-src &#39;none&#39;" in page
    )
    assert [*sweep_lines(front, folder)][-1].endswith("sweep.html")
    failed = {**front, "points": [{**points[2], "gate": "fail", "drop_pp": 5.17, "exit_code": 7}]}
    assert "FAIL: 1.6 ms: accuracy gate, drop +5.17 points (exit code 7)" in [*sweep_lines(failed, folder)]
    assert "the accuracy gate failed" in report.render_sweep(failed) and "the accuracy gate failed" not in page
    longest = {**front, "points": [{**point, "latency_ms": 0.881234} for point in points]}
    assert "\n 0.881234 ms " in "\n".join(sweep_lines(longest, folder)), "no cell breaks at 80 columns"


def test_a_sweep_whose_target_is_lost_keeps_what_it_has(fresh: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = fresh.load(asked(1, trials=6), *SHORT)
    recipes = [fresh.load(*SHORT, *sweeping.overrides_of(recipe, value)) for value in (5.0, 1.9)]
    use(Simulated("ssh://board", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, failing=[4, 5, 6]), monkeypatch)
    with Workdir(fresh.folder / "work").open() as work:
        front = sweeping.sweep(recipes, work)
    first, lost = front["points"]
    assert (first["verdict"], first["exit_code"], first["on_front"]) == ("not needed", 0, True)
    assert (lost["latency_ms"], lost["verdict"], lost["achieved_ms"], lost["exit_code"]) == (1.9, None, None, 5)
    assert not lost["on_front"] and front["dense"]["latency_ms"] == pytest.approx(DENSE, rel=0.01)
    folder = fresh.folder / "work"
    assert "target lost" in (folder / "sweep.html").read_text() and "target lost" in "\n".join(
        sweep_lines(front, folder)
    )
    assert len((folder / "sweep.csv").read_text().splitlines()) == 3
    assert [
        *faults({"schema": "cswap-deploy/sweep/1", "work": str(folder), **front}, schemas.of(command="sweep"))
    ] == []
    # a first request that fails leaves not even the dense latency
    use(
        Simulated("ssh://board", (), step=8, base_ns=BASE_NS, block_ns=BLOCK_NS, failing=[1, 2, 3], processor="other"),
        monkeypatch,
    )
    with Workdir(fresh.folder / "work").open() as work:
        front = sweeping.sweep(recipes[1:], work)
    assert front["dense"]["latency_ms"] is None and front["points"][0]["exit_code"] == 5
    assert "lost before anything was measured" in (folder / "sweep.html").read_text()


@pytest.mark.parametrize(("latencies", "code"), [("5,1.9", 0), ("5,1.1", 8)])
def test_the_command_answers_with_the_front_and_the_first_code_that_is_not_0(
    latencies: str, code: int, project: Project, device: Simulated
) -> None:
    settings = [part for setting in SHORT for part in ("--set", setting)]
    result = CliRunner().invoke(app, [
        "sweep", str(project.recipe), "--latency", latencies, "--work", str(project.folder / "work"), "--json", *settings,
    ])  # fmt: skip
    document = json.loads(result.stdout)
    assert result.exit_code == code, result.output
    assert list(faults(document, schemas.of(command="sweep"))) == []
    assert [point["latency_ms"] for point in document["points"]] == [float(part) for part in latencies.split(",")]


def test_the_front_is_what_nothing_else_beats() -> None:
    places = [(8.0, 0.9), (4.0, 0.8), (5.0, 0.79), (3.0, 0.7), None]
    assert [sweeping._on_front(place, places) for place in places] == [True, True, False, True, False]
    assert sweeping._place({"verdict": "not needed", "ratio": 1.01, "top1": 0.9}) == (1.0, 0.9)
    assert sweeping._place({"verdict": "met", "ratio": 0.6, "top1": 0.8}) == (0.6, 0.8)
    assert sweeping._place({"verdict": None, "ratio": None, "top1": 0.9}) is None


@pytest.mark.parametrize("text", ["", "3,x", "0,1", "-1", "nan", "inf", ","])
def test_a_list_of_latencies_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no list of milliseconds"):
        sweeping.latencies_of(text)


# --- what is told


def test_the_report_tells_candidates_and_steps(project: Project, device: Simulated) -> None:
    manifest = Bundle.read(project.folder / "work" / "bundle").manifest
    page, text = report.render(manifest, "html"), report.render(manifest, "markdown")
    assert '<section id="budget">' in page and page.count("candidate ") >= manifest["budget"]["trials"]
    for kind in manifest["budget"]["staircase"]["kinds"]:
        assert kind["name"] in page and len(kind["ms"]) == len(kind["widths"])
    assert "Budget. Met: a p50 of 1.9 ms was asked for" in text
    assert '<section id="budget">' not in report.render({**manifest, "budget": None}, "html")


@pytest.mark.parametrize("damage", [{"candidates": [{}]}, {"staircase": {"kinds": 3}}, {"ratio_asked": "x"}])
def test_a_budget_that_is_damaged_is_refused(project: Project, damage: dict[str, Any]) -> None:
    manifest = Bundle.read(project.folder / "work" / "bundle").manifest
    with pytest.raises(VerifyError, match="cannot be shown"):
        report.render({**manifest, "budget": manifest["budget"] | damage}, "html")


# --- other precisions


def test_the_loop_measures_what_ships_int8_too(project: Project, device: Simulated) -> None:
    built = project.build(asked(1.9), *SHORT, "ship=int8")
    block = budget_of(built)
    assert (block["verdict"], built.manifest["shipped"]) == ("met", "model.int8.onnx")
    assert (built.manifest["latency"]["precision"], block["staircase"]["multiple"]) == ("int8", 8)


@pytest.mark.parametrize("kind", ["fp16", "int8", "int8-tensorrt"])
def test_files_of_every_precision_are_narrowed(
    project: Project, device: Simulated, kind: Variant, tmp_path: Path
) -> None:
    with Workdir(project.folder / "work").open() as work:
        recipe, ready = prepared.find(work)
        groups = work.run(prune.find_groups, ready.source, ())
    images = ImageSet(data.catalogue(recipe.calibration.images, None, 6).scoring, recipe.calibration.images)
    made = variants.make(
        tmp_path, ready.dense["fp32"], ready.source, images, images, kind, recipe.onnx.graph, recipe.int8
    )
    narrow = tmp_path / "narrow.onnx"
    known = export.sizes_of(
        tmp_path, ready.source, groups, ready.dense["fp32"], recipe.onnx.graph, kind.startswith("int8")
    )
    template = Template.read(made.graph.path, groups, known)
    narrow.write_bytes(template.narrowed({"conv1": 16, "conv2": 5}, template.shared(tmp_path)))
    apart(template, {"conv1": 16, "conv2": 20}, ready.source.input.shape, tmp_path)
    require_runnable(narrow)
    shapes = [shape for shape in stored(narrow) if len(shape) > 1]
    assert {(16, 3, 1, 1), (5, 16, 3, 3), (6, 5)} <= set(shapes), shapes


def test_sizes_that_follow_another_group_than_was_learned_are_refused(
    project: Project, device: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned from the exports is tried on widths that none of them had."""
    with Workdir(project.folder / "work").open() as work:
        recipe, ready = prepared.find(work)
        groups = work.run(prune.find_groups, ready.source, ())
    really_learned, other = sizes.learned, {"conv1": "conv2", "conv2": "conv1"}

    def swapped(*seen: Any) -> sizes.Sizes:
        found, *rest = really_learned(*seen).found
        wrong = replace(found, per_unit=tuple((other[name], each) for name, each in found.per_unit))
        return sizes.Sizes((wrong, *rest))

    monkeypatch.setattr(sizes, "learned", swapped)
    with pytest.raises(ExportError, match="a narrowed graph does not run"):
        export.sizes_of(tmp_path, ready.source, groups, ready.dense["fp32"], recipe.onnx.graph, False)


def stored(path: Path) -> list[tuple[int, ...]]:
    """Shapes of all initializers."""
    return [tuple(item.dims) for item in onnx.load(path, load_external_data=False).graph.initializer]
