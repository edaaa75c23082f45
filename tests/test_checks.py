"""`check` finds what a build would find, and says it as the recipe spells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from typer.testing import CliRunner

from cswap_deploy import checks, cli, model, pipeline, progress
from cswap_deploy.errors import DataError, ModelError, PruningError
from cswap_deploy.paths import require_paths
from cswap_deploy.stage import Workdir

TYPOS = """
name: typos
model:
  factory: nett.py:colours
  checkpoint: weigths/w.pth
calibration:
  images: image
  labels: label.txt
"""


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def weights(project: Project, **kwargs: int) -> Path:
    """What fits the project's network, or one of other sizes."""
    from safetensors.torch import save_file

    from cswap_deploy.factory import call_factory

    path = project.folder / "w.safetensors"
    save_file(call_factory(f"{project.folder / 'net.py'}:colours", kwargs).state_dict(), path)
    return path


# --- paths


@pytest.mark.parametrize("command", ["check", "build"])
def test_all_wrong_paths_are_told_at_once_with_line_and_nearest_name(project, command):
    folder = project.folder
    (folder / "weights").mkdir()
    for name in ("weights/w.pth", "labels.txt"):
        (folder / name).touch()
    project.recipe.write_text(TYPOS)
    result = call(command, project.recipe, "--work", folder / "work")
    assert result.exit_code == 3, "of data and model the lower code"
    lines = result.stderr.removeprefix("error: ").splitlines()
    assert lines == [
        f"{project.recipe}:4: model.factory: {folder}/nett.py does not exist; did you mean 'net.py'?",
        f"{project.recipe}:5: model.checkpoint: {folder}/weigths/w.pth does not exist; did you mean '{folder}/weights/w.pth'?",
        f"{project.recipe}:7: calibration.images: {folder}/image does not exist; did you mean 'images'?",
        f"{project.recipe}:8: calibration.labels: {folder}/label.txt does not exist; did you mean 'labels.txt'?",
        "  hint: correct model.factory and model.checkpoint and calibration.images and calibration.labels; relative paths start at "
        "the recipe's folder, those of --set at the current one",
    ]
    assert not (folder / "imported").exists()


def test_nothing_is_suggested_where_nothing_is_like_it(project):
    with pytest.raises(ModelError) as refusal:
        require_paths(project.load("model.checkpoint=/nowhere/at/all.pth"))
    assert refusal.value.message.endswith("model.checkpoint: /nowhere/at/all.pth does not exist")
    assert refusal.value.message.startswith("--set model.checkpoint=/nowhere/at/all.pth: ")


def test_a_file_is_no_folder_and_a_link_may_lead_nowhere(project, tmp_path):
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    for override, kind, fault in (
        (f"model.checkpoint={tmp_path}", ModelError, "is a folder, expected a file"),
        (f"calibration.images={project.recipe}", DataError, "is a file, expected a folder"),
        (
            f"model.checkpoint={tmp_path}/link.pth",
            ModelError,
            f"is a link to {tmp_path}/gone.pth, which does not exist",
        ),
        (f"calibration.labels={project.recipe}/x", DataError, "cannot be read: Not a directory"),
    ):
        with pytest.raises(kind, match=fault):
            require_paths(project.load(override))
    require_paths(project.load())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(project, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        require_paths(project.load(f"calibration.images={closed}/images"))


def test_a_path_cannot_begin_a_line_of_its_own(project):
    result = call("check", project.recipe, "--set", 'model.checkpoint="a\\nPASS: all is well"')
    assert result.exit_code == 4 and "does not exist" in result.stderr
    assert not [line for line in result.stderr.splitlines() if line.startswith("PASS")]


# --- weights


def test_weights_that_do_not_fit_are_found_before_a_build(project):
    check = ["check", project.recipe, "--work", project.folder / "work", "--set", "model.checkpoint=w.safetensors"]
    assert "does not exist" in call(*check).stderr
    path = weights(project)
    check[-1] = f"model.checkpoint={path}"
    assert call(*check).exit_code == 0
    weights(project, copies=5)
    result = call(*check)
    assert result.exit_code == 4 and "conv1.bias is (30,), expected (24,)" in result.stderr
    path.write_bytes(path.read_bytes()[:100])
    result = call(*check)
    assert result.exit_code == 4 and "is not a valid safetensors file" in result.stderr
    assert not (project.folder / "work").exists()


def test_weights_of_a_timm_network_are_found_not_to_fit(project):
    settings = f"model={{name: resnet18, num_classes: 6, checkpoint: {weights(project)}}}"
    result = call("check", project.recipe, "--work", project.folder / "work", "--set", settings)
    assert result.exit_code == 4 and "does not fit the network" in result.stderr


def test_random_weights_with_a_gate_are_told_before_a_build(project):
    random = ["--set", "model={name: resnet10t, pretrained: false, num_classes: 6}"]
    result = call("check", project.recipe, "--work", project.folder / "work", *random)
    assert result.exit_code == 3 and "resnet10t has random weights, so that no drop can be judged" in result.stderr
    result = call(
        "check", project.recipe, "--work", project.folder / "work", *random, "--set", "accuracy.max_drop=null"
    )
    assert result.exit_code == 0 and "random weights" not in result.stderr


def test_a_factory_that_takes_no_number_of_classes_is_told_which_key_gives_it(project):
    result = call(
        "check", project.recipe, "--work", project.folder / "work", "--set", "model.num_classes=6", "--groups"
    )
    assert result.exit_code == 4
    assert "model.num_classes is given as an argument of that name" in " ".join(result.stderr.split())


def test_a_factory_s_classes_are_compared_with_the_folders(project):
    (project.folder / "labels.txt").write_text("blue\nred\n")
    result = call("check", project.recipe, "--set", f"calibration.labels={project.folder}/labels.txt")
    assert result.exit_code == 3 and "names 2 classes and the model has 6 outputs" in result.stderr


def test_what_was_proven_is_not_built_again(project, monkeypatch):
    recipe = project.load()
    with Workdir(project.folder / "work").open() as work:
        pipeline.load(recipe, work)
    monkeypatch.setattr(model, "_create", lambda *_: pytest.fail("built again"))
    assert dict(checks.check(recipe, project.folder / "work").stages)["source"] == "up to date"


# --- targets


@pytest.mark.parametrize("key", ["macs", "params"])
def test_a_target_out_of_reach_is_told_with_the_groups(project, key):
    recipe = [project.recipe, "--work", project.folder / "work", "--set", f"prune.target={{{key}: 0.001}}"]
    assert call("check", *recipe).exit_code == 0, "groups take as long as in a build: only where they are asked for"
    result = call("check", *recipe, "--groups")
    assert result.exit_code == 4
    assert (
        f"--set prune.target={{{key}: 0.001}}: prune.target asks to keep 0.001 of the {key}; with every group"
        in result.stderr
    )
    assert "prunable     2 proven groups; at their narrowest (round_to 1)" in result.stdout
    assert not (project.folder / "work").exists()


def test_a_target_just_within_reach_is_not_refused_and_one_just_beyond_is(project):
    recipe = project.load()
    groups = checks.check(recipe, project.folder / "work", prove=True).groups
    assert groups is not None
    left = groups.cost({group.name: (0,) for group in groups.groups})[1] / groups.cost({})[1]
    for fraction, code in ((left * 1.0001, 0), (left * 0.9999, 4)):
        result = call("check", project.recipe, "--groups", "--set", f"prune.target.macs={fraction!r}")
        assert result.exit_code == code, result.stderr


@pytest.mark.parametrize("target", ["{latency_ms: 2.5, percentile: 90}", "{fps: 400, percentile: 90}"])
def test_a_budget_is_told_and_what_is_not_known_of_it(project, target):
    result = call("check", project.recipe, "--set", f"prune.target={target}", "--set", "latency={}")
    assert result.exit_code == 0, result.stderr
    assert "budget       2.5 ms (p90); a build begins with the dense network's latency" in result.stdout


@pytest.mark.parametrize("target", ["{macs: 0.5}", "{max_drop: 1}"])
def test_a_round_to_that_leaves_nothing_to_remove_is_told(project, target):
    sets = ["--set", f"prune.target={target}", "--set"]
    result = call("check", project.recipe, "--groups", *sets, "prune.round_to=24")
    assert result.exit_code == 4
    assert "prune.round_to 24 leaves nothing to remove: no group has more than 24 units" in result.stderr
    assert "set prune.round_to to 12 or less" in result.stderr
    assert "leaves nothing" not in call("check", project.recipe, "--groups", *sets, "prune.round_to=12").stderr


def test_groups_of_an_earlier_run_are_used_without_being_asked_for(project):
    recipe = project.load("prune.target.macs=0.001")
    with Workdir(project.folder / "work").open() as work:
        pipeline.find_groups(recipe, pipeline.load(recipe, work), work)
    (fault,) = checks.check(recipe, project.folder / "work").faults
    assert isinstance(fault, PruningError) and "prune.target asks to keep 0.001 of the macs" in fault.message


def test_export_only_has_no_target_to_reach(project):
    report = checks.check(project.load("prune.target=null"), project.folder / "work", prove=True)
    assert report.faults == () and "prunable" not in report.facts and report.groups is not None


# --- the model, and what is asked of it


@pytest.mark.parametrize("command", ["check", "build"])
def test_a_fault_of_the_model_is_told_with_its_line(project, command):
    """Of the key that is to be corrected, where one is named; else of the model's name."""
    text = project.recipe.read_text()
    place = next(number for number, line in enumerate(text.splitlines(), 1) if "factory: " in line)
    bad = project.folder / "bad.safetensors"
    bad.write_bytes(b"no weights")
    for settings, where, said in (
        ((f"model.checkpoint={bad}",), f"--set model.checkpoint={bad}: ", "not a valid safetensors file"),
        (("model={name: resnet_18}",), "--set model={name: resnet_18}: ", "timm"),
        (("model.kwargs={depth: 9}",), "--set model.kwargs={depth: 9}: ", "does not take these arguments"),
        ((), f"{project.recipe}:{place}: ", "returned int"),
    ):
        if not settings:
            (project.folder / "net.py").write_text("def colours(**kwargs):\n    return 3\n")
        overrides = [part for setting in settings for part in ("--set", setting)]
        result = call(command, project.recipe, "--work", project.folder / "work", *overrides)
        assert result.exit_code == 4, result.stderr
        assert f"error: {where}" in result.stderr and said in result.stderr


def test_the_input_is_told(project):
    found = checks.check(project.load(), project.folder / "work").facts["input"]
    assert found.startswith("3x") and ", mean " in found and ", std " in found
    heard = progress.Recording()
    with progress.reporting(heard), Workdir(project.folder / "work").open() as work:
        pipeline.load(project.load(), work)
    assert f"input {found}" in heard.of("note")


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_target_out_of_reach_is_refused_before_anything_is_scored(project, kind):
    heard = progress.Recording()
    recipe = project.load(f"prune.target={{{kind}: 0.001}}")
    with (
        progress.reporting(heard),
        Workdir(project.folder / "work").open() as work,
        pytest.raises(PruningError, match=f"prune.target asks to keep 0.001 of the {kind}; with every group"),
    ):
        pipeline.build(recipe, work)
    assert heard.of("finished")[-1] == "groups" and "scores" not in heard.of("started")


def test_a_target_out_of_reach_is_told_beside_what_would_run(project):
    """After a build, so that source, split and groups are up to date."""
    work = project.folder / "work"
    with Workdir(work).open() as opened:
        pipeline.build(project.load("prune.target={macs: 0.9}", "accuracy.max_drop=null"), opened)
    found = checks.check(project.load("prune.target={macs: 0.001}", "accuracy.max_drop=null"), work)
    assert len(found.faults) == 1 and "asks to keep 0.001" in found.faults[0].message
    told = dict(found.stages)
    assert told["groups"] == "up to date" and told["scores"] == "refused: prune.target is out of reach"


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_where_all_may_stay_a_network_without_groups_is_built(project, kind):
    recipe = project.load(f"prune.target={{{kind}: 1.0}}", "prune.skip=['*']", "accuracy.max_drop=null")
    with Workdir(project.folder / "work").open() as work:
        bundle = pipeline.build(recipe, work)
    assert bundle.manifest["pruned"]["macs"] == bundle.manifest["model"]["macs"]
