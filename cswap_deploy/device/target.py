"""Where a model runs: this machine, or another one over ssh. Both run the same agent, which is sent with each request."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from re import fullmatch, match
from typing import IO, Any

from cswap_deploy.artifacts import File, sha256_of
from cswap_deploy.device.trtexec import banner_version
from cswap_deploy.errors import DeviceError, UsageError
from cswap_deploy.recipe import TARGET

AGENT = Path(__file__).with_name("agent.py")
SCHEMA = "cswap-deploy/agent/1"
BOOTSTRAP = (
    'import sys; sys.version_info >= (3, 8) or sys.exit("Python 3.8 or newer is needed, this is " + sys.version); '
    "sys.path[:] = [p for p in sys.path if p]; n = int(sys.stdin.buffer.readline()); "
    'exec(compile(sys.stdin.buffer.read(n), "agent.py", "exec"))'
)
"""Runs the agent that comes on standard input. The current folder is no place for modules."""
REMOTE = f"exec python3 -c '{BOOTSTRAP}'"
"""The whole command line that the target's shell sees: a constant."""
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "RemoteCommand": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "Tunnel": "no",
    "RequestTTY": "no",
    "EscapeChar": "none",
}
"""Asks nothing, forwards nothing; host keys and everything else are as the user's own configuration has them."""
APT_TENSORRT = "sudo apt install python3-libnvinfer libnvinfer-bin"
"""What puts TensorRT on a Jetson, its Python module and trtexec."""
AWAY = "the target cannot be reached"
PUBLIC = {
    "runtime": "the runtime on the target cannot be used",
    "model": "the runtime on the target does not run the model",
    "engine": "TensorRT on the target does not build or run the engine",
    "busy": "another build or measurement ran on the target",
    "disk": "the target's disk has no room, or its folder no rights",
    "file": "a file was not on the target",
    "transfer": "a file arrived incomplete or changed",
    "internal": "the agent on the target failed",
}
"""What a bundle says of the agent's faults; their full text is for the one who runs the command."""
PUBLIC_RUNTIME = (
    "ONNX Runtime is not usable on the target",
    "TensorRT is not on the target",
    "TensorRT's Python module cannot be used on the target",
    "CUDA's runtime library, libcudart.so, is not on the target",
)
"""The agent's own words about a runtime, which a bundle may say too; what follows them is a library's, and names paths."""
NO_TENSORRT = "TensorRT cannot be used on the target"
CONNECT_S, PROBE_S, CLOSE_S = 30.0, 60.0, 5.0
SLOWEST = 250_000
"""Bytes per second below which a transfer is given up."""
IDLE_S = 60
"""How long an idle connection is kept for the next request; it is closed at the end of a run anyway."""
LONGEST_LOG, LONGEST_LINE = 4 << 20, 512 << 20
"""Bytes of a target's messages that are kept, the last ones; of its answer, beyond which it is none."""
LONGEST = 50
UNKEYED = {"key": False}


@dataclass(frozen=True)
class Target:
    """A machine that answers. Where it is does not count in a stage's key; `Probe.facts` do."""

    name: str = field(metadata=UNKEYED)
    command: tuple[str, ...] = field(metadata=UNKEYED)

    @property
    def remote(self) -> bool:
        return self.name != "local"

    def ask(self, verb: str, seconds: float, **request: Any) -> dict[str, Any]:
        """The agent's answer. Errors: DeviceError, with what the agent or ssh says, or after `seconds`."""
        return self.ask_with_log(verb, seconds, **request)[0]

    def ask_with_log(self, verb: str, seconds: float, **request: Any) -> tuple[dict[str, Any], str]:
        """The same, and what the runtime on the target has printed meanwhile."""
        return self._exchange({"verb": verb, **request}, seconds)

    def put(self, *files: File, names: tuple[str, ...] = ()) -> list[dict[str, str]]:
        """How a request names these files; a remote target gets those that it does not have yet."""
        shown = names or tuple(file.path.name for file in files)
        if not self.remote:
            return [
                {"path": str(f.path), "sha256": f.sha256, "name": name} for f, name in zip(files, shown, strict=True)
            ]
        wanted = {file.sha256: file for file in files}
        for sha256 in self.ask("missing", PROBE_S, sha256=list(wanted))["missing"]:
            file = wanted[sha256]
            request = {"verb": "store", "sha256": sha256, "bytes": file.bytes}
            self._exchange(request, PROBE_S + file.bytes / SLOWEST, source=file.path)
        return [{"sha256": file.sha256, "name": name} for file, name in zip(files, shown, strict=True)]

    def get(self, file: dict[str, Any], path: Path) -> File:
        """Fetch a file that the agent named by `sha256` and `bytes`. Errors: DeviceError when it arrives changed."""
        seconds = PROBE_S + file["bytes"] / SLOWEST
        self._exchange({"verb": "fetch", "file": {"sha256": file["sha256"]}}, seconds, into=path, most=file["bytes"])
        if sha256_of(path) != file["sha256"]:
            path.unlink()
            raise DeviceError(f"{self.name}: a file arrived incomplete or changed", "run the same command again")
        return File.of(path)

    def _exchange(
        self,
        request: dict[str, Any],
        seconds: float,
        source: Path | None = None,
        into: Path | None = None,
        most: int = 0,
    ) -> tuple[dict[str, Any], str]:
        """`source` follows the request, `into` gets what follows the answer, `most` bytes of it."""
        with tempfile.TemporaryFile() as log, _running(self.command, log, seconds) as (process, expired):
            assert process.stdin and process.stdout
            with suppress(BrokenPipeError):  # the agent has ended early: it says why
                _send(process.stdin, {"schema": SCHEMA, **request}, source)
            document = _document(process.stdout)
            if document and into and "error" not in document:
                with into.open("wb") as stream:
                    _copy(process.stdout, stream, min(document["bytes"], most))
            with suppress(BrokenPipeError):
                process.stdin.close()
            code = process.wait()
            log.seek(max(0, log.seek(0, os.SEEK_END) - LONGEST_LOG))
            text = log.read().decode(errors="replace")
        if expired.is_set():
            late = f"{request['verb']} did not end within {seconds:.0f} s"
            raise DeviceError(f"{self.name}: {late}", "is the target overloaded or asleep?", public=late)
        if document is None:
            raise self._silent(request["verb"], code, text)
        if error := document.get("error"):
            raise refusal(self.name, error, text)
        return document, text

    def _silent(self, verb: str, code: int, log: str) -> DeviceError:
        last = "".join(f": {line}" for line in log.strip().splitlines()[-1:])
        if "Python 3.8 or newer is needed" in log:
            return DeviceError(f"{self.name}{last}", "install a newer Python there, or another JetPack")
        if code == 127 or "python3: not found" in log or "python3: command not found" in log:
            return DeviceError(f"{self.name}: there is no python3 on the target", "install Python 3.8 or newer there")
        if self.remote:
            return DeviceError(
                f"{self.name}: the connection ended during {verb}{last}",
                "run the same command again: what has arrived is kept",
                public="the connection to the target ended",
            )
        return DeviceError(f"{self.name}: the agent ended with {code} during {verb}{last}", "please report this")


@contextmanager
def reach(name: str) -> Iterator[Target]:
    """`local` or `ssh://[user@]host[:port]`, with one connection for all requests. Errors: UsageError, DeviceError."""
    if name == "local":
        yield Target(name, (sys.executable, "-c", BOOTSTRAP))
        return
    user, host, port = _parts(name)
    if shutil.which("ssh") is None:
        raise DeviceError("ssh is not installed on this machine", "install OpenSSH's client")
    with tempfile.TemporaryDirectory(prefix="cswap-", dir=_place_of_socket()) as folder:
        settings = OPTIONS | {"ControlPath": '"{}/s"'.format(folder.replace("%", "%%"))}
        options = [text for key, value in settings.items() for text in ("-o", f"{key}={value}")]
        options += [*(["-l", user] if user else []), *(["-p", port] if port else [])]
        destination = ["--", host]
        _connect(
            name, ["ssh", "-T", *options, "-o", "ControlMaster=yes", "-o", f"ControlPersist={IDLE_S}"], destination
        )
        try:
            yield Target(name, ("ssh", "-T", *options, "-o", "ControlMaster=no", *destination, REMOTE))
        finally:
            with suppress(subprocess.TimeoutExpired):
                command = ["ssh", *options, "-O", "exit", *destination]
                subprocess.run(command, capture_output=True, timeout=CLOSE_S, check=False)


def _place_of_socket() -> str | None:
    """None: where temporary files go; but the path of a socket holds about 100 characters, and ssh adds some of its own."""
    return "/tmp" if len(tempfile.gettempdir()) > LONGEST else None


def _parts(name: str) -> tuple[str | None, str, str | None]:
    """User, host and port of an ssh target. Errors: UsageError."""
    parts = fullmatch(TARGET, name) and match(r"ssh://(?:([^@]*)@)?(?:\[(.*)\]|([^:]*))(?::(\d+))?$", name)
    if not parts:
        raise UsageError(f"target {name!r} is none", "give local or ssh://[user@]host[:port]")
    return parts[1], parts[2] or parts[3], parts[4]


@dataclass(frozen=True)
class Away(Target):
    """A target that does not answer: whatever is asked of it, it says why. What is stored need not be asked for."""

    error: DeviceError = field(metadata=UNKEYED)

    def ask_with_log(self, verb: str, seconds: float, **request: Any) -> tuple[dict[str, Any], str]:
        raise self.error

    def put(self, *files: File, names: tuple[str, ...] = ()) -> list[dict[str, str]]:
        raise self.error


@dataclass(frozen=True)
class Probe:
    """What the target is and can do, as its agent says."""

    document: dict[str, Any]

    @staticmethod
    def of(target: Target) -> Probe:
        document = target.ask("probe", PROBE_S)
        tensorrt = document["tensorrt"]
        if tensorrt["version"] is None and tensorrt.get("banner"):  # known by trtexec only
            tensorrt["version"] = banner_version(f"[{tensorrt['banner']}]") or "unknown"
        return Probe(document)

    def facts(self, runtime: str) -> dict[str, str]:
        """What a measurement depends on, for its key: never clocks, temperature or host name.

        An engine is loaded only where it was built, so what is made of engines also depends on the device's own store.
        """
        document = self.document
        board, tensorrt = document["board"] or {}, document["tensorrt"]
        version = document["onnxruntime"]["version"] if runtime == "onnxruntime" else tensorrt["version"]
        known = {
            "device": self.device,
            "cores": str(document["cpu"]["cores"]) if runtime == "onnxruntime" else None,
            "runtime": f"{runtime} {version or 'absent'}",
            "power_mode": board.get("power_mode"),
            "gpu": tensorrt["gpu"],
            "compute_capability": tensorrt["compute_capability"],
            "agent": _agent_sha256()[:16],
            "store": document["id"] if runtime == "tensorrt" else None,
        }
        return {key: value for key, value in known.items() if value}

    @property
    def typed(self) -> bool:
        """TensorRT takes precision from the graph's own types (from 11), not from flags."""
        return bool(self.document["tensorrt"]["precision"] == "typed")

    def require_tensorrt(self, target: str) -> None:
        """Errors: DeviceError, with what is missing and how to get it."""
        found = self.document["tensorrt"]
        if found["version"] is None:
            board = (self.document["board"] or {}).get("model", "")
            hint = "run this for a target with an NVIDIA GPU and TensorRT, such as a Jetson"
            if "NVIDIA" in board:
                hint = f"on the target: {APT_TENSORRT}"
            raise DeviceError(f"{target}: {NO_TENSORRT}: {found['reason']}", hint, public=NO_TENSORRT)

    @property
    def device(self) -> str:
        """The board's name, else the processor's."""
        return str((self.document["board"] or self.document["cpu"])["model"])


@cache
def _agent_sha256() -> str:
    return sha256_of(AGENT)


def _connect(name: str, command: list[str], destination: list[str]) -> None:
    """Start the connection that later requests share. It outlives this call, so its messages go to a file, not a pipe."""
    with tempfile.TemporaryFile() as log:
        try:
            code = subprocess.run(
                [*command, "-N", "-f", *destination],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=CONNECT_S, check=False, start_new_session=True,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DeviceError(
                f"{name}: no connection within {CONNECT_S:.0f} s", "is the target on?", public=AWAY
            ) from None
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines() or ["no message"]
    if code:
        text = " ".join(lines)
        hint = "check address and network: ssh to it by hand"
        if "IDENTIFICATION HAS CHANGED" in text:
            hint = "find out why; if the target was set up anew, remove its old key with ssh-keygen -R"
        elif "Host key verification failed" in text:
            hint = "connect once by hand with ssh to accept the target's host key"
        elif "Permission denied" in text:
            hint = "set up a key: ssh-copy-id to the target; nothing is asked for during a run"
        raise DeviceError(f"{name} cannot be reached: {lines[-1]}", hint, public=AWAY)


@contextmanager
def _running(
    command: tuple[str, ...], log: IO[bytes], seconds: float
) -> Iterator[tuple[subprocess.Popen[bytes], threading.Event]]:
    """The process, killed after `seconds` or when the block is left; a session of its own, so that Ctrl-C is ours alone."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )
    expired = threading.Event()

    def give_up() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield process, expired
    finally:
        timer.cancel()
        process.kill()
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                if stream:
                    stream.close()
        process.wait()


def _send(stream: IO[bytes], request: dict[str, Any], source: Path | None) -> None:
    agent = AGENT.read_bytes()
    stream.write(b"%d\n%s%s\n" % (len(agent), agent, json.dumps(request).encode()))
    if source:
        with source.open("rb") as content:
            shutil.copyfileobj(content, stream, 1 << 20)
    stream.flush()


def _document(stream: IO[bytes]) -> dict[str, Any] | None:
    """The agent's line; what a login script of the target prints before it is passed over. None: there is none."""
    for line in iter(lambda: stream.readline(LONGEST_LINE), b""):
        if (start := line.find(b'{"schema": "%s"' % SCHEMA.encode())) >= 0:
            with suppress(ValueError):
                document: dict[str, Any] = json.loads(line[start:])
                return document
    return None


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size and (some := source.read(min(1 << 20, size))):
        target.write(some)
        size -= len(some)


def refusal(name: str, error: dict[str, Any], log: str) -> DeviceError:
    """The agent's error, with what TensorRT said about a failed build: its error lines, else the last ones."""
    public = PUBLIC.get(error["kind"], PUBLIC["internal"])
    if error["kind"] == "runtime":
        public = next((words for words in PUBLIC_RUNTIME if error["message"].startswith(words)), public)
    message, shown = f"{name}: {error['message']}", ""
    hint = error["hint"] or (
        "please report this, unless the target has no memory left" if error["kind"] == "internal" else ""
    )
    if error["kind"] in ("engine", "internal") and log.strip():
        lines = log.strip().splitlines()
        chosen = [line for line in lines if "[E]" in line][-5:] or lines[-5:]
        shown = "".join(f"\n  {line}" for line in chosen)
    found = DeviceError(f"{message}{shown}", hint, public=public, log=log)
    found.kind = error["kind"]
    found.parser = [fault for fault in error.get("parser", ()) if isinstance(fault, dict)]
    return found
