"""Thirty faults on the way to a target, over a real sshd: a clear message, exit code 5, nothing half done, and the next request works."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sshd
from conftest import ROOT
from sshd import Device, Server
from test_ssh import MB, assert_whole, cut, fresh_file, is_locked, measure, ssh_processes, use

from cswap_deploy.artifacts import File
from cswap_deploy.device import target as targets
from cswap_deploy.device.target import Target, reach
from cswap_deploy.errors import DeviceError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> File:
    return File.of(sshd.classifier(tmp_path_factory.mktemp("models") / "model.onnx"))


@dataclass(frozen=True)
class Place:
    """What a fault is made of."""

    device: Device
    server: Server
    model: File
    folder: Path
    patch: pytest.MonkeyPatch

    def wrapped(self, name: str, script: str) -> AbstractContextManager[Server]:
        """A server whose python3 is a shell script; {python} is the real one."""
        folder = self.device.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "python3").write_text("#!/bin/sh\n" + script.format(python=self.device.path / "python3") + "\n")
        (folder / "python3").chmod(0o755)
        for program in ("head", "cat", "sleep", "yes"):
            if not (folder / program).exists():
                (folder / program).symlink_to(str(shutil.which(program)))
        return self.device.serving(PATH=str(folder))

    def file(self, size: int = MB) -> File:
        return fresh_file(self.folder / f"file{time.monotonic_ns()}", size)


def missing(target: Target) -> Any:
    return target.ask("missing", 20, sha256=[])


# --- the way there


def host_key_is_unknown(at: Place) -> None:
    use(at.device.client(at.folder / "stranger", known=False), at.patch)
    with reach(at.server.name):
        pass


def host_key_has_changed(at: Place) -> None:
    folder = use(at.device.client(at.folder / "stranger"), at.patch)
    (folder / "known_hosts").write_text("* " + (at.device.folder / "stranger_key.pub").read_text())
    with reach(at.server.name):
        pass


def key_is_wrong(at: Place) -> None:
    use(at.device.client(at.folder / "stranger", key="stranger_key"), at.patch)
    with reach(at.server.name):
        pass


def user_may_not_log_in(at: Place) -> None:
    with reach(at.server.name.replace(at.device.user, "somebody-else")):
        pass


def nobody_listens(at: Place) -> None:
    with reach(f"ssh://{at.device.user}@127.0.0.1:{sshd.free_port()}"):
        pass


def host_has_no_address(at: Place) -> None:
    with reach("ssh://somebody@no-such-host.invalid"):
        pass


def ssh_is_not_installed(at: Place) -> None:
    at.patch.setenv("PATH", str(at.folder))
    with reach(at.server.name):
        pass


def host_does_not_answer(at: Place) -> None:
    """As one whose packets are dropped."""
    client = at.device.client(at.folder / "slow")
    (client / "ssh").write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 20\n")
    use(client, at.patch)
    at.patch.setattr(targets, "CONNECT_S", 0.5)
    with reach(at.server.name):
        pass


def configuration_of_ssh_is_broken(at: Place) -> None:
    client = at.device.client(at.folder / "broken")
    (client / "config").write_text("NoSuchKeyword yes\n")
    use(client, at.patch)
    with reach(at.server.name):
        pass


# --- what is there


def there_is_no_python(at: Place) -> None:
    (at.device.folder / "empty").mkdir(exist_ok=True)
    with at.device.serving(PATH=str(at.device.folder / "empty")) as server, reach(server.name) as target:
        missing(target)


def python_is_too_old(at: Place) -> None:
    """As sys.version_info would say on JetPack 4."""
    script = 'shift; exec {python} -c "import sys; sys.version_info = (3, 6, 9); $1"'
    with at.wrapped("old", script) as server, reach(server.name) as target:
        missing(target)


def python_does_not_start(at: Place) -> None:
    with at.wrapped("crash", "kill -SEGV $$") as server, reach(server.name) as target:
        missing(target)


def login_script_ends_the_session(at: Place) -> None:
    with at.device.login_script("exit 3\n") as variables, at.device.serving(**variables) as server:
        if not sshd.shell().endswith("bash"):
            pytest.skip("the target's shell is not bash: it runs no script before a command")
        with reach(server.name) as target:
            missing(target)


def answer_is_cut_off(at: Place) -> None:
    with at.wrapped("cut", '{python} "$@" | head -c 20') as server, reach(server.name) as target:
        missing(target)


def answer_is_of_another_program(at: Place) -> None:
    with (
        at.wrapped("other", 'head -c 100 > /dev/null; echo \'{{"schema": "cswap-deploy/agent/1", \'') as server,
        reach(server.name) as target,
    ):
        missing(target)


def answer_never_ends(at: Place) -> None:
    at.patch.setattr(targets, "LONGEST_LINE", 1 << 20)
    with at.wrapped("flood", "yes flood") as server, reach(server.name) as target:
        target.ask("missing", 2, sha256=[])


def memory_is_too_small(at: Place) -> None:
    with at.wrapped("small", 'ulimit -v 20000; exec {python} "$@"') as server, reach(server.name) as target:
        missing(target)


# --- the work folder there


def folder_may_not_be_written(at: Place) -> None:
    with closed(at.device.store / "tmp", at), reach(at.server.name) as target:
        target.put(at.file())


def cache_is_a_file(at: Place) -> None:
    (at.device.home / "plain").touch()
    with at.device.serving(XDG_CACHE_HOME=str(at.device.home / "plain")) as server, reach(server.name) as target:
        missing(target)


def disk_is_full(at: Place) -> None:
    with at.wrapped("full", 'ulimit -f 100; exec {python} "$@"') as server, reach(server.name) as target:
        target.put(at.file(2 * MB))


def file_has_vanished(at: Place) -> None:
    with reach(at.server.name) as target:
        named = target.put(at.file())[0]
        (at.device.store / "files" / named["sha256"]).unlink()
        target.ask("measure", 20, runtime="onnxruntime", models=[named], warmup_s=0, duration_s=0.01)


def file_was_changed_there(at: Place) -> None:
    file = at.file()
    with reach(at.server.name) as target:
        target.put(file)
        stored = at.device.store / "files" / file.sha256
        stored.write_bytes(b"?" + stored.read_bytes()[1:])
        try:
            target.get({"sha256": file.sha256, "bytes": file.bytes}, at.folder / "back")
        finally:
            stored.unlink()


def file_comes_back_shorter(at: Place) -> None:
    file = at.file()
    with at.wrapped("shorter", '{python} "$@" | head -c 200000') as server, reach(server.name) as target:
        target.put(file)
        target.get({"sha256": file.sha256, "bytes": file.bytes}, at.folder / "back")


def file_changes_on_its_way(at: Place) -> None:
    file = at.file(100_000)
    named = File(file.path, "0" * 64, file.bytes)  # not what its digest says
    with reach(at.server.name) as target:
        target.put(named)


def device_is_busy(at: Place) -> None:
    with reach(at.server.name) as target, (at.device.store / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        measure(target, at.model, wait_s=0)


# --- what ends meanwhile


def agent_is_killed(at: Place) -> None:
    with reach(at.server.name) as target, ThreadPoolExecutor(1) as pool:
        doing = pool.submit(measure, target, at.model, 30)
        sshd.wait_until(lambda: is_locked(at.device))
        sshd.end(*at.server.agents())
        doing.result(20)


def _cut(victim: str) -> Callable[[Place], None]:
    def cut_it(at: Place) -> None:
        with reach(at.server.name) as target, ThreadPoolExecutor(1) as pool:
            doing = pool.submit(measure, target, at.model, 30)
            sshd.wait_until(lambda: is_locked(at.device))
            cut(victim, target, at.server)
            doing.result(20)

    cut_it.__name__ = f"{victim}_is_killed"
    return cut_it


def server_is_gone_before_the_next_request(at: Place) -> None:
    with at.device.serving() as server, reach(server.name) as target:
        missing(target)
        sessions = server.sessions()
        server.process.kill()
        server.process.wait()
        sshd.end(*sessions)
        sshd.wait_until(lambda: not any(map(sshd.runs, sessions)))
        missing(target)


def request_takes_too_long(at: Place) -> None:
    with at.wrapped("asleep", "exec sleep 20") as server, reach(server.name) as target:
        target.ask("missing", 1, sha256=[])


FAULTS: dict[Callable[[Place], None], str] = {
    host_key_is_unknown: "accept the target's host key",
    host_key_has_changed: "Host key verification failed",
    key_is_wrong: "Permission denied.*ssh-copy-id",
    user_may_not_log_in: "Permission denied",
    nobody_listens: "Connection refused.*check address and network",
    host_has_no_address: "Could not resolve hostname|name resolution|not known",
    ssh_is_not_installed: "ssh is not installed on this machine",
    host_does_not_answer: "no connection within 0 s.*is the target on",
    configuration_of_ssh_is_broken: "cannot be reached: .*bad configuration",
    there_is_no_python: "no python3 on the target",
    python_is_too_old: "Python 3.8 or newer is needed",
    python_does_not_start: "the connection ended during missing",
    login_script_ends_the_session: "the connection ended during missing",
    answer_is_cut_off: "the connection ended during missing",
    answer_is_of_another_program: "the connection ended during missing",
    answer_never_ends: "missing did not end within 2 s",
    memory_is_too_small: "the connection ended during missing|MemoryError|can't start new thread",
    folder_may_not_be_written: "Permission denied on the target",
    cache_is_a_file: "Not a directory on the target|File exists on the target",
    disk_is_full: "File too large on the target",
    file_has_vanished: "is not on the target.*run the same command again",
    file_was_changed_there: "arrived incomplete or changed.*run the same command again",
    file_comes_back_shorter: "arrived incomplete or changed",
    file_changes_on_its_way: "arrived incomplete or changed",
    device_is_busy: "another build or measurement runs on the target",
    agent_is_killed: "the connection ended during measure",
    _cut("client"): "the connection ended during measure",
    _cut("connection"): "the connection ended during measure",
    _cut("session"): "the connection ended during measure",
    server_is_gone_before_the_next_request: "the connection ended during missing.*run the same command again",
    request_takes_too_long: "missing did not end within 1 s",
}


@contextmanager
def closed(folder: Path, at: Place) -> Iterator[None]:
    with reach(at.server.name) as target:
        missing(target)
    if at.device.own_user or os.geteuid():
        folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault(
    fault: Callable[[Place], None],
    device: Device,
    server: Server,
    model: File,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(device.client(tmp_path / "client"), monkeypatch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceError, match=FAULTS[fault]) as caught:
        fault(Place(device, server, model, tmp_path, patch))
    assert caught.value.exit_code == 5 and caught.value.hint
    assert (
        "127.0.0.1" not in caught.value.public
        and device.user not in caught.value.public
        and "/" not in caught.value.public
    )
    assert_whole(device)
    sshd.wait_until(lambda: not is_locked(device), 5)
    assert not (tmp_path / "back").exists()
    with reach(server.name) as target:  # nothing is left that disturbs the next one
        file = fresh_file(tmp_path / "next", 1000)
        assert target.put(file)[0]["sha256"] == file.sha256
        assert not ssh_processes(target, "no")
    (device.store / "files" / file.sha256).unlink()


def test_there_are_thirty_and_the_page_says_how_many() -> None:
    assert len(FAULTS) >= 30
    assert f"[{len(FAULTS)} faults](#faults-on-the-way)" in (ROOT / "docs" / "jetson.md").read_text("utf-8")


def test_two_hosts_at_once(
    device: Device, server: Server, model: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a connection of its own; what is sent to one is not taken for sent to the other."""
    use(device.client(tmp_path / "client"), monkeypatch)
    other = device.home / "other cache"
    with device.serving(XDG_CACHE_HOME=str(other)) as second, reach(server.name) as one, reach(second.name) as two:
        assert one.command != two.command
        with ThreadPoolExecutor(2) as pool:
            documents = [*pool.map(lambda target: measure(target, model, 0.3), (one, two))]
        assert all(document["rounds"] for document in documents)
        assert (other / "cswap-deploy" / "files" / model.sha256).is_file()
        ids = [target.ask("probe", 60)["id"] for target in (one, two)]
        assert ids[0] != ids[1]
    shutil.rmtree(other, ignore_errors=True)
