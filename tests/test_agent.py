"""The agent as a program: what it reads and writes keeps to the protocol, whatever else happens on the device."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sshd

from cswap_deploy import manifest, recipe
from cswap_deploy.device import needs, protocol, target
from cswap_deploy.device.target import AGENT, Probe, reach
from cswap_deploy.errors import DeviceError

TREE = ast.parse(AGENT.read_text("utf-8"), feature_version=(3, 8))
ENGINE_RECIPE = {
    "name": "x", "model": {"name": "resnet18"}, "calibration": {"images": "."}, "prune": {}, "engine": {"precision": "fp16"},
}  # fmt: skip
SETTINGS = {
    "precision": "fp16", "workspace_mib": 64, "optimization_level": 2, "dla_core": None, "keep_fp32": "auto",
    "batch": {"min": 1, "opt": 2, "max": 4},
}  # fmt: skip
TRTEXEC = """#!/bin/sh
[ "$1" = --help ] && { echo '&&&& RUNNING TensorRT.trtexec [TensorRT v101300] [b35]'; echo ' --fp16 ...'; exit; }
echo "$*" >> "$XDG_CACHE_HOME/calls"
for option; do
  case "$option" in
    --saveEngine=*) printf engine > "${option#*=}" ;;
    --loadEngine=*) [ -f "${option#*=}" ] || { echo '[01/01/2026-00:00:00] [E] no such engine'; exit 1; } ;;
    --exportTimes=*) echo '[{"latencyMs": 1.5}, {"latencyMs": 2}]' > "${option#*=}" ;;
  esac
done
"""


@dataclass(frozen=True)
class Agent:
    """The agent in a process of its own with a store of its own; every line of both sides is held to the protocol."""

    cache: Path
    environment: dict[str, str] = field(default_factory=dict)
    program: Sequence[str] = (sys.executable, str(AGENT))

    @property
    def store(self) -> Path:
        return self.cache / "cswap-deploy"

    def ask(self, verb: str, payload: bytes = b"", **request: Any) -> dict[str, Any]:
        return self.exchange(verb, payload, **request)[0]

    def refusal(self, verb: str, payload: bytes = b"", **request: Any) -> dict[str, str]:
        error = self.ask(verb, payload, **request)["error"]
        assert isinstance(error, dict)
        return error

    def exchange(self, verb: str, payload: bytes = b"", **request: Any) -> tuple[dict[str, Any], bytes]:
        """The document and the bytes after it. Standard input stays open, as the host holds it, but for `store`."""
        line = {"schema": protocol.SCHEMA, "verb": verb, **request}
        assert [*manifest.faults(line, protocol.request_schema(verb))] == []
        answer, rest, code = self.talk(json.dumps(line).encode() + b"\n" + payload, close=verb == "store")
        assert [*manifest.faults(answer, protocol.response_schema(verb))] == []
        assert code == int("error" in answer)
        return answer, rest

    def talk(self, text: bytes, close: bool = False) -> tuple[dict[str, Any], bytes, int]:
        with self.running() as process:
            assert process.stdin and process.stdout
            process.stdin.write(text)
            process.stdin.close() if close else process.stdin.flush()
            answer, rest = process.stdout.readline(), process.stdout.read()
            return json.loads(answer), rest, process.wait(10)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, "XDG_CACHE_HOME": str(self.cache)}
        self.cache.mkdir(exist_ok=True)
        with (self.cache / "log").open("ab") as log:
            process = subprocess.Popen(
                self.program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=surroundings
            )
        try:
            yield process
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()
            process.wait()


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path / "cache")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The agent's file, imported; its store is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("agent_under_test", AGENT)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`open`: any batch; `fixed`: batches of 3; `slow`: about a millisecond; `large`: 30 MB of weights."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "open": sshd.classifier(folder / "open.onnx"),
        "fixed": sshd.classifier(folder / "fixed.onnx", batch=3),
        "slow": sshd.classifier(folder / "slow.onnx", batch=1, width=24, side=64),
        "large": sshd.classifier(folder / "large.onnx", batch=1, width=900, side=2),
    }


@pytest.fixture(scope="module")
def measured(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models in turn, half a second each."""
    agent = Agent(tmp_path_factory.mktemp("measured") / "cache")
    files = [here(models["slow"]), here(models["large"])]
    return agent.ask("measure", runtime="onnxruntime", models=files, warmup_s=0.05, duration_s=0.5, block_s=0.05)


def here(path: Path) -> dict[str, str]:
    """A file as the host names it to an agent on the same machine."""
    return {"path": str(path), "sha256": digest(path.read_bytes()), "name": path.name}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def give(module: ModuleType, monkeypatch: pytest.MonkeyPatch, content: bytes, age: float = 0) -> str:
    """Store a file in this process, as one that was last used `age` seconds ago."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    files = module.Store()
    stored: dict[str, Any] = module.store({"sha256": digest(content), "bytes": len(content)}, files)["stored"]
    if age:
        os.utime(files.path(stored["sha256"]), (time.time() - age, time.time() - age))
    return str(stored["sha256"])


def kept(agent: Agent) -> list[str]:
    return sorted(path.name for folder in ("files", "tmp") for path in (agent.store / folder).iterdir())


# --- the file


def test_agent_is_one_short_file_for_python_38() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno and node.end_lineno - node.lineno >= 40]
    assert long == []
    assert len(AGENT.read_text("utf-8").splitlines()) < 1000


def test_agent_needs_only_the_standard_library_to_start() -> None:
    imports = [node for node in TREE.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in imports
        for alias in node.names
    }
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_python_38_runs_the_agent(agent: Agent) -> None:
    interpreter = sshd.python38()
    if interpreter is None:
        pytest.skip("there is no Python 3.8 on this machine")
    old = Agent(agent.cache, program=(str(interpreter), "-I", str(AGENT)))
    assert old.ask("probe")["python"].startswith("3.8.")
    assert old.ask("store", b"content", sha256=digest(b"content"), bytes=7)["stored"]["bytes"] == 7
    assert old.exchange("fetch", file={"sha256": digest(b"content")})[1] == b"content"


def test_protocol_names_what_the_agent_has(module: ModuleType) -> None:
    assert set(protocol.VERBS) == set(module.VERBS)
    assert module.SCHEMA == protocol.SCHEMA == target.SCHEMA
    faults = {
        node.args[0].value
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Fault" and isinstance(node.args[0], ast.Constant)
    }
    assert faults | {"internal"} == set(protocol.FAULTS)


# --- requests and answers


def test_probe_says_what_the_machine_is(agent: Agent) -> None:
    document = agent.ask("probe")
    assert document["python"] == sys.version.split()[0] and document["machine"] == os.uname().machine
    assert document["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert document["memory_mb"] > document["memory_free_mb"] > 0 and document["disk_free_mb"] > 0
    assert document["numpy"] == np.__version__ and "CPUExecutionProvider" in document["onnxruntime"]["providers"]
    assert document["store"] == {"folder": str(agent.store), "bytes": 0, "limit_bytes": 4 << 30}


def test_library_that_prints_disturbs_nothing(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "onnxruntime.py").write_text(
        "import os\nos.write(1, b'native noise')\nprint('noise', flush=True)\n"
        "__version__ = '9.9'\ndef get_available_providers():\n    print('more')\n    return []\n"
    )
    noisy = Agent(agent.cache, {"PYTHONPATH": str(tmp_path / "lib")})
    document, rest = noisy.exchange("probe")
    assert document["onnxruntime"] == {"version": "9.9", "providers": [], "reason": ""} and rest == b""
    assert b"native noise" in (agent.cache / "log").read_bytes()


def test_library_that_does_not_load_is_reported(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    document = Agent(agent.cache, {"PYTHONPATH": str(tmp_path)}).ask("probe")
    assert document["onnxruntime"]["version"] is None
    assert document["onnxruntime"]["reason"] == "OSError: libcudart.so.12: cannot open shared object file"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"", "request"),
        (b"{}\n", "request"),
        (b'{"schema": "cswap-deploy/agent/2", "verb": "probe"}\n', "request"),
        (b'{"schema": "cswap-deploy/agent/1", "verb": "main"}\n', "request"),
        (b'{"schema": "cswap-deploy/agent/1", "verb": "missing"}\n', "internal"),
        (b"not JSON\n", "internal"),
    ],
)
def test_strange_request_gets_an_error_document(agent: Agent, line: bytes, kind: str) -> None:
    document, rest, code = agent.talk(line, close=not line)
    assert [*manifest.faults(document, protocol.response_schema("probe"))] == []
    assert document["error"]["kind"] == kind and rest == b"" and code == 1


def test_local_target_talks_to_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "numpy.py").write_text("raise SystemExit('modules of the current folder are none of our business')")
    monkeypatch.chdir(tmp_path)
    with reach("local") as found:
        probe = Probe.of(found)
        assert probe.document["numpy"] == np.__version__
        assert probe.facts("onnxruntime").keys() >= {"device", "runtime", "agent"}
        with pytest.raises(DeviceError, match=r"local: 'x' is not a SHA-256 digest"):
            found.ask("missing", 60, sha256=["x"])


# --- files


def test_file_goes_there_and_back(agent: Agent) -> None:
    content = os.urandom(3_000_000)
    name, other = digest(content), digest(b"other")
    assert agent.ask("missing", sha256=[name, other])["missing"] == [name, other]
    assert agent.ask("store", content, sha256=name, bytes=len(content))["stored"] == {
        "sha256": name, "bytes": len(content)
    }  # fmt: skip
    assert agent.ask("missing", sha256=[name, other])["missing"] == [other]
    assert agent.exchange("fetch", file={"sha256": name}) == (
        {"schema": protocol.SCHEMA, "bytes": len(content)},
        content,
    )
    assert kept(agent) == [name] and agent.store.joinpath("files").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("sent", [b"conten", b"", b"c0ntent"])
def test_truncated_or_changed_file_is_refused(agent: Agent, sent: bytes) -> None:
    error = agent.refusal("store", sent, sha256=digest(b"content"), bytes=7)
    assert (error["kind"], error["message"]) == ("transfer", "a file arrived incomplete or changed")
    assert kept(agent) == []


@pytest.mark.parametrize("name", ["../x", "", "/etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "../" + "a" * 61])
@pytest.mark.parametrize("verb", ["store", "missing", "fetch"])
def test_name_that_is_no_digest_is_refused(module: ModuleType, verb: str, name: str) -> None:
    request = {
        "store": {"sha256": name, "bytes": 0}, "missing": {"sha256": [name]}, "fetch": {"file": {"sha256": name}}
    }[verb]  # fmt: skip
    with pytest.raises(module.Fault, match="is not a SHA-256 digest"):
        module.VERBS[verb](request, module.Store())


def test_absent_file_is_a_fault(agent: Agent) -> None:
    error = agent.refusal("fetch", file={"sha256": "0" * 64})
    assert error["kind"] == "file" and "run the same command again" in error["hint"]


def test_least_recently_used_files_make_room(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 100)
    first, second, third = (give(module, monkeypatch, bytes([n]) * 30, age=10_000 - n) for n in range(3))
    module.fetch({"file": {"sha256": first}}, module.Store())  # used again
    fourth = give(module, monkeypatch, b"x" * 30)
    assert module.missing({"sha256": [first, second, third, fourth]}, module.Store())["missing"] == [second]


def test_file_that_was_asked_for_is_not_removed_for_the_next(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`missing` says that a file is there: the host counts on it."""
    monkeypatch.setattr(module, "LIMIT", 100)
    wanted, other = give(module, monkeypatch, b"a" * 40, age=10_000), give(module, monkeypatch, b"b" * 40, age=9000)
    new = digest(b"c" * 40)
    assert module.missing({"sha256": [wanted, new]}, module.Store())["missing"] == [new]
    give(module, monkeypatch, b"c" * 40)
    assert module.missing({"sha256": [wanted, other]}, module.Store())["missing"] == [other]


@pytest.mark.parametrize("size", [101, 80])
def test_nothing_is_removed_for_what_does_not_fit_anyway(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """80 would fit without the file that was used lately, which a request that is under way may need."""
    monkeypatch.setattr(module, "LIMIT", 100)
    kept = [give(module, monkeypatch, b"a" * 30, age=10_000), give(module, monkeypatch, b"b" * 30)]
    with pytest.raises(module.Fault, match="do not fit on the target"):
        module.Store().make_room(size)
    assert module.missing({"sha256": kept}, module.Store())["missing"] == []


def test_sampling_of_very_unequal_models_ends(module: ModuleType) -> None:
    start = time.monotonic()
    models = [SimpleNamespace(run=run, on_gpu=None) for run in (lambda: None, lambda: time.sleep(0.1))]
    rounds, gpu_rounds, _ = module.sample(models, 0.1, 0.01)
    assert gpu_rounds is None
    assert len(rounds) == module.ROUNDS and time.monotonic() - start < 4


def test_abandoned_files_are_swept(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = (module.Store().scratch(suffix) for suffix in (".old", ".young"))
    for path in (old, young):
        path.touch()
    os.utime(old, (time.time() - module.ABANDONED_S - 1,) * 2)
    give(module, monkeypatch, b"content")
    assert not old.exists() and young.exists()


def test_file_of_another_agent_may_vanish_meanwhile(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to nowhere is what a folder's entry is when its file has just been renamed: listed, and not there."""
    module.Store().scratch().symlink_to("nowhere")
    assert give(module, monkeypatch, b"content") == digest(b"content")


def test_full_disk_is_told_before_anything_is_sent(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Store, "free", lambda store: 300 << 20)
    with pytest.raises(
        module.Fault, match=r"50 MiB do not fit on the target: 300 MiB are free, 256 stay free, 4096 are kept"
    ):
        module.Store().make_room(50 << 20)
    give(module, monkeypatch, b"content")


def test_what_a_builder_needs_meanwhile_counts_for_the_disk_alone(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT", 100)
    kept = [give(module, monkeypatch, bytes([n]) * 30, age=10_000 - n) for n in range(2)]
    module.Store().make_room(5000, kept=False)
    assert module.missing({"sha256": kept}, module.Store())["missing"] == []
    monkeypatch.setattr(module.Store, "free", lambda store: 300 << 20)
    with pytest.raises(module.Fault, match=r"300 MiB are free, 256 stay free$"):
        module.Store().make_room(50 << 20, kept=False)


def test_a_store_without_its_name_gets_one(agent: Agent) -> None:
    """Power fails after a file is made and before it has its content."""
    name = agent.ask("probe")["id"]
    assert agent.ask("probe")["id"] == name and len(name) == 16
    (agent.store / "id").write_bytes(b"")
    assert len(agent.ask("probe")["id"]) == 16 and kept(agent) == []


def test_files_bear_their_names_once_the_disk_has_them(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(module.os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    module.probe({}, module.Store())
    assert synced == [(module.Store().root / "id").stat().st_ino]


def test_disk_that_fills_up_meanwhile_is_told(agent: Agent) -> None:
    limit = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (1000, 1000)); "
    run = f"sys.argv = [{str(AGENT)!r}]; runpy.run_path(sys.argv[0], run_name='__main__')"
    full = Agent(agent.cache, program=(sys.executable, "-c", limit + run))
    error = full.refusal("store", b"x" * 5000, sha256=digest(b"x" * 5000), bytes=5000)
    assert error["kind"] == "disk" and "File too large on the target" in error["message"]
    assert "None" not in error["message"]
    assert not any((agent.store / "files").iterdir())


def test_cache_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cswap-deploy").touch()
    error = Agent(tmp_path / "cache").refusal("probe")
    assert "cache/cswap-deploy" in error["message"] and error["kind"] == "disk"


# --- measurements


def test_measurement_keeps_to_its_duration(measured: dict[str, Any]) -> None:
    spent = [sum(sum(blocks[model]) for blocks in measured["rounds"]) / 1e9 for model in range(2)]
    longest = max(max(block) for blocks in measured["rounds"] for block in blocks) / 1e9
    assert 0.5 <= min(spent) <= 0.5 + 0.05 + longest
    assert max(spent) <= 1.2 * min(spent) + 0.05 + longest


def test_measurement_costs_little_beside_the_model(measured: dict[str, Any]) -> None:
    print(f"overhead {100 * measured['overhead']:.2f} %")
    assert 0 <= measured["overhead"] < 0.05


def test_memory_is_that_of_each_model(measured: dict[str, Any]) -> None:
    memory = measured["memory"]
    small, large = memory["peak_mb"]
    assert 10 < memory["runtime_mb"] < small < 1000
    assert 20 < large - small < 300, "30 MB of weights, and what ONNX Runtime makes of them"
    assert memory["agent_mb"] > memory["runtime_mb"]


def test_conditions_are_noted_before_and_after(measured: dict[str, Any]) -> None:
    assert measured["before"]["cpu"]["model"] == measured["after"]["cpu"]["model"]
    assert [model["runtime"].split()[0] for model in measured["models"]] == ["onnxruntime"] * 2


def test_rounds_alternate_and_settling_does_not_count(module: ModuleType) -> None:
    order: list[str] = []

    def model(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            time.sleep(0.001)

        return run

    start = time.perf_counter()
    models = [SimpleNamespace(run=model(name), on_gpu=None) for name in "ab"]
    rounds, _, running = module.sample(models, 0.1, 0.02)
    taken = time.perf_counter() - start
    turns = [name for name, before in zip(order, ["", *order]) if name != before]
    assert "".join(turns) == ("ab" * len(rounds))[: len(turns)] and len(turns) == len(rounds) + 1
    assert order.count("a") > sum(len(blocks[0]) for blocks in rounds), "a model's first runs find foreign caches"
    assert len(rounds) >= module.ROUNDS and all(len(block) >= 2 for blocks in rounds for block in blocks)
    assert min(duration for blocks in rounds for block in blocks for duration in block) >= 1_000_000
    assert 0.2 < running / 1e9 <= taken


def test_models_that_do_not_fit_are_faults(agent: Agent, models: dict[str, Path], tmp_path: Path) -> None:
    run = {"runtime": "onnxruntime", "warmup_s": 0, "duration_s": 0.01}
    error = agent.refusal("measure", models=[here(models["fixed"])], **run)
    assert error["kind"] == "model" and "fixed.onnx has a fixed batch of 3, asked for are 1" in error["message"]
    assert error["hint"] == "measure with batch 3, or export with onnx.dynamic_batch: true"
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    error = agent.refusal("layers", runtime="onnxruntime", model=here(tmp_path / "broken.onnx"))
    assert error["kind"] == "model" and "cannot open broken.onnx" in error["message"]


def test_missing_runtime_says_what_to_install(agent: Agent, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    bare = Agent(agent.cache, {"PYTHONPATH": str(tmp_path)})
    error = bare.refusal("layers", runtime="onnxruntime", model=here(models["open"]))
    assert error["kind"] == "runtime" and error["hint"] == "there: pip install onnxruntime"


def test_busy_device_is_told_after_the_wait(agent: Agent, models: dict[str, Path]) -> None:
    agent.ask("missing", sha256=[])
    with (agent.store / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        start = time.monotonic()
        error = agent.refusal("layers", runtime="onnxruntime", model=here(models["open"]), wait_s=0.3)
        assert error["kind"] == "busy" and time.monotonic() - start >= 0.3


def test_agent_ends_with_its_connection(agent: Agent, models: dict[str, Path]) -> None:
    run = {"runtime": "onnxruntime", "models": [here(models["slow"])], "warmup_s": 0, "duration_s": 60}
    with agent.running() as process:
        assert process.stdin
        process.stdin.write(json.dumps({"schema": protocol.SCHEMA, "verb": "measure", **run}).encode() + b"\n")
        process.stdin.flush()
        sshd.wait_until(lambda: (agent.store / "lock").exists())
        assert process.poll() is None
        process.stdin.close()
        start = time.monotonic()
        assert process.wait(10) == 1 and time.monotonic() - start < 2


@pytest.mark.parametrize("killed", [False, True])
def test_no_child_outlives_the_agent(agent: Agent, tmp_path: Path, killed: bool) -> None:
    """A process that measures memory may take long, with a library or a model that does; it holds the lock."""
    (tmp_path / "onnxruntime.py").write_text("import time\ntime.sleep(30)")
    slow = Agent(agent.cache, {"PYTHONPATH": str(tmp_path)})
    run = {"runtime": "onnxruntime", "models": [], "warmup_s": 0, "duration_s": 1}
    with slow.running() as process:
        assert process.stdin
        process.stdin.write(json.dumps({"schema": protocol.SCHEMA, "verb": "measure", **run}).encode() + b"\n")
        process.stdin.flush()
        sshd.wait_until(lambda: [pid for pid in sshd.pids() if sshd.parent_of(pid) == process.pid])
        children = [pid for pid in sshd.pids() if sshd.parent_of(pid) == process.pid]
        time.sleep(0.1)
        process.kill() if killed else process.stdin.close()
        process.wait(5)
        try:
            sshd.wait_until(lambda: not any(map(sshd.runs, children)), 2)
        finally:
            sshd.end(*children)


# --- logits and layers


@pytest.mark.parametrize(
    ("kind", "name", "count"), [("uint8", "fixed", 7), ("float32", "open", 6), ("uint8", "open", 1)]
)
def test_logits_are_those_of_a_direct_run(
    agent: Agent, models: dict[str, Path], tmp_path: Path, kind: str, name: str, count: int
) -> None:
    import onnxruntime

    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    columns = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    given = pixels.astype(np.float32) / 7
    if kind == "uint8":
        given = (pixels / np.float32(255) - next(columns)) / next(columns)
    np.save(tmp_path / "images.npy", pixels.astype(np.uint8) if kind == "uint8" else given)
    answer = agent.ask(
        "infer", runtime="onnxruntime", model=here(models[name]), images=here(tmp_path / "images.npy"),
        mean=mean, std=std, batch=3,
    )  # fmt: skip
    assert answer["images"] == count
    kept_of = np.load(io.BytesIO(agent.exchange("fetch", file={"sha256": answer["outcomes"]["sha256"]})[1]))
    found = kept_of["logits"]
    session = onnxruntime.InferenceSession(models["open"], providers=["CPUExecutionProvider"])
    expected = session.run(None, {"images": given.astype(np.float32)})[0]
    assert found.dtype == np.float32 and found.shape == (count, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert kept(agent) == [answer["outcomes"]["sha256"]]


def test_judging_many_images_takes_little_memory(agent: Agent, tmp_path: Path) -> None:
    """220 MB of pixels, in a file of zeros that takes no room; beside what the runtime takes for one batch."""
    model = sshd.classifier(tmp_path / "wide.onnx", width=2, side=224)
    pixels = np.lib.format.open_memmap(tmp_path / "pixels.npy", "w+", np.uint8, (1460, 3, 224, 224))
    del pixels
    peak = "next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))"  # kB, of this program alone
    note = f"open({str(tmp_path / 'peak')!r}, 'w').write({peak})"
    run = f"import atexit, runpy, sys; atexit.register(lambda: {note}); sys.argv = [{str(AGENT)!r}]; "
    noting = Agent(
        agent.cache, program=(sys.executable, "-c", run + "runpy.run_path(sys.argv[0], run_name='__main__')")
    )
    bare = (
        "import numpy as np, onnxruntime as ort; zeros = np.zeros((4, 3, 224, 224), 'f4'); "
        f"ort.InferenceSession({str(model)!r}, providers=['CPUExecutionProvider']).run(None, {{'images': zeros}}); print({peak})"
    )
    loaded = int(subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True).stdout) / 1024
    answer = noting.ask(
        "infer", runtime="onnxruntime", model=here(model), images={"path": str(tmp_path / "pixels.npy")}, mean=[0.5] * 3,
        std=[0.5] * 3, batch=4, labels=[0] * 1460,
    )  # fmt: skip
    assert answer["images"] == 1460
    used = int((tmp_path / "peak").read_text()) / 1024
    print(f"agent with 220 MB of images: {used:.0f} MB, the runtime with one batch {loaded:.0f} MB")
    assert used - loaded < 60


def test_layers_name_their_operators(agent: Agent, models: dict[str, Path]) -> None:
    layers = agent.ask("layers", runtime="onnxruntime", model=here(models["slow"]))["layers"]
    convolutions = [layer["ms"] for layer in layers if layer["op"] in ("Conv", "FusedConv")]
    assert len(convolutions) == 2 and sum(convolutions) > 0.5 * sum(layer["ms"] for layer in layers) > 0
    assert [layer["op"] for layer in layers][-1] in ("MatMul", "Gemm")
    assert kept(agent) == []


# --- engines, without TensorRT


def test_foreign_engine_is_refused(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"native code")
    name = digest(b"native code")
    agent.ask("store", b"native code", sha256=name, bytes=11)
    for file in (here(tmp_path / "model.engine"), {"sha256": name}):
        error = agent.refusal("measure", runtime="tensorrt", models=[file], warmup_s=0, duration_s=1)
        assert error["kind"] == "engine" and "was not built on the target" in error["message"]
        assert f"--trust-engine {name}" in error["hint"]


def test_build_without_tensorrt_says_what_to_install(agent: Agent, models: dict[str, Path]) -> None:
    empty = Agent(agent.cache, {"PATH": "/nonexistent"})
    if empty.ask("probe")["tensorrt"]["version"]:
        pytest.skip("TensorRT is on this machine")
    error = empty.refusal(
        "build",
        model=here(models["open"]),
        settings=SETTINGS,
        input={"name": "images", "shape": [3, 8, 8]},
        dynamic=True,
    )
    assert error["kind"] == "runtime" and "apt install" in error["hint"]


def test_engine_is_built_entered_and_measured_with_trtexec(
    agent: Agent, models: dict[str, Path], tmp_path: Path
) -> None:
    """A stand-in for trtexec takes the options that the real one has."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "trtexec").write_text(TRTEXEC)
    (tmp_path / "bin" / "trtexec").chmod(0o755)
    board = Agent(agent.cache, {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path)})
    (tmp_path / "tensorrt.py").write_text("raise ImportError('no module')")
    request = {"settings": SETTINGS, "input": {"name": "images", "shape": [3, 8, 8]}, "dynamic": True}
    answer = board.ask("build", model=here(models["open"]), **request)
    assert answer["engine"] == {"sha256": digest(b"engine"), "bytes": 6} and answer["tensorrt"] == "TensorRT v101300"
    options = (agent.cache / "calls").read_text().split()
    assert {"--fp16", "--optShapes=images:2x3x8x8", "--memPoolSize=workspace:64"} <= set(options)
    document = board.ask(
        "measure", runtime="tensorrt", models=[{"sha256": digest(b"engine")}], warmup_s=0.5, duration_s=1
    )
    assert document["times"] == [['[{"latencyMs": 1.5}, {"latencyMs": 2}]\n']] * 6 and document["memory"] is None
    agent.ask("store", b"foreign", sha256=digest(b"foreign"), bytes=7)
    trusted = {"models": [{"sha256": digest(b"foreign")}], "trust": [digest(b"foreign")]}
    assert board.ask("measure", runtime="tensorrt", warmup_s=0, duration_s=1, **trusted)["times"]


def test_a_gray_network_takes_the_first_mean_and_std(agent: Agent, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    flatten = helper.make_node("Flatten", ["x"], ["y"])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([flatten], "gray", [given], [result])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    (tmp_path / "gray.onnx").write_bytes(model.SerializeToString())
    np.save(tmp_path / "images.npy", np.full((2, 1, 2, 2), 255, np.uint8))
    answer = agent.ask(
        "infer", runtime="onnxruntime", model=here(tmp_path / "gray.onnx"), images=here(tmp_path / "images.npy"),
        mean=[0.5, 0.1, 0.1], std=[0.25, 1, 1], batch=1,
    )  # fmt: skip
    kept_of = np.load(io.BytesIO(agent.exchange("fetch", file={"sha256": answer["outcomes"]["sha256"]})[1]))
    found = kept_of["logits"]
    np.testing.assert_allclose(found, np.full((2, 4), 2.0))


# --- what a bundle may say


@pytest.mark.parametrize(
    ("message", "public"),
    [
        (
            "ONNX Runtime is not usable on the target: ImportError: /home/me/x.so",
            "ONNX Runtime is not usable on the target",
        ),
        ("TensorRT is not on the target: OSError: /home/me/x.so", "TensorRT is not on the target"),
        ("trtexec of /home/me ended with -9", "the runtime on the target cannot be used"),
    ],
)
def test_a_bundle_says_of_a_runtimes_fault_what_names_no_path(message: str, public: str) -> None:
    error = target.refusal("ssh://me@board", {"kind": "runtime", "message": message, "hint": ""}, "")
    assert error.public == public and error.message == f"ssh://me@board: {message}"


def test_every_fault_of_a_runtime_has_its_public_words() -> None:
    """But for what trtexec ends with, of which a bundle says the least."""
    texts = [
        piece.value
        for call in ast.walk(TREE)
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "Fault"
        and "'runtime'" in ast.unparse(call.args[0])
        for piece in ast.walk(call.args[1])
        if isinstance(piece, ast.Constant) and isinstance(piece.value, str) and "target" in piece.value
    ]
    assert len(texts) == 4 and all(text.startswith(target.PUBLIC_RUNTIME) for text in texts)


def test_a_bundle_does_not_say_why_tensorrt_cannot_be_imported(agent: Agent) -> None:
    document = agent.ask("probe")
    why = "ImportError: /home/me/venv/libnvinfer.so.10: no such file"
    document["tensorrt"] |= {"version": None, "reason": why}
    asked = recipe.Recipe.model_validate(ENGINE_RECIPE)
    for refuse in (lambda: Probe(document).require_tensorrt("local"), lambda: needs.require(asked, document, "local")):
        with pytest.raises(DeviceError, match="/home/me/venv") as caught:
            refuse()
        assert caught.value.public == "TensorRT cannot be used on the target"
