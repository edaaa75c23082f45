"""SIGINT and SIGTERM end a command within a second, whatever it is doing, and what it had done is kept. Real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest
from conftest import build, start_build, tree, wait_until

PROMPT_S = 2.0
"""The bar is a second; the rest is for a busy machine."""

PROGRAM = """
    import hashlib, io, sys, time
    from contextlib import redirect_stderr, redirect_stdout
    from dataclasses import dataclass
    from pathlib import Path
    from cswap_deploy import cli, pipeline
    from cswap_deploy.stage import stage

    @dataclass(frozen=True)
    class Number:
        number: int

    def say() -> None:
        print("running", file=sys.stderr, flush=True)

    def deaf(out: Path) -> Number:
        "Swallows what comes, as a bare except in a library does, and goes on."
        say()
        while True:
            try:
                time.sleep(10)
            except BaseException:
                pass

    def redirected(out: Path) -> Number:
        "The same where what is said goes elsewhere, as in PyTorch's exporter."
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            print("running", file=sys.__stderr__, flush=True)
            return deaf(out)

    def native(out: Path) -> Number:
        "In native code, which keeps the handler waiting."
        say()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 500_000_000)

    def wrong(out: Path) -> Number:
        "Returns a wrong number because it was interrupted."
        say()
        try:
            time.sleep(10)
        except BaseException:
            pass
        return Number(-1)

    def failing(out: Path) -> Number:
        "Makes an error of its own of it."
        say()
        try:
            time.sleep(10)
        except BaseException:
            raise RuntimeError("in a library") from None

    def mute(out: Path) -> Number:
        "Nobody reads what is said."
        say()
        print("x" * 200_000, file=sys.stdout)

    def fragile(out: Path) -> Number:
        "Imports what aborts the process where an exception comes while it makes its objects, as nanobind's enumerations do."
        say()
        import fragile

    chosen = stage("source", returns=Number)(globals()[sys.argv.pop()])
    pipeline.build = lambda recipe, work: work.run(chosen)
    cli.main()
"""


def program(what: str, folder: Path) -> subprocess.Popen[str]:
    """A build in `folder` whose first stage is the function of `PROGRAM` with that name."""
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
    command = [sys.executable, str(folder / "program.py"), "build", str(recipe), "--work", str(folder / "work")]
    return subprocess.Popen(
        [*command, "--json", "--quiet", what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("what", ["deaf", "redirected", "native", "wrong", "failing", "mute"])
def test_no_stage_can_refuse_to_end_or_commit_after_a_signal(what: str, number: signal.Signals, tmp_path: Path) -> None:
    process = program(what, tmp_path)
    try:
        assert process.stdout and process.stderr and process.stderr.readline() == "running\n"
        time.sleep(0.3)
        sent = time.monotonic()
        process.send_signal(number)
        code = process.wait(timeout=30)
        assert time.monotonic() - sent < PROMPT_S
        stdout, stderr = process.communicate()
    finally:
        process.kill()
    assert code == 130
    assert not list((tmp_path / "work").glob("stages/*/*"))
    if what != "mute":
        assert json.loads(stdout)["error"]["exit_code"] == 130
        assert stderr.count("error: ") == 1 and "error: interrupted" in stderr and "Traceback" not in stderr


FRAGILE = """
    #define PY_SSIZE_T_CLEAN
    #include <Python.h>
    #include <stdlib.h>

    static int executed(PyObject *module) {
        if (PyRun_SimpleString("import sys, time\\nprint('running', file=sys.stderr, flush=True)\\ntime.sleep(10)\\n")) abort();
        return 0;
    }
    static PyModuleDef_Slot slots[] = {{Py_mod_exec, executed}, {0, NULL}};
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fragile", NULL, 0, NULL, slots};
    PyMODINIT_FUNC PyInit_fragile(void) { return PyModuleDef_Init(&definition); }
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_module_that_bears_no_exception_while_it_is_imported_is_spared_one(
    number: signal.Signals, tmp_path: Path
) -> None:
    include = sysconfig.get_path("include")
    if shutil.which("gcc") is None or not (Path(include) / "Python.h").exists():
        pytest.skip("there is no gcc, or no Python.h, to compile an extension module with")
    (tmp_path / "fragile.c").write_text(textwrap.dedent(FRAGILE))
    library = tmp_path / f"fragile{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{include}", "-o", library, tmp_path / "fragile.c"], check=True)
    process = program("fragile", tmp_path)
    try:
        assert process.stderr and [process.stderr.readline() for _ in range(2)] == ["running\n", "running\n"]
        time.sleep(0.1)
        sent = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        assert time.monotonic() - sent < PROMPT_S
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert json.loads(stdout)["error"]["exit_code"] == 130 and "error: interrupted" in stderr


def test_a_build_interrupted_in_stage_after_stage_ends_as_an_undisturbed_one(project, colours) -> None:
    """While PyTorch is imported, while units are ablated, in the exporter, which swallows exceptions, and beside onnxsim."""
    work = project.folder / "work"
    kept: dict[str, bytes] = {}
    for stage, number in (("source", 2), ("scores", 15), ("exported", 2), ("simplified", 15)):
        process = start_build(project.recipe, work, "--json")
        wait_until(lambda: (work / "tmp" / f"{stage}-0").exists(), process)  # noqa: B023
        time.sleep(0.05)
        sent = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert time.monotonic() - sent < PROMPT_S, stage
        assert process.returncode == 130, (stage, stderr)
        assert json.loads(stdout)["error"]["exit_code"] == 130
        assert "error: interrupted" in stderr and "Traceback" not in stderr
        found = tree(work / "stages")
        assert kept.items() <= found.items(), f"interrupted in {stage}, it lost what it had committed"
        assert not [name for name in found if name.startswith(f"{stage}/")]
        kept = found
    built = build(project.recipe, (), work)
    assert kept.items() <= tree(work / "stages").items()
    for name in ("plan.json", "weights.safetensors", "model.onnx"):
        assert (built.bundle.folder / name).read_bytes() == (colours.bundle.folder / name).read_bytes()


def test_a_signal_after_the_answer_does_not_change_how_the_command_ended(colours, tmp_path: Path) -> None:
    """Libraries take seconds to shut down, long after the answer was read."""
    work = shutil.copytree(colours.work, tmp_path / "work")
    process = start_build(colours.recipe, work, "--json", "--force", "groups")
    assert process.stdout and json.loads(process.stdout.readline())["verdict"] == "pass"
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
