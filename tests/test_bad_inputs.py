"""Bad recipes, images and weights through the real command line: the exit code, the words, and nothing on disk harmed."""

from __future__ import annotations

import fcntl
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Built, Project, tree
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from cswap_deploy import pipeline
from cswap_deploy.cli import app
from cswap_deploy.digests import sealed
from cswap_deploy.factory import call_factory

USAGE, DATA, MODEL, DEVICE, EXPORT = 2, 3, 4, 5, 6
Change = Callable[[Project], object]


@dataclass(frozen=True)
class Case:
    """One fault: how a sound project gets it, the command that meets it, and what the user is told."""

    name: str
    change: Change
    message: str
    hint: str
    """Part of the hint; empty: there is none."""
    kind: str
    arguments: tuple[str, ...] = ()
    command: str = "prepare"

    @property
    def code(self) -> int:
        codes = {"DataError": DATA, "ModelError": MODEL, "PruningError": MODEL, "DeviceError": DEVICE}
        return codes.get(self.kind, EXPORT if self.kind == "ExportError" else USAGE)


SCHEMA = "`cswap-deploy schema` tells every key"
MILLISECONDS = "target: {latency_ms: 3}\n  allocation: global\nlatency: {}"
ARRANGE = "put the images of each class into a folder of its own"


def sets(*overrides: str) -> tuple[str, ...]:
    return tuple(word for override in overrides for word in ("--set", override))


def nothing(project: Project) -> None:
    pass


# --- recipes


def text(old: str, new: str) -> Change:
    """Replace a piece of the recipe's text."""

    def change(project: Project) -> None:
        content = project.recipe.read_text()
        assert old in content
        project.recipe.write_text(content.replace(old, new, 1))

    return change


def recipe(name: str, change: Change, message: str, hint: str = SCHEMA, command: str = "check") -> Case:
    return Case(name, change, message, hint, "RecipeError", command=command)


def override(name: str, value: str, message: str, hint: str = SCHEMA) -> Case:
    return Case(name, nothing, message, hint, "RecipeError", sets(value), "check")


RECIPES = [
    recipe("unknown key", text("steps", "stepz"), "recipe.yaml:10: prune.stepz: unknown key; did you mean 'steps'?"),
    recipe("unknown block", text("prune:", "pruning:"), "pruning: unknown key; did you mean 'prune'?"),
    recipe("wrong type", text("steps: 2", "steps: two"), "prune.steps: expected an integer"),
    recipe("quoted number", text("steps: 2", "steps: '2'"), "got '2' (in quotes it is text)"),
    recipe("duplicate key", text("steps: 2", "steps: 2\n  steps: 3"), "prune.steps: given twice, first at"),
    recipe("name missing", text("name: colours", "seed: 1"), "name: required and not given"),
    recipe("bad name", text("name: colours", "name: My Run"), "expected lower-case letters, digits"),
    recipe("out of range", text("macs: 0.5", "macs: 1.5"), "prune.target.macs: expected a number"),
    recipe("two targets", text("{macs: 0.5}", "{macs: 0.5, params: 0.5}"), "got macs and params"),
    recipe("unknown criterion", text("steps: 2", "criterion: tailor"), "did you mean 'taylor'?"),
    recipe("name and factory", text("  factory", "  name: resnet18\n  factory"), "name and factory exclude each other"),
    recipe("neither", text("  factory: net.py:colours\n", ""), "one of name and factory is required"),
    recipe("weights twice", text("factory: net.py:colours", "name: resnet18\n  pretrained: true\n  checkpoint: w.pth"),
           "weights come from timm or from a checkpoint"),
    recipe("factory pretrained", text("  factory", "  pretrained: true\n  factory"), "a factory has no timm weights"),
    recipe("speed without a meter", text("{macs: 0.5}", "{latency_ms: 5}"), "a speed is measured: add a latency block"),
    recipe("YAML syntax", text("{macs: 0.5}", "{macs: 0.5"), "not valid YAML: ", "close the bracket"),
    recipe("YAML object", text("name: colours", "name: !!python/object:os.system x"), "is not used in recipes"),
    recipe("empty file", lambda p: p.recipe.write_text(""), "the file is empty", "docs/recipe.md"),
    recipe("only a list", lambda p: p.recipe.write_text("- a\n- b\n"), "expected a mapping of keys", ""),
    recipe("not UTF-8", lambda p: p.recipe.write_bytes(b"name: caf\xe9\n"), "this is not UTF-8 text", "save the file as"),
    recipe("missing file", lambda p: p.recipe.unlink(), "cannot read the recipe: no such file", "path of a YAML file"),
    recipe("a folder", lambda p: (p.recipe.unlink(), p.recipe.mkdir()), "cannot read the recipe: is a directory", "YAML"),
    override("unknown --set key", "prune.stepz=3", "--set prune.stepz=3: prune.stepz: unknown key; did you mean 'steps'?"),
    override("--set into a block without kind", "prune.allocation.images=32", "expected one of curves, global, got a block"),
    override("--set without value", "prune.steps", "expected KEY.PATH=VALUE, such as prune.steps=4"),
    override("--set into a value", "name.first=x", "name is 'colours' there, not a block of keys"),
    recipe("latency by scores", text("target: {macs: 0.5}", MILLISECONDS), "weighed against measured damage"),
    override("unknown variant", "variants=[int7]", "--set variants=[int7]: variants.0: "),
    override("unknown ship", "ship=int7", "--set ship=int7: ship: "),
    override("target of latency", "latency={target: 'ssh://-oProxyCommand=x'}", "expected local or ssh://"),
    override("batch of a fixed file", "latency={batch: 4}", "latency.batch: more than one image needs a file with an open"),
    override("runtime without engine", "latency={runtime: tensorrt}", "latency.runtime: tensorrt runs an engine"),
]  # fmt: skip


# --- command line and work folder


def work(change: Change, message: str, hint: str) -> Case:
    return Case(message, change, message, hint, "WorkdirError")


def foreign(project: Project) -> None:
    (project.folder / "work").mkdir()
    (project.folder / "work" / "thesis.tex").write_text("years of work")


def of_version(text: str) -> Change:
    def change(project: Project) -> None:
        (project.folder / "work").mkdir()
        (project.folder / "work" / "work.json").write_text(text)

    return change


LINE = [
    Case("bad --force", nothing, "--force: 'prunning' is not a stage", "this recipe runs source, split", "UsageError",
         ("--force", "prunning")),
    Case("idle --force", nothing, "--force: 'latency' does not run for this recipe", "this recipe runs", "UsageError",
         ("--force", "latency")),
    work(foreign, "is not a work folder: it holds 'thesis.tex'", "choose an empty or a new folder"),
    work(of_version('{"format": 0}'), "has format 0; this version of cswap-deploy reads format 2", "choose another folder"),
    work(of_version('{"format": 99}'), "has format 99; this version of cswap-deploy reads", "or delete this one"),
    work(of_version("?"), "has format unreadable", "choose another folder"),
    work(lambda p: (p.folder / "work").write_text("notes"), "work is a file", "choose another with --work"),
    Case("no GPU", nothing, "the recipe asks for device: cuda", "set device: auto", "DeviceError", sets("device=cuda")),
]  # fmt: skip


# --- images


def data(name: str, change: Change, message: str, hint: str, *arguments: str) -> Case:
    return Case(name, change, message, hint, "DataError", arguments)


def images(project: Project) -> Path:
    return project.folder / "images"


def one_pool(project: Project, per_class: int = 100) -> None:
    """The scoring images become the only ones, straight below class folders."""
    (images(project) / "scoring").rename(project.folder / "pool")
    shutil.rmtree(images(project))
    (project.folder / "pool").rename(images(project))
    for folder in images(project).iterdir():
        for path in sorted(folder.iterdir())[per_class:]:
            path.unlink()


def loose(project: Project) -> None:
    one_pool(project)
    for path in sorted(images(project).glob("*/*")):
        path.rename(images(project) / f"{path.parent.name}{path.name}")
    for folder in [path for path in images(project).iterdir() if path.is_dir()]:
        folder.rmdir()


def emptied(project: Project) -> None:
    for path in (images(project) / "scoring" / "red").iterdir():
        path.unlink()


def labelled(names: str) -> Change:
    return lambda project: (project.folder / "labels.txt").write_text(names)


def rotated(project: Project) -> None:
    """Every class folder gets the name of the next: the order of the labels is not the model's."""
    for part in ("scoring", "holdout"):
        names = sorted(path.name for path in (images(project) / part).iterdir())
        for old in names:
            (images(project) / part / old).rename(images(project) / part / f"{old}.old")
        for old, new in zip(names, [*names[1:], names[0]], strict=True):
            (images(project) / part / f"{old}.old").rename(images(project) / part / new)


def damaged(content: Callable[[bytes], bytes]) -> Change:
    """Change every red scoring image, so that whichever is used first is among them or an error."""

    def change(project: Project) -> None:
        for path in (images(project) / "scoring" / "red").iterdir():
            path.write_bytes(content(path.read_bytes()) + path.name.encode())

    return change


SIX = "blue\ncyan\ngreen\nmagenta\nred\nyellow\n"
LABELS = sets("calibration.labels=labels.txt")
DATASETS = [
    data("images missing", lambda p: shutil.rmtree(images(p)), "images does not exist", "correct calibration.images"),
    data("images a file", lambda p: (shutil.rmtree(images(p)), images(p).touch()), "images is a file, expected a folder",
         "correct calibration.images"),
    data("no images", lambda p: (shutil.rmtree(images(p)), images(p).mkdir()), "only 0 loose images", ARRANGE),
    data("only loose images", loose, "holds no class folders, only 48 loose images", ARRANGE),
    data("empty class folder", emptied, "red holds no image", "remove it, or add images"),
    data("a class too few", lambda p: shutil.rmtree(images(p) / "scoring" / "red"), "class", "calibration.labels"),
    data("half a division", lambda p: shutil.rmtree(images(p) / "holdout"), "scoring/ but not its counterpart", "both"),
    data("too few images", lambda p: one_pool(p, 1), "6 different images; 8 for scoring leave none", "add images",
         *sets("calibration.scoring=8")),
    data("truncated image", damaged(lambda content: content[:60]), "cannot be decoded", "remove or replace the file"),
    data("text as image", damaged(lambda content: b"hello"), "is not a PNG, JPEG", "remove or convert the file"),
    data("leakage", lambda p: shutil.copy(images(p) / "scoring/red/0.png", images(p) / "holdout/red/copy.png"),
         "scoring/red/0.png and holdout/red/copy.png are the same image", "remove one of them"),
    data("labels too few", labelled("red\ngreen\n"), "names 2 classes and the model has 6", "in the order", *LABELS),
    data("label twice", labelled(SIX.replace("cyan", "red")), "labels.txt:5: 'red' is already on line 2", "own", *LABELS),
    data("unknown class", labelled(SIX.replace("red", "reds")), "the nearest is 'reds'", "rename the folder", *LABELS),
    data("labels missing", nothing, "labels.txt does not exist", "correct calibration.labels", *LABELS),
    data("labels in another order", rotated, "near chance for 6 classes", "give calibration.labels with one class name"),
]  # fmt: skip


# --- networks and weights


def network(name: str, change: Change, message: str, hint: str, *overrides: str, command: str = "prepare") -> Case:
    return Case(name, change, message, hint, "ModelError", sets(*overrides), command)


def colours_state(project: Project) -> dict[str, torch.Tensor]:
    state = call_factory(f"{project.folder / 'net.py'}:colours", {}).state_dict()
    (project.folder / "imported").unlink()
    return {**state}


def checkpoint(change: Callable[[Path, dict[str, torch.Tensor]], object], name: str = "w.pth") -> Change:
    return lambda project: change(project.folder / name, colours_state(project))


def truncated(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:900])


def not_a_number(path: Path, state: dict[str, torch.Tensor]) -> None:
    state["fc.bias"] = torch.full_like(state["fc.bias"], float("nan"))
    torch.save(state, path)


class Attack:
    """A pickle of it writes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def attack(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({**state, "extra": Attack(path.with_name("marker"))}, path)


def without_head(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("fc")}, path)


def factory(code: str) -> Change:
    return lambda project: (project.folder / "own.py").write_text(code)


OWN, WEIGHTS = "model.factory=own.py:net", "model.checkpoint=w.pth"
BRANCHES = """
from net import Colours


class Branches(Colours):
    def forward(self, x):
        return super().forward(x) if x.mean() < 100 else x.mean((2, 3))


def net():
    return Branches()
"""
STRICT = """
from torch import nn


class Strict(nn.Conv2d):
    def forward(self, x):
        if x.shape[-1] != 8:
            raise ValueError(f"{x.shape[-1]} pixels")
        return super().forward(x)


def net():
    return Strict(3, 6, 1)
"""
TIMM = "model={name: %s, pretrained: %s}"
NETWORKS = [
    network("unknown timm name", nothing, "has no model named 'resnet_18'", "did you mean 'resnet18'?",
            TIMM % ("resnet_18", "true"), command="check"),
    network("unknown timm tag", nothing, "has no weights 'x9' of 'resnet18'", "resnet18.a1_in1k",
            TIMM % ("resnet18.x9", "true"), command="check"),
    network("pretrained for other classes", nothing, "have 1000 classes, model.num_classes asks for 6", "remove model.num",
            "model={name: resnet18, num_classes: 6}", command="check"),
    network("timm kwargs", nothing, "timm cannot build 'resnet18' with kwargs {'depths': 3}", "correct model.kwargs",
            "model={name: resnet18, pretrained: false, kwargs: {depths: 3}}"),
    network("factory file missing", nothing, "gone.py does not exist", "recipe's folder", "model.factory=gone.py:net", command="check"),
    network("factory missing", nothing, "has no function 'colour'", "did you mean 'colours'?", "model.factory=net.py:colour"),
    network("factory module missing", nothing, "No module named 'no_such'", "install it", "model.factory=no_such.one:net"),
    network("factory syntax", factory("def net(:"), "own.py cannot be imported: SyntaxError", "correct the file", OWN),
    network("factory fails", factory("def net():\n    raise OSError('no weights here')"),
            "failed: OSError: no weights here (line 2)", "correct the factory", OWN),
    network("factory exits", factory("raise SystemExit(0)"), "SystemExit: 0", "correct the file", OWN),
    network("factory gives no module", factory("def net():\n    return 3"), "returned int", "torch.nn.Module", OWN),
    network("factory kwargs", nothing, "does not take these arguments", "correct model.kwargs", "model.kwargs={width: 3}"),
    network("input does not fit", factory(STRICT), "cannot run on an input of shape (3, 9, 9): ValueError: 9 pixels",
            "set model.input.size", "model.input.size=9", OWN),
    network("no logits", factory(STRICT), "the network returns (2, 6, 8, 8), not logits", "returns logits", OWN),
    network("factory file missing in a build", nothing, "gone.py does not exist", "correct model.factory",
            "model.factory=gone.py:net"),
    network("checkpoint missing", nothing, "w.pth does not exist", "correct model.checkpoint", WEIGHTS, command="check"),
    network("checkpoint truncated", checkpoint(truncated), "w.pth cannot be read: RuntimeError", "copy it again", WEIGHTS),
    network("safetensors truncated", checkpoint(truncated, "w.safetensors"), "is not a valid safetensors file",
            "copy or convert it again", "model.checkpoint=w.safetensors"),
    network("code in a checkpoint", checkpoint(attack), "and was refused; nothing in it was run", "state_dict", WEIGHTS),
    network("text as checkpoint", checkpoint(lambda path, _: path.write_text("404: Not Found")),
            "is not a PyTorch file: it begins with b'404:'", "torch.save", WEIGHTS),
    network("NaN weights", checkpoint(not_a_number), "weight 'fc.bias' holds 6 values that are NaN", "diverged", WEIGHTS),
    network("keys missing", checkpoint(without_head), "2 missing: fc.bias, fc.weight", "check model.name", WEIGHTS),
    network("another architecture", checkpoint(lambda path, state: torch.save(state, path)),
            "conv1.bias is (24,), expected (30,)", "model.kwargs", WEIGHTS, "model.kwargs={copies: 5}"),
    Case("unreachable target", nothing, "prune.target asks to keep 0.001 of the macs", "raise prune.target.macs",
         "PruningError", sets("prune.target.macs=0.001")),
    Case("skip matches nothing", nothing, "prune.skip: pattern 'layer9.*' matches no module", "look like 'conv2'", "PruningError",
         sets("prune.skip=['layer9.*']")),
    Case("cannot be exported", factory(BRANCHES), "PyTorch cannot export the network to ONNX: ", "must not branch",
         "ExportError", sets(OWN, "prune.target=null")),
]  # fmt: skip

CASES = [*RECIPES, *LINE, *DATASETS, *NETWORKS]


# --- the tests


def invoke(project: Project, command: str, *arguments: str) -> Result:
    quiet = () if command == "check" else ("--quiet",)
    line = [command, str(project.recipe), "--work", str(project.folder / "work"), *quiet, *arguments]
    return CliRunner().invoke(app, line)


def kept(project: Project) -> dict[str, bytes]:
    """All of a project that a run must not touch: not its own work folder, nor the marker of its factory."""
    return {
        name: content
        for name, content in tree(project.folder).items()
        if name != "imported" and (not name.startswith("work/") or name == "work/thesis.tex")
    }


def require_refused(result: Result, case: Case, project: Project, before: dict[str, bytes]) -> None:
    assert result.exit_code == case.code, result.output
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: "), result.stderr
    hints = [line for line in rest if line.startswith("  hint: ")]
    assert case.message in result.stderr and "Traceback" not in result.stderr
    assert len(hints) == bool(case.hint) and case.hint in "".join(hints), result.stderr
    assert kept(project) == before
    assert not (project.folder / "work" / "bundle").exists()


def require_document(result: Result, case: Case) -> None:
    document = json.loads(result.stdout)
    assert document.keys() == {"schema", "error"}
    assert document["schema"] == f"cswap-deploy/{case.command}/1"
    error = document["error"]
    assert error.keys() == {"type", "message", "hint", "exit_code"}
    assert (error["type"], error["exit_code"]) == (case.kind, case.code)
    assert case.message in error["message"] and case.hint in error["hint"]


def test_table_is_long_and_without_repetition() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 80
    assert {case.code for case in CASES} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.kind == "DeviceError" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(project.folder)
    case.change(project)
    before = kept(project)
    plain = invoke(project, case.command, *case.arguments)
    require_refused(plain, case, project, before)
    assert plain.stdout == ""
    as_json = invoke(project, case.command, *case.arguments, "--json")
    require_refused(as_json, case, project, before)
    require_document(as_json, case)
    if case.command == "check":
        assert not (project.folder / "work").exists()
    assert not (project.folder / "marker").exists()


@pytest.mark.parametrize("code", [b"", b"other pixels"])
def test_images_that_vanish_or_change_after_they_were_indexed(
    code: bytes, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = pipeline.data.catalogue

    def and_then(*arguments: Any) -> object:
        found = index(*arguments)
        for path in (images(project) / "scoring" / "red").iterdir():
            path.write_bytes(code) if code else path.unlink()
        return found

    monkeypatch.setattr(pipeline.data, "catalogue", and_then)
    result = invoke(project, "prepare")
    assert (result.exit_code, result.stdout) == (DATA, ""), result.output
    assert ("changed since it was indexed" if code else "cannot read ") in result.stderr
    assert "  hint: r" in result.stderr


# --- bundles, prepared folders and models


@dataclass(frozen=True)
class Damage:
    """A fault of a bundle or of a work folder, and what the command that meets it ends with."""

    name: str
    command: tuple[str, ...]
    """`BUNDLE` and `WORK` stand for the folders."""
    harm: Callable[[Path], object]
    """Takes the work folder; the bundle is below it."""
    code: int
    message: str
    hint: str


def wrote(name: str, content: str) -> Callable[[Path], object]:
    return lambda work: (work / name).write_text(content)


def cut(name: str, size: int = 100) -> Callable[[Path], object]:
    return lambda work: (work / name).write_bytes((work / name).read_bytes()[:size])


def manifest(change: Callable[[dict[str, Any]], object], seal: bool = True) -> Callable[[Path], object]:
    """Another value in the manifest; `seal`: of one who wants it to be believed."""

    def harm(work: Path) -> None:
        path = work / "bundle" / "manifest.json"
        document = json.loads(path.read_text("utf-8"))
        change(document)
        path.write_text(json.dumps(sealed(document) if seal else document), "utf-8")

    return harm


SHOW, VERIFY, DEPLOY = ("show", "BUNDLE"), ("verify", "BUNDLE"), ("deploy", "WORK")
AGAIN, COPY = "build the bundle again", "copy the whole work folder again"
FOREIGN = {"path": "../../secret", "sha256": "0" * 64, "bytes": 1}
DAMAGES = [
    Damage("no manifest", SHOW, lambda w: (w / "bundle/manifest.json").unlink(), 2, "is not a bundle", "give the bundle folder"),
    Damage("manifest cut off", SHOW, cut("bundle/manifest.json"), 9, "is not valid JSON", AGAIN),
    Damage("manifest of a later version", SHOW, manifest(lambda m: m.update(schema="cswap-deploy/manifest/2")), 9,
           "has schema 'cswap-deploy/manifest/2', expected", "update cswap-deploy"),
    Damage("a figure changed", SHOW, manifest(lambda m: m["accuracy"].update(drop_pp=-1.0), seal=False), 9,
           "is not as it was written", "copy the bundle again"),
    Damage("a verdict changed", SHOW, manifest(lambda m: m.update(verdict="fail"), seal=False), 9, "its sha256 differs", "copy"),
    Damage("a key removed", SHOW, manifest(lambda m: m.pop("model")), 9, "is not a manifest: 'model' is missing", AGAIN),
    Damage("a type changed", SHOW, manifest(lambda m: m["onnx"].update(opset="x")), 9, "onnx.opset: expected integer", AGAIN),
    Damage("a path out of the bundle", SHOW, manifest(lambda m: m["files"].append(FOREIGN)), 9, "lies outside the bundle", AGAIN),
    Damage("unit of no group", (*SHOW, "--unit", "conv9:1"), lambda w: None, 2, "no group is called 'conv9'", "the nearest are"),
    Damage("plan cut off", (*SHOW, "--unit", "conv1:1"), cut("bundle/plan.json"), 9, "is not what the manifest says", "copy"),
    Damage("unknown check", (*VERIFY, "--require", "onxn"), lambda w: None, 2, "this bundle has no check 'onxn'", "choose from"),
    Damage("a bundle given to deploy", ("deploy", "BUNDLE"), lambda w: None, 2, "holds no prepared model", "its work folder is"),
    Damage("not prepared", DEPLOY, lambda w: (w / "prepared.json").unlink(), 2, "holds no prepared model", "prepare RECIPE"),
    Damage("prepared cut off", DEPLOY, cut("prepared.json"), 2, "prepared.json cannot be read", COPY.replace("whole ", "")),
    Damage("prepared by an older version", DEPLOY, wrote("prepared.json", '{"schema": "cswap-deploy/prepared/0"}'), 2,
           "has schema 'cswap-deploy/prepared/0', expected", "run prepare again"),
    Damage("a stage lost in copying", DEPLOY, lambda w: shutil.rmtree(w / "stages/simplified"), 2, "stages/simplified", COPY),
    Damage("hold-out count lost", DEPLOY, wrote("holdout_reads", "many"), 2, "does not hold a number", "write the number"),
    Damage("measure no file", ("measure", "WORK/gone.onnx"), lambda w: None, 2, "gone.onnx is not a file", "give a .onnx file"),
    Damage("measure a recipe", ("measure", "WORK/../recipe.yaml"), lambda w: None, 2, "ends in .yaml", ".onnx"),
    Damage("measure text", ("measure", "WORK/text.onnx"), wrote("text.onnx", "404: Not Found"), 5, "text.onnx", ""),
    Damage("measure nowhere", ("measure", "BUNDLE/model.onnx", "--on", "ssh://-x"), lambda w: None, 2, "is no target", "give local"),
    Damage("schema of no command", ("schema", "--command", "biuld"), lambda w: None, 2, "'biuld' has no --json", "choose one"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_refused(damage: Damage, colours: Built, tmp_path: Path) -> None:
    work = shutil.copytree(colours.recipe.parent, tmp_path / "copy") / "work"
    damage.harm(work)
    before = tree(work)
    line = [word.replace("BUNDLE", str(work / "bundle")).replace("WORK", str(work)) for word in damage.command]
    result = CliRunner().invoke(app, line)
    assert (result.exit_code, result.stdout) == (damage.code, ""), result.output
    lines = result.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in result.stderr
    assert damage.message in result.stderr, result.stderr
    assert damage.hint in "".join(line for line in lines if line.startswith("  hint: ")), result.stderr
    after = tree(work)
    assert {name for name, content in before.items() if after.get(name) != content} <= {"lock", "history.json"}


@pytest.mark.parametrize(
    ("name", "harm", "check", "detail"),
    [
        ("a file cut off", cut("bundle/model.onnx"), "files", "model.onnx: has 100 bytes instead of"),
        ("a file gone", lambda w: (w / "bundle/weights.safetensors").unlink(), "files", "weights.safetensors: is missing"),
        ("a byte flipped", wrote("bundle/labels.txt", "blue\ncyan\ngreen\nmagenta\nrad\nyellow\n"), "files", "labels.txt"),
        ("a file too many", wrote("bundle/extra.txt", "x"), "unlisted", "extra.txt"),
        ("a figure changed", manifest(lambda m: m["model"].update(macs=1), seal=False), "manifest", "sha256 differs"),
    ],
)  # fmt: skip
def test_verify_names_what_is_wrong_and_ends_with_9(
    name: str, harm: Callable[[Path], object], check: str, detail: str, colours: Built, tmp_path: Path
) -> None:
    work = shutil.copytree(colours.work, tmp_path / "work")
    harm(work)
    result = CliRunner().invoke(app, ["verify", str(work / "bundle"), "--json"])
    assert result.exit_code == 9 and "Traceback" not in result.output
    failed = {
        found["name"]: found["detail"] for found in json.loads(result.stdout)["checks"] if found["outcome"] == "failed"
    }
    assert detail in failed[check], failed


def test_attack_would_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_a_work_folder_in_use(project: Project) -> None:
    (project.folder / "work").mkdir()
    with (project.folder / "work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711\n")
        lock.flush()
        result = invoke(project, "build")
    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert "is in use by process 4711" in result.stderr and "  hint: wait until" in result.stderr


@pytest.mark.parametrize("value", ["prune.target.macs=0.001", "prune.steps=none", "model.factory=net.py:gone"])
def test_a_refused_build_leaves_the_last_bundle(value: str, colours: Built, tmp_path: Path) -> None:
    folder = shutil.copytree(colours.recipe.parent, tmp_path / "copy")
    before = tree(folder / "work" / "bundle")
    if value.startswith("model"):
        value = f"model.factory={folder / 'net.py'}:gone"
    result = invoke(Project(folder), "build", "--set", value)
    assert result.exit_code in (USAGE, MODEL), result.output
    assert tree(folder / "work" / "bundle") == before


def test_an_unknown_option_is_a_usage_error(project: Project) -> None:
    result = invoke(project, "build", "--no-such-option")
    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert "--no-such-option" in result.stderr
