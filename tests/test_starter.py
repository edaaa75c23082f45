"""`init`: whatever was asked for or seen, the recipe loads through the real loader, and nothing is overwritten unasked."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, faults, make_project, run
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from typer.testing import CliRunner

from cswap_deploy import cli, recipe, schemas, starter, wording
from cswap_deploy.console import WIDTH, questions
from cswap_deploy.errors import DataError, ModelError, RecipeError, UsageError
from cswap_deploy.starter import FILE, SCHEMA, Wishes

DIGITS = ROOT / "calibration" / "digits"
CNN = ROOT / "calibration" / "models" / "digits_cnn.safetensors"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def made(path: Path, **wishes: Any) -> recipe.Recipe:
    starter.write(Wishes(path, **wishes), force=False)
    return recipe.load(path)


# --- what is written


def test_check_passes_on_the_embedded_digits(tmp_path):
    path = tmp_path / "digits.yaml"
    result = call("init", path, "--images", DIGITS, "--model", "resnet18", "--on", "local")
    assert result.exit_code == 0, result.stderr
    assert f"cswap-deploy check {path}" in result.stdout and "untrained and without a gate" in result.stdout
    checked = call("check", path, "--work", tmp_path / "work", "--json")
    assert checked.exit_code == 0, checked.stderr
    assert json.loads(checked.stdout)["facts"]["images"].startswith("300 fit, 100 selection, 600 hold-out, 10 classes")


def test_what_is_written_can_be_built(project, cheap_export):
    shutil.move(project.folder / "recipe.yaml", project.folder / "other.yaml")
    call("init", project.recipe, "--model", "net.py:colours", "--images", project.folder / "images", "--target", "none")
    sets = [f"model.input={recipe_input(project)}", "accuracy.max_drop=null", "latency=null", "device=cpu"]
    result = call("prepare", project.recipe, "--work", project.folder / "work", *(f"--set={text}" for text in sets))
    assert result.exit_code == 0, result.stderr


def recipe_input(project: Any) -> str:
    return json.dumps(YAML(typ="safe").load(project.folder / "other.yaml")["model"]["input"])


def test_every_option_arrives_in_the_recipe(tmp_path):
    path = tmp_path / "sub" / "my.yaml"
    found = made(
        path,
        name="x.1",
        model="resnet18",
        images=DIGITS,
        checkpoint=CNN,
        target="params=0.25",
        on="ssh://me@board:2222",
    )
    assert (found.name, found.model.name, found.model.checkpoint, found.model.num_classes) == (
        "x.1",
        "resnet18",
        CNN,
        10,
    )
    assert found.calibration.images == DIGITS and found.calibration.scoring == 1024
    assert found.prune.target == recipe.ParamsTarget(params=0.25)
    assert found.latency == recipe.LatencySettings(target="ssh://me@board:2222")
    assert found.accuracy.max_drop == 1.0
    plain = made(tmp_path / "plain.yaml")
    assert plain.latency is None and plain.model.pretrained and plain.model.checkpoint is None
    assert plain == recipe.Recipe.model_validate_json(
        json.dumps(
            {
                "name": "plain",
                "model": {"name": "resnet50"},
                "calibration": {"images": str(tmp_path / "path/to/images")},
            }
        )
    ), "beyond what was asked for it says the defaults"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("macs=0.5", recipe.MacsTarget(macs=0.5)),
        ("max_drop=2", recipe.MaxDropTarget(max_drop=2)),
        ("none", None),
    ],
)
def test_targets(tmp_path, target, expected):
    assert made(tmp_path / "r.yaml", target=target).prune.target == expected


def test_a_factory_beside_the_recipe(project):
    found = made(project.folder / "new.yaml", model="net.py:colours", images=project.folder / "images")
    assert found.model.factory == f"{project.folder}/net.py:colours" and found.model.name is None
    assert found.accuracy.max_drop == 1.0


def test_labels_name_the_outputs_of_published_weights(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{number}\n" for number in range(1000)))
    found = made(tmp_path / "r.yaml", model="resnet18", images=DIGITS, labels=labels)
    assert found.model.pretrained and found.model.num_classes is None and found.calibration.labels == labels


def test_a_pool_is_divided_in_two(tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    for name in DIGITS.joinpath("holdout").iterdir():
        (pool / name.name).symlink_to(name)
    assert made(tmp_path / "r.yaml", model="resnet18", images=pool).calibration.scoring == 300
    assert call("check", tmp_path / "r.yaml", "--work", tmp_path / "work").exit_code == 0


def test_a_link_is_written_as_it_was_typed_where_that_leads_to_the_same(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "shared").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "behind").symlink_to(tmp_path / "elsewhere" / "deep")
    path, recipe_file = Path("shared/w.pth"), tmp_path / "own" / "r.yaml"
    monkeypatch.chdir(tmp_path)
    assert starter._path(path, recipe_file) == "../shared/w.pth"
    text = starter._path(path, tmp_path / "behind" / "r.yaml")  # whose `..` is `elsewhere`
    assert (tmp_path / "behind" / text.strip('"')).resolve() == (tmp_path / "elsewhere" / "deep" / "w.pth")


def test_images_are_found_and_written_relative_to_the_recipe(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    monkeypatch.chdir(project.folder)
    (project.folder / "sub").mkdir()
    assert starter.find_images(Path("sub")) is None and starter.find_images(Path("x.yaml")) == Path("images")
    starter.write(Wishes(Path("sub/r.yaml"), images=Path("images"), model="resnet18"), force=False)
    starter.write(Wishes(Path("r.yaml"), model="resnet18"), force=False)
    assert (
        "\n  images: ../images\n" in Path("sub/r.yaml").read_text()
        and "\n  images: images\n" in Path("r.yaml").read_text()
    )
    for path in ("sub/r.yaml", "r.yaml"):
        assert recipe.load(Path(path)).calibration.images == project.folder / "images"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("recipe.yaml", "resnet18"),
        ("Ärger & Co.yaml", "rger-co"),
        ("___.yaml", "my-model"),
        ("My Net.v2.yaml", "my-net.v2"),
    ],
)
def test_the_name_comes_from_the_file_s(tmp_path, path, name):
    assert made(tmp_path / path, model="resnet18").name == name


HOSTILE = [
    "yes",
    "~",
    "~root",
    "null",
    "0x1F",
    "1e3",
    " ",
    " a",
    "a: b",
    "- x",
    "#x",
    "{a: 1}",
    "'",
    '"',
    "a\nb: c",
    "a\rb",
    "é名",
    "\u2028",
    "\x85",
    "\x7f",
    "%",
    "&a",
    "*a",
    "!t",
    "|",
    "2020-01-01",
    "x # y",
    "\ufeff",
    "emoji 😀",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_name_is_one_path(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    for label in ("0", "1"):
        shutil.copytree(DIGITS / "holdout" / label, folder / (label + "".join(name.splitlines())))
    monkeypatch.chdir(tmp_path)
    for wished in (Path(name), folder):
        starter.write(Wishes(Path("r.yaml"), images=wished, model="resnet18"), force=True)
        assert recipe.load(Path("r.yaml")).calibration.images == folder
    text = Path("r.yaml").read_text()
    assert text.replace("\n", "").isprintable()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_any_text_is_one_scalar_on_one_line(text):
    written = starter._scalar(text)
    assert "\n" not in written
    assert YAML(typ="safe", pure=True).load(f"# {wording.printable(text)}\na: {written}\nb: 1\n") == {
        "a": text,
        "b": 1,
    }


# --- the schema beside it


def test_the_schema_is_where_the_first_line_says(tmp_path):
    path = tmp_path / "r.yaml"
    made(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA}"
    assert json.loads((tmp_path / first.partition("=")[2]).read_text()) == recipe.schema()


def test_an_older_schema_of_ours_is_replaced_and_another_s_is_not(tmp_path):
    schema = tmp_path / SCHEMA
    schema.write_text(json.dumps({"title": recipe.schema()["title"]}))
    made(tmp_path / "a.yaml")
    assert json.loads(schema.read_text()) == recipe.schema()
    for other in ("{}", "[]", "no JSON"):
        schema.write_text(other)
        with pytest.raises(UsageError, match="holds something else"):
            made(tmp_path / "b.yaml")
        assert schema.read_text() == other and not (tmp_path / "b.yaml").exists()
    assert call("init", tmp_path / "b.yaml", "--force").exit_code == 0


# --- refusals


def test_nothing_is_overwritten_without_force(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    result = call("init", path)
    assert result.exit_code == 2 and "is there already" in result.stderr and "--force" in result.stderr
    assert path.read_text() == "mine" and [*tmp_path.iterdir()] == [path]
    dangling = tmp_path / "link.yaml"
    dangling.symlink_to(tmp_path / "nowhere")
    assert call("init", dangling).exit_code == 2
    assert call("init", path, "--force").exit_code == 0 and recipe.load(path).name == "r"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "resnet19"], 4, "did you mean 'resnet18'"),
        (["--model", "nets.py:build"], 4, "nets.py does not exist"),
        (["--images", "absent"], 3, "absent"),
        (["--images", "empty"], 3, "holds no class folders"),
        (["--checkpoint", "absent.safetensors", "--model", "resnet18"], 4, "does not exist"),
        (["--target", "macs"], 2, "is no target"),
        (["--target", "macs=[0.5]"], 2, "is no target"),
        (["--target", "mcas=0.5"], 2, "did you mean 'macs'"),
        (["--target", "macs=5"], 2, "expected"),
        (["--target", "latency_ms=5"], 2, "add a latency block"),
        (["--name", "Not A Name"], 2, "lower-case"),
        (["--on", "ssh://-x"], 2, "is no target"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = call("init", "r.yaml", *arguments)
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and ".trial" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_library_errors_are_the_documented_ones(tmp_path):
    for error, wishes in (
        (DataError, {"images": tmp_path / "absent"}),
        (ModelError, {"model": "resnet19"}),
        (RecipeError, {"name": "-"}),
    ):
        with pytest.raises(error):
            made(tmp_path / "r.yaml", **wishes)


# --- on a terminal, in a pipe


def test_a_pipe_is_asked_nothing(tmp_path):
    done = run("-m", "cswap_deploy", "init", "--json", cwd=tmp_path, PYTHONPATH=str(ROOT))
    found = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert list(faults(found, schemas.of(command="init"))) == []
    assert (found["recipe"], found["editor_schema"]) == (FILE, SCHEMA) and (tmp_path / FILE).exists()
    again = run("-m", "cswap_deploy", "init", ".", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert again.returncode == 2 and "recipe.yaml is there already" in again.stderr


def dialogue(folder: Path, *answers: str) -> tuple[int, str]:
    """The real command on a terminal, each answer typed once its question is there; exit code and screen.

    A Ctrl-C that comes after the question was written and before Python waits for the answer is seen only with the next
    key: as a person would, it is pressed again.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
        os.execv(sys.executable, [sys.executable, "-m", "cswap_deploy", "init"])
    sent, waiting, typed, silences = b"", [*answers], "", 0
    with suppress(OSError):  # how Linux says that the other side has closed
        while silences < 24:
            if not select.select([terminal], [], [], 5)[0]:
                silences += 1
                os.write(terminal, b"\x03" if typed == "\x03" else b"")
                continue
            sent += os.read(terminal, 4096)
            if sent.endswith((b"]: ", b"): ")) and waiting:  # not an echo, which ends its line
                typed = waiting.pop(0)
                os.write(terminal, typed.encode())
    os.close(terminal)  # ends one that still asks
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sent.decode()


def test_a_terminal_is_asked_until_the_answers_can_be_used(tmp_path):
    (tmp_path / "images").symlink_to(DIGITS)
    answers = (
        "resnt18\n",
        "resnet18\n",
        "absent\n",
        "\n",
        "no.pth\n",
        f"{CNN}\n",
        "half\n",
        "macs=7\n",
        "macs=0.5\n",
        "nowhere\n",
        "no\n",
    )
    code, screen = dialogue(tmp_path, *answers)
    assert code == 0, screen
    for words in (
        "did you mean 'resnet18'",
        "absent",
        "of 10 classes",
        "no.pth is not a file",
        "'half' is no target",
        "macs=7 is no target",
        "next     ",
    ):
        assert words in screen
    asked = [line for line in screen.replace("\r", "").splitlines() if re.search(r"[\])]: ", line)]
    assert len(asked) == len(answers) and max(len(line.rpartition(": ")[0]) + 2 for line in asked) <= WIDTH
    assert all(re.search(r"\[.+\]: |\(no default\): ", line) for line in asked), "each says what is taken by default"
    assert max(map(len, screen.replace("\r", "").splitlines())) <= WIDTH + max(map(len, answers))
    found = recipe.load(tmp_path / FILE)
    assert (found.model.name, found.model.checkpoint) == ("resnet18", CNN)
    assert found.prune.target == recipe.MacsTarget(macs=0.5) and found.latency is None


@pytest.mark.parametrize("typed", ["\x03", "\x04"], ids=["Ctrl-C", "end of input"])
def test_leaving_a_question_ends_with_130_and_writes_nothing(tmp_path, typed):
    code, screen = dialogue(tmp_path, typed)
    assert code == 130 and "error: interrupted" in screen and "Traceback" not in screen
    assert [*tmp_path.iterdir()] == []


def test_answers_become_wishes(monkeypatch, tmp_path):
    (tmp_path / "images").symlink_to(DIGITS)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"resnet18\n{tmp_path}/images\n\nnone\nlocal\n"))
    wishes = questions.ask(Wishes(tmp_path / "r.yaml"))
    assert wishes == Wishes(
        tmp_path / "r.yaml", model="resnet18", images=tmp_path / "images", target="none", on="local"
    )
