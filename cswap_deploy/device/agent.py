"""The device's half of cswap-deploy: one file that is sent to the target and run there. Nothing is installed.

A request, one line of JSON, comes on standard input; one line of JSON goes to standard output. Needs Python 3.8, numpy
and a runtime: onnxruntime, or TensorRT by its Python module, else by trtexec.

  probe: what this machine is and can run · missing: which files are not stored here · store, fetch: receive or send one,
  which follows the line · build: ONNX file → TensorRT engine · measure: durations of several models, run in turn ·
  infer: outcomes of images · layers: where a model's time goes

~/.cache/cswap-deploy/ (or below XDG_CACHE_HOME) holds files/<sha256>, timing/ (TensorRT's timing caches), lock (held while a model is built
or run) and engines/<sha256>, a ledger: an engine is native code, so only one that was built on this board with this TensorRT, or that the
request trusts by its digest, is loaded. Of engines only to be measured the last PASSING stay. What trtexec prints is read on the host.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, Dict

SCHEMA = "cswap-deploy/agent/1"
Json = Dict[str, Any]
LIMIT, SPARE = 4 << 30, 256 << 20  # bytes of files kept here; bytes of disk that stay free
PASSING, TIMINGS = 24, 64 << 20  # engines kept that are only measured; bytes of a timing cache that is kept
ABANDONED_S, FRESH_S = 3600, 600  # unfinished files older than this are removed; files used lately stay
BLOCK_S, SETTLE_S = 0.05, 0.005  # a model's turn; what it starts with, on caches full of another model, is not kept
ROUNDS, TRTEXEC_ROUNDS, PROFILED_RUNS = 6, 6, 50  # fewer rounds prove nothing
WATCH_S, IDLE_S = 0.1, 0.5  # how often a board's state is read meanwhile; how long before anything runs
KEPT_LOGITS, TOP = 64, 5
ROOT = os.environ.get("CSWAP_DEPLOY_ROOT", "")  # before /proc, /sys, /etc and /var: another board's files
NEVER_C = -256.0  # what a thermal zone that is off shows
ROOM = "make room there, or, for hold-out images, lower calibration.holdout"
APT = "on a Jetson: sudo apt install python3-libnvinfer libnvinfer-bin"


class Fault(Exception):
    """What the host is told instead of an answer. Kinds: request, file, disk, busy, transfer, runtime, model, engine."""

    def __init__(self, kind: str, message: str, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.document = {"kind": kind, "message": message, "hint": hint, **details}


def main() -> int:
    """Answer one request. What native libraries print goes to standard error: standard output carries the answer only."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    payload: Path | None = None
    try:
        request = json.loads(sys.stdin.buffer.readline() or b"{}")
        if request.get("schema") != SCHEMA or request.get("verb") not in VERBS:
            raise Fault("request", f"expected a request of schema {SCHEMA} with a verb of {', '.join(VERBS)}")
        if request["verb"] != "store":
            # the host holds standard input open as long as it waits; without it there is nobody to work for
            threading.Thread(target=lambda: [os.read(0, 1), os._exit(1)], daemon=True).start()
        document = VERBS[request["verb"]](request, Store())
        payload = document.pop("payload", None)
    except Fault as fault:
        document = {"error": fault.document}
    except OSError as error:
        where = error.filename or "its work folder"
        document = {"error": Fault("disk", f"{error.strerror} on the target: {where}", "see space and rights").document}
    except Exception as error:
        traceback.print_exc()
        document = {"error": {"kind": "internal", "message": f"{type(error).__name__}: {error}", "hint": ""}}
    with suppress(BrokenPipeError):
        out.write(json.dumps({"schema": SCHEMA, **document}).encode() + b"\n")
        if payload is not None:
            with payload.open("rb") as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
        out.flush()
    return int("error" in document)


class Store:
    """The work folder on this device: files by digest, bounded; unfinished ones never bear their final name."""

    def __init__(self) -> None:
        self.root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cswap-deploy"
        for name in ("files", "timing", "engines", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise Fault("request", f"{sha256!r} is not a SHA-256 digest")
        return self.root / "files" / sha256

    def find(self, file: Json) -> Path:
        """Where a file of the request is: at its own path when the target is the host, else in the store."""
        path = Path(file["path"]) if "path" in file else self.path(file["sha256"])
        if not path.is_file():
            raise Fault("file", f"file {path.name} is not on the target", "run the same command again: it is sent anew")
        if "path" not in file:
            os.utime(str(path))
        return path

    def scratch(self, suffix: str = "") -> Path:
        return self.root / "tmp" / f"{os.getpid()}-{time.time_ns()}{suffix}"

    def keep(self, path: Path, sha256: str = "") -> Json:
        """Move a finished file to its digest's place. Fault when it is not the file that was announced."""
        found = digest_of(path)
        if sha256 and found != sha256:
            path.unlink()
            raise Fault("transfer", "a file arrived incomplete or changed", "run the same command again")
        self.settle(path, self.path(found))
        return {"sha256": found, "bytes": self.path(found).stat().st_size}

    def settle(self, path: Path, target: Path) -> None:  # its name, once the disk has it: boards lose their power
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.replace(target)

    def make_room(self, size: int, kept: bool = True) -> None:
        """Remove abandoned files, then the least recently used, until `size` bytes fit, if they can. Not `kept`: on the disk alone."""
        for changed, _, path in self.listed("tmp"):
            if time.time() - changed > ABANDONED_S:
                path.unlink(missing_ok=True)
        files = self.listed("files")
        used, old = sum(entry[1] for entry in files), [entry for entry in files if time.time() - entry[0] > FRESH_S]
        can_go, stays, most = sum(entry[1] for entry in old), kept * size, kept * f", {LIMIT >> 20} are kept at most"
        if (kept and used - can_go + size > LIMIT) or self.free() + can_go < size + SPARE:
            have = f"{self.free() >> 20} MiB are free, {SPARE >> 20} stay free{most}"
            raise Fault("disk", f"{size >> 20} MiB do not fit on the target: {have}", ROOM)
        for _, bytes_of_it, path in old:
            if used + stays > LIMIT or self.free() < size + SPARE:
                path.unlink(missing_ok=True)
                used -= bytes_of_it

    def engine(self, request: Json, file: Json) -> tuple[Path, Json]:
        """An engine that was built on this board or that the request trusts, and how it was built. Errors: Fault."""
        built = self.entry(found := digest_of(path := self.find(file)))
        if found in request.get("trust", ()):
            return path, built
        if not built:
            hint = f"build it there, or, if you trust its origin, pass --trust-engine {found}"
            raise Fault("engine", "this engine was not built on the target; an engine is native code", hint)
        here = place_of(tensorrt_facts())
        for key in filter(lambda key: built[key] != here[key], BOUND_TO):
            was = f"the engine was built for {key.replace('_', ' ')} {built[key]}, the target now has {here[key]}"
            raise Fault("engine", was, "build it again on this target")
        return path, built

    def entry(self, sha256: str) -> Json:
        """How an engine was built here. Empty where it was not, or where its entry of the ledger is damaged."""
        with suppress(OSError, ValueError):
            found = json.loads((self.root / "engines" / sha256).read_text())
            return found if isinstance(found, dict) and found.keys() >= {*BOUND_TO} else {}
        return {}

    def passed(self, made_from: list[Any]) -> Json | None:
        """The answer that the build of a passing engine had, while the engine is here; the oldest of them leave."""
        places = [path for _, _, path in self.listed("engines")]
        passing = [(path, entry) for path in places if "answer" in (entry := self.entry(path.name))]
        for path, entry in passing:
            if entry["made_from"] == made_from and self.path(path.name).is_file():
                os.utime(str(path))
                return {**entry["answer"], "reused": True}
        for path, _ in passing[: -PASSING + 1]:
            self.path(path.name).unlink(missing_ok=True)
            path.unlink()
        return None

    def listed(self, folder: str) -> list[tuple[float, int, Path]]:
        """Time of the last change, bytes and path of each file, oldest first; other agents' files come and go."""
        found = []
        for path in (self.root / folder).iterdir():
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        return sorted(found)

    def free(self) -> int:
        return shutil.disk_usage(str(self.root)).free

    @contextmanager
    def alone(self, request: Json) -> Iterator[None]:
        """One build or measurement at a time on this device."""
        deadline = time.monotonic() + request.get("wait_s", 60)
        with (self.root / "lock").open("a") as handle:
            while True:
                with suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise Fault("busy", "another build or measurement runs on the target", "wait until it has ended")
                time.sleep(0.1)
            yield


def missing(request: Json, files: Store) -> Json:
    for path in filter(Path.is_file, map(files.path, request["sha256"])):
        os.utime(str(path))  # wanted soon: not the first to leave
    return {"missing": [sha256 for sha256 in request["sha256"] if not files.path(sha256).is_file()]}


def store(request: Json, files: Store) -> Json:
    """A connection that ends before the file's last byte leaves nothing behind but a file to be swept."""
    size, wanted = int(request["bytes"]), files.path(request["sha256"])
    files.make_room(size)
    path = files.scratch()
    with path.open("wb") as target:
        for some in iter(lambda: sys.stdin.buffer.read(min(1 << 20, size - target.tell())), b""):
            target.write(some)
    return {"stored": files.keep(path, wanted.name)}


def fetch(request: Json, files: Store) -> Json:
    path = files.find(request["file"])
    return {"bytes": path.stat().st_size, "payload": path}


def digest_of(path: Path) -> str:
    value = hashlib.sha256()
    with path.open("rb") as stream:
        for some in iter(lambda: stream.read(1 << 20), b""):
            value.update(some)
    return value.hexdigest()


def probe(request: Json, files: Store) -> Json:
    """What this machine is and what it can run."""
    ort, reason = imported("onnxruntime")
    runtime = {"version": getattr(ort, "__version__", None), "reason": reason}
    runtime["providers"] = ort.get_available_providers() if ort else []
    numpy = getattr(imported("numpy")[0], "__version__", None)
    here = {"folder": str(files.root), "bytes": sum(entry[1] for entry in files.listed("files")), "limit_bytes": LIMIT}
    identity = files.root / "id"  # of this store and its ledger: a twin of this board has another
    if not text_of(identity):
        (fresh := files.scratch()).write_text(os.urandom(8).hex())
        files.settle(fresh, identity)
    found = {"id": identity.read_text(), "numpy": numpy, "onnxruntime": runtime, "disk_free_mb": files.free() >> 20}
    return {**machine(), **found, "tensorrt": tensorrt_facts(), "store": here}


# --- the machine and its state, read without root; what cannot be read is None


def machine() -> Json:
    memory = {key: int(value) >> 10 for key, value in re.findall(r"(\w+):\s+(\d+) kB", text_of("/proc/meminfo"))}
    system, release, kind = os.uname().sysname, os.uname().release, os.uname().machine
    return {
        **{"python": sys.version.split()[0], "machine": kind, "system": f"{system} {release}"},
        **{"memory_mb": memory.get("MemTotal", 0), "memory_free_mb": memory.get("MemAvailable", 0)},
        **{"cpu": cpu(), "board": board(), "load": list(os.getloadavg())},
        **state(),
    }


def state() -> Json:
    """What changes while something runs. Temperatures in degrees Celsius, the hottest zone apart; power in mW by rail."""
    zones: dict[str, float] = {}
    for folder in found_at("/sys/class/thermal/thermal_zone*"):
        value = number_of(folder / "temp")
        if value is not None and value / 1000 > NEVER_C:
            zones[text_of(folder / "type") or folder.name] = value / 1000
    return {"temperature_c": max(zones.values(), default=None), "zones_c": zones, "gpu": gpu(), "rails_mw": rails()}


def gpu() -> Json | None:
    """Clock in MHz with its bounds, governor, and load in percent of an integrated GPU (devfreq): Jetson."""
    for folder in found_at("/sys/class/devfreq/*"):
        if re.search(r"\.(ga10b|gv11b|gpu)$|^gpu-gpc-\d+$", folder.name):
            hertz = {key: number_of(folder / name) for key, name in CLOCKS.items()}
            load = number_of(folder / "device" / "load")  # per mille
            facts: Json = {key: None if value is None else value // 1_000_000 for key, value in hertz.items()}
            known = hertz["min_mhz"] is not None and hertz["max_mhz"] is not None
            facts["locked"] = hertz["min_mhz"] == hertz["max_mhz"] if known else None
            facts["load"] = None if load is None else load / 10
            return {**facts, "governor": text_of(folder / "governor") or None}
    return None


def rails() -> dict[str, float]:
    """Power by rail in mW, from INA3221 sensors: volts times amperes of channels 1 to 3. Empty: none that can be read."""
    found = {}
    for name in found_at("/sys/bus/i2c/devices/*/name"):
        for label in sorted(name.parent.glob("hwmon/hwmon*/in[1-6]_label")) if "ina3221" in text_of(name) else []:
            rail, number = text_of(label), label.name[2]
            values = [number_of(label.with_name(f"{kind}{number}_input")) for kind in ("in", "curr")]
            if rail and "NC" not in rail.split("_") and values[0] is not None and values[1] is not None:
                found[rail] = values[0] * values[1] / 1000
    return found


def cpu() -> Json:
    folder, names = "/sys/devices/system/cpu/cpu0/cpufreq/", {"mhz": "scaling_cur_freq", "max_mhz": "cpuinfo_max_freq"}
    kilohertz = {key: number_of(folder + name) for key, name in names.items()}
    bounds = [number_of(folder + name) for name in ("scaling_min_freq", "scaling_max_freq")]
    name = re.search(r"^(?:model name|Model|Hardware)\s*: (.+)$", text_of("/proc/cpuinfo"), re.M)
    kinds = dict.fromkeys(re.findall(r"^CPU (?:implementer|part)\s*: (\S+)$", text_of("/proc/cpuinfo"), re.M))
    facts: Json = {key: None if value is None else value // 1000 for key, value in kilohertz.items()}
    facts.update({"cores": len(os.sched_getaffinity(0)), "governor": text_of(folder + "scaling_governor") or None})
    model = name.group(1).strip() if name else " ".join([os.uname().machine, *kinds])  # ARM says numbers alone
    return {**facts, "model": model, "locked": None if None in bounds else bounds[0] == bounds[1]}


def board() -> Json | None:
    """A board that names itself in the device tree: Jetson, Raspberry Pi and the like."""
    name = text_of("/proc/device-tree/model").strip("\0")
    if not name:
        return None
    release = re.search(r"# R(\d+) .*REVISION: ([\d.]+)", text_of("/etc/nv_tegra_release"))
    chips = re.findall(r"nvidia,(tegra\d{3})", text_of("/proc/device-tree/compatible"))
    facts = {"model": name, "l4t": ".".join(release.groups()) if release else None, "chip": chips[0] if chips else None}
    return {**facts, "power_mode": power_mode(), "gpu_clocks_locked": (gpu() or {}).get("locked")}


def power_mode() -> str | None:
    """Its name, as nvpmodel's own files give it, else as `nvpmodel -q` does; `mode 2` where it has no name."""
    number = re.match(r"pmode:(\d+)", text_of("/var/lib/nvpmodel/status"))
    if number:
        names = re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", text_of("/etc/nvpmodel.conf"))
        return next((name for key, name in names if int(key) == int(number.group(1))), f"mode {int(number.group(1))}")
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        if not ROOT:
            asked = subprocess.run(["nvpmodel", "-q"], stdin=-3, stdout=-1, stderr=-3, timeout=10)  # -1: PIPE
            return str(re.findall(r"NV Power Mode: (\S+)", asked.stdout.decode())[0])
    return None


def found_at(pattern: str) -> list[Path]:
    return sorted(Path(ROOT or "/").glob(pattern[1:]))


def text_of(path: str | Path) -> str:
    with suppress(OSError):
        place = Path(path) if isinstance(path, Path) else Path(ROOT + path)
        return place.read_text(errors="replace").strip()
    return ""


def taken(path: Path) -> str:
    """The text of a file that is removed."""
    text = path.read_text(errors="replace")
    path.unlink()
    return text


def number_of(path: str | Path) -> int | None:
    text = text_of(path)
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None


def imported(name: str) -> tuple[Any, str]:
    """A module or None, and why not: a library that does not fit its CUDA or its C library raises anything."""
    try:
        return __import__(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@contextmanager
def watched(files: Store) -> Iterator[Json]:
    """The board's state every WATCH_S, read by a process of its own: `moments` (ns, state), there when the block ends. Where neither
    clock nor power can be read nothing is watched, but tegrastats, if it is there: its lines are for the host.
    """
    found: Json = {"moments": [], "tegrastats": None}
    path, can_read = files.scratch(".watch"), bool(gpu() or rails())
    tool = None if can_read or ROOT else shutil.which("tegrastats")
    if not can_read and tool is None:
        yield found
        return
    with path.open("wb") as stream:
        if tool:
            command = [tool, "--interval", str(int(1000 * WATCH_S))]
            child = subprocess.Popen(command, stdin=-3, stdout=stream, stderr=-3, preexec_fn=die_with_agent).pid
        else:
            child = os.fork()
        if child == 0:
            try:
                die_with_agent()
                while os.write(stream.fileno(), json.dumps([time.perf_counter_ns(), state()]).encode() + b"\n"):
                    time.sleep(WATCH_S)
            finally:
                os._exit(1)  # whatever happens, this process is no second agent
    time.sleep(IDLE_S)
    try:
        yield found
    finally:
        with suppress(OSError):  # it has ended by itself
            os.kill(child, 9)
            os.waitpid(child, 0)
        text = taken(path)
        found["tegrastats"] = text if tool else None
        found["moments"] = [] if tool else [json.loads(line) for line in text.splitlines() if line.endswith("}]")]


def die_with_agent() -> None:
    """In a child: on its own it would go on using the device, without holding the lock."""
    ctypes.CDLL(None).prctl(1, 9)  # SIGKILL when the parent ends


# --- measuring


def measure(request: Json, files: Store) -> Json:
    """Raw durations in ns: `rounds[r][m]` are those of model m in round r; what they mean is for the host to say. Engines also have
    `gpu_rounds`, the same between two CUDA events. trtexec's exported times are sent as they are.
    """
    with files.alone(request), watched(files) as watch:
        before = machine()
        by_trtexec = request["runtime"] == "tensorrt" and not imported("tensorrt")[0]
        found = (trtexec_in_turn if by_trtexec else models_in_turn)(request, files)
        after = machine()
    return {**found, "watch": watch, "before": before, "after": after}


def models_in_turn(request: Json, files: Store) -> Json:
    """By a runtime's own module; peak memory too unless `memory` is false; then single calls after pauses, and energy."""
    kind, opened, used = MODELS[request["runtime"]], request["models"], None
    start = time.perf_counter_ns()
    if request["runtime"] == "onnxruntime" and request.get("memory", True):
        bare, *memory = [peak_memory(request, file, files) for file in (None, *opened)]
        used = {"peak_mb": memory, "runtime_mb": bare}
    models = [kind(request, file, files) for file in opened]
    for model in models:
        run_for(model.run, request["warmup_s"])
    begun = time.perf_counter_ns()
    rounds, gpu_rounds, running = sample(models, request["duration_s"], request.get("block_s", BLOCK_S))
    overhead = 1 - running / (time.perf_counter_ns() - begun)
    if used:
        used["agent_mb"] = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024
    cold = [after_pauses(model.run, request.get("cold", 0), request.get("pause_s", 0.0)) for model in models]
    energy = [run_for(model.run, request["energy_s"]) for model in models if request.get("energy_s") and rails()]
    facts = [model.facts for model in models]
    more = {"cold": cold, "energy": energy, "idle_until_ns": start, "sampling_ns": [begun, begun + running]}
    return {"rounds": rounds, "gpu_rounds": gpu_rounds, "models": facts, "overhead": overhead, "memory": used, **more}


def sample(models: Sequence[Any], duration_s: float, block_s: float) -> tuple[Any, Any, int]:
    """Rounds until each model has run for `duration_s`, order reversed every other round; GPU's too; the ns spent running."""
    rounds: list[list[list[int]]] = []
    gpu_rounds: list[list[list[int]]] = []
    spent, running, asked = [0] * len(models), 0, duration_s * 1e9
    gc.disable()
    while (min(spent) < asked and sum(spent) < 2 * len(models) * asked) or len(rounds) < ROUNDS:
        rounds.append([[] for _ in models])
        gpu_rounds.append([[] for _ in models])
        for index in range(len(models))[:: -1 if len(rounds) % 2 == 0 else 1]:
            again, _ = block(models[index], SETTLE_S, 1)
            rounds[-1][index], gpu_rounds[-1][index] = block(models[index], block_s, 2)
            spent[index] += sum(rounds[-1][index])
            running += sum(again) + sum(rounds[-1][index])
    gc.enable()
    return rounds, gpu_rounds if gpu_rounds[0][0] else None, running


def block(model: Any, seconds: float, least: int) -> tuple[list[int], list[int]]:
    """ns of each inference, and of its part between two events on the GPU, which only engines have."""
    clock, run, on_gpu = time.perf_counter_ns, model.run, getattr(model, "on_gpu", None)
    durations, gpu_durations = [], []
    end = clock() + int(seconds * 1e9)
    while True:
        before = clock()
        run()
        after = clock()
        durations.append(after - before)
        if on_gpu:
            gpu_durations.append(on_gpu())
        if after >= end and len(durations) >= least:
            return durations, gpu_durations


def after_pauses(run: Callable[[], None], times: int, pause_s: float) -> list[int]:
    """ns of single inferences, each after a pause, as a camera calls."""
    found = []
    for _ in range(times):
        time.sleep(pause_s)
        call = run_for(run, 0.0)
        found.append(call["end_ns"] - call["start_ns"])
    return found


def run_for(run: Callable[[], None], seconds: float) -> Json:
    """Inferences without a break, at least one. Long enough, they show in the power sensors, which are read meanwhile."""
    start, runs = time.perf_counter_ns(), 0
    while not runs or time.perf_counter_ns() < start + seconds * 1e9:
        run()
        runs += 1
    return {"start_ns": start, "end_ns": time.perf_counter_ns(), "runs": runs}


def peak_memory(request: Json, file: Json | None, files: Store) -> float:
    """Peak resident memory in MB of a process of its own that runs this model, or, without one, only loads the runtime."""
    child = os.fork()
    if child == 0:
        die_with_agent()
        with suppress(Exception):  # what fails here fails again, and is reported, when it is measured
            imported("numpy"), imported(request["runtime"])
            if file:
                run_for(MODELS[request["runtime"]](request, file, files).run, 0.05)
        os._exit(0)
    return os.wait4(child, 0)[2].ru_maxrss / 1024


class OnnxModel:
    """An ONNX file in ONNX Runtime on the CPU; input and output buffers are bound once."""

    def __init__(self, request: Json, file: Json, files: Store) -> None:
        ort, reason = imported("onnxruntime")
        if not ort:
            what = f"ONNX Runtime is not usable on the target: {reason}"
            raise Fault("runtime", what, "there: pip install onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = request.get("threads", 1), 1
        options.log_severity_level = 4
        if "profile" in request:
            options.enable_profiling, options.profile_file_prefix = True, request["profile"]
        path, name = files.find(file), file.get("name", "the model")
        self.ort, self.name, self.batch = ort, name, request.get("batch", 1)
        self.facts: Json = {"runtime": f"onnxruntime {ort.__version__}"}
        start = time.perf_counter()
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            message = f"ONNX Runtime {ort.__version__} cannot open {name}: {error}"
            raise Fault("model", message, "is it an ONNX file?") from error
        self.bind({item.name: self.noise(item) for item in self.session.get_inputs()})
        self.facts["load_s"] = time.perf_counter() - start

    def bind(self, feeds: Json) -> None:
        """Every output gets a buffer of the size that a first run shows."""
        try:
            results = self.session.run(None, feeds)
        except Exception as error:  # its exceptions have no common base
            raise Fault("model", f"{self.name} does not run with a batch of {self.batch}: {error}") from error
        names = [*feeds, *(item.name for item in self.session.get_outputs())]
        self.buffers = [self.ort.OrtValue.ortvalue_from_numpy(value) for value in [*feeds.values(), *results]]
        self.binding = self.session.io_binding()
        for number, (name, buffer) in enumerate(zip(names, self.buffers)):
            put = self.binding.bind_ortvalue_input if number < len(feeds) else self.binding.bind_ortvalue_output
            put(name, buffer)

    def noise(self, item: Any) -> Any:
        import numpy as np

        kinds = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(uint8)": "u1"}
        head, *rest = item.shape or [None]
        if isinstance(head, int) and head != self.batch:
            hint = f"measure with batch {head}, or export with onnx.dynamic_batch: true"
            raise Fault("model", f"{self.name} has a fixed batch of {head}, asked for are {self.batch}", hint)
        if item.type not in kinds or not all(isinstance(size, int) for size in rest):
            raise Fault("model", f"input {item.name} of {self.name} is {item.type} of shape {item.shape}, not images")
        return (np.random.RandomState(0).random_sample([self.batch, *rest]) * 2).astype(kinds[item.type])

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def logits(self, images: Any) -> Any:
        return self.session.run(None, {self.session.get_inputs()[0].name: images})[0]

    def layers(self) -> Json:
        times: dict[tuple[str, str], list[float]] = {}
        for event in json.loads(taken(Path(self.session.end_profiling()))):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = event["name"][: -len("_kernel_time")], event["args"]["op_name"]
                times.setdefault(key, []).append(event["dur"] / 1000)
        return {"layers": [{"name": name, "op": op, "ms": median(ms[1:])} for (name, op), ms in times.items()]}


def infer(request: Json, files: Store) -> Json:
    """Outcomes of `images`, an .npy file of shape (n, C, H, W): uint8 pixels, normalised here, or float32 as they are. An .npz file of
    `top` (n, 5 or fewer) int32, the best classes first; `true` (n) float32, the logit of the image's own class in `labels`; `crc32` (n)
    of its logits; `finite` (n); and `logits` (64 or fewer, classes) of the first images.
    """
    with files.alone(request):
        import numpy as np

        path, batch = str(files.find(request["images"])), request.get("batch", 1)
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        (count, channels), pixels = images.shape[:2], images.dtype == np.uint8
        model = MODELS[request["runtime"]](request, request["model"], files)
        mean, std = (np.float32(request[key][:channels]).reshape(-1, 1, 1) for key in ("mean", "std"))
        truth = np.array(request.get("labels") or [0] * count)
        parts: dict[str, list[Any]] = {key: [] for key in ("top", "true", "crc32", "finite", "logits")}
        for start in range(0, count, batch):
            images = np.load(path, mmap_mode="r", allow_pickle=False)  # anew: else all pages read count as memory
            some = np.array(images[start : start + batch], np.float32)
            if pixels:
                some /= np.float32(255)
                some -= mean
                some /= std
            full = np.concatenate([some, np.repeat(some[-1:], batch - len(some), axis=0)])
            logits = model.logits(full)[: len(some)].astype(np.float32)
            parts["top"] += [np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)]
            parts["true"] += [logits[np.arange(len(logits)), truth[start : start + batch]]]
            parts["crc32"] += [np.array([zlib.crc32(row.tobytes()) for row in logits], np.uint32)]
            parts["finite"] += [np.isfinite(logits).all(1)]
            parts["logits"] += [logits[: max(0, KEPT_LOGITS - start)]]
        target = files.scratch(".npz")
        with target.open("wb") as stream:
            np.savez(stream, **{key: np.concatenate(values) for key, values in parts.items()})  # type: ignore[arg-type]
        return {"outcomes": files.keep(target), "images": count}


def layers(request: Json, files: Store) -> Json:
    """Median milliseconds of each layer over PROFILED_RUNS inferences, in order, and its operator; of trtexec its documents as they are."""
    with files.alone(request):
        if request["runtime"] == "tensorrt" and not imported("tensorrt")[0]:
            return trtexec_layers(request, files)
        settings = {**request, "profile": str(files.scratch()), "graph": False}
        model = MODELS[request["runtime"]](settings, request["model"], files)
        for _ in range(PROFILED_RUNS):
            model.run()
        return dict(model.layers())


# --- TensorRT, by its Python module


def tensorrt_facts() -> Json:
    """`precision`: by `flags` (to 10.x) or `typed` graphs (from 11); `banner`: trtexec's version, read on the host."""
    trt, reason = imported("tensorrt")
    cards = [text_of(path) for path in found_at("/proc/driver/nvidia/gpus/*/information")]
    card = re.search(r"Model:\s+(.+)", "\n".join(cards))
    facts: Json = {"module": False, "trtexec": trtexec(), "gpu": card.group(1) if card else None, "reason": reason}
    facts.update(dict.fromkeys(("version", "precision", "compute_capability", "cuda", "dla_cores", "banner")))
    try:
        if trt:
            facts["dla_cores"] = trt.Runtime(trt.Logger(trt.Logger.ERROR)).num_DLA_cores
            facts["precision"] = "flags" if hasattr(trt.BuilderFlag, "FP16") else "typed"
            facts.update({**Cuda().device(facts["gpu"]), "version": trt.__version__, "module": True})
        elif facts["trtexec"]:
            text = run_trtexec(["--help"])
            facts["banner"] = (re.findall(r"TensorRT v\d+", text) or ["TensorRT"])[0]
            facts["precision"] = "flags" if "--fp16" in text else "typed"
    except (Fault, TypeError) as error:  # TypeError: TensorRT's library cannot start
        facts["reason"] = str(error)
    return facts


def place_of(facts: Json) -> Json:
    """What an engine is bound to, and how the device was set when it was built. Errors: Fault."""
    found, version = board() or {}, facts["version"] or facts["banner"]
    if version is None:
        raise Fault("runtime", f"TensorRT is not on the target: {facts['reason']}", APT)
    own = {"tensorrt": version, "board": found.get("model"), "power_mode": found.get("power_mode")}
    return {**own, "gpu": facts["gpu"], "compute_capability": facts["compute_capability"]}


class Cuda:
    """The few calls of libcudart that running an engine takes, through ctypes."""

    def __init__(self) -> None:
        names = [f"libcudart.so{end}" for end in ("", ".13", ".12", ".11.0")]
        for name in [*names, *("/usr/local/cuda/lib64/" + name for name in names)]:
            with suppress(OSError):
                self.library = ctypes.CDLL(name)
                return
        raise Fault("runtime", "CUDA's runtime library, libcudart.so, is not on the target", "install it there")

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name, None)
        code = function(*arguments) if function else "unknown: this libcudart does not have it"
        if code:
            raise Fault("engine", f"{name} failed on the target with CUDA error {code}")

    def forget(self) -> None:  # an error that was answered: else TensorRT finds it after its next launch
        getattr(self.library, "cudaGetLastError", int)()

    def created(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """The handle or address that a call hands out through its first argument."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle

    def device(self, name: str | None) -> Json:
        """Name and compute capability of GPU 0, and CUDA's version."""
        numbers = [ctypes.c_int() for _ in range(3)]
        for number, attribute in zip(numbers, (75, 76)):  # major and minor
            self.call("cudaDeviceGetAttribute", ctypes.byref(number), attribute, 0)
        self.call("cudaRuntimeGetVersion", ctypes.byref(numbers[2]))  # 12060 is 12.6
        told = ctypes.create_string_buffer(1 << 16)  # the name comes first in every version of a struct of 1 KB
        with suppress(Fault):
            self.call("cudaGetDeviceProperties", told, 0)
        shown, (major, minor, cuda) = told.value.decode(errors="replace") or name, (number.value for number in numbers)
        return {"gpu": shown, "compute_capability": f"{major}.{minor}", "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}"}

    def copy(self, to: Any, source: Any, size: int, stream: ctypes.c_void_p) -> None:
        """In the stream's order; 4: the direction follows from the addresses."""
        self.call("cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), 4, stream)


class EngineModel:
    """An engine on the GPU: buffers, stream, events and graph are made once."""

    def __init__(self, request: Json, file: Json, files: Store) -> None:
        trt, reason = imported("tensorrt")
        if not trt:
            raise Fault("runtime", f"TensorRT's Python module cannot be used on the target: {reason}", APT)
        start = time.perf_counter()
        path, built = files.engine(request, file)
        self.trt, self.cuda, self.logger = trt, Cuda(), trt.Logger(trt.Logger.ERROR)
        spins = getattr(self.cuda.library, "cudaSetDeviceFlags", int)(1) == 0
        waits = "spinning" if spins else "as the driver chooses"  # on a Jetson this may be to sleep
        self.cuda.forget()
        self.runtime = trt.Runtime(self.logger)
        if built.get("dla_core") is not None:
            self.runtime.DLA_core = built["dla_core"]
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        self.context: Any = self.engine.create_execution_context() if self.engine is not None else None
        if self.context is None:
            raise Fault("engine", f"TensorRT {trt.__version__} cannot load the engine", "build it again on this target")
        self.stream = self.cuda.created("cudaStreamCreateWithFlags", 1)  # 1: does not wait for the default stream
        self.events = [self.cuda.created("cudaEventCreateWithFlags", 0) for _ in range(2)]
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        names.sort(key=lambda name: self.engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT)  # the input first
        self.tensors = [self.place(name, request.get("batch", 1)) for name in names]
        self.graph: ctypes.c_void_p | None = None
        self.run()
        self.facts: Json = {"runtime": f"tensorrt {trt.__version__}", "load_s": time.perf_counter() - start}
        note = self.capture() if request.get("graph", True) else "not asked for"
        made = self.engine  # from 10 on the first
        size = made.device_memory_size_v2 if hasattr(made, "device_memory_size_v2") else made.device_memory_size
        self.facts.update({"graph_note": note, "cuda_graph": self.graph is not None, "device_mb": size / 2**20})
        self.facts.update({"host_waits": waits, "cuda": self.cuda.device(None)["cuda"]})

    def place(self, name: str, batch: int) -> tuple[Any, int | None]:
        """Array on the host and address on the device of one tensor; an input's open batch is fixed first."""
        import numpy as np

        if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT:
            shape = (batch, *tuple(self.engine.get_tensor_shape(name))[1:])
            if not self.context.set_input_shape(name, shape):
                raise Fault("engine", f"the engine does not take a batch of {batch}", "see engine.batch of the recipe")
        kind = self.trt.nptype(self.engine.get_tensor_dtype(name))
        array = np.random.RandomState(0).random_sample(tuple(self.context.get_tensor_shape(name))).astype(kind)
        address = self.cuda.created("cudaMalloc", ctypes.c_size_t(array.nbytes)).value
        self.cuda.copy(address, array.ctypes.data, array.nbytes, self.stream)
        self.context.set_tensor_address(name, address)
        return array, address

    def run(self) -> None:
        self.cuda.call("cudaEventRecord", self.events[0], self.stream)
        if self.graph:
            self.cuda.call("cudaGraphLaunch", self.graph, self.stream)
        elif not self.context.execute_async_v3(self.stream.value):
            raise Fault("engine", "TensorRT did not run the engine", "build it again on this target")
        self.cuda.call("cudaEventRecord", self.events[1], self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def on_gpu(self) -> int:
        """ns of the last run between its two events."""
        passed = ctypes.c_float()
        self.cuda.call("cudaEventElapsedTime", ctypes.byref(passed), *self.events)
        return max(1, round(1e6 * passed.value))

    def capture(self) -> str:
        """Make a run a CUDA graph; without, each kernel is launched by the host. Returns why not, as for engines with loops."""
        graph = ctypes.c_void_p()
        try:
            self.cuda.call("cudaStreamBeginCapture", self.stream, 1)  # 1: only this thread's calls can break it
            enqueued = self.context.execute_async_v3(self.stream.value)
            self.cuda.call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
            if not enqueued:
                return "TensorRT did not enqueue the engine while a graph was captured"
            self.graph = self.cuda.created("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
            self.run()
        except Fault as fault:
            self.graph = None
            self.cuda.forget()
            return str(fault)
        return ""

    def logits(self, images: Any) -> Any:
        (given, source), (found, target) = self.tensors
        given[...] = images
        self.cuda.copy(source, given.ctypes.data, given.nbytes, self.stream)
        self.run()
        self.cuda.copy(found.ctypes.data, target, found.nbytes, self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return found.copy()

    def layers(self) -> Json:
        """Milliseconds from TensorRT's profiler, and under `engine` its inspector's account of each layer."""
        times: dict[str, list[float]] = {}
        base = self.trt.IProfiler
        note = {"report_layer_time": lambda _, name, ms: times.setdefault(name, []).append(ms)}
        self.context.profiler = type("Profiler", (base,), {"__init__": base.__init__, **note})()
        for _ in range(PROFILED_RUNS):
            self.run()
        text = self.engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        return {"layers": [{"name": n, "op": "", "ms": median(ms)} for n, ms in times.items()], "layer_info": text}


def build(request: Json, files: Store) -> Json:
    """`settings`: the recipe's `engine`; `input`: name and (channels, height, width); `dynamic`: open batch; `passing`: the engine
    is only to be measured, one built from the same may take its place; `beside`: files that the model refers to by their digests.
    """
    with files.alone(request):
        facts = tensorrt_facts()
        here, model = place_of(facts), files.find(request["model"])
        weights = sum(files.find(file).stat().st_size for file in request.get("beside", ()))
        made_from = [digest_of(model), *(request[key] for key in ("settings", "input", "dynamic")), here]
        passing = request.get("passing")
        if passing and (known := files.passed(made_from)):
            return known
        files.make_room(4 * (model.stat().st_size + weights) + (64 << 20), kept=False)
        place = re.sub(r"[^\w.-]+", "_", " ".join(str(here[key]) for key in (*BOUND_TO, "power_mode")))[:150]
        target, timing, start = files.scratch(".engine"), files.root / "timing" / f"{place}.cache", time.monotonic()
        if timing.is_file() and timing.stat().st_size > TIMINGS:  # what many runs have left
            timing.unlink()
        told = (build_with_module if facts["module"] else build_with_trtexec)(model, target, timing, request)
        built = {**here, **told, "seconds": time.monotonic() - start}
        kept = files.keep(target)
        settings = {key: request["settings"][key] for key in ("precision", "batch", "dla_core")}
        entry = {**built, **settings, "input": request["input"], "dynamic": request["dynamic"], "made_from": made_from}
        answer = {"engine": kept, **built}  # below: the ledger of the engines that were built here
        (fresh := files.scratch()).write_text(json.dumps({**entry, **({"answer": answer} if passing else {})}))
        files.settle(fresh, files.root / "engines" / kept["sha256"])
        return answer


def build_with_module(path: Path, target: Path, timing: Path, request: Json) -> Json:
    """ONNX file → engine file; `timing`: cache of kernel timings. Returns what of the settings could not be obeyed."""
    import tensorrt as trt

    logger, creation = trt.Logger(trt.Logger.INFO), trt.NetworkDefinitionCreationFlag
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(creation.EXPLICIT_BATCH) if hasattr(creation, "EXPLICIT_BATCH") else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)) or not network.num_layers or not network.num_outputs:
        faults = [parser_fault(parser.get_error(index)) for index in range(parser.num_errors)]
        text = "; ".join(fault["text"] for fault in faults) or "the graph is empty"
        message = f"TensorRT {trt.__version__} cannot read the ONNX file: {text}"
        raise Fault("engine", message, "try another onnx.opset", parser=faults)
    config = builder.create_builder_config()
    configure(trt, builder, network, config, request)
    layers = map(network.get_layer, range(network.num_layers if request["settings"]["dla_core"] is not None else 0))
    beside = [layer.name for layer in layers if not config.can_run_on_DLA(layer)]
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # written on another device or by another version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        which = f"; the DLA cannot run {', '.join(beside[:5])}" if beside else ""
        hint = "set engine.dla_fallback: true to run these on the GPU" if beside else "its log is above"
        raise Fault("engine", f"TensorRT {trt.__version__} could not build the engine{which}", hint)
    target.write_bytes(blob)
    fresh = timing.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(config.get_timing_cache().serialize())
    fresh.replace(timing)
    note = f"{len(beside)} of {network.num_layers} layers run on the GPU, not on the DLA" if beside else ""
    return {"note": note, "gpu_layers": beside}


def parser_fault(fault: Any) -> Json:
    """Node and operator by name are known from 10.3 on; before, the host finds them by the node's number."""
    name = fault.node_name() if hasattr(fault, "node_name") else ""
    operator = fault.node_operator() if hasattr(fault, "node_operator") else ""
    return {"node": fault.node(), "name": name, "operator": operator, "text": fault.desc()}


def configure(trt: Any, builder: Any, network: Any, config: Any, request: Json) -> None:
    """The recipe's settings, in the dialect of the TensorRT that is there."""
    settings, flags = request["settings"], {"fp32": "", "fp16": "FP16", "int8": "INT8 FP16"}
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mib"] << 20)
    if hasattr(trt.IBuilderConfig, "builder_optimization_level"):  # from 8.6 on
        config.builder_optimization_level = settings["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings["precision"] == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: ten bits of mantissa are no fp32
    elif hasattr(trt.BuilderFlag, "FP16"):  # from 11 on the graph's own types decide
        for name in flags[settings["precision"]].split():
            config.set_flag(getattr(trt.BuilderFlag, name))
        if settings["dla_core"] is None or settings["keep_fp32"] != "auto":  # a DLA knows no fp32
            keep_in_fp32(trt, network, config, settings["keep_fp32"])
    if settings["dla_core"] is not None:
        cores, wanted = builder.num_DLA_cores, settings["dla_core"]
        if wanted >= cores:
            raise Fault("engine", f"the target has {cores} DLA cores, no core {wanted}", "change engine.dla_core")
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, wanted
        if settings.get("dla_fallback"):  # without it what the DLA cannot run ends the build
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if request["dynamic"]:
        profile = builder.create_optimization_profile()
        shapes = [(settings["batch"][key], *request["input"]["shape"]) for key in ("min", "opt", "max")]
        profile.set_shape(request["input"]["name"], *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise Fault("engine", f"TensorRT refuses the batches {shapes}", "see engine.batch of the recipe")


def keep_in_fp32(trt: Any, network: Any, config: Any, patterns: Any) -> None:
    """Layers that half precision ruins: `auto` are normalisations, softmax and reductions, else patterns of names."""
    kinds = [getattr(trt.LayerType, n) for n in ("NORMALIZATION", "SOFTMAX", "REDUCE") if hasattr(trt.LayerType, n)]
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer in map(network.get_layer, range(network.num_layers)):
        wanted = layer.type in kinds if patterns == "auto" else any(fnmatchcase(layer.name, p) for p in patterns)
        if wanted and layer.get_output(0).dtype in (trt.float32, trt.float16):
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)


# --- TensorRT, by trtexec: its output is for the host


def trtexec() -> str | None:
    return shutil.which("trtexec", path=f"{os.environ.get('PATH', '')}:/usr/src/tensorrt/bin:/opt/tensorrt/bin")


def run_trtexec(options: Sequence[str]) -> str:
    """What it prints, which also goes to standard error. Errors: Fault when it does not end with 0."""
    program = trtexec()
    if program is None:
        raise Fault("runtime", "TensorRT is not on the target: no module and no trtexec", APT)
    process = subprocess.Popen([program, *options], stdin=-3, stdout=-1, stderr=-2, preexec_fn=die_with_agent)
    text = process.communicate()[0].decode(errors="replace")
    if options != ["--help"]:
        print(text, end="", file=sys.stderr, flush=True)
    if code := process.returncode:  # killed, as where memory runs out: that says nothing of the file
        raise Fault("runtime" if code == -9 else "engine", f"trtexec ended with {code}", "its log is above")
    return text


def build_with_trtexec(path: Path, target: Path, timing: Path, request: Json) -> Json:
    """As `build_with_module`."""
    known, settings, dla = run_trtexec(["--help"]), request["settings"], request["settings"]["dla_core"]
    options = [f"--onnx={path}", f"--saveEngine={target}", f"--timingCacheFile={timing}"]
    options += [f"--memPoolSize=workspace:{settings['workspace_mib']}", "--profilingVerbosity=detailed"]
    options += [flag for flag in ("--skipInference", "--buildOnly") if flag in known][:1]  # 8.5 has the second only
    if "--builderOptimizationLevel" in known:  # from 8.6 on
        options += [f"--builderOptimizationLevel={settings['optimization_level']}"]
    wanted = {"fp32": ["--noTF32"], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}[settings["precision"]]
    options += [flag for flag in wanted if flag in known]  # from 11 on the graph's own types decide
    if dla is not None:
        options += [f"--useDLACore={dla}", *(["--allowGPUFallback"] if settings.get("dla_fallback") else [])]
    if request["dynamic"]:
        rest, name, batch = "x".join(map(str, request["input"]["shape"])), request["input"]["name"], settings["batch"]
        options += [f"--{key}Shapes={name}:{batch[key]}x{rest}" for key in ("min", "opt", "max")]
    run_trtexec(options)
    if not target.is_file():
        raise Fault("engine", "trtexec wrote no engine", "its log is above")
    pinned = settings["precision"] != "fp32" and "--fp16" in known
    return {"note": "trtexec pins no layers: engine.keep_fp32 was not applied" if pinned else "", "gpu_layers": []}


def trtexec_engine(request: Json, file: Json, files: Store) -> list[str]:
    """The options that load an engine, with its batch where that is open. Errors: Fault."""
    path, built = files.engine(request, file)
    batch, open_batch = request.get("batch", 1), built.get("dynamic", False)
    if not (built["batch"]["min"] <= batch <= built["batch"]["max"] if open_batch else batch == 1):
        raise Fault("engine", f"the engine does not take a batch of {batch}", "see engine.batch of the recipe")
    options = [f"--loadEngine={path}"]
    if open_batch:
        shape = "x".join(map(str, built["input"]["shape"]))
        options += [f"--shapes={built['input']['name']}:{batch}x{shape}"]
    return options + ([] if built.get("dla_core") is None else [f"--useDLACore={built['dla_core']}"])


def trtexec_in_turn(request: Json, files: Store) -> Json:
    """Several short runs in turn; trtexec keeps one query ahead, so its latency is that under full load."""
    engines = [trtexec_engine(request, file, files) for file in request["models"]]
    exported, seconds = files.scratch(".json"), request["duration_s"] / TRTEXEC_ROUNDS
    options = ["--noDataTransfers", "--useSpinWait", "--useCudaGraph", "--avgRuns=1000", f"--exportTimes={exported}"]
    options += [f"--warmUp={1000 * request['warmup_s']:.0f}", f"--duration={max(1, seconds):.0f}"]
    times = [[""] * len(engines) for _ in range(TRTEXEC_ROUNDS)]
    for number, blocks in enumerate(times):
        for index in range(len(engines))[:: -1 if number % 2 else 1]:
            run_trtexec([*engines[index], *options])
            blocks[index] = taken(exported)
    return {"times": times, "models": [{"runtime": "trtexec"} for _ in engines], "overhead": None, "memory": None}


def trtexec_layers(request: Json, files: Store) -> Json:
    profile, info = files.scratch(".profile"), files.scratch(".layers")
    options = ["--dumpProfile", "--separateProfileRun", f"--exportProfile={profile}", f"--exportLayerInfo={info}"]
    run_trtexec([*trtexec_engine(request, request["model"], files), *options, "--profilingVerbosity=detailed"])
    return {"layers": [], "profile": taken(profile), "layer_info": taken(info)}


BOUND_TO = ("tensorrt", "board", "gpu", "compute_capability")  # what an engine that was built here must find again
CLOCKS = {"mhz": "cur_freq", "min_mhz": "min_freq", "max_mhz": "max_freq"}
# made of (request, file, files): objects with `run()` on fixed buffers, `logits(images)`, `layers()`, `facts`; engines: `on_gpu`
MODELS: dict[str, Any] = {"onnxruntime": OnnxModel, "tensorrt": EngineModel}
VERBS = {verb.__name__: verb for verb in (probe, missing, store, fetch, build, measure, infer, layers)}

if __name__ == "__main__":
    errand = Path(sys.argv[0]).with_name("errand.json")  # beside a copy in a work folder, as errand.py is
    if sys.argv[0] != "-c" and len(sys.argv) == 1 and errand.is_file():
        os.execv(sys.executable, [sys.executable, str(errand.with_suffix(".py"))])
    sys.exit(main())
