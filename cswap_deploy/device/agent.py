"""The device's half of cswap-deploy: one file that is sent to the target and run there. Nothing is installed.

A request, one line of JSON, comes on standard input; one line of JSON goes to standard output. Needs Python 3.8, numpy
and a runtime: onnxruntime, or TensorRT by its Python module, else by trtexec.

  probe: what this machine is and can run · missing: which files are not stored here · store, fetch: receive or send one,
  which follows the line · build: ONNX file → TensorRT engine · measure: durations of several models, run in turn ·
  infer: logits of images · layers: where a model's time goes

~/.cache/cswap-deploy/ (or below XDG_CACHE_HOME) holds files/<sha256>, timing/ (TensorRT's timing caches), lock (held while
a model is built or run) and engines/<sha256>: an engine is native code, so only one that was built here, or that the
request trusts by its digest, is loaded.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, Dict

SCHEMA = "cswap-deploy/agent/1"
Json = Dict[str, Any]
LIMIT, SPARE = 4 << 30, 256 << 20  # bytes of files kept here; bytes of disk that stay free
ABANDONED_S, FRESH_S = 3600, 600  # unfinished files older than this are removed; files used lately stay
BLOCK_S, SETTLE_S = (
    0.05,
    0.005,
)  # how long a model's turn is; what it starts with, on caches full of another, is not kept
ROUNDS, TRTEXEC_ROUNDS, PROFILED_RUNS = 6, 6, 50  # fewer rounds prove nothing
MEMORY = {"memory_mb": "MemTotal", "memory_free_mb": "MemAvailable"}
APT = "on a Jetson: sudo apt install python3-libnvinfer libnvinfer-bin"


class Fault(Exception):
    """What the host is told instead of an answer. Kinds: request, file, disk, busy, transfer, runtime, model, engine."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.document = {"kind": kind, "message": message, "hint": hint}


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
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.replace(self.path(found))
        return {"sha256": found, "bytes": self.path(found).stat().st_size}

    def make_room(self, size: int) -> None:
        """Remove abandoned files, then the least recently used ones, until `size` bytes more fit; if they cannot, none."""
        for changed, _, path in self.listed("tmp"):
            if time.time() - changed > ABANDONED_S:
                path.unlink(missing_ok=True)
        files = self.listed("files")
        used, old = sum(entry[1] for entry in files), [entry for entry in files if time.time() - entry[0] > FRESH_S]
        can_go = sum(entry[1] for entry in old)
        if used - can_go + size > LIMIT or self.free() + can_go < size + SPARE:
            have = f"{self.free() >> 20} MiB are free, {SPARE >> 20} stay free, {LIMIT >> 20} are kept at most"
            raise Fault("disk", f"{size >> 20} MiB do not fit on the target: {have}", "make room there")
        for _, bytes_of_it, path in old:
            if used + size > LIMIT or self.free() < size + SPARE:
                path.unlink(missing_ok=True)
                used -= bytes_of_it

    def engine(self, request: Json, file: Json) -> Path:
        """An engine that was built here or that the request trusts. Errors: Fault."""
        found = digest_of(path := self.find(file))
        if not (self.root / "engines" / found).is_file() and found not in request.get("trust", ()):
            hint = f"build it there, or, if you trust its origin, pass --trust-engine {found}"
            raise Fault("engine", "this engine was not built on the target; an engine is native code", hint)
        return path

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
    if not identity.is_file():
        identity.write_text(os.urandom(8).hex())
    found = {"id": identity.read_text(), "numpy": numpy, "onnxruntime": runtime, "disk_free_mb": files.free() >> 20}
    return {**machine(), **found, "tensorrt": tensorrt_facts(), "store": here}


def machine() -> Json:
    """The temperature is that of the hottest zone, in degrees Celsius."""
    memory = dict(re.findall(r"(\w+):\s+(\d+) kB", text_of("/proc/meminfo")))
    zones = [text_of(path) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    system, release, kind = os.uname().sysname, os.uname().release, os.uname().machine
    return {
        **{"python": sys.version.split()[0], "machine": kind, "system": f"{system} {release}"},
        **{key: int(memory.get(name, 0)) >> 10 for key, name in MEMORY.items()},
        **{"cpu": cpu(), "board": board(), "load": list(os.getloadavg())},
        "temperature_c": max((int(text) / 1000 for text in zones if text.isdigit()), default=None),
    }


def cpu() -> Json:
    folder = "/sys/devices/system/cpu/cpu0/cpufreq/"
    clocks = {"mhz": text_of(folder + "scaling_cur_freq"), "max_mhz": text_of(folder + "cpuinfo_max_freq")}
    name = re.search(r"^(?:model name|Model|Hardware)\s*: (.+)$", text_of("/proc/cpuinfo"), re.M)
    facts: Json = {key: int(text) // 1000 if text.isdigit() else None for key, text in clocks.items()}
    facts.update({"cores": len(os.sched_getaffinity(0)), "governor": text_of(folder + "scaling_governor") or None})
    return {**facts, "model": name.group(1).strip() if name else os.uname().machine}


def board() -> Json | None:
    """A board that names itself in the device tree: Jetson, Raspberry Pi and the like."""
    name = text_of("/proc/device-tree/model").strip("\0")
    if not name:
        return None
    release = re.search(r"# R(\d+) .*REVISION: ([\d.]+)", text_of("/etc/nv_tegra_release"))
    clocks = [path for path in Path("/sys/class/devfreq").glob("*") if re.search("ga10b|gv11b|gpu", path.name)]
    limits = [text_of(clock / bound) for clock in clocks[:1] for bound in ("min_freq", "max_freq")]
    locked, mode = limits[0] == limits[1] if limits else None, None
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        asked = subprocess.run(["nvpmodel", "-q"], stdin=-3, stdout=-1, stderr=-3, timeout=10)  # -1: PIPE, -3: DEVNULL
        mode = re.findall(r"NV Power Mode: (\S+)", asked.stdout.decode())[0]
    l4t = ".".join(release.groups()) if release else None
    return {"model": name, "l4t": l4t, "power_mode": mode, "gpu_clocks_locked": locked}


def text_of(path: str | Path) -> str:
    with suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return ""


def imported(name: str) -> tuple[Any, str]:
    """A module or None, and why not: a library that does not fit its CUDA or its C library raises anything."""
    try:
        return __import__(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def measure(request: Json, files: Store) -> Json:
    """Raw durations in ns: `rounds[r][m]` are those of model m in round r; what they mean is for the host to say."""
    with files.alone(request):
        before = machine()
        by_trtexec = request["runtime"] == "tensorrt" and not imported("tensorrt")[0]
        return {
            **(trtexec_in_turn if by_trtexec else models_in_turn)(request, files),
            "before": before,
            "after": machine(),
        }


def models_in_turn(request: Json, files: Store) -> Json:
    """Peak memory is looked for unless `memory` is false: it takes a process for each model."""
    kind, opened = MODELS[request["runtime"]], request["models"]
    asked = (None, *opened) if request.get("memory", True) else ()
    peaks = [peak_memory(request, file, files) for file in asked]
    models = [kind(request, file, files) for file in opened]
    for model in models:
        run_for(model.run, request["warmup_s"])
    start = time.perf_counter_ns()
    rounds, running = sample([model.run for model in models], request["duration_s"], request.get("block_s", BLOCK_S))
    overhead = 1 - running / (time.perf_counter_ns() - start)
    own = int(re.findall(r"VmHWM:\s+(\d+) kB", text_of("/proc/self/status"))[0]) / 1024
    used = {"peak_mb": peaks[1:], "runtime_mb": peaks[0], "agent_mb": own} if peaks else None
    return {"rounds": rounds, "models": [model.facts for model in models], "overhead": overhead, "memory": used}


def sample(runs: Sequence[Callable[[], None]], duration_s: float, block_s: float) -> tuple[list[list[list[int]]], int]:
    """Rounds until each model has run for `duration_s`, order reversed every other round; and the ns spent running."""
    rounds: list[list[list[int]]] = []
    spent, running, asked = [0] * len(runs), 0, duration_s * 1e9
    gc.disable()
    while (min(spent) < asked and sum(spent) < 2 * len(runs) * asked) or len(rounds) < ROUNDS:
        blocks: list[list[int]] = [[]] * len(runs)
        for index in range(len(runs))[:: -1 if len(rounds) % 2 else 1]:
            again, blocks[index] = block(runs[index], SETTLE_S, 1), block(runs[index], block_s, 2)
            spent[index] += sum(blocks[index])
            running += sum(again) + sum(blocks[index])
        rounds.append(blocks)
    gc.enable()
    return rounds, running


def block(run: Callable[[], None], seconds: float, least: int) -> list[int]:
    """ns of each inference."""
    clock, durations = time.perf_counter_ns, []
    end = clock() + int(seconds * 1e9)
    while True:
        before = clock()
        run()
        after = clock()
        durations.append(after - before)
        if after >= end and len(durations) >= least:
            return durations


def run_for(run: Callable[[], None], seconds: float) -> None:
    end = time.perf_counter() + seconds
    run()
    while time.perf_counter() < end:
        run()


def peak_memory(request: Json, file: Json | None, files: Store) -> float:
    """Peak resident memory in MB of a process of its own that runs this model, or, without one, only loads the runtime."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, 9)  # it dies with the agent, whose lock it shares
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
            raise Fault(
                "runtime", f"ONNX Runtime is not usable on the target: {reason}", "there: pip install onnxruntime"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = request.get("threads", 1), 1
        options.log_severity_level = 4
        if "profile" in request:
            options.enable_profiling, options.profile_file_prefix = True, request["profile"]
        path, name = files.find(file), file.get("name", "the model")
        self.ort, self.name, self.batch = ort, name, request.get("batch", 1)
        self.facts = {"runtime": f"onnxruntime {ort.__version__}"}
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            message = f"ONNX Runtime {ort.__version__} cannot open {name}: {error}"
            raise Fault("model", message, "is it an ONNX file?") from error
        self.bind({item.name: self.noise(item) for item in self.session.get_inputs()})

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
        written = Path(self.session.end_profiling())
        times: dict[tuple[str, str], list[float]] = {}
        for event in json.loads(written.read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = event["name"][: -len("_kernel_time")], event["args"]["op_name"]
                times.setdefault(key, []).append(event["dur"] / 1000)
        written.unlink()
        return {"layers": [{"name": name, "op": op, "ms": median(ms[1:])} for (name, op), ms in times.items()]}


def infer(request: Json, files: Store) -> Json:
    """Logits of `images`, an .npy file of shape (n, C, H, W): uint8 pixels, normalised here, or float32 as they are."""
    with files.alone(request):
        import numpy as np

        images = np.load(str(files.find(request["images"])), mmap_mode="r", allow_pickle=False)
        model = MODELS[request["runtime"]](request, request["model"], files)
        batch, results = request.get("batch", 1), []
        mean, std = (np.float32(request[key][: images.shape[1]]).reshape(-1, 1, 1) for key in ("mean", "std"))
        for start in range(0, len(images), batch):
            some = np.array(images[start : start + batch], np.float32)
            if images.dtype == np.uint8:
                some = (some / np.float32(255) - mean) / std
            full = np.concatenate([some, np.repeat(some[-1:], batch - len(some), axis=0)])
            results.append(model.logits(full)[: len(some)])
        path = files.scratch(".npy")
        np.save(str(path), np.concatenate(results).astype(np.float32))
        return {"logits": files.keep(path), "images": len(images)}


def layers(request: Json, files: Store) -> Json:
    """Median milliseconds of each layer over PROFILED_RUNS inferences, in order of execution; its operator where known."""
    with files.alone(request):
        model = MODELS[request["runtime"]]({**request, "profile": str(files.scratch())}, request["model"], files)
        for _ in range(PROFILED_RUNS):
            model.run()
        return dict(model.layers())


def tensorrt_facts() -> Json:
    """`precision`: `flags` set FP16 and INT8 on the builder (to 10.x), `typed` graphs carry them (from 11)."""
    trt, reason = imported("tensorrt")
    cards = map(text_of, Path("/proc/driver/nvidia/gpus").glob("*/information"))
    card = re.search(r"Model:\s+(.+)", "\n".join(cards))
    facts: Json = {"module": False, "trtexec": trtexec(), "gpu": card.group(1) if card else None, "reason": reason}
    facts.update(dict.fromkeys(("version", "precision", "compute_capability", "dla_cores")))
    try:
        if trt:
            facts["dla_cores"] = trt.Builder(trt.Logger(trt.Logger.ERROR)).num_DLA_cores
            facts["precision"] = "flags" if hasattr(trt.BuilderFlag, "FP16") else "typed"
            facts.update({"compute_capability": Cuda().capability(), "version": trt.__version__, "module": True})
        elif facts["trtexec"]:
            text = run_trtexec(["--help"])
            banner = re.search(r"TensorRT v(?:(\d+)(\d\d)(\d\d)|(\d)(\d)(\d\d))\]", text)
            facts["version"] = ".".join(str(int(part)) for part in banner.groups() if part) if banner else "unknown"
            facts["precision"] = "flags" if "--fp16" in text else "typed"
    except (Fault, TypeError) as error:  # TypeError: TensorRT's library cannot start
        facts["reason"] = str(error)
    return facts


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
        code = getattr(self.library, name)(*arguments)
        if code:
            raise Fault("engine", f"{name} failed on the target with CUDA error {code}")

    def created(self, name: str, *arguments: Any) -> int | None:
        """The handle or address that a call hands out through its first argument."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value

    def capability(self) -> str:
        numbers = [ctypes.c_int(), ctypes.c_int()]
        for number, attribute in zip(numbers, (75, 76)):  # major and minor
            self.call("cudaDeviceGetAttribute", ctypes.byref(number), attribute, 0)
        return ".".join(str(number.value) for number in numbers)

    def copy(self, to: int | None, source: int | None, size: int) -> None:
        arguments = ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size)
        self.call("cudaMemcpy", *arguments, 4)  # 4: the direction follows from the addresses
        self.call(
            "cudaStreamSynchronize", None
        )  # pageable memory may still be on its way; our stream does not wait for it


class EngineModel:
    """An engine on the GPU: buffers and stream are made once."""

    def __init__(self, request: Json, file: Json, files: Store) -> None:
        trt, reason = imported("tensorrt")
        if not trt:
            raise Fault("runtime", f"TensorRT's Python module cannot be used on the target: {reason}", APT)
        blob, batch = files.engine(request, file).read_bytes(), request.get("batch", 1)
        self.trt, self.cuda, self.logger = trt, Cuda(), trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(blob)
        self.context: Any = self.engine.create_execution_context() if self.engine is not None else None
        if self.context is None:
            raise Fault("engine", f"TensorRT {trt.__version__} cannot load the engine", "build it again on this target")
        self.stream = self.cuda.created("cudaStreamCreateWithFlags", 1)  # 1: does not wait for the default stream
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        names.sort(key=lambda name: self.engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT)  # the input first
        self.tensors = [self.place(name, batch) for name in names]
        self.facts = {"runtime": f"tensorrt {trt.__version__}"}

    def place(self, name: str, batch: int) -> tuple[Any, int | None]:
        """Array on the host and address on the device of one tensor; an input's open batch is fixed first."""
        import numpy as np

        if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT:
            shape = (batch, *tuple(self.engine.get_tensor_shape(name))[1:])
            if not self.context.set_input_shape(name, shape):
                raise Fault("engine", f"the engine does not take a batch of {batch}", "see engine.batch of the recipe")
        kind = self.trt.nptype(self.engine.get_tensor_dtype(name))
        array = np.random.RandomState(0).random_sample(tuple(self.context.get_tensor_shape(name))).astype(kind)
        address = self.cuda.created("cudaMalloc", ctypes.c_size_t(array.nbytes))
        self.cuda.copy(address, array.ctypes.data, array.nbytes)
        self.context.set_tensor_address(name, address)
        return array, address

    def run(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise Fault("engine", "TensorRT did not run the engine", "build it again on this target")
        self.cuda.call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def logits(self, images: Any) -> Any:
        (given, source), (found, target) = self.tensors
        given[...] = images
        self.cuda.copy(source, given.ctypes.data, given.nbytes)
        self.run()
        self.cuda.copy(found.ctypes.data, target, found.nbytes)
        return found.copy()

    def layers(self) -> Json:
        """Milliseconds from TensorRT's profiler, and under `engine` its inspector's account of each layer."""
        times: dict[str, list[float]] = {}
        base = self.trt.IProfiler
        note = {"report_layer_time": lambda _, name, ms: times.setdefault(name, []).append(ms)}
        self.context.profiler = type("Profiler", (base,), {"__init__": base.__init__, **note})()
        for _ in range(PROFILED_RUNS):
            self.run()
        inspector = self.engine.create_engine_inspector()
        facts = json.loads(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))
        return {"layers": [{"name": n, "op": "", "ms": median(ms)} for n, ms in times.items()], "engine": facts}


def build(request: Json, files: Store) -> Json:
    """Settings are those of the recipe's `engine`; `input`: name and (channels, height, width); `dynamic`: open batch."""
    with files.alone(request):
        facts = tensorrt_facts()
        if facts["version"] is None:
            raise Fault("runtime", f"TensorRT is not on the target: {facts['reason']}", APT)
        model = files.find(request["model"])
        files.make_room(4 * model.stat().st_size + (64 << 20))
        mode = (board() or {}).get("power_mode")
        place = re.sub(r"[^\w.-]+", "_", f"{facts['version']} {facts['gpu']} {facts['compute_capability']} {mode}")
        target, start = files.scratch(".engine"), time.monotonic()
        builder = build_with_module if facts["module"] else build_with_trtexec
        note = builder(model, target, files.root / "timing" / f"{place}.cache", request)
        built = {key: facts[key] for key in ("gpu", "compute_capability")}
        built.update({"tensorrt": facts["version"], "note": note, "seconds": time.monotonic() - start})
        kept = files.keep(target)
        (fresh := files.scratch()).write_text(json.dumps(built))
        fresh.replace(files.root / "engines" / kept["sha256"])  # the ledger of the engines that were built here
        return {"engine": kept, **built}


def build_with_module(path: Path, target: Path, timing: Path, request: Json) -> str:
    """ONNX file → engine file; `timing`: cache of kernel timings. Returns what of the settings could not be obeyed."""
    import tensorrt as trt

    logger, creation = trt.Logger(trt.Logger.WARNING), trt.NetworkDefinitionCreationFlag
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(creation.EXPLICIT_BATCH) if hasattr(creation, "EXPLICIT_BATCH") else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)) or not network.num_layers:
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        text = "; ".join(f"node {fault.node()}: {fault.desc()}" for fault in faults) or "the graph is empty"
        raise Fault("engine", f"TensorRT {trt.__version__} cannot read the ONNX file: {text}", "try another onnx.opset")
    config = builder.create_builder_config()
    configure(trt, builder, network, config, request)
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # written on another device or by another version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise Fault("engine", f"TensorRT {trt.__version__} could not build the engine", "its log is above")
    target.write_bytes(blob)
    fresh = timing.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(config.get_timing_cache().serialize())
    fresh.replace(timing)
    return ""


def configure(trt: Any, builder: Any, network: Any, config: Any, request: Json) -> None:
    """The recipe's settings, in the dialect of the TensorRT that is there."""
    settings, flags = request["settings"], {"fp32": "", "fp16": "FP16", "int8": "INT8 FP16"}
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mib"] << 20)
    config.builder_optimization_level = settings["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "FP16") and settings["precision"] != "fp32":  # from 11 on the graph's own types decide
        for name in flags[settings["precision"]].split():
            config.set_flag(getattr(trt.BuilderFlag, name))
        if settings["dla_core"] is None or settings["keep_fp32"] != "auto":  # a DLA knows no fp32
            keep_in_fp32(trt, network, config, settings["keep_fp32"])
    if settings["dla_core"] is not None:  # without GPU_FALLBACK: what the DLA cannot run ends the build
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, settings["dla_core"]
    if request["dynamic"]:
        profile = builder.create_optimization_profile()
        shapes = [(settings["batch"][key], *request["input"]["shape"]) for key in ("min", "opt", "max")]
        profile.set_shape(request["input"]["name"], *shapes)
        config.add_optimization_profile(profile)


def keep_in_fp32(trt: Any, network: Any, config: Any, patterns: Any) -> None:
    """Layers that half precision ruins: `auto` are normalisations, softmax and reductions, else patterns of names."""
    names = ("NORMALIZATION", "SOFTMAX", "REDUCE")
    kinds = [getattr(trt.LayerType, name) for name in names if hasattr(trt.LayerType, name)]
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer in map(network.get_layer, range(network.num_layers)):
        wanted = layer.type in kinds if patterns == "auto" else any(fnmatchcase(layer.name, p) for p in patterns)
        if wanted and layer.get_output(0).dtype in (trt.float32, trt.float16):
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)


def trtexec() -> str | None:
    return shutil.which("trtexec", path=f"{os.environ.get('PATH', '')}:/usr/src/tensorrt/bin:/opt/tensorrt/bin")


def run_trtexec(options: Sequence[str]) -> str:
    """What it prints. It dies with the agent: on its own it would go on using the GPU without holding the lock."""
    program, libc = trtexec(), ctypes.CDLL(None)  # prctl(1, 9): SIGKILL when the parent ends
    if program is None:
        raise Fault("runtime", "TensorRT is not on the target: no module and no trtexec", APT)
    process = subprocess.Popen([program, *options], stdin=-3, stdout=-1, stderr=-2, preexec_fn=lambda: libc.prctl(1, 9))
    text = process.communicate()[0].decode(errors="replace")
    if process.returncode:
        sys.stderr.write(text)
        faults = "; ".join(re.findall(r"\[E\] (.+)", text)[-3:]) or f"it ended with {process.returncode}"
        raise Fault("engine", f"trtexec failed: {faults}", "its log is above")
    return text


def build_with_trtexec(path: Path, target: Path, timing: Path, request: Json) -> str:
    """As `build_with_module`."""
    settings, known = request["settings"], run_trtexec(["--help"])
    options = [f"--onnx={path}", f"--saveEngine={target}", f"--timingCacheFile={timing}", "--skipInference"]
    options += [f"--memPoolSize=workspace:{settings['workspace_mib']}", "--profilingVerbosity=detailed"]
    options += [f"--builderOptimizationLevel={settings['optimization_level']}"]
    wanted = {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}[settings["precision"]]
    options += [flag for flag in wanted if flag in known]  # from 11 on the graph's own types decide
    options += [] if settings["dla_core"] is None else [f"--useDLACore={settings['dla_core']}"]
    if request["dynamic"]:
        rest, name, batch = "x".join(map(str, request["input"]["shape"])), request["input"]["name"], settings["batch"]
        options += [f"--{key}Shapes={name}:{batch[key]}x{rest}" for key in ("min", "opt", "max")]
    run_trtexec(options)
    return "" if settings["precision"] == "fp32" else "trtexec pins no layers: engine.keep_fp32 was not applied"


def trtexec_in_turn(request: Json, files: Store) -> Json:
    """Several short runs in turn; trtexec keeps one query ahead, so its latency is that under full load."""
    if request.get("batch", 1) != 1:
        raise Fault("runtime", "trtexec measures a batch of 1 only", APT)
    engines = [files.engine(request, file) for file in request["models"]]
    rounds: list[list[list[int]]] = []
    exported, seconds = files.scratch(".json"), request["duration_s"] / TRTEXEC_ROUNDS
    for _ in range(TRTEXEC_ROUNDS):
        rounds.append([])
        for engine in engines:
            options = [f"--loadEngine={engine}", "--noDataTransfers", "--useSpinWait", "--useCudaGraph"]
            options += [f"--warmUp={1000 * request['warmup_s']:.0f}", f"--duration={max(1, seconds):.0f}"]
            run_trtexec([*options, f"--exportTimes={exported}"])
            rounds[-1].append([round(1e6 * entry["latencyMs"]) for entry in json.loads(exported.read_text())])
    exported.unlink()
    return {"rounds": rounds, "models": [{"runtime": "trtexec"} for _ in engines], "overhead": None, "memory": None}


# made of (request, file, files): objects with `run()` on fixed buffers, `logits(images)`, `layers()` and `facts`
MODELS: dict[str, Any] = {"onnxruntime": OnnxModel, "tensorrt": EngineModel}
VERBS = {verb.__name__: verb for verb in (probe, missing, store, fetch, build, measure, infer, layers)}

if __name__ == "__main__":
    sys.exit(main())
