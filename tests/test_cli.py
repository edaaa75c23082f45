"""The command line as users and programs meet it: exit codes, one JSON document, quiet pipes, no heavy imports."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, faults, run
from typer.testing import CliRunner

import cswap_deploy
from cswap_deploy import cli, pipeline, schemas
from cswap_deploy.console import WIDTH
from cswap_deploy.digests import sealed
from cswap_deploy.errors import (
    CswapError,
    DataError,
    DeviceError,
    ExportError,
    ModelError,
    RecipeError,
    VerifyError,
)

COMMANDS = ("build", "prepare", "deploy", "sweep", "measure", "check", "init", "doctor", "show", "verify", "schema")
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
HEAVY = ("torch", "timm", "numpy", "pydantic", "onnx", "onnxruntime", "scipy", "PIL", "jinja2", "ruamel", "safetensors")


def call(*arguments: str | Path) -> Any:
    """A command inside this process; standard output and standard error apart."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def document(result: Any) -> dict[str, Any]:
    """The one JSON document on standard output."""
    return json.loads(result.stdout)


# --- help and start


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = call(command, "--help")
    assert result.exit_code == 0 and command in result.stdout and "--help" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= WIDTH
    assert "..." not in result.stdout and "…" not in result.stdout


def test_help_names_every_command_and_cuts_no_description_short():
    result = call("--help")
    assert result.exit_code == 0 and all(f"  {command} " in result.stdout for command in COMMANDS)
    assert max(map(len, result.stdout.splitlines())) <= WIDTH
    assert "..." not in result.stdout and "…" not in result.stdout


def test_version_is_the_installed_one_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom cswap_deploy import cli\nsys.argv = ['cswap-deploy', '--version']\n"
        f"try:\n    cli.main()\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout == f"cswap-deploy {metadata.version('cswap-deploy')}\n"


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from cswap_deploy import cli\n"
        "sys.argv = ['cswap-deploy', '--help']\n"
        "try:\n    cli.main()\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = run("-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert time.perf_counter() - start < 1.5


def test_show_and_schema_import_no_framework(quickstart):
    code = (
        "import sys\nfrom cswap_deploy import cli\nsys.argv = ['cswap-deploy', *sys.argv[1:]]\n"
        "try:\n    cli.main()\n"
        "finally:\n    print([m for m in ('torch', 'timm', 'onnx', 'scipy') if m in sys.modules], file=sys.stderr)\n"
    )
    for arguments in (["show", quickstart.bundle.folder], ["schema"], ["schema", "--manifest"]):
        done = run("-c", code, *arguments)
        assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_importing_the_package_imports_nothing_heavy():
    done = run("-c", f"import cswap_deploy, sys; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_names_of_the_package_are_what_it_says():
    for name in cswap_deploy.__all__:
        assert getattr(cswap_deploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cswap_deploy.nonsense


@pytest.mark.parametrize("program", [["-m", "cswap_deploy"], [str(Path(sys.executable).with_name("cswap-deploy"))]])
def test_module_and_script_are_the_same_program(program):
    if program[0] != "-m" and not Path(program[0]).exists():
        pytest.skip("the console script is not installed beside this Python")
    done = run(*program, "schema", "--command", "show")
    assert done.returncode == 0 and json.loads(done.stdout) == schemas.of(command="show")


# --- what programs read


@pytest.mark.parametrize("command", ["build", "prepare", "deploy", "measure", "check", "show", "verify"])
def test_json_of_an_error_keeps_to_the_schema(command, tmp_path):
    result = call(command, tmp_path / "nothing", "--json")
    found = document(result)
    assert list(faults(found, schemas.of(command=command))) == []
    assert found["schema"] == f"cswap-deploy/{command}/1"
    assert found["error"]["exit_code"] == result.exit_code == 2
    assert f"error: {found['error']['message']}" in result.stderr


def test_json_of_build_prepare_check_and_show_keeps_to_the_schemas(project, cheap_export):
    work = project.folder / "work"
    for command, arguments in {
        "check": [project.recipe, "--work", work, "--groups"],
        "prepare": [project.recipe, "--work", work],
        "build": [project.recipe, "--work", work],
        "show": [work / "bundle"],
    }.items():
        result = call(command, *arguments, "--json")
        found = document(result)
        assert result.exit_code == 0, result.stderr
        assert list(faults(found, schemas.of(command=command))) == []
        assert result.stdout.count("\n") == 1 and result.stdout.isascii()
    assert found["manifest"] == json.loads((work / "bundle" / "manifest.json").read_text())


def test_arguments_that_the_parser_refuses_are_answered_in_json_too():
    for arguments in (["build", "--json"], ["show", "x", "--json", "--nonsense"], ["shwo", "--json"]):
        done = run("-m", "cswap_deploy", *arguments)
        error = json.loads(done.stdout)["error"]
        assert done.returncode == error["exit_code"] == 2
        assert error["message"] in done.stderr and "Usage:" in done.stderr


def test_schemas_are_json_schemas():
    for arguments in ([], ["--manifest"], *(["--command", name] for name in COMMANDS[:-1])):
        result = call("schema", *arguments)
        assert result.exit_code == 0 and document(result)["$schema"] == schemas.DRAFT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--command", "schema"], "'schema' has no --json output"),
        (["--manifest", "--command", "show"], "exclude each other"),
    ],
)
def test_schemas_that_do_not_exist_are_refused(arguments, message):
    result = call("schema", *arguments)
    assert result.exit_code == 2 and message in result.stderr and "hint:" in result.stderr


# --- what people read


def test_show_in_a_pipe_is_plain_and_within_80_columns(quickstart):
    done = run("-m", "cswap_deploy", "show", quickstart.bundle.folder, FORCE_COLOR="1", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    assert not set(done.stdout) & set("\x1b\r")
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    assert all(entry["path"] in done.stdout for entry in quickstart.manifest["files"])


def test_show_in_a_locale_without_the_letters(quickstart):
    done = run("-m", "cswap_deploy", "show", quickstart.bundle.folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "PASS" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= WIDTH and f" {'-' * 60}" in done.stdout


def test_names_in_a_bundle_cannot_drive_the_terminal(copy):
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["name"] = "\x1b[2J\x1b]0;title\x07\r\u202e"
    manifest |= {"verdict": "fail", "reasons": ["\x9b31m"]}
    manifest["model"]["name"] = "[bold]x[/bold]"
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)), "utf-8")
    result = call("show", copy)
    assert result.exit_code == 0
    assert not set(result.stdout) & set("\x1b\x07\r\x9b\u202e")
    assert "[bold]x[/bold]" in result.stdout


def test_a_reader_that_leaves_early_is_no_error(quickstart):
    command = f'"{sys.executable}" -m cswap_deploy show "$1" | head -1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command, "bash", str(quickstart.bundle.folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("quickstart")


def test_a_build_whose_progress_nobody_reads_goes_on(quickstart):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        command = [sys.executable, "-m", "cswap_deploy", "build", QUICKSTART, "--work", str(quickstart.work)]
        command += [f"--set={setting}" for setting in quickstart.overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=nobody, text=True, check=False)
    assert done.returncode == 0 and "\nPASS: " in done.stdout


def test_a_build_reports_on_standard_error_and_answers_on_standard_output(quickstart):
    again = ["build", QUICKSTART, "--work", quickstart.work, *(f"--set={setting}" for setting in quickstart.overrides)]
    result = call(*again)
    assert result.exit_code == 0
    assert [line.split()[-3:] for line in result.stderr.splitlines()] == [["up", "to", "date"]] * 12
    assert result.stdout.startswith("quickstart: resnet18") and f"{quickstart.work}/bundle" in result.stdout
    quiet = call(*again, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_check_says_what_would_run_and_writes_nothing(quickstart, tmp_path):
    fresh = call("check", QUICKSTART, "--work", tmp_path / "work")
    assert fresh.exit_code == 0 and "source       not run yet" in fresh.stdout
    assert not (tmp_path / "work").exists()
    before = sorted(quickstart.work.rglob("*"))
    sets = [f"--set={setting}" for setting in quickstart.overrides]
    result = call("check", QUICKSTART, "--work", quickstart.work, *sets, "--set", "prune.target.macs=0.8")
    status = dict(line.split(maxsplit=1) for line in result.stdout.split("\n\n")[1].splitlines())
    assert status["scores"] == "up to date" and status["plan"] == "settings.target.macs: 0.6 -> 0.8"
    assert status["pruned"] == status["bundle"] == "runs if the result of plan changes"
    assert sorted(quickstart.work.rglob("*")) == before


def test_a_run_that_ends_in_the_midst_of_a_live_line_says_why_on_a_line_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    code = (
        "import sys\nfrom cswap_deploy import cli, errors, pipeline, progress\n"
        "def build(recipe, work):\n"
        "    progress.advance('images', 1, 3)\n    raise errors.DataError('x.png cannot be decoded', 'remove it')\n"
        "pipeline.build = build\ncli.main()\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, "build", QUICKSTART, "--work", str(tmp_path / "work")])
    sent = b""
    with suppress(OSError):  # how Linux says that the other side has closed
        while block := os.read(terminal, 4096):
            sent += block
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    live, rest = sent.decode().split("\r\x1b[2K")
    assert live.endswith("images 1/3")
    assert rest.split("\r\n") == ["error: x.png cannot be decoded", "  hint: remove it", ""]


# --- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CswapError("bug"), 1), (RecipeError("x", "do y", where="r.yaml:3", key="k"), 2), (DataError("x"), 3),
        (ModelError("x"), 4), (DeviceError("x"), 5), (ExportError("x"), 6), (VerifyError("x"), 9),
        (KeyboardInterrupt(), 130), (OSError(28, "No space left on device", "file"), 2),
    ],
    ids=repr,
)  # fmt: skip
def test_exit_codes(monkeypatch, tmp_path, error, code):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "build", fail)
    result = call("build", QUICKSTART, "--work", tmp_path / "work", "--json")
    assert result.exit_code == document(result)["error"]["exit_code"] == code
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_bug_of_ours_ends_with_1_and_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "build", lambda *_: 1 / 0)
    result = call("build", QUICKSTART, "--work", tmp_path / "work", "--json")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr and "ZeroDivisionError" in result.stderr
    assert "error: internal error: division by zero" in result.stderr
    assert document(result)["error"]["type"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "absent.yaml"], 2, "absent.yaml"),
        (["build", QUICKSTART, "--set", "prune.taget=1"], 2, "taget"),
        (["build", QUICKSTART, "--force", "nonsense"], 2, "'nonsense' is not a stage"),
        (["build", QUICKSTART, "--force", "engine"], 2, "'engine' does not run for this recipe"),
        (["check", QUICKSTART, "--set", "calibration.images=absent"], 3, "absent"),
        (["check", QUICKSTART, "--set", "model.name=resnet19"], 4, "no model named 'resnet19'"),
        (["check", QUICKSTART, "--on", "ssh://-x"], 2, "is no target"),
        (["sweep", QUICKSTART, "--latency", "3,x"], 2, "is no list of milliseconds"),
        (["measure", QUICKSTART], 2, "ends in .yaml"),
        (["deploy", "absent"], 2, "is not a folder"),
        (["verify", "absent"], 2, "is not a bundle"),
        (["show", "absent"], 2, "is not a bundle"),
        (["show", QUICKSTART], 2, "is not a bundle"),
    ],
)
def test_mistakes_end_with_their_code_and_a_way_out(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == code and message in result.stderr and result.stdout == ""
    assert "  hint: " in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_show_of_a_tampered_manifest_ends_with_9(copy):
    (copy / "manifest.json").write_text('{"schema": "cswap-deploy/manifest/1"}')
    result = call("show", copy)
    assert result.exit_code == 9 and "is not a manifest" in result.stderr


def test_a_failed_gate_ends_with_7_and_leaves_a_complete_bundle(project, cheap_export):
    sets = ["prune.criterion=magnitude", "prune.compensate=none", "prune.target.macs=0.02", "accuracy.max_drop=0"]
    work = project.folder / "work"
    result = call("build", project.recipe, "--work", work, "--json", *(f"--set={setting}" for setting in sets))
    assert result.exit_code == 7
    manifest = document(result)["manifest"]
    assert document(result)["verdict"] == manifest["verdict"] == "fail"
    assert manifest["reasons"] and manifest["accuracy"]["gate"]["verdict"] == "fail"
    assert {entry["path"] for entry in manifest["files"]} <= {
        path.relative_to(work / "bundle").as_posix() for path in (work / "bundle").rglob("*")
    }
    again = call("build", project.recipe, "--work", work, *(f"--set={setting}" for setting in sets))
    assert again.exit_code == 7 and "FAIL: accuracy: the drop exceeds 0 points" in again.stdout


def test_a_work_folder_in_use_is_named(quickstart, tmp_path):
    from cswap_deploy.stage import Workdir

    with Workdir(tmp_path / "work").open():
        result = call("build", QUICKSTART, "--work", tmp_path / "work")
    assert result.exit_code == 2 and f"in use by process {os.getpid()}" in result.stderr


def test_default_work_folder_is_runs_and_the_name(project, monkeypatch, cheap_export):
    monkeypatch.chdir(project.folder)
    result = call("prepare", "recipe.yaml", "--set=prune.target=null", "--json")
    assert document(result)["work"] == "runs/colours"
    assert (project.folder / "runs" / "colours" / "work.json").exists()
