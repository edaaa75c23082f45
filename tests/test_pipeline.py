"""The whole line from a recipe to a bundle: complete, repeatable, resumed where it stopped, rerun only where it must."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from typing import Any

import pytest
from conftest import (
    COLOURS,
    HOLDOUT,
    ROOT,
    SHARED,
    Built,
    build,
    events,
    faults,
    run,
    start_build,
    tree,
    wait_until,
)

from cswap_deploy import accuracy, data, export, model, pipeline, schemas
from cswap_deploy.artifacts import ImageSet
from cswap_deploy.errors import DataError, PruningError
from cswap_deploy.factory import code_files
from cswap_deploy.prune.cut import restore
from cswap_deploy.recipe import load
from cswap_deploy.stage import Workdir

CONTRACT = {
    "": "schema name created tool recipe_sha256 shipped verdict reasons exit_code model pruned accuracy onnx latency budget engine "
    "files environment",
    "tool": "version",
    "model": "name source params macs input",
    "model.input": "shape mean std interpolation crop_pct",
    "pruned": "params macs units units_removed criterion compensation steps",
    "accuracy": "images source pruned exported variants engine shipped drop_pp drop_ci95_pp agreement worst_classes gate "
    "holdout_reads",
    "accuracy.source": "top1 top5",
    "accuracy.pruned": "top1 top5",
    "accuracy.exported": "top1 top5",
    "accuracy.shipped": "top1 top5",
    "accuracy.worst_classes.0": "label drop_pp images",
    "accuracy.gate": "max_drop_pp rule verdict proven images_to_prove",
    "onnx": "opset ir_version parity nodes_exported nodes_simplified",
    "onnx.parity": "max_abs sqnr_db",
    "files.0": "path sha256 bytes",
    "environment": "python torch timm onnx onnxruntime platform",
}
"""The manifest's keys that users were promised, by block."""

ALL = (
    "source",
    "split",
    "groups",
    "scores",
    "curves",
    "plan",
    "pruned",
    "exported",
    "simplified",
    "accuracy",
    "bundle",
)
LINES = (*ALL[: ALL.index("accuracy")], "accuracy (dense)", *ALL[ALL.index("accuracy") :])
CHEAP = ("prune.criterion=magnitude", "prune.compensate=none")


def block(manifest: dict[str, Any], place: str) -> dict[str, Any]:
    node: Any = manifest
    for key in place.split(".") if place else ():
        node = node[int(key) if key.isdecimal() else key]
    return node


def kept(built: Built) -> dict[str, int]:
    return {group["name"]: group["kept"] for group in built.manifest["pruned"]["groups"]}


def products(built: Built) -> dict[str, bytes]:
    """Everything in the bundle that does not hold a date or count runs."""
    dated = {"manifest.json", "report.html", "MODEL_CARD.md", "bom.cdx.json"}
    return {name: content for name, content in tree(built.bundle.folder).items() if name not in dated}


def ran(found: dict[str, str]) -> set[str]:
    return {stage for stage, event in found.items() if event == "finished"}


# --- what comes out


@pytest.mark.parametrize("place", CONTRACT)
def test_manifest_has_every_key_that_users_were_promised(quickstart, place):
    assert set(CONTRACT[place].split()) <= block(quickstart.manifest, place).keys()


def test_manifest_of_every_kind_of_build_keeps_to_the_schema(quickstart, colours):
    for built in (quickstart, colours):
        assert list(faults(built.manifest, schemas.of(manifest=True))) == []


def test_build_meets_its_target_and_its_gate(quickstart):
    manifest = quickstart.manifest
    dense, pruned, found = manifest["model"], manifest["pruned"], manifest["accuracy"]
    assert 0.5 < pruned["macs"] / dense["macs"] <= 0.6
    assert pruned["units_removed"] == pruned["units"] - sum(group["kept"] for group in pruned["groups"])
    assert (pruned["criterion"], pruned["compensation"], pruned["steps"]) == ("causal", "least_squares", 1)
    assert found["images"] == 100 and found["source"]["top1"] > 0.97
    assert found["drop_pp"] <= 1.0 and manifest["verdict"] == found["gate"]["verdict"] == "pass"
    assert found["holdout_reads"] == 1 and manifest["reasons"] == []


def test_figures_are_of_the_files_in_the_bundle(quickstart):
    from safetensors.numpy import load_file

    folder, manifest = quickstart.bundle.folder, quickstart.manifest
    plan = json.loads((folder / "plan.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert (
        sum(array.size for name, array in weights.items() if not name.endswith(buffers)) == manifest["pruned"]["params"]
    )
    assert {name: len(units) for name, units in plan["keep"].items()} == kept(quickstart)
    assert {name: list(array.shape) for name, array in weights.items()} == plan["shapes"]["after"]
    assert (folder / "recipe.yaml").read_text().splitlines()[1] == "name: quickstart"


# --- what runs again


def test_a_second_run_does_nothing_and_loads_no_framework(quickstart):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cswap_deploy import Workdir, build, load_recipe, progress\n"
        "heard = progress.Recording()\n"
        "with progress.reporting(heard), Workdir(Path(sys.argv[2])).open() as work:\n"
        "    build(load_recipe(Path(sys.argv[1]), sys.argv[3:]), work)\n"
        "assert not heard.of('started'), heard.events\n"
        "print(len(heard.of('up to date')), [name for name in ('torch', 'timm', 'onnx') if name in sys.modules])\n"
    )
    before = tree(quickstart.bundle.folder)
    done = run("-c", code, quickstart.recipe, quickstart.work, *quickstart.overrides)
    assert (done.returncode, done.stdout.strip()) == (0, f"{len(LINES)} []"), done.stderr
    assert tree(quickstart.bundle.folder) == before


def test_a_change_reruns_what_depends_on_it_and_nothing_else(project, cheap_export):
    project.build()
    work = project.folder / "work"
    found = events(project.recipe, ["prune.target.macs=0.7"], work)
    assert tuple(found) == LINES
    judged = {"accuracy", "bundle"}  # not the dense network again
    assert ran(found) == {"plan", "pruned", "exported", "simplified", *judged}
    found = events(project.recipe, ["prune.target.macs=0.7", "accuracy.max_drop=5"], work)
    assert ran(found) == {"bundle"}, "outcomes are raw; the gate is a matter of the bundle"
    found = events(project.recipe, [], work)
    assert ran(found) == {"bundle"}, "the first settings' results are still there; the bundle counts hold-out readings"
    found = events(project.recipe, ["prune.compensate=mean"], work)
    assert {"source", "split", "groups", "scores"}.isdisjoint(ran(found)) and "curves" in ran(found)


def test_a_changed_image_is_found_and_the_rest_stays(project, cheap_export):
    project.build()
    image = project.folder / "images" / "holdout" / "red" / "0.png"
    shutil.copy(image.with_name("1.png"), image)
    found = events(project.recipe, [], project.folder / "work")
    assert ran(found) == {"split", "accuracy (dense)", "accuracy", "bundle"}
    image.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"red/0\.png"):
        project.build()


def test_a_moved_folder_reruns_nothing(project, cheap_export, tmp_path):
    project.build()
    (tmp_path / "disk").mkdir()
    shutil.move(project.folder / "images", tmp_path / "disk" / "images")
    shutil.move(project.folder / "work", tmp_path / "disk" / "work")
    moved = [f"calibration.images={tmp_path / 'disk' / 'images'}"]
    assert ran(events(project.recipe, moved, tmp_path / "disk" / "work")) == set()


def test_a_moved_factory_is_looked_at_again_and_nothing_else(project, cheap_export, tmp_path):
    first = project.build()
    shutil.move(project.folder, tmp_path / "moved")
    recipe, work = tmp_path / "moved" / "recipe.yaml", tmp_path / "moved" / "work"
    assert ran(events(recipe, [], work)) <= {"source"}
    assert ran(events(recipe, ["prune.target.macs=0.9"], work)) >= {"plan", "pruned"}
    assert first.manifest["model"]["name"] == "net.py:colours"


def test_force_reruns_one_stage_and_what_its_result_changes(project, cheap_export):
    first = project.build()
    work = project.folder / "work"
    assert ran(events(project.recipe, [], work, force=["groups"])) == {"groups"}
    assert ran(events(project.recipe, [], work, force=["accuracy"])) == {"accuracy (dense)", "accuracy", "bundle"}
    again = project.build()
    assert again.manifest["accuracy"]["holdout_reads"] == first.manifest["accuracy"]["holdout_reads"] + 1 == 2
    assert products(again) == products(first)


def test_the_dense_network_is_judged_again_where_the_gate_is_switched_and_nothing_is_compared(project, cheap_export):
    """The gate refuses a network near chance, so that its switch is an input of the dense network's outcomes, not of the others'."""
    first = project.build()
    found = events(project.recipe, ["accuracy.max_drop=null"], project.folder / "work")
    assert ran(found) == {"scores", "accuracy (dense)", "bundle"}
    off = project.build("accuracy.max_drop=null")
    assert off.manifest["accuracy"]["holdout_reads"] == first.manifest["accuracy"]["holdout_reads"] == 1
    assert off.manifest["accuracy"]["source"] == first.manifest["accuracy"]["source"]


def test_readings_of_the_hold_out_are_counted_where_they_happen(project, cheap_export):
    assert project.build().manifest["accuracy"]["holdout_reads"] == 1
    assert project.build().manifest["accuracy"]["holdout_reads"] == 1
    assert project.build("accuracy.max_drop=2").manifest["accuracy"]["holdout_reads"] == 1
    with Workdir(project.folder / "work").open() as work:
        pipeline.prepare(project.load("prune.target.macs=0.9"), work)
        assert work.holdout_reads == 2, "the host's half judges its models"


def test_a_deleted_or_damaged_bundle_is_put_back(project, cheap_export):
    built = project.build("prune.target=null")
    before = tree(built.bundle.folder)
    (built.bundle.folder / "model.onnx").write_bytes(b"")
    (built.bundle.folder / "stray").touch()
    assert tree(project.build("prune.target=null").bundle.folder) == before
    shutil.rmtree(built.bundle.folder)
    assert tree(project.build("prune.target=null").bundle.folder) == before


def test_status_foretells_what_a_build_does(project, cheap_export):
    def status(*overrides: str) -> dict[str, str]:
        with Workdir(project.folder / "work", dry=True).open() as work:
            return dict(pipeline.status(project.load(*overrides), work))

    assert status()["source"] == "not run yet"
    assert not (project.folder / "work").exists()
    project.build()
    assert set(status().values()) == {"up to date"} and tuple(status()) == ALL
    assert status("accuracy.max_drop=2")["accuracy"] == "up to date"
    assert status("accuracy.max_drop=2")["bundle"].startswith("terms.accuracy.max_drop: 1.0 -> 2.0")
    shutil.rmtree(project.folder / "work" / "bundle")
    assert status()["bundle"] == "it differs from its result"


# --- the same again


def test_two_builds_in_two_places_give_the_same_bytes(colours, project, monkeypatch):
    monkeypatch.setattr(export, "_run_onnxsim", lambda source, target: shutil.copyfile(source, target) and None)
    other = project.build()
    for name in ("plan.json", "weights.safetensors", "recipe.yaml", "labels.txt", "preprocess.json"):
        assert (other.bundle.folder / name).read_bytes() == (colours.bundle.folder / name).read_bytes()
    graphs = [
        path.read_bytes() for built in (other, colours) for path in built.work.glob("stages/exported/*/model.onnx")
    ]
    assert len(graphs) == 2 and len(set(graphs)) == 1


def test_a_seed_is_a_setting(project, cheap_export):
    first, other = (project.build("prune.criterion=random", "prune.compensate=none", f"seed={seed}") for seed in (1, 2))
    assert kept(first) != kept(other) or first.manifest["files"] != other.manifest["files"]


KILLS = 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_a_build_completes_with_the_same_result(project, colours, seed):
    """Oracle 7: SIGKILL, which nothing can catch; in real processes, so that hash seeds differ as well."""
    dice = random.Random(seed)
    work = project.folder / "work"
    for stage in sorted(dice.sample(range(len(ALL)), KILLS)):
        process = start_build(project.recipe, work)
        wait_until(lambda: (work / "stages" / ALL[stage - 1]).exists() or not stage, process)  # noqa: B023
        time.sleep(dice.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start_build(project.recipe, work)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    again = build(project.recipe, (), work)
    assert products(again) == products(colours)
    assert not (work / "tmp").exists()


def test_killed_while_it_writes_a_result_a_build_completes_with_the_same_result(project, colours):
    work = project.folder / "work"
    process = start_build(project.recipe, work)
    wait_until(lambda: (work / "tmp" / "scores-0").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (work / "tmp").exists()
    assert {"source", "split", "groups"}.isdisjoint(ran(events(project.recipe, (), work)))
    assert products(build(project.recipe, (), work)) == products(colours)


# --- settings


@pytest.mark.parametrize(
    ("criterion", "compensate"),
    [
        ("{kind: causal, estimator: exact, intervention: mean, images: 12}", "least_squares"),
        ("taylor", "mean"),
        ("variance", "batchnorm"),
        ("random", "least_squares"),
        ("magnitude", "none"),
    ],
)
def test_every_criterion_and_every_compensation_builds(project, cheap_export, criterion, compensate):
    built = project.build(f"prune.criterion={criterion}", f"prune.compensate={compensate}", "prune.steps=1")
    pruned = built.manifest["pruned"]
    assert pruned["criterion"] in criterion and pruned["compensation"] == compensate
    assert 0.35 < pruned["macs"] / built.manifest["model"]["macs"] <= 0.5
    assert list(faults(built.manifest, schemas.of(manifest=True))) == []


def test_copies_leave_without_any_loss(colours):
    """Each class has four interchangeable units per layer: half of the network can go, and nothing is lost."""
    assert colours.manifest["accuracy"]["drop_pp"] == 0 and colours.manifest["accuracy"]["agreement"] == 1
    assert colours.manifest["accuracy"]["images"] == HOLDOUT * len(COLOURS)
    assert colours.manifest["pruned"]["macs"] <= 0.5 * colours.manifest["model"]["macs"]


def test_a_params_target_is_met(project, cheap_export):
    built = project.build("prune.target={params: 0.4}", *CHEAP)
    assert 0.3 < built.manifest["pruned"]["params"] / built.manifest["model"]["params"] <= 0.4


def test_without_a_target_the_dense_model_is_in_a_complete_bundle(project, cheap_export):
    built = project.build("prune.target=null")
    dense, pruned, found = (built.manifest[name] for name in ("model", "pruned", "accuracy"))
    assert (pruned["params"], pruned["macs"]) == (dense["params"], dense["macs"])
    assert (pruned["units_removed"], pruned["steps"], pruned["criterion"], pruned["compensation"]) == (
        0,
        0,
        "none",
        "none",
    )
    assert found["source"] == found["pruned"] == found["exported"] and found["agreement"] == 1
    assert built.manifest["verdict"] == "pass"
    assert set(tree(built.bundle.folder)) == {"manifest.json", *(entry["path"] for entry in built.manifest["files"])}
    assert list(faults(built.manifest, schemas.of(manifest=True))) == []


def test_round_to_holds_in_the_plan_and_in_the_onnx_file(project, cheap_export):
    import onnx

    built = project.build("prune.round_to=8", *CHEAP)
    assert {units % 8 for units in kept(built).values()} == {0} and min(kept(built).values()) < 24
    model = onnx.load(built.bundle.folder / "model.onnx")
    shapes = [list(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert sorted(shape[0] for shape in shapes) == sorted(kept(built).values())
    plan = json.loads((built.bundle.folder / "plan.json").read_text())
    assert {len(units) % 8 for units in plan["keep"].values()} == {0}


def test_skipped_layers_stay_whole(project, cheap_export):
    built = project.build("prune.skip=[conv1]", *CHEAP)
    assert kept(built).keys() == {"conv2"}
    plan = json.loads((built.bundle.folder / "plan.json").read_text())
    assert plan["shapes"]["after"]["conv1.weight"][0] == plan["shapes"]["before"]["conv1.weight"][0] == 24


def test_a_drop_target_stops_within_its_limit_on_selection(tmp_path, cheap_export):
    settings = ("calibration.scoring=64", "calibration.holdout=20", "prune.target={max_drop: 7}", "prune.round_to=1")
    settings += ("latency=null", *CHEAP)
    built = build(ROOT / "recipes" / "quickstart.yaml", settings, tmp_path / "work")
    steps = json.loads((built.bundle.folder / "plan.json").read_text())["steps"]
    assert steps and all(step["drop_pp"] <= 7 for step in steps)
    assert built.manifest["pruned"]["macs"] < 0.96 * built.manifest["model"]["macs"]
    assert [step["macs"] for step in steps] == sorted((step["macs"] for step in steps), reverse=True)


def test_a_bound_that_too_few_images_cannot_hold_fails_the_gate(project, cheap_export):
    built = project.build("prune.target=null", "accuracy.rule=bound")
    gate = built.manifest["accuracy"]["gate"]
    assert (built.manifest["verdict"], gate["verdict"], gate["proven"]) == ("fail", "fail", False)
    assert gate["images_to_prove"] > HOLDOUT * len(COLOURS)
    assert built.manifest["reasons"][0].startswith("accuracy: the upper bound at 95 % of the drop exceeds 1 points")


def test_without_a_gate_everything_passes(project, cheap_export):
    built = project.build("prune.target.macs=0.02", *CHEAP, "accuracy.max_drop=null")
    assert built.manifest["accuracy"]["drop_pp"] > 10
    assert (built.manifest["verdict"], built.manifest["accuracy"]["gate"]["verdict"]) == ("pass", "off")


def test_onnx_settings_reach_the_file(project, cheap_export):
    import onnx

    built = project.build("prune.target=null", "onnx={opset: 20, dynamic_batch: true}")
    model = onnx.load(built.bundle.folder / "model.onnx")
    assert model.opset_import[0].version == built.manifest["onnx"]["opset"] == 20
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


# --- refusals


def test_a_target_beyond_reach_is_refused_and_says_what_is_left(project, cheap_export):
    with pytest.raises(PruningError, match=r"asks to keep 0\.001 of the macs; .* 0\.002 is left"):
        project.build("prune.target.macs=0.001", *CHEAP)


# --- real inputs


def cifar() -> list[str]:
    images, weights = SHARED / "data" / "cifar10-lossless", SHARED / "models" / "cifar10_resnet56.safetensors"
    if not (images.is_dir() and weights.is_file()):
        pytest.skip("CIFAR-10 images and ResNet-56 weights are not beside the checkout, in ../shared")
    return [f"calibration.images={images}", f"model.checkpoint={weights}", "device=cpu"]


def test_the_published_resnet56_is_right_as_often_as_published(tmp_path):
    recipe = load(ROOT / "recipes" / "cifar10-resnet56.yaml", [*cifar(), "prune.target=null"])
    with Workdir(tmp_path / "work").open() as work:
        source = work.run(model.load, recipe.model, code_files(recipe.model.factory), recipe.seed)
        catalogue = data.catalogue(recipe.calibration.images, None, source.outputs, work.digest)
        split = work.run(data.split, catalogue, recipe.calibration.scoring, recipe.calibration.holdout, recipe.seed)
    predict = accuracy._torch(source, "cpu")
    holdout = ImageSet(split.holdout, recipe.calibration.images)
    labels, (outcome,) = accuracy.evaluate({"shipped": predict}, source, holdout)
    assert (len(labels), sum(a == y for a, y in zip(outcome.predicted, labels, strict=True))) == (846, 789)
    assert sum(parameter.numel() for parameter in restore(source).parameters()) == source.params


@pytest.mark.slow
def test_the_published_resnet56_is_pruned_to_70_percent(tmp_path):
    built = build(ROOT / "recipes" / "cifar10-resnet56.yaml", [*cifar(), "prune.steps=2"], tmp_path / "work")
    assert built.manifest["accuracy"]["source"]["correct"] == 789
    assert built.manifest["pruned"]["macs"] <= 0.7 * built.manifest["model"]["macs"]
    assert built.manifest["accuracy"]["drop_pp"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "quickstart-vit"])
def test_recipes_of_the_repository_pass_as_they_are(tmp_path, name):
    built = build(ROOT / "recipes" / f"{name}.yaml", ["device=cpu"], tmp_path / "work")
    assert built.manifest["verdict"] == "pass"


def test_work_folders_hold_no_more_than_stages_and_records(colours: Built):
    assert {path.name for path in colours.work.iterdir()} == {
        "bundle", "digests.json", "history.json", "holdout_reads", "lock", "prepared.json", "stages", "work.json",
    }  # fmt: skip
