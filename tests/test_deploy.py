"""The second half of a build: variants, latency, the gate on what ships, `deploy` on a machine without torch.

Every bundle here is really built and every latency really measured, of a network that runs in microseconds.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
from conftest import VNNI, Built, Project, build, faults, make_project, run, start_build, traces, tree, wait_until
from onnx import helper
from typer.testing import CliRunner

from cswap_deploy import cli, outline, pipeline, planning, progress, schemas, variants
from cswap_deploy.artifacts import File, OnnxModel, sha256_of
from cswap_deploy.bundle import Bundle
from cswap_deploy.device.target import AWAY, Probe, reach
from cswap_deploy.digests import sealed
from cswap_deploy.errors import DeviceError
from cswap_deploy.handoff import FILES
from cswap_deploy.recipe import Variant
from cswap_deploy.stage import Workdir

MEASURED = ("latency.duration_s=0.2", "latency.warmup_s=0.05")
CONTRACT = {
    "": "target runtime precision batch threads source pruned speedup speedup_ci95 stable peak_memory_mb conditions",
    "source": "p50_ms p90_ms p99_ms samples",
    "pruned": "p50_ms p90_ms p99_ms samples",
}
"""The latency block's keys that users were promised."""
PROMISED = {
    "manifest.json", "README.md", "report.html", "recipe.yaml", "model.onnx", "labels.txt", "preprocess.json", "plan.json",
    "weights.safetensors", "test_vectors/input.npy", "test_vectors/output.npy",
}  # fmt: skip
"""What every bundle holds, also one that fails."""
NOBODY = "ssh://somebody@127.0.0.1:1"
"""A port that nobody listens on refuses at once."""
WAY_ON = "cswap-deploy deploy WORK"
LIGHT = """
import sys
BLOCKED = set("torch timm PIL scipy onnx safetensors onnxsim onnxscript torch_pruning onnxconverter_common".split())

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
"""A sitecustomize.py that makes a Jetson's Python of ours."""
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def measured(colours: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The colours, built once more with their latency; tests only read it."""
    project = shutil.copytree(colours.recipe.parent, tmp_path_factory.mktemp("measured") / "project")
    return build(project / "recipe.yaml", MEASURED, project / "work")


@pytest.fixture
def own(measured: Built, tmp_path: Path) -> Built:
    """A copy of project and work folder of the test's own: nothing reruns but what the test changes."""
    project = shutil.copytree(measured.recipe.parent, tmp_path / "project")
    return replace(measured, recipe=project / "recipe.yaml", work=project / "work", bundle=_bundle(project / "work"))


@pytest.fixture(scope="module")
def without_tensorrt() -> None:
    with reach("local") as target:
        if Probe.of(target).document["tensorrt"]["version"]:
            pytest.skip("this machine has TensorRT, so its absence cannot be tested")


@pytest.fixture
def with_ssh() -> None:
    if shutil.which("ssh") is None:
        pytest.skip("OpenSSH's client is not installed")


def _bundle(work: Path) -> Bundle:
    return Bundle.read(work / "bundle")


def again(built: Built, *overrides: str, force: tuple[str, ...] = ()) -> tuple[Bundle, list[str]]:
    """One more build in the same work folder, and the stages that ran."""
    recording = progress.Recording()
    with progress.reporting(recording):
        bundle = build(built.recipe, overrides, built.work, force).bundle
    return bundle, recording.of("finished")


def call(*arguments: str | Path) -> Any:
    """A command inside this process; standard output and standard error apart."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def command(built: Built, *options: str) -> Any:
    """The real `build` in a process of its own, which ends with a line of JSON."""
    return run("-m", "cswap_deploy", "build", built.recipe, "--work", built.work, "--json", *options)


def sets(*overrides: str) -> list[str]:
    return [f"--set={text}" for text in overrides]


def require_complete(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle that holds all that was promised, and nothing that is not listed."""
    manifest = Bundle.read(folder).manifest
    assert list(faults(manifest, schemas.of(manifest=True))) == []
    assert set(tree(folder)) == {"manifest.json", *(entry["path"] for entry in manifest["files"])} >= PROMISED
    for entry in manifest["files"]:
        assert (sha256_of(folder / entry["path"]), (folder / entry["path"]).stat().st_size) == (
            entry["sha256"],
            entry["bytes"],
        )
    assert (manifest["verdict"] == "fail") == bool(manifest["reasons"]) == bool(manifest["exit_code"])
    return manifest


# --- latency


@pytest.mark.parametrize("place", CONTRACT)
def test_latency_has_every_key_that_users_were_promised(measured, place):
    block = measured.manifest["latency"][place] if place else measured.manifest["latency"]
    assert set(CONTRACT[place].split()) <= block.keys()


def test_latency_is_that_of_the_dense_and_of_the_shipped_model(measured):
    manifest = require_complete(measured.work / "bundle")
    latency = manifest["latency"]
    assert [latency[key] for key in ("target", "runtime", "precision", "batch", "threads")] == [
        "local", "onnxruntime", "fp32", 1, 1,
    ]  # fmt: skip
    for timing in (latency["source"], latency["pruned"]):
        assert 0 < timing["p50_ms"] <= timing["p90_ms"] <= timing["p99_ms"] < 50
        low, high = timing["p50_ci95_ms"]
        assert low <= timing["p50_ms"] <= high and timing["samples"] >= 100
    low, high = latency["speedup_ci95"]
    assert low < latency["speedup"] < high
    assert latency["stable"] == (not latency["unstable_because"])
    assert latency["peak_memory_mb"] > 10
    assert latency["conditions"]["cores"] >= 1 and latency["conditions"]["device"] == latency["conditions"]["cpu"]
    assert len(latency["conditions"]["load"]) == len(latency["conditions"]["mhz"]) == 2
    assert "times as fast as the dense model" in (measured.work / "bundle" / "report.html").read_text("utf-8")
    assert "times as fast as the dense model" in (measured.work / "bundle" / "README.md").read_text("utf-8")


def test_what_was_measured_tells_nothing_about_the_machine_but_its_kind(measured):
    assert measured.manifest["latency"]["conditions"]["device"]
    assert traces(measured) == {}


def test_layers_of_both_models_are_timed(measured):
    layers = measured.manifest["latency"]["layers"]
    (path,) = measured.work.glob("stages/latency/*/layers.json")
    assert [*layers] == ["source", "pruned"] == [*json.loads(path.read_text("utf-8"))]
    for rows in layers.values():
        assert {row["op"] for row in rows} & {"Conv", "FusedConv"} and all(row["ms"] >= 0 for row in rows)
    assert "Milliseconds along the network" in (measured.work / "bundle" / "report.html").read_text("utf-8")


def test_the_raw_samples_are_kept_and_give_the_figures(measured):
    from cswap_deploy.samples import Samples

    (path,) = measured.work.glob("stages/latency/*/samples.npz")
    samples, latency = Samples.load(path), measured.manifest["latency"]
    assert samples.models == 2
    assert [samples.percentile_ms(model, 99) for model in (0, 1)] == [
        latency[name]["p99_ms"] for name in ("source", "pruned")
    ]
    assert samples.speedup(1, against=0).value == latency["speedup"]


def test_a_second_build_measures_nothing_and_force_measures_again(own):
    before = tree(own.work / "bundle")
    assert again(own, *MEASURED)[1] == [] and tree(own.work / "bundle") == before
    bundle, ran = again(own, *MEASURED, force=("latency",))
    assert ran == ["latency", "bundle"]
    assert bundle.manifest["latency"]["source"] != own.manifest["latency"]["source"]
    assert bundle.manifest["accuracy"] == own.manifest["accuracy"]


def test_a_change_of_the_measurement_reruns_the_measurement_and_the_bundle(own):
    bundle, ran = again(own, "latency.duration_s=0.1", "latency.warmup_s=0")
    assert ran == ["latency", "bundle"] and bundle.manifest["latency"]["duration_s"] == 0.1


def test_a_change_of_the_gate_reruns_the_bundle(own):
    bundle, ran = again(own, *MEASURED, "accuracy.max_drop=2")
    assert ran == ["bundle"] and bundle.manifest["accuracy"]["gate"]["max_drop_pp"] == 2
    assert bundle.manifest["accuracy"]["holdout_reads"] == own.manifest["accuracy"]["holdout_reads"]


def test_int8_that_ships_is_what_is_measured_and_judged(own):
    bundle, ran = again(own, *MEASURED, "ship=int8")
    made = ["variants (int8)", "variants (int8, dense)"]
    assert ran == [*made, "accuracy", "latency", "latency (files)", "bundle"], "the last: both files of the bundle"
    manifest = require_complete(bundle.folder)
    assert manifest["shipped"] == "model.int8.onnx" and manifest["latency"]["precision"] == "int8"
    assert manifest["accuracy"]["shipped"] == manifest["accuracy"]["variants"]["int8"]
    (dense,) = (file for file in own.work.glob("stages/variants/*/model.onnx") if not _ships(file, bundle))
    assert sum(map(_weights, (dense,))) > sum(map(_weights, (bundle.folder / "model.int8.onnx",)))


def _ships(file: Path, bundle: Bundle) -> bool:
    return sha256_of(file) == sha256_of(bundle.folder / "model.int8.onnx")


def _weights(file: Path) -> int:
    return sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer)


# --- variants, and the gate on what ships


def test_variants_are_listed_in_the_bundle_and_judged(own):
    bundle, ran = again(own, "ship=fp16", "variants=[fp16, int8, int8-tensorrt, int8-arm]")
    manifest = require_complete(bundle.folder)
    made = [f"variants ({name})" for name in ("fp16", "int8", "int8-tensorrt", "int8-arm")]
    assert ran == [*made, "accuracy", "bundle"], "without a measurement nothing needs the dense twin"
    assert manifest["shipped"] == "model.fp16.onnx" and manifest["latency"] is None
    listed = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    names = [FILES[kind] for kind in ("fp32", *get_args(Variant))]
    assert {name for name in listed if name.endswith(".onnx")} == set(names)
    if VNNI:  # without it two of the int8 files may end as the same weights alone
        assert len({listed[name] for name in names}) == len(names)
    assert manifest["accuracy"]["variants"].keys() == manifest["onnx"]["variants"].keys() == set(get_args(Variant))
    assert {found["top1"] for found in manifest["accuracy"]["variants"].values()} == {1.0}
    assert manifest["accuracy"]["shipped"] == manifest["accuracy"]["variants"]["fp16"]
    for name, found in manifest["onnx"]["variants"].items():
        assert found["file"] == FILES[name] and onnx.load(bundle.folder / found["file"]).ir_version <= 10
    assert again(own, "ship=fp32", "variants=[fp16, int8, int8-tensorrt, int8-arm]")[1] == ["bundle"]


@pytest.mark.parametrize(("ship", "code"), [("int8", 7), ("fp32", 0)])
def test_the_gate_judges_what_ships(own, monkeypatch, ship, code):
    monkeypatch.setattr(variants, "make", replace(variants.make, function=permuted(variants.make.function)))
    manifest = require_complete(again(own, "variants=[int8]", f"ship={ship}")[0].folder)
    accuracy = manifest["accuracy"]
    assert accuracy["variants"]["int8"]["top1"] == 0 and accuracy["exported"]["top1"] == 1
    assert (manifest["exit_code"], manifest["verdict"]) == (code, "fail" if code else "pass")
    assert accuracy["gate"]["verdict"] == manifest["verdict"]
    assert accuracy["drop_pp"] == (100 if code else 0) and accuracy["agreement"] == (0 if code else 1)
    assert accuracy["worst_classes"][0]["drop_pp"] == accuracy["drop_pp"]
    assert manifest["reasons"] == (
        ["accuracy: the drop exceeds 1 points (observed +100.00 points on 24 images)"] if code else []
    )


def permuted(make: Callable[..., OnnxModel]) -> Callable[..., OnnxModel]:
    """A conversion that gives each class the logit of its neighbour."""

    @wraps(make)
    def wrapped(out: Path, *arguments: Any) -> OnnxModel:
        made = make(out, *arguments)
        graph = onnx.load(made.graph.path)
        name = graph.graph.output[0].name
        for node in graph.graph.node:
            node.output[:] = ["straight" if output == name else output for output in node.output]
        order = [*range(1, graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value), 0]
        graph.graph.initializer.append(helper.make_tensor("order", onnx.TensorProto.INT64, [len(order)], order))
        graph.graph.node.append(helper.make_node("Gather", ["straight", "order"], [name], axis=1))
        onnx.save(graph, made.graph.path)
        return replace(made, graph=File.of(made.graph.path))

    return wrapped


# --- what cannot be done: an exit code, a reason, and a complete bundle


def require_failed(done: Any, code: int, built: Built) -> dict[str, Any]:
    """The manifest of a run of the real command that ended with `code` and left a complete bundle."""
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert list(faults(found, schemas.of(command="build"))) == []
    manifest = require_complete(built.work / "bundle")
    assert found["manifest"] == manifest and found["verdict"] == manifest["verdict"] == "fail"
    assert manifest["exit_code"] == code and "Traceback" not in done.stderr
    return manifest


def test_without_tensorrt_the_bundle_says_what_is_missing_and_how_to_finish(own, without_tensorrt):
    manifest = require_failed(command(own, *sets("engine={precision: fp32}")), 5, own)
    engine = manifest["engine"]
    assert (engine["built"], engine["precision"], engine["bytes"]) == (False, "fp32", None)
    assert engine["reason"] == manifest["reasons"][0]
    assert "TensorRT cannot be used on the target" in engine["reason"] and WAY_ON in engine["reason"]
    assert manifest["latency"] is None and manifest["accuracy"]["gate"]["verdict"] == "pass"
    assert manifest["accuracy"]["engine"] is None and manifest["shipped"] == "model.onnx"
    assert not (own.work / "bundle" / "engine").exists()
    result = call("build", own.recipe, "--work", own.work, *sets("engine={precision: fp32}"))
    assert result.exit_code == 5 and "FAIL: engine: " in result.stdout
    told = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert {line.split()[-1] for line in told} == {"date"}


def test_an_engine_that_cannot_be_built_does_not_stop_the_measurement_of_what_ships(own, without_tensorrt):
    bundle, _ = again(own, *MEASURED, "engine={precision: fp16}", "ship=fp32", "prune.round_to=1")
    manifest = require_complete(bundle.folder)
    assert manifest["exit_code"] == 5 and manifest["engine"]["built"] is False and len(manifest["reasons"]) == 1
    assert manifest["latency"]["runtime"] == "onnxruntime" and manifest["shipped"] == "model.onnx"


def test_a_target_out_of_reach_leaves_a_bundle_without_latency_and_without_its_address(own, with_ssh):
    done = command(own, "--on", NOBODY, *sets(*MEASURED))
    manifest = require_failed(done, 5, own)
    assert manifest["latency"] is None and manifest["engine"] is None
    assert len(manifest["reasons"]) == 1 and manifest["reasons"][0].startswith("target: ")
    assert "cannot be reached" in manifest["reasons"][0] and WAY_ON in manifest["reasons"][0]
    assert "warning: ssh://somebody@127.0.0.1:1 cannot be reached" in done.stderr, "who runs it may know where"
    for name in ("manifest.json", "README.md", "report.html", "recipe.yaml"):
        text = (own.work / "bundle" / name).read_text("utf-8")
        assert "127.0.0.1" not in text and "somebody" not in text, name
    assert require_failed(command(own, "--on", NOBODY, *sets(*MEASURED)), 5, own) == manifest
    bundle, ran = again(own, *MEASURED)
    assert bundle.verdict == "pass" and bundle.manifest["reasons"] == []
    assert "latency" not in ran and bundle.manifest["latency"] == own.manifest["latency"]


def test_a_target_out_of_reach_and_a_failed_gate_end_with_the_target_s_code(own, with_ssh):
    found = call(
        "build", own.recipe, "--work", own.work, "--on", NOBODY, *sets(*MEASURED, "accuracy.rule=bound"), "--json"
    )
    manifest = require_complete(own.work / "bundle")
    assert found.exit_code == manifest["exit_code"] == 5 and manifest["accuracy"]["gate"]["verdict"] == "fail"
    assert [text.partition(":")[0] for text in manifest["reasons"]] == ["target", "accuracy"]


def test_a_failed_gate_ends_with_7_each_time(own):
    for _ in range(2):
        manifest = require_failed(command(own, *sets(*MEASURED, "accuracy.rule=bound")), 7, own)
        assert manifest["latency"] == own.manifest["latency"]
        assert manifest["reasons"][0].startswith("accuracy: the upper bound at 95 % of the drop exceeds 1 points")


def test_a_variant_that_cannot_be_made_ends_with_6_and_the_rest_is_there(tmp_path, cheap_export):
    """Its logits leave float16; nothing is lost in float32."""
    project = make_project(tmp_path / "project")
    source = project.folder / "net.py"
    source.write_text(source.read_text().replace("* 8 /", "* 8e6 /"))
    built = Built(project.recipe, (), tmp_path / "work", None)  # type: ignore[arg-type]
    asked = ("prune.target=null", "ship=fp16", "variants=[int8]", *MEASURED)
    with Workdir(built.work).open() as opened:  # the real command below then finds the cheap export
        pipeline.prepare(project.load(asked[0], *MEASURED), opened)
    manifest = require_failed(command(built, *sets(*asked)), 6, built)
    assert [text.partition(": '")[0] for text in manifest["reasons"]] == [
        "variant fp16",
        "dense network, variant fp16",
    ]
    assert "'logits' reaches" in manifest["reasons"][0] and "float16 ends at 65504" in manifest["reasons"][0]
    assert manifest["accuracy"]["gate"]["verdict"] == "pass" and manifest["accuracy"]["variants"].keys() == {"int8"}
    assert manifest["shipped"] == "model.onnx" and manifest["latency"] is None
    assert {path.name for path in (built.work / "bundle").glob("*.onnx")} == {"model.onnx", "model.int8.onnx"}
    assert again(built, *asked)[0].manifest == manifest


# --- prepare here, deploy there


def unfinished(own: Built) -> Path:
    """The work folder as `prepare` leaves it: nothing of the device's half, but what was measured before."""
    result = call("prepare", own.recipe, "--work", own.work, *sets(*MEASURED), "--json")
    assert result.exit_code == 0, result.stderr
    assert list(faults(json.loads(result.stdout), schemas.of(command="prepare"))) == []
    shutil.rmtree(own.work / "bundle")
    shutil.rmtree(own.work / "stages" / "bundle")
    return own.work


def test_prepare_and_deploy_make_the_bundle_of_build(own):
    work = unfinished(own)
    result = call("deploy", work, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(faults(found, schemas.of(command="deploy"))) == [] and found["schema"] == "cswap-deploy/deploy/1"
    manifest = require_complete(work / "bundle")
    undated = {key: own.manifest[key] for key in ("created", "files", "sha256")}
    assert found["manifest"] == manifest and {**manifest, **undated} == own.manifest
    again = call("deploy", work)
    assert again.exit_code == 0 and "\nPASS: " in again.stdout
    assert [line.split()[0:1] + line.split()[-3:] for line in again.stderr.splitlines()] == [
        ["[", "up", "to", "date"],
        ["[", "up", "to", "date"],
    ]


def test_prepared_results_stay_however_often_deploy_runs(own):
    work = unfinished(own)
    results = json.loads((work / "prepared.json").read_text())["results"]
    for _ in range(2):
        (work / "history.json").unlink()
        assert call("deploy", work, "--quiet").exit_code == 0
        assert all((work / "stages" / name / "stage.json").is_file() for name in results)
    assert not list((work / "stages" / "latency").glob("*"))[1:]


def test_deploy_of_a_copied_folder_needs_no_torch_and_nothing_of_the_host(own, tmp_path):
    work = shutil.copytree(unfinished(own), tmp_path / "device" / "copy")
    shutil.rmtree(work / "stages" / "latency")
    shutil.rmtree(own.recipe.parent)
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "sitecustomize.py").write_text(LIGHT)
    done = run("-m", "cswap_deploy", "deploy", "copy", cwd=tmp_path / "device", PYTHONPATH=str(tmp_path / "light"))
    assert done.returncode == 0, done.stderr
    assert [line.split(maxsplit=2)[1:] for line in done.stderr.splitlines() if line.startswith("[")] == [
        ["1/2]", "latency    not run yet"],
        ["2/2]", "bundle     not run yet"],
    ]
    assert max(map(len, done.stdout.splitlines())) <= 80 and "bundle   copy/bundle" in done.stdout
    manifest = require_complete(work / "bundle")
    assert manifest["verdict"] == "pass" and manifest["latency"] != own.manifest["latency"]
    assert manifest["environment"] == own.manifest["environment"], "torch's version is that of the host's half"
    assert str(tmp_path) not in (work / "bundle" / "manifest.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda work: shutil.rmtree(work), "is not a folder"),
        (lambda work: (work / "prepared.json").unlink(), "holds no prepared model"),
        (lambda work: (work / "work.json").unlink(), "is not a work folder"),
        (lambda work: (work / "prepared.json").write_text("{"), "prepared.json cannot be read"),
        (lambda work: (work / "prepared.json").write_text("[]"), "prepared.json cannot be read"),
        (lambda work: (work / "prepared.json").write_bytes(b"\xff\xfe"), "prepared.json cannot be read"),
        (lambda work: (work / "prepared.json").write_text("[" * 100_000), "prepared.json cannot be read"),
        (lambda work: (work / "prepared.json").write_text('{"schema": "other/2"}'), "has schema 'other/2'"),
        (
            lambda work: edit(work / "prepared.json", lambda found: found["recipe"].update(seed="x")),
            "prepared.json cannot be read",
        ),
        (lambda work: edit(work / "prepared.json", lambda found: found.pop("ready")), "prepared.json cannot be read"),
        (lambda work: edit(work / "prepared.json", lambda found: found.update(results=None)), "cannot be read"),
        (
            lambda work: next(work.glob("stages/simplified/*/model.onnx")).write_bytes(b""),
            "stored file model.onnx is damaged",
        ),
        (lambda work: next(work.glob("stages/pruned/*/*.safetensors")).unlink(), "is missing"),
        (lambda work: shutil.rmtree(work / "stages" / "accuracy"), "stored result is damaged"),
    ],
)
def test_deploy_refuses_what_prepare_did_not_leave(own, damage, message):
    before = own.work / "bundle"
    kept = tree(before)
    damage(own.work)
    result = call("deploy", own.work, "--json")
    assert result.exit_code == 2 and message in result.stderr and "  hint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert list(faults(json.loads(result.stdout), schemas.of(command="deploy"))) == []
    assert not before.exists() or tree(before) == kept


def test_deploy_of_a_bundle_names_its_work_folder(measured):
    result = call("deploy", measured.work / "bundle")
    assert result.exit_code == 2 and f"its work folder is {measured.work}" in result.stderr


def test_the_dense_twin_is_no_change_of_the_pruned_network(own):
    """Both have the stages exported and simplified; neither is compared with the other."""
    shutil.rmtree(own.work)
    recording = progress.Recording()
    with progress.reporting(recording):
        build(own.recipe, MEASURED, own.work)
    started = [event for event in recording.events if event[0] == "started"]
    assert [event[1] for event in started if event[1].startswith("exported")] == ["exported", "exported (dense)"]
    assert recording.of("finished") == list(outline.lines(Project(own.recipe.parent).load(*MEASURED))), (
        "each has a line, in this order"
    )
    assert {event[2] for event in started} == {"not run yet"}


def test_what_is_left_to_do_can_be_pasted(own, with_ssh):
    result = call("build", own.recipe, "--work", own.work, "--on", NOBODY, *sets(*MEASURED))
    assert result.exit_code == 5
    assert f"deploy {own.work} --on TARGET" in result.stdout and "accuracy passed: the drop is within" in result.stdout
    assert NOBODY in result.stderr


def test_deploy_of_an_empty_folder_leaves_it_empty(tmp_path):
    result = call("deploy", tmp_path)
    assert result.exit_code == 2 and "first run: cswap-deploy prepare RECIPE" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_deploy_on_a_target_where_the_default_measurement_does_not_fit_is_refused(own):
    batch = "{min: 4, opt: 4, max: 4}"
    recipe = Project(own.recipe.parent).load(f"engine={{precision: fp32, batch: {batch}}}", "onnx.dynamic_batch=true")
    edit(own.work / "prepared.json", lambda found: found.update(recipe=recipe.model_dump(mode="json")))
    result = call("deploy", own.work, "--on", "local")
    assert result.exit_code == 2 and "expected a batch of the engine (4 to 4), got 1" in result.stderr
    assert "add a latency block to the recipe and run prepare again" in result.stderr


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(sealed(document)))


def test_deploy_on_a_target_needs_a_folder_that_was_prepared_for_it(colours, tmp_path):
    work = shutil.copytree(colours.work, tmp_path / "work")
    result = call("deploy", work, "--on", "local")
    assert result.exit_code == 2 and "was prepared without a measurement" in result.stderr
    assert f"run prepare again with --on TARGET, or with a latency block in the recipe, and --work {work}" in " ".join(
        result.stderr.split()
    )
    assert call("deploy", work, "--quiet").exit_code == 0


def test_deploy_on_another_target_than_the_recipe_s(own, with_ssh):
    work = unfinished(own)
    result = call("deploy", work, "--on", NOBODY, "--quiet")
    assert result.exit_code == 5 and require_complete(work / "bundle")["latency"] is None
    assert call("deploy", work, "--on", "local", "--quiet").exit_code == 0
    assert require_complete(work / "bundle")["latency"] == own.manifest["latency"]


# --- targets


@pytest.mark.parametrize("target", ["ssh://-x", "ssh://-x@host", "ssh://a b", "ssh://a:b", "ssh://", "foo", "host", ""])
@pytest.mark.parametrize("name", ["build", "prepare", "check", "deploy", "doctor"])
def test_what_is_no_target_is_refused_with_words(own, name, target):
    place = {"deploy": [own.work], "doctor": []}.get(name, [own.recipe, "--work", own.work])
    result = call(name, *place, "--on", target)
    assert result.exit_code == 2 and f"--on: {target!r} is no target" in result.stderr
    assert "give local or ssh://[user@]host[:port]" in result.stderr and result.stdout == ""


def test_a_target_on_the_command_line_adds_the_measurement(colours, own):
    found = json.loads(call("check", colours.recipe, "--work", colours.work, "--on", "local", "--json").stdout)
    assert found["facts"]["target"].startswith("local (")
    assert {stage["name"]: stage["status"] for stage in found["stages"]}["latency"] != "up to date"
    for options in (["--on", "local"], []):
        result = call("build", own.recipe, "--work", own.work, *sets(*MEASURED), *options, "--json")
        assert result.exit_code == 0 and json.loads(result.stdout)["manifest"] == own.manifest


def test_check_names_the_target_and_what_runs_there(own):
    before = sorted(own.work.rglob("*"))
    result = call("check", own.recipe, "--work", own.work, *sets(*MEASURED))
    lines = [line for line in result.stdout.split("\n\n")[0].splitlines() if not line.startswith(" ")]
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert result.exit_code == 0 and facts["target"].startswith("local (") and ", onnxruntime 1." in facts["target"]
    status = dict(line.split(maxsplit=1) for line in result.stdout.split("\n\n")[1].splitlines())
    assert set(status.values()) == {"up to date"} and "latency" in status
    changed = call("check", own.recipe, "--work", own.work, *sets(*MEASURED, "latency.threads=2"))
    assert "latency      settings.threads: 1 -> 2" in changed.stdout
    assert sorted(own.work.rglob("*")) == before


def test_check_of_an_engine_without_tensorrt_says_so_and_writes_nothing(own, without_tensorrt):
    before = tree(own.work)
    result = call("check", own.recipe, "--work", own.work, *sets("engine={precision: fp32}"))
    assert result.exit_code == 5 and "TensorRT cannot be used on the target" in result.stderr
    assert tree(own.work) == before
    result = call("check", own.recipe, "--work", own.work / "new", *sets("engine={precision: fp32}"))
    assert result.exit_code == 5 and not (own.work / "new").exists()


def test_check_of_a_target_out_of_reach_ends_with_5(own, with_ssh):
    before = tree(own.work)
    result = call("check", own.recipe, "--work", own.work, "--on", NOBODY)
    assert result.exit_code == 5 and f"{NOBODY} cannot be reached" in result.stderr
    assert "problem: the target cannot be reached" in result.stdout and "images" in result.stdout, (
        "the rest is told too"
    )
    assert tree(own.work) == before


# --- interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_leaves_no_agent_and_the_next_run_completes(own, cache, number):
    shutil.rmtree(own.work / "bundle")
    process = start_build(own.recipe, own.work, *sets("latency.duration_s=20", "latency.warmup_s=0"), "--quiet")
    wait_until(lambda: (own.work / "tmp" / "latency-0").exists() and bool(agents(cache)), process)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "error: interrupted" in stderr
    assert time.monotonic() - sent < 3
    while agents(cache) and time.monotonic() - sent < 3:
        time.sleep(0.01)
    assert agents(cache) == []
    bundle, ran = again(own, *MEASURED)
    assert ran == [] and bundle.manifest == own.manifest


def agents(cache: Path) -> list[str]:
    """Processes that an agent runs in and what they started, known by the folder of this test's own in their surroundings."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"XDG_CACHE_HOME={cache}".encode() in (folder / "environ").read_bytes()
            text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [text] if mine and "agent.py" in text else []
    return found


# --- the target is away


def test_a_target_that_is_away_costs_nothing_that_was_measured(own, monkeypatch):
    """Nothing changed, the board is off: what it measured is still what it measured."""
    bundle, _ = again(own, *MEASURED)
    before = require_complete(bundle.folder)

    @contextmanager
    def off(name):
        raise DeviceError(f"{name} cannot be reached", "switch it on", public=AWAY)
        yield

    monkeypatch.setattr(planning, "reach", off)
    bundle, ran = again(own, *MEASURED)
    assert ran == []
    assert require_complete(bundle.folder) == before
    bundle, _ = again(own, *MEASURED, "latency.threads=2")
    failed = require_complete(bundle.folder)
    assert failed["exit_code"] == 5 and failed["latency"] is None and AWAY in failed["reasons"][0]


def test_what_one_target_measured_is_not_taken_for_another_one_s(own, with_ssh):
    require_complete(again(own, *MEASURED)[0].folder)
    failed = require_failed(command(own, "--on", NOBODY, *sets(*MEASURED)), 5, own)
    assert failed["latency"] is None
