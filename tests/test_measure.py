"""`measure`, `doctor`, `verify` and `schema --agent` as commands: documents, tables, exit codes; nothing heavy is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Built, faults, run
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from cswap_deploy import cli, schemas
from cswap_deploy.artifacts import sha256_of
from cswap_deploy.console import WIDTH
from cswap_deploy.device import protocol

SHORT = ("--warmup", "0.05", "--duration", "0.2")
NOBODY = "ssh://somebody@127.0.0.1:1"
"""A port that nobody listens on refuses at once."""
FRAMEWORKS = ("torch", "timm", "onnx", "scipy", "PIL")
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`narrow` takes one image at a time, `wide` is slower, `open` takes any batch; and some that are no models."""
    folder = tmp_path_factory.mktemp("files")
    for name, channels, batch in (("narrow", 4, 1), ("wide", 64, 1), ("open", 4, "batch")):
        onnx.save(network(channels, batch), folder / f"{name}.onnx")
    (folder / "text.onnx").write_text("not a graph")
    (folder / "text.engine").write_text("not an engine")
    (folder / "model.pth").write_bytes(b"")
    return folder


def network(channels: int, batch: int | str) -> onnx.ModelProto:
    """Two convolutions, the second one costs `channels` squared."""
    image, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])
        for name, shape in (("input", (3, 32, 32)), ("logits", (channels, 32, 32)))
    )
    nodes = [
        helper.make_node("Conv", ["input", "first"], ["hidden"], name="conv1", pads=[1] * 4),
        helper.make_node("Conv", ["hidden", "second"], ["logits"], name="conv2", pads=[1] * 4),
    ]
    shapes = {"first": (channels, 3, 3, 3), "second": (channels, channels, 3, 3)}
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "net", [image], [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def call(*arguments: str | Path) -> Any:
    """A command inside this process; standard output and standard error apart."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def document(result: Any, command: str, code: int = 0) -> dict[str, Any]:
    """The JSON document of a command that ended with `code`, which fits its schema."""
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert list(faults(found, schemas.of(command=command))) == [] and found["schema"] == f"cswap-deploy/{command}/1"
    assert result.stdout.count("\n") == 1 and result.stdout.isascii()
    return found


# --- measure


def test_two_models_are_measured_in_turn_and_compared(files):
    found = document(
        call("measure", files / "narrow.onnx", "--against", files / "wide.onnx", *SHORT, "--json"), "measure"
    )
    narrow, wide = found["models"]
    assert [narrow["file"], wide["file"]] == [str(files / "narrow.onnx"), str(files / "wide.onnx")]
    assert [model["sha256"] for model in (narrow, wide)] == [sha256_of(Path(m["file"])) for m in (narrow, wide)]
    assert narrow["rounds"] == wide["rounds"] >= 6 and narrow["samples"] > wide["samples"]
    assert narrow["p50_ms"] <= narrow["p90_ms"] <= narrow["p99_ms"]
    assert narrow["p50_ms"] < wide["p50_ms"]
    low, high = found["speedup_ci95"]
    assert 1 < low < found["speedup"] < high, "it says how much faster the first one is"
    assert narrow["stable"] == (not narrow["unstable_because"])
    assert narrow["peak_memory_mb"] > 10
    settings = {"target": "local", "batch": 1, "threads": 1, "warmup_s": 0.05, "duration_s": 0.2}
    assert {key: found[key] for key in settings} == settings
    assert found["runtime"].startswith("onnxruntime 1.") and found["layers"] is None
    assert found["conditions"]["cores"] == len(os.sched_getaffinity(0))


def test_the_table_fits_a_terminal_and_says_on_what_it_was_measured(files):
    result = call("measure", files / "narrow.onnx", "--against", files / "wide.onnx", *SHORT)
    assert result.exit_code == 0 and result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= WIDTH
    text = " ".join(result.stdout.split())
    assert re.search(r"narrow\.onnx is [\d.]+ times as fast as wide\.onnx \(95 %: [\d.]+ to [\d.]+\)", text)
    assert "p50 p90 p99 p50, 95 % samples peak MB" in text
    assert "batch 1, 1 thread" in text and text.endswith("0.2 s each, in turn")


def test_long_names_fit_as_well(files, tmp_path):
    names = [tmp_path / f"a-network-with-a-name-that-tells-all-about-it-{number}.onnx" for number in (1, 2)]
    for name in names:
        shutil.copy(files / "narrow.onnx", name)
    result = call("measure", names[0], "--against", names[1], *SHORT)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= WIDTH


def test_two_files_of_one_name_are_told_apart(files, tmp_path):
    shutil.copy(files / "wide.onnx", tmp_path / "narrow.onnx")
    lines = call("measure", files / "narrow.onnx", "--against", tmp_path / "narrow.onnx", *SHORT).stdout.splitlines()
    assert f"narrow.onnx (1): {files / 'narrow.onnx'}" in lines
    assert f"narrow.onnx (2): {tmp_path / 'narrow.onnx'}" in lines


def test_one_model_has_figures_and_no_ratio(files):
    found = document(call("measure", files / "narrow.onnx", *SHORT, "--on", "local", "--json"), "measure")
    assert len(found["models"]) == 1 and found["speedup"] is found["speedup_ci95"] is None


def test_layers_show_where_the_time_goes(files):
    arguments = ["measure", files / "wide.onnx", *SHORT, "--layers"]
    layers = document(call(*arguments, "--json"), "measure")["layers"]
    slowest = max(layers, key=lambda layer: layer["ms"])
    assert slowest["op"] == "Conv"
    assert re.search("conv2|logits", slowest["name"]), "ONNX Runtime names a node that it has rewritten by its output"
    assert all(layer["ms"] >= 0 for layer in layers)
    result = call(*arguments)
    assert max(map(len, result.stdout.splitlines())) <= WIDTH
    assert f"{len(layers)} slowest of {len(layers)} layers" in result.stdout and " share" in result.stdout


def test_a_batch_takes_a_file_that_leaves_it_open(files):
    one, four = (
        document(call("measure", files / "open.onnx", "--batch", batch, *SHORT, "--json"), "measure")
        for batch in ("1", "4")
    )
    assert (one["batch"], four["batch"]) == (1, 4)
    assert four["models"][0]["p50_ms"] > one["models"][0]["p50_ms"], "milliseconds are those of the whole batch"
    error = document(call("measure", files / "narrow.onnx", "--batch", "2", "--json"), "measure", 5)["error"]
    assert "narrow.onnx has a fixed batch of 1, asked for are 2" in error["message"]
    assert error["hint"] == "measure with batch 1, or export with onnx.dynamic_batch: true"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("absent.onnx", None, "absent.onnx is not a file"),
        ("narrow.onnx", "absent.onnx", "absent.onnx is not a file"),
        (".", None, "is not a file"),
        ("model.pth", None, "model.pth ends in .pth"),
        ("narrow.onnx", "model.pth", "model.pth ends in .pth"),
        ("narrow.onnx", "text.engine", "an ONNX file and an engine cannot be measured in turn"),
    ],
)
def test_what_cannot_be_measured_is_refused(files, first, second, message):
    more = ["--against", files / second] if second else []
    result = call("measure", files / first, *more)
    assert result.exit_code == 2 and message in result.stderr and "  hint: " in result.stderr
    assert result.stdout == ""
    assert document(call("measure", files / first, *more, "--json"), "measure", 2)["error"]["type"] == "UsageError"


@pytest.mark.parametrize(
    "option",
    [
        ("--batch", "0"),
        ("--threads", "0"),
        ("--warmup", "-1"),
        ("--warmup", "nan"),
        ("--duration", "0"),
        ("--duration", "inf"),
    ],
)
def test_settings_out_of_range_are_refused(files, option):
    result = call("measure", files / "narrow.onnx", *option)
    assert result.exit_code == 2 and option[0] in result.stderr and result.stdout == ""


def test_a_text_that_is_named_onnx_is_the_target_s_complaint(files):
    result = call("measure", files / "narrow.onnx", "--against", files / "text.onnx")
    assert result.exit_code == 5 and "  hint: is it an ONNX file?" in result.stderr
    assert re.search(r"error: local: ONNX Runtime \S+ cannot open text\.onnx: ", result.stderr)
    assert "Traceback" not in result.stderr


def test_an_engine_from_elsewhere_is_not_loaded_unless_it_is_trusted_by_its_digest(files):
    digest = sha256_of(files / "text.engine")
    error = document(call("measure", files / "text.engine", "--json"), "measure", 5)["error"]
    assert "was not built on the target; an engine is native code" in error["message"]
    assert f"--trust-engine {digest}" in error["hint"]
    other = document(call("measure", files / "text.engine", "--trust-engine", "0" * 64, "--json"), "measure", 5)
    assert other["error"]["message"] == error["message"]


@pytest.mark.parametrize("target", ["ssh://-x", "ssh://-oProxyCommand=x", "ssh://a b", "foo", ""])
def test_what_is_no_target_is_refused_with_words(files, target):
    result = call("measure", files / "narrow.onnx", "--on", target)
    assert result.exit_code == 2 and f"--on: {target!r} is no target" in result.stderr


def test_a_target_out_of_reach_ends_with_5(files):
    if shutil.which("ssh") is None:
        pytest.skip("OpenSSH's client is not installed")
    result = call("measure", files / "narrow.onnx", "--on", NOBODY)
    assert result.exit_code == 5 and f"{NOBODY} cannot be reached" in result.stderr


@pytest.mark.parametrize("command", ["measure", "doctor"])
def test_the_light_commands_import_no_framework(files, command):
    code = (
        "import sys\nfrom cswap_deploy import cli\nsys.argv = ['cswap-deploy', *sys.argv[1:]]\n"
        "try:\n    cli.main()\n"
        f"finally:\n    print([name for name in {FRAMEWORKS} if name in sys.modules], file=sys.stderr)\n"
    )
    done = run("-c", code, command, *([files / "narrow.onnx", *SHORT] if command == "measure" else []))
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


# --- doctor


def test_doctor_says_what_this_machine_and_the_target_can_do():
    found = document(call("doctor", "--json"), "doctor")
    assert found["target"]["name"] == "local"
    states = {finding["topic"]: finding["state"] for finding in found["target"]["findings"]}
    assert states["onnxruntime"] == "ok" and "tensorrt" in states
    assert {finding["topic"]: finding["state"] for finding in found["host"]}["torch"] == "ok"
    result = call("doctor")
    assert result.exit_code == 0 and result.stdout.startswith("this machine\n") and "\ntarget local\n" in result.stdout
    for finding in (*found["host"], *found["target"]["findings"]):
        assert f"{finding['state']:<8} {finding['topic']}: " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_doctor_of_a_target_out_of_reach_says_why_and_still_looks_here():
    if shutil.which("ssh") is None:
        pytest.skip("OpenSSH's client is not installed")
    found = document(call("doctor", "--on", NOBODY, "--json"), "doctor", 5)
    (finding,) = found["target"]["findings"]
    assert found["target"]["name"] == NOBODY and found["host"]
    assert (finding["topic"], finding["state"]) == ("target", "problem")
    assert "cannot be reached" in finding["text"] and "Connection refused" in finding["text"]
    assert finding["fix"] == "check address and network: ssh to it by hand"
    result = call("doctor", "--on", NOBODY)
    assert result.exit_code == 5 and f"target {NOBODY}" in result.stdout and "Connection refused" in result.stdout


# --- verify


@pytest.fixture
def bundle(colours: Built, tmp_path: Path) -> Path:
    return shutil.copytree(colours.bundle.folder, tmp_path / "bundle")


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in found["checks"]}


def test_verify_passes_what_is_as_it_was_built(bundle):
    found = document(call("verify", bundle, "--json"), "verify")
    assert outcomes(found) == {
        "manifest": "passed", "files": "passed", "unlisted": "passed", "onnx": "passed", "pytorch": "skipped",
    }  # fmt: skip
    result = call("verify", bundle)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "PASS: 0 of 5 checks failed, 1 skipped"
    assert max(map(len, result.stdout.splitlines())) <= WIDTH
    assert re.search(r"^skipped +pytorch: .*factory", result.stdout, re.MULTILINE)


def test_verify_ends_with_9_where_it_finds_a_difference(bundle):
    (bundle / "labels.txt").write_text("others\n")
    found = document(call("verify", bundle, "--json"), "verify", 9)
    assert outcomes(found)["files"] == "failed" and outcomes(found)["onnx"] == "passed"
    result = call("verify", bundle)
    assert result.exit_code == 9 and result.stdout.splitlines()[-1].startswith("FAIL: 1 of 5 checks failed")
    assert "labels.txt" in result.stdout and result.stderr == ""


def test_a_check_that_is_required_may_not_be_skipped(bundle):
    assert call("verify", bundle, "--require", "files,onnx").exit_code == 0
    found = document(call("verify", bundle, "--require", "onnx,pytorch", "--json"), "verify", 9)
    assert outcomes(found)["pytorch"] == "failed"


@pytest.mark.parametrize("name", ["engine", "onnx:fp16", "nonsense"])
def test_a_check_that_this_bundle_does_not_have_cannot_be_required(bundle, name):
    error = document(call("verify", bundle, "--require", name, "--json"), "verify", 2)["error"]
    assert name in error["message"] and error["hint"]


def test_verify_of_no_bundle_is_a_matter_of_usage(tmp_path):
    assert "is not a bundle" in document(call("verify", tmp_path, "--json"), "verify", 2)["error"]["message"]


# --- schema


def test_the_agent_s_schema_tells_requests_and_answers_by_verb():
    found = json.loads(call("schema", "--agent").stdout)
    assert found == schemas.of(agent=True) and found["title"] == protocol.SCHEMA
    assert tuple(found["verbs"]) == protocol.VERBS
    assert all(set(verb) == {"request", "response"} for verb in found["verbs"].values())


@pytest.mark.parametrize("option", [("--manifest",), ("--command", "measure")])
def test_the_agent_s_schema_comes_alone(option):
    result = call("schema", "--agent", *option)
    assert result.exit_code == 2 and "exclude each other" in result.stderr
