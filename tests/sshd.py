"""A real sshd on loopback with keys, port and, for root, a user of its own, for the tests of the ssh target."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

HOME = 'it\'s a "home" $x'
"""Name of the device's home folder: what is quoted wrongly anywhere breaks here."""
PREFIX = "cswap-sshd-"
SBIN = "/usr/sbin:/usr/local/sbin:/sbin"
UNNEEDED = set(
    "test tests site-packages dist-packages idlelib tkinter ensurepip lib2to3 turtledemo distutils pydoc_data sqlite3 "
    "transformers tools quantization datasets f2py _pyinstaller doc".split()
)
"""Folders of the standard library, numpy and onnxruntime that the agent does without."""


@dataclass(frozen=True)
class Server:
    """One sshd process; `name` is how the target is given to cswap-deploy."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def sessions(self) -> list[int]:
        """Processes of sshd that serve one connection each, or a part of it."""
        return [pid for pid in self._descendants() if re.match(r"sshd(-session)?: ", " ".join(command_of(pid)))]

    def agents(self) -> list[int]:
        return [pid for pid in self._descendants() if command_of(pid)[1:2] == ["-c"] and "python" in command_of(pid)[0]]

    def logins(self) -> int:
        return self.log.read_text().count("Accepted publickey")

    def _descendants(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for pid in pids():
            children.setdefault(parent_of(pid), []).append(pid)
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found[1:]


@dataclass(frozen=True)
class Device:
    """The other machine: a user with home folder, python3 and keys; without `own_user` it is whoever runs the tests."""

    folder: Path
    user: str
    home: Path
    own_user: bool

    @property
    def store(self) -> Path:
        return self.home / ".cache" / "cswap-deploy"

    @property
    def path(self) -> Path:
        """The folder of PATH there: python3 and nothing else."""
        return self.folder / "bin"

    @contextmanager
    def serving(self, **environment: str) -> Iterator[Server]:
        """An sshd whose sessions have these variables."""
        surroundings = {"PATH": str(self.path), "HOME": str(self.home), "OMP_NUM_THREADS": "1", **environment}
        port, folder = free_port(), Path(tempfile.mkdtemp(prefix="server-", dir=self.folder))
        config, log = folder / "sshd_config", folder / "log"
        config.write_text(self._config(port, folder, surroundings))
        program = shutil.which("sshd", path=SBIN)
        assert program
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [program, "-D", "-e", "-f", str(config)], stderr=stream, stdin=subprocess.DEVNULL
            )
        server = Server(f"ssh://{self.user}@127.0.0.1:{port}", port, process, log)
        try:
            wait_until(lambda: process.poll() is not None or answers(port), 10)
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            left = server.sessions() + server.agents()
            process.kill()
            process.wait()
            end(*left)

    @contextmanager
    def login_script(self, text: str) -> Iterator[dict[str, str]]:
        """What bash runs before a command; the variables are for `serving`: bash may not know that sshd started it."""
        script = self.home / ".bashrc"
        script.write_text(text)
        script.chmod(0o644)
        try:
            yield {"BASH_ENV": str(script)}
        finally:
            script.unlink()

    def _config(self, port: int, folder: Path, environment: dict[str, str]) -> str:
        given = " ".join('"{}={}"'.format(key, re.sub(r'(["\\])', r"\\\1", v)) for key, v in environment.items())
        return f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {self.folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {self.folder}/user_key.pub
AllowUsers {self.user}
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
LogLevel VERBOSE
MaxStartups 100
SetEnv {given}
"""

    def python(self, name: str, interpreter: Path, **environment: Path | str) -> Path:
        """A folder for PATH with a python3 that runs `interpreter` with these variables."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        words = [f"{key}={value}" for key, value in environment.items()] + [str(interpreter)]
        (folder / "python3").write_text(f'#!/bin/sh\nexec /usr/bin/env {shlex.join(words)} "$@"\n')
        (folder / "python3").chmod(0o755)
        return folder

    @property
    def interpreter(self) -> Path:
        """What its python3 runs; `packages` is where that finds onnxruntime and numpy."""
        return (
            self.folder / "python/bin/python{}.{}".format(*sys.version_info) if self.own_user else Path(sys.executable)
        )

    @property
    def packages(self) -> Path:
        return self.folder / "packages" if self.own_user else Path(str(distribution("onnxruntime").locate_file("")))

    def client(self, folder: Path, *, key: str = "user_key", known: bool = True) -> Path:
        """A folder for PATH whose ssh never sees the ~/.ssh of whoever runs the tests; it notes them in `calls`."""
        folder.mkdir(parents=True, exist_ok=True)
        public = (self.folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"* {public}" if known else "")
        (folder / "config").write_text(
            f'UserKnownHostsFile "{folder}/known_hosts"\nGlobalKnownHostsFile /dev/null\n'
            f'IdentityFile "{self.folder}/{key}"\nIdentitiesOnly yes\nIdentityAgent none\n'
        )
        program = (
            f"#!/bin/sh\necho \"$*\" >> '{folder}/calls'\nexec {shutil.which('ssh')} -F '{folder}/config' \"$@\"\n"
        )
        (folder / "ssh").write_text(program)
        (folder / "ssh").chmod(0o755)
        return folder


@contextmanager
def device() -> Iterator[Device]:
    """Skips where there is no sshd. Leaves neither user nor files behind, nor those of a run that was killed."""
    if not shutil.which("sshd", path=SBIN) or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("these tests need OpenSSH's server and client: apt-get install openssh-server openssh-client")
    if os.geteuid() == 0 and not shutil.which("useradd", path=SBIN):
        pytest.skip("these tests need useradd and userdel, for a user who is not root: apt-get install passwd")
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/tmp"))  # where another user can enter
    folder.chmod(0o755)
    try:
        for name in ("host_key", "user_key", "stranger_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
            subprocess.run(command, check=True)
        yield make(folder, own_user=os.geteuid() == 0)
    finally:
        sweep(os.getpid())


def make(folder: Path, own_user: bool) -> Device:
    home = folder / HOME
    site = Path(str(distribution("onnxruntime").locate_file("")))
    if not own_user:
        home.mkdir(mode=0o700)
        found = Device(folder, pwd.getpwuid(os.geteuid()).pw_name, home, own_user)
        found.python("bin", Path(sys.executable), PYTHONPATH=site)
        return found
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it, and only an init system makes it
    name = f"{PREFIX}{os.getpid()}"
    account = ["useradd", "--no-create-home", "--home-dir", str(home), "--shell", shell(), "--password", "*", name]
    subprocess.run(account, check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"})
    home.mkdir(mode=0o700)
    shutil.chown(home, name, name)
    found = Device(folder, name, home, own_user)
    interpreter = copy_interpreter(Path(sys.base_prefix), "{}.{}".format(*sys.version_info), folder / "python")
    copy_packages("onnxruntime", folder / "packages")
    found.python("bin", interpreter, PYTHONPATH=folder / "packages", LD_LIBRARY_PATH=folder / "python" / "lib")
    return found


def shell() -> str:
    return shutil.which("bash") or "/bin/sh"


def sweep(pid: int | None = None) -> None:
    """Remove what the run of this process made, or without one what runs that are no more have left behind."""
    for folder in Path("/tmp").glob(f"{PREFIX}*-*"):
        owner = re.fullmatch(rf"{PREFIX}(\d+)-.*", folder.name)
        if owner and _is_over(int(owner[1]), pid) and folder.stat().st_uid == os.geteuid():
            for note in folder.glob("server-*/sshd.pid"):
                with suppress(ValueError):
                    left = int(note.read_text())
                    if str(note.parent) in " ".join(command_of(left)):
                        end(left)
            shutil.rmtree(folder, ignore_errors=True)
    if os.geteuid() == 0:
        for account in pwd.getpwall():
            owner = re.fullmatch(rf"{PREFIX}(\d+)", account.pw_name)
            if owner and _is_over(int(owner[1]), pid):
                end(*(found for found in pids() if user_of(found) == account.pw_uid))
                _remove_user(account.pw_name)


def _is_over(owner: int, pid: int | None) -> bool:
    return owner == pid if pid else not Path(f"/proc/{owner}").exists()


def _remove_user(name: str) -> None:
    command = ["userdel", "--force", name]
    surroundings = {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"}
    for _ in range(5):  # another run may hold the lock of /etc/passwd
        if subprocess.run(command, check=False, capture_output=True, env=surroundings).returncode in (0, 6):
            return
        time.sleep(0.2)


# --- a Python that another user may run


def copy_interpreter(prefix: Path, version: str, folder: Path) -> Path:
    """A copy without packages, which may need LD_LIBRARY_PATH; what lies below a private home is closed to others."""
    library = Path(sysconfig.get_path("stdlib")) if prefix == Path(sys.base_prefix) else prefix / f"lib/python{version}"
    copy_tree(library, folder / "lib" / f"python{version}")
    for shared in prefix.glob(f"lib/libpython{version}*.so*"):
        give(shared, folder / "lib" / shared.name)
    give((prefix / "bin" / f"python{version}").resolve(), folder / "bin" / f"python{version}")
    return folder / "bin" / f"python{version}"


def copy_packages(name: str, folder: Path) -> None:
    """An installed distribution with all that it requires."""
    wanted, seen = [name], set()
    while wanted:
        with suppress(PackageNotFoundError):
            found = distribution(wanted.pop())
            for file in found.files or ():
                if ".." not in file.parts and not UNNEEDED & set(file.parts[:-1]):
                    give(Path(str(found.locate_file(file))), folder / file)
            needs = [re.split(r"[^\w.-]", need)[0] for need in found.requires or () if "extra ==" not in need]
            wanted += [need for need in needs if need not in seen]
            seen.update(needs)


def copy_tree(source: Path, target: Path) -> None:
    for parent, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in UNNEEDED and not name.startswith("config-")]
        for name in files:
            give(Path(parent, name), target / Path(parent, name).relative_to(source))


def give(source: Path, target: Path) -> None:
    """A file for everyone to read: a hard link where that does."""
    if not source.is_file() or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        if source.stat().st_mode & 0o004 and not source.is_symlink():
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    target.chmod(0o755)


def python38() -> Path | None:
    """An interpreter as JetPack 5 has it, where there is one."""
    found = shutil.which("python3.8")
    known = sorted((Path.home() / ".pyenv" / "versions").glob("3.8*/bin/python3.8"))
    return known[-1] if known else Path(found) if found else None


# --- processes


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_of(pid: int) -> list[str]:
    """Empty when the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return [""]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def user_of(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def runs(pid: int) -> bool:
    """A process that has ended and waits for its parent does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end(*these: int) -> None:
    for pid in these:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(happened: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- what it is sent


def classifier(path: Path, *, batch: int | None = None, width: int = 4, side: int = 8, classes: int = 5) -> Path:
    """An ONNX file: two convolutions, mean and a linear layer on (batch, 3, side, side); None: an open batch."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    shapes = {"w1": (width, 3, 3, 3), "w2": (width, width, 3, 3), "w3": (width, classes)}
    weights = [numpy_helper.from_array(random.normal(0, 0.3, s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], name="pool"),
        helper.make_node("Flatten", ["d"], ["e"], name="flatten"),
        helper.make_node("MatMul", ["e", "w3"], ["logits"], name="head"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch or "n", *rest])
        for name, rest in (("images", (3, side, side)), ("logits", (classes,)))
    ]
    graph = helper.make_graph(nodes, "classifier", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path
