"""The ssh target against a real sshd: another user, a home folder with quotes in its name, and cut connections."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sshd
from sshd import Device, Server

from cswap_deploy import manifest
from cswap_deploy.artifacts import File
from cswap_deploy.device import protocol
from cswap_deploy.device.target import BOOTSTRAP, REMOTE, Probe, Target, reach
from cswap_deploy.errors import DeviceError, UsageError

MB = 1 << 20


@pytest.fixture(autouse=True)
def client(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use(device.client(tmp_path / "client"), monkeypatch)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> File:
    return File.of(sshd.classifier(tmp_path_factory.mktemp("models") / "it's a model; touch $x.onnx"))


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs of all requests, as they are sent."""
    sent: list[str] = []
    exchange = Target._exchange

    def noted(self: Target, request: dict[str, Any], *rest: Any, **named: Any) -> dict[str, Any]:
        sent.append(request["verb"])
        return exchange(self, request, *rest, **named)

    monkeypatch.setattr(Target, "_exchange", noted)
    return sent


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def fresh_file(path: Path, size: int) -> File:
    """Content that no other file has; the rest of it is zeros, which cost no time to make."""
    with path.open("wb") as stream:
        stream.write(os.urandom(64))
        stream.truncate(size)
    return File.of(path)


def measure(target: Target, model: File, duration_s: float = 0.02, seconds: float = 60, **more: Any) -> dict[str, Any]:
    request = {"runtime": "onnxruntime", "models": target.put(model), "warmup_s": 0, "duration_s": duration_s}
    return target.ask("measure", seconds, **request, **{"block_s": 0.005, **more})


def assert_whole(device: Device) -> None:
    """What bears a digest for a name is that file to the last byte."""
    for path in (device.store / "files").glob("*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def is_locked(device: Device) -> bool:
    """Whether an agent builds or measures."""
    if not (device.store / "lock").exists():
        return False
    with (device.store / "lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def control_option(target: Target) -> str:
    return next(word for word in target.command if word.startswith("ControlPath="))


def control_path(target: Target) -> Path:
    return Path(control_option(target).partition("=")[2].strip('"').replace("%%", "%"))


def ssh_processes(target: Target, master: str) -> list[int]:
    """Clients (`no`) or the shared connection (`yes`) of a target."""
    options = {control_option(target), f"ControlMaster={master}"}
    return [pid for pid in sshd.pids() if options <= set(sshd.command_of(pid))]


# --- a connection


def test_probe_takes_little_time(server: Server, device: Device) -> None:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        with reach(server.name) as target:
            probe = Probe.of(target)
        taken.append(time.perf_counter() - start)
    waiting = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # processes for each core
    print(f"probe over ssh, connecting included: {min(taken):.2f} s, {waiting:.1f} processes for each core")
    assert min(taken) < 1.5 * waiting
    assert [*manifest.faults(probe.document, protocol.response_schema("probe"))] == []
    assert probe.document["store"]["folder"] == str(device.store)
    assert probe.facts("onnxruntime")["runtime"].startswith("onnxruntime ")


def test_one_connection_serves_all_requests_and_leaves_nothing(server: Server, client: Path) -> None:
    before = server.logins()
    with reach(server.name) as target:
        target.ask("missing", 60, sha256=[])
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            target.ask("missing", 60, sha256=[])
            taken.append(time.perf_counter() - start)
        socket = control_path(target)
        masters = ssh_processes(target, "yes")
        assert socket.is_socket() and socket.parent.stat().st_mode & 0o777 == 0o700 and len(masters) == 1
        assert server.logins() == before + 1
    assert not socket.parent.exists()
    sshd.wait_until(lambda: not any(map(sshd.runs, masters)))
    sshd.wait_until(lambda: not server.sessions())
    print(f"requests on an open connection: {min(taken):.2f} to {max(taken):.2f} s")
    assert sorted(taken)[-2] < 0.5, taken


def test_connection_is_closed_when_the_run_fails(server: Server) -> None:
    with pytest.raises(ZeroDivisionError), reach(server.name) as target:
        1 / 0  # noqa: B018
    assert not control_path(target).parent.exists()
    sshd.wait_until(lambda: not ssh_processes(target, "yes"))


def test_temporary_folder_may_have_a_name_with_spaces(
    server: Server, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = device.folder / "a b %h"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with reach(server.name) as target:
        assert target.ask("missing", 60, sha256=[])["missing"] == []
        assert control_path(target).is_socket() and control_path(target).parent.parent == folder


def test_shell_of_the_target_sees_one_constant_line(device: Device, model: File, client: Path) -> None:
    if not sshd.shell().endswith("bash"):
        pytest.skip("the target's shell is not bash, which alone tells what it was given")
    script = 'printf "%s\\n" "$BASH_EXECUTION_STRING" >> "$HOME/seen"\n'
    with (
        device.login_script(script) as variables,
        device.serving(**variables) as server,
        reach(server.name) as target,
        ThreadPoolExecutor(1) as pool,
    ):
        doing = pool.submit(measure, target, model)
        sshd.wait_until(server.agents)
        commands = [sshd.command_of(pid)[1:] for pid in server.agents()]
        doing.result()
    assert commands == [["-c", BOOTSTRAP]] * len(commands)
    lines = (device.home / "seen").read_text().splitlines()
    assert len(lines) >= 2 and set(lines) == {REMOTE}
    assert {line.partition(" -- ")[2] for line in (client / "calls").read_text().splitlines()} == {
        "127.0.0.1", f"127.0.0.1 {REMOTE}"
    }  # fmt: skip


# --- refusals


def test_unknown_host_key_is_refused(
    server: Server, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = use(device.client(tmp_path / "stranger", known=False), monkeypatch)
    with (
        pytest.raises(DeviceError, match=r"Host key verification failed.*accept the target's host key"),
        reach(server.name),
    ):
        pass
    assert (stranger / "known_hosts").read_text() == "", "a host key is accepted by a person"


def test_changed_host_key_is_refused(
    server: Server, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = use(device.client(tmp_path / "stranger"), monkeypatch)
    (folder / "known_hosts").write_text("* " + (device.folder / "stranger_key.pub").read_text())
    with pytest.raises(DeviceError, match="Host key verification failed") as caught, reach(server.name):
        pass
    assert "accept" not in caught.value.hint, "a key that has changed is no matter of habit"


def test_wrong_key_is_refused(server: Server, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(device.client(tmp_path / "stranger", key="stranger_key"), monkeypatch)
    with pytest.raises(DeviceError, match=r"Permission denied.*ssh-copy-id"), reach(server.name):
        pass


def test_closed_port_is_named(device: Device) -> None:
    with (
        pytest.raises(DeviceError, match=r"cannot be reached: .*refused.*check address and network"),
        reach(f"ssh://{device.user}@127.0.0.1:{sshd.free_port()}"),
    ):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "ssh://-oProxyCommand=x", "ssh://u@-oProxyCommand=x", "ssh://-l@h", "ssh://a;b", "ssh://a b", "ssh://$(x)@h",
        "ssh://`x`", "ssh://a|b", "ssh://a\n", "ssh://\na", "ssh://'a'", "ssh://%h", "ssh://", "ssh://@h", "ssh://h:",
        "ssh://h:0", "ssh://h:65536", "ssh://h:22;x", "ssh://h/x", "ssh://u:secret@h", "ssh://[::1", "SSH://h", "h", "",
    ],
)  # fmt: skip
def test_strange_target_is_refused_before_anything_runs(name: str, client: Path) -> None:
    with pytest.raises(UsageError, match="give local or ssh://"), reach(name):
        pass
    assert not (client / "calls").exists()


# --- what a target may be like


@pytest.mark.parametrize(
    "text",
    [
        "echo 'Welcome, it is Monday'; echo '{\"schema\": \"not ours\"}'; printf '%0100000d\\n' 0",
        pytest.param("printf 'no line end: '", id="no line end"),
    ],
)
def test_login_script_may_talk(device: Device, tmp_path: Path, text: str) -> None:
    if not sshd.shell().endswith("bash"):
        pytest.skip("the target's shell is not bash: it runs no script before a command")
    with (
        device.login_script(text) as variables,
        device.serving(**variables) as server,
        reach(server.name) as target,
    ):
        file = fresh_file(tmp_path / "file", MB)
        stored = target.put(file)[0]
        target.get({**stored, "bytes": file.bytes}, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.path.read_bytes()


def test_target_without_python_is_named(device: Device) -> None:
    (device.folder / "empty").mkdir(exist_ok=True)
    with (
        device.serving(PATH=str(device.folder / "empty")) as server,
        reach(server.name) as target,
        pytest.raises(DeviceError, match=r"no python3 on the target .install Python 3\.8 or newer there"),
    ):
        Probe.of(target)


@pytest.mark.slow
def test_python_38_with_numpy_alone(device: Device, model: File) -> None:
    interpreter = sshd.python38()
    if interpreter is None:
        pytest.skip("there is no Python 3.8 on this machine")
    folder = device.folder / "python38"
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", f"--target={folder}/packages"]
    command = [
        interpreter,
        "-m",
        "pip",
        "--retries=1",
        "--disable-pip-version-check",
        "install",
        *options,
        "numpy<1.25",
    ]
    if subprocess.run(command, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("numpy for Python 3.8 could not be installed: is there a network?")
    run = sshd.copy_interpreter(interpreter.parents[1], "3.8", folder / "python")
    path = device.python("bin38", run, PYTHONPATH=folder / "packages", LD_LIBRARY_PATH=folder / "python" / "lib")
    with device.serving(PATH=str(path)) as server, reach(server.name) as target:
        document = Probe.of(target).document
        assert document["python"].startswith("3.8.") and document["numpy"].startswith("1.")
        assert document["onnxruntime"]["version"] is None
        assert "No module named 'onnxruntime'" in document["onnxruntime"]["reason"]
        with pytest.raises(DeviceError, match=r"ONNX Runtime is not usable on the target.*pip install onnxruntime"):
            measure(target, model)


# --- files and measurements


@pytest.mark.parametrize("megabytes", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_file_is_sent_once(server: Server, device: Device, tmp_path: Path, verbs: list[str], megabytes: int) -> None:
    file = fresh_file(tmp_path / "model.onnx", megabytes * MB)
    with reach(server.name) as target:
        start = time.perf_counter()
        assert target.put(file, file) == [{"sha256": file.sha256, "name": "model.onnx"}] * 2
        print(f"{megabytes} MiB over ssh: {time.perf_counter() - start:.2f} s")
        kept = (device.store / "files" / file.sha256).stat()
        assert target.put(file, names=("other",)) == [{"sha256": file.sha256, "name": "other"}]
        assert verbs == ["missing", "store", "missing"]
    again = (device.store / "files" / file.sha256).stat()
    (device.store / "files" / file.sha256).unlink()
    assert (again.st_ino, again.st_size) == (kept.st_ino, file.bytes)


def test_file_comes_back_and_a_changed_one_does_not(server: Server, device: Device, tmp_path: Path) -> None:
    file = fresh_file(tmp_path / "file", 3 * MB + 1)
    with reach(server.name) as target:
        target.put(file)
        named = {"sha256": file.sha256, "bytes": file.bytes}
        assert target.get(named, tmp_path / "back") == File(tmp_path / "back", file.sha256, file.bytes)
        with (device.store / "files" / file.sha256).open("r+b") as stream:
            stream.write(b"?")
        with pytest.raises(DeviceError, match="a file arrived incomplete or changed"):
            target.get(named, tmp_path / "changed")
        (device.store / "files" / file.sha256).unlink()
        with pytest.raises(DeviceError, match="is not on the target"):
            target.get(named, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_measurement_brings_samples_and_conditions(server: Server, model: File) -> None:
    with reach(server.name) as target:
        document = measure(target, model, 0.1)
        with pytest.raises(DeviceError, match=r"cannot open .*it's a model; touch \$x.onnx"):
            broken = fresh_file(model.path.with_name("broken"), 1000)
            target.ask("measure", 60, runtime="onnxruntime", warmup_s=0, duration_s=0.1, models=[
                {**named, "name": model.path.name} for named in target.put(broken)
            ])  # fmt: skip
    assert [*manifest.faults(document, protocol.response_schema("measure"))] == []
    assert "error" not in document and document["before"]["cpu"]["cores"] >= 1
    assert sum(len(block) for (block,) in document["rounds"]) > 20


def test_unfinished_files_are_swept_when_they_are_old(server: Server, device: Device, tmp_path: Path) -> None:
    with reach(server.name) as target:
        target.ask("missing", 60, sha256=[])  # makes the folders
        old, young = device.store / "tmp" / "1-1", device.store / "tmp" / "2-2"
        for path in (old, young):
            path.touch()
        os.utime(old, (0, 0))
        target.put(fresh_file(tmp_path / "file", 10))
    assert not old.exists() and young.exists()
    young.unlink()


# --- one at a time


def test_second_measurement_waits_for_the_first(server: Server, device: Device, model: File) -> None:
    with reach(server.name) as target, ThreadPoolExecutor(1) as pool:
        first = pool.submit(measure, target, model, 1.0)
        sshd.wait_until(lambda: is_locked(device))
        with pytest.raises(DeviceError, match="another build or measurement runs on the target"):
            measure(target, model, wait_s=0)
        assert not first.done()
        assert measure(target, model, wait_s=30)["rounds"]
        assert first.result(timeout=1)["rounds"]


def test_request_that_takes_too_long_is_given_up_here_and_there(server: Server, device: Device, model: File) -> None:
    with reach(server.name) as target, ThreadPoolExecutor(1) as pool:
        target.put(model)
        doing = pool.submit(measure, target, model, 30, seconds=1.5)
        sshd.wait_until(lambda: is_locked(device))
        agents = server.agents()
        with pytest.raises(DeviceError, match="measure did not end within 2 s"):
            doing.result()
        sshd.wait_until(lambda: not any(map(sshd.runs, agents)), 5)
        sshd.wait_until(lambda: not is_locked(device), 5)
        assert agents


def test_build_ends_with_the_connection(device: Device, model: File) -> None:
    """trtexec is a process of its own, which reads nothing and may be silent for minutes."""
    path, note = device.python("trt", device.path / "python3"), device.home / "trtexec.pid"
    (path / "trtexec").write_text(
        '#!/bin/sh\n[ "$1" = --help ] || { echo $$ > "$HOME/trtexec.pid"; exec /bin/sleep 60; }\n'
    )
    (path / "trtexec").chmod(0o755)
    batch = {"min": 1, "opt": 1, "max": 1}
    settings = {"precision": "fp32", "workspace_mib": 64, "optimization_level": 0, "dla_core": None, "batch": batch}
    with device.serving(PATH=str(path)) as server, reach(server.name) as target, ThreadPoolExecutor(1) as pool:
        request = {"settings": {**settings, "keep_fp32": "auto"}, "input": {"name": "images", "shape": [3, 8, 8]}}
        doing = pool.submit(target.ask, "build", 60, model=target.put(model)[0], dynamic=False, **request)
        sshd.wait_until(lambda: note.exists() and note.read_text())
        builder = int(note.read_text())
        try:
            sshd.end(*ssh_processes(target, "no"))
            assert isinstance(doing.exception(), DeviceError)
            sshd.wait_until(lambda: not sshd.runs(builder), 3)
        finally:
            sshd.end(builder)
        sshd.wait_until(lambda: not is_locked(device), 5)


# --- cut connections


@pytest.mark.parametrize("seed", range(10))
def test_cut_connection_leaves_nothing_half_done(
    server: Server, device: Device, model: File, tmp_path: Path, seed: int
) -> None:
    """While a file is sent or a model measured, the client, the shared connection or sshd's session is killed."""
    random = Random(seed)
    sending, victim = seed not in (0, 4, 8), ("client", "connection", "session")[seed % 3]
    file = fresh_file(tmp_path / "file", 20 * MB)
    with reach(server.name) as target, ThreadPoolExecutor(1) as pool:
        doing: Future[Any] = pool.submit(target.put, file) if sending else pool.submit(measure, target, model, 30)
        time.sleep(random.uniform(0.05, 0.5 if sending else 1.0))
        agents = server.agents()
        cut(victim, target, server)
        error = doing.exception(timeout=10)
        assert isinstance(error, DeviceError | None) and (sending or error)
        sshd.wait_until(lambda: not any(map(sshd.runs, agents)), 5)
        assert_whole(device)
        sshd.wait_until(lambda: not is_locked(device), 5)
        if sending:
            assert target.put(file) == [{"sha256": file.sha256, "name": "file"}]
            assert (device.store / "files" / file.sha256).stat().st_size == file.bytes
        else:
            assert measure(target, model)["rounds"]
        assert_whole(device)
    (device.store / "files" / file.sha256).unlink(missing_ok=True)
    print(f"{victim} cut while {'sending' if sending else 'measuring'}: {error}")


def cut(victim: str, target: Target, server: Server) -> None:
    match victim:
        case "client":
            sshd.end(*ssh_processes(target, "no"))
        case "connection":
            sshd.end(*ssh_processes(target, "yes"), *ssh_processes(target, "no"))
        case _:
            sshd.end(*server.sessions())
