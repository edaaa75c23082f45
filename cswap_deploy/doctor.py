"""`cswap-deploy doctor`: what this machine and a target can do, what is missing, how to fix it. Changes nothing.

Nothing heavy is imported: a target is read from its agent's probe. Where a probe says null the answer is "unknown": no finding
is guessed from a board's name. What is known about JetPack comes from NVIDIA's documentation and package indexes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cswap_deploy import doctor_host
from cswap_deploy.device import needs
from cswap_deploy.device.jetpack import jetpack_of
from cswap_deploy.device.target import APT_TENSORRT, SCHEMA
from cswap_deploy.errors import DeviceError
from cswap_deploy.findings import Finding, ok, or_unknown, release, size_text
from cswap_deploy.manifest import INTEGER, NUMBER, TEXT, Schema, faults, nullable, record
from cswap_deploy.recipe import Recipe
from cswap_deploy.wording import BUSY, is_busy

host = doctor_host.findings


def target(name: str, probe: Mapping[str, Any], recipe: Recipe | None = None) -> tuple[Finding, ...]:
    """What a target's probe says to somebody who wants to build engines and measure there, with what a recipe needs.

    `name`: as the user gave it, `local` or ssh://...  Errors: DeviceError when the document is no probe of ours.
    """
    if fault := next(faults(dict(probe), PROBE, "probe"), None):
        raise DeviceError(
            f"{name} did not answer with a probe: {fault}", "use the same version of cswap-deploy on both"
        )
    asked = _Target(name, probe)
    parts = (_machine, _python, _jetpack, _numpy, _onnxruntime, _tensorrt, _precision)
    conditions = (_power_mode, _gpu_clocks, _governor, _load, _memory, _disk, _store)
    found = tuple(finding for part in (*parts, *conditions) for finding in part(asked))
    return (*found, *(_wanted(recipe, probe) if recipe else ()))


def unreachable(name: str, message: str, hint: str) -> tuple[Finding, ...]:
    """What is left to say about a target that gave no probe."""
    by_hand = f"ssh {shlex.quote(name)} python3 --version" if name.startswith("ssh://") else "python3 --version"
    return (Finding("target", "problem", f"{name} cannot be asked: {message}", hint or f"try it by hand: {by_hand}"),)


def _wanted(recipe: Recipe, probe: Mapping[str, Any]) -> Iterator[Finding]:
    lacking = list(needs.shortfalls(recipe, probe))
    for need in lacking:
        yield Finding(f"recipe: {need.topic}", "problem", need.text, need.fix)
    if not lacking:
        yield ok("recipe", f"{recipe.name}: the target has what it needs")


# --- a target

FASTEST = {"AGX Orin": "0", "Orin Nano .*Super": "2"}
"""Pattern of a board's name → its MAXN mode, where it is known; on others 0 is not always the fastest."""
MAJORS = {35: "5", 36: "6", 38: "7", 39: "7"}
LEAST_MEMORY_MB, LEAST_DISK_MB = 1024, 1024
"""Free MiB that an engine's build should find: the workspace's default, and engine, timing cache and files."""


def _some(**properties: Schema) -> Schema:
    """An object whose keys may be absent or null: then the answer is unknown."""
    return nullable({"type": "object", "properties": {name: nullable(kind) for name, kind in properties.items()}})


FLAG: Schema = {"type": "boolean"}
PROBE: Schema = {
    **record(schema={"const": SCHEMA}, python=TEXT, machine=TEXT),
    "properties": {
        "schema": {"const": SCHEMA},
        "verb": {"const": "probe"},
        "python": TEXT,
        "machine": TEXT,
        "system": nullable(TEXT),
        "cpu": _some(model=TEXT, cores=INTEGER, governor=TEXT, mhz=NUMBER, max_mhz=NUMBER),
        **dict.fromkeys(("memory_mb", "memory_free_mb", "disk_free_mb"), nullable(NUMBER)),
        "load": nullable({"type": "array", "items": NUMBER}),
        "numpy": nullable(TEXT),
        "onnxruntime": _some(version=TEXT, providers={"type": "array", "items": TEXT}, reason=TEXT),
        "tensorrt": _some(
            version=TEXT, module=FLAG, trtexec=TEXT, gpu=TEXT, compute_capability=TEXT, cuda=TEXT,
            precision={"enum": ["flags", "typed"]}, dla_cores=INTEGER, reason=TEXT,
        ),
        "board": _some(model=TEXT, l4t=TEXT, power_mode=TEXT, gpu_clocks_locked=FLAG),
        "store": _some(folder=TEXT, bytes=INTEGER, limit_bytes=INTEGER),
    },
}  # fmt: skip
"""The agent's probe document; what may be null may also be absent."""


@dataclass(frozen=True)
class _Target:
    name: str
    probe: Mapping[str, Any]

    def part(self, key: str) -> Mapping[str, Any]:
        return self.probe.get(key) or {}

    @cached_property
    def python(self) -> tuple[int, ...]:
        return release(self.probe["python"])

    @cached_property
    def l4t(self) -> str | None:
        return self.part("board").get("l4t")

    @cached_property
    def is_jetson(self) -> bool:
        """Known by its L4T release, its kernel or its own name; in a container one of them is often hidden."""
        named = "jetson" in (self.part("board").get("model") or "").lower()
        return bool(self.l4t) or named or "tegra" in (self.probe.get("system") or "")

    @cached_property
    def has_tensorrt(self) -> bool:
        return self.part("tensorrt").get("version") is not None

    def pip(self, package: str) -> str:
        """Ubuntu 24.04, which JetPack 7 is made of, lets pip touch the system's Python only when told to."""
        more = "--break-system-packages " if self.is_jetson and self.python >= (3, 12) else ""
        return f"python3 -m pip install {more}{package}"


def _machine(asked: _Target) -> Iterator[Finding]:
    cpu = asked.part("cpu")
    what = asked.part("board").get("model") or cpu.get("model") or "a machine of unknown model"
    clock = f", {cpu['mhz']:g} of {or_unknown(cpu.get('max_mhz'))} MHz" if cpu.get("mhz") else ""
    system = f"{asked.probe.get('system') or 'unknown system'}, {asked.probe['machine']}"
    yield ok("target", f"{asked.name}: {what}, {system}, {or_unknown(cpu.get('cores'))} cores{clock}")


def _python(asked: _Target) -> Iterator[Finding]:
    version = asked.probe["python"]
    if asked.python < (3, 8):
        text = f"Python {version} is too old: the agent needs 3.8"
        yield Finding("python", "problem", text, "make python3 on the target's PATH a Python 3.8 or newer")
    elif asked.python < (3, 10):
        text = f"Python {version} runs the agent; cswap-deploy itself needs 3.10 and cannot be installed there"
        yield Finding("python", "note", text, f"use it from a workstation: --on {asked.name}")
    else:
        yield ok("python", f"Python {version}")


def _jetpack(asked: _Target) -> Iterator[Finding]:
    if not asked.is_jetson:
        return
    if asked.l4t is None:
        mount = "in a container, mount it: docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro ..."
        yield Finding("jetpack", "note", "unknown: /etc/nv_tegra_release cannot be read", mount)
        return
    found = release(asked.l4t)
    name = jetpack_of(asked.l4t)
    if found < (35,):
        text = f"L4T {asked.l4t} is JetPack 4 or older, which is not supported"
        yield Finding(
            "jetpack", "problem", text, "flash JetPack 5 or newer, where the module has it; else take another board"
        )
    elif found < (36,):
        text = f"JetPack {name or MAJORS[35]} (L4T {asked.l4t}): over ssh only, and unchecked"
        yield Finding("jetpack", "note", text, f"from a workstation: --on {asked.name}; JetPack 6 is what is checked")
    elif name:
        yield ok("jetpack", f"JetPack {name} (L4T {asked.l4t})")
    else:
        guess = f"JetPack {MAJORS[found[0]]}, exact name unknown" if found[0] in MAJORS else "JetPack unknown"
        fix = "to see its name: dpkg-query --show nvidia-jetpack"
        yield Finding("jetpack", "note", f"L4T {asked.l4t}: {guess}", fix)


def _numpy(asked: _Target) -> Iterator[Finding]:
    version, old = asked.probe.get("numpy"), asked.is_jetson and asked.python < (3, 12)
    wheel = asked.pip('"numpy<2"' if old else "numpy")
    if version is None:
        fix = wheel if old or not asked.is_jetson else "sudo apt install python3-numpy"
        yield Finding("numpy", "missing", "numpy cannot be imported: the agent needs it to run models", fix)
    elif old and release(version) >= (2,):
        text = f"numpy {version}: NVIDIA's wheels for JetPack 5 and 6 were built for numpy 1"
        yield Finding("numpy", "note", text, wheel)
    else:
        yield ok("numpy", f"numpy {version}")


def _onnxruntime(asked: _Target) -> Iterator[Finding]:
    found = asked.part("onnxruntime")
    version, why = found.get("version"), found.get("reason") or "no reason given"
    if version is not None:
        yield ok(
            "onnxruntime", f"ONNX Runtime {version}: {', '.join(found.get('providers') or ()) or 'providers unknown'}"
        )
    elif asked.has_tensorrt:
        text = f"ONNX Runtime cannot be imported ({why}); engines do not need it, latency.runtime: onnxruntime does"
        yield Finding("onnxruntime", "note", text, asked.pip("onnxruntime"))
    else:
        text = f"ONNX Runtime cannot be imported ({why})"
        yield Finding("onnxruntime", "missing", text, asked.pip("onnxruntime"))


def _tensorrt(asked: _Target) -> Iterator[Finding]:
    found = asked.part("tensorrt")
    if not asked.has_tensorrt:
        yield _without_tensorrt(asked)
        return
    version = found["version"]
    number, gpu = release(version), found.get("gpu") or "GPU's name unknown"
    through = "its Python module" if found.get("module") else "trtexec only"
    about = f"compute capability {or_unknown(found.get('compute_capability'))}, DLA cores {or_unknown(found.get('dla_cores'))}"
    about += f", CUDA {found['cuda']}" if found.get("cuda") else ""
    text = f"TensorRT {version} through {through}; {gpu}, {about}"
    if number and number < (8, 5):
        yield Finding("tensorrt", "problem", f"{text}; 8.5 is the oldest supported", "update to JetPack 5.1 or newer")
    elif asked.is_jetson and (11,) <= number < (11, 4, 1):
        text = f"{text}; TensorRT 11.0 to 11.4.0 do not support JetPack"
        yield Finding("tensorrt", "problem", text, "go back to the version of your JetPack: " + APT_TENSORRT)
    elif number and number < (8, 6):
        text = f"{text}; it reads ONNX up to opset 16 for sure, this tool writes 18 or newer: an engine may not build"
        yield Finding(
            "tensorrt", "note", text, "if it does not: update to JetPack 6, or set latency.runtime: onnxruntime"
        )
    else:
        yield ok("tensorrt", text)
    if not found.get("module"):
        text = "no Python module: engines are built and timed by trtexec, which is slower to start"
        venv = " (it serves the system's python3; a venv needs --system-site-packages)"
        fix = f"sudo apt install python3-libnvinfer{venv}" if asked.is_jetson else asked.pip('"cswap-deploy[tensorrt]"')
        yield Finding("tensorrt module", "note", text, fix)


def _without_tensorrt(asked: _Target) -> Finding:
    found = asked.part("tensorrt")
    why = found.get("reason") or "no reason given"
    if "ModuleNotFoundError" not in why and found.get("reason"):
        driver = "in a container, start it with --runtime nvidia; else: " + APT_TENSORRT
        fix = driver if asked.is_jetson else "check the driver: nvidia-smi"
        return Finding("tensorrt", "problem", f"TensorRT is there, but cannot be used: {why}", fix)
    if asked.is_jetson:
        text = f"no TensorRT ({why}); it comes from apt, never from pip, whose packages do not fit JetPack 6"
        return Finding("tensorrt", "missing", text, APT_TENSORRT)
    if found.get("gpu"):
        text = f"no TensorRT ({why}) for {found['gpu']}"
        return Finding("tensorrt", "missing", text, asked.pip('"cswap-deploy[tensorrt]"'))
    text = "no TensorRT and no NVIDIA GPU was seen: engines cannot be built there, ONNX Runtime can be measured"
    return Finding("tensorrt", "note", text, "for an engine name another target: --on ssh://USER@BOARD")


def _precision(asked: _Target) -> Iterator[Finding]:
    if asked.part("tensorrt").get("precision") == "typed":
        text = "this TensorRT is strongly typed: fp16 and int8 come from the ONNX file, not from a flag"
        fix = "nothing to do: an engine pulls in the fp16 or int8-tensorrt variant that it needs"
        yield Finding("precision", "note", text, fix)


# --- what a measurement depends on


def _power_mode(asked: _Target) -> Iterator[Finding]:
    if not asked.is_jetson:
        return
    mode, model = asked.part("board").get("power_mode"), asked.part("board").get("model") or ""
    if mode is not None and mode.startswith("MAXN"):
        yield ok("power mode", mode)
        return
    known = next((number for board, number in FASTEST.items() if re.search(board, model)), None)
    set_it = (
        f"sudo nvpmodel -m {known}" if known else "sudo nvpmodel -m ID (the IDs: grep POWER_MODEL /etc/nvpmodel.conf)"
    )
    if mode is None:
        yield Finding("power mode", "note", "unknown", f"sudo nvpmodel -q shows it, {set_it} sets the fastest")
    elif mode.startswith("mode "):
        yield Finding(
            "power mode", "note", f"{mode}; its name is shown to root only", f"sudo nvpmodel -q; then {set_it}"
        )
    else:
        yield Finding("power mode", "note", f"{mode} is not a MAXN mode: the board can be faster", set_it)


def _gpu_clocks(asked: _Target) -> Iterator[Finding]:
    locked = asked.part("board").get("gpu_clocks_locked")
    if not asked.is_jetson:
        return
    if locked:
        yield ok("gpu clocks", "locked")
    elif locked is None:
        yield Finding("gpu clocks", "note", "unknown whether they are locked", "sudo jetson_clocks --show")
    else:
        text = "not locked: they follow the load, and short runs look slow"
        yield Finding("gpu clocks", "note", text, "sudo jetson_clocks")


def _governor(asked: _Target) -> Iterator[Finding]:
    governor = asked.part("cpu").get("governor")
    if governor == "performance":
        yield ok("cpu governor", governor)
    elif governor is None:
        text = "unknown, as in most containers and virtual machines"
        yield Finding("cpu governor", "note", text, "compare only what was measured in one run on this machine")
    else:
        fix = "sudo jetson_clocks" if asked.is_jetson else "sudo cpupower frequency-set -g performance"
        yield Finding("cpu governor", "note", f"{governor}: the CPU's clock follows the load", fix)


def _load(asked: _Target) -> Iterator[Finding]:
    load, cores = asked.probe.get("load") or (), asked.part("cpu").get("cores")
    if not load:
        yield Finding("load", "note", "unknown", "see that nothing else runs there: uptime")
    elif is_busy(load[0], cores):
        text = f"{load[0]:.1f} over the last minute on {or_unknown(cores)} cores: {BUSY}"
        yield Finding("load", "problem", text, "stop what else runs there, and measure again: top")
    else:
        yield ok("load", f"{load[0]:.1f} over the last minute on {or_unknown(cores)} cores")


def _memory(asked: _Target) -> Iterator[Finding]:
    free, total = asked.probe.get("memory_free_mb"), asked.probe.get("memory_mb")
    if not free or not total:
        yield Finding("memory", "note", "unknown", "see that 1 GiB is free there: free -m")
        return
    text = f"{free / 1024:.1f} of {total / 1024:.1f} GiB free"
    if free < LEAST_MEMORY_MB:
        stop = (
            "sudo systemctl isolate multi-user.target stops the desktop" if asked.is_jetson else "close other programs"
        )
        yield Finding("memory", "problem", f"{text}; an engine's build needs about 1 GiB", stop)
    else:
        yield ok("memory", text)


def _disk(asked: _Target) -> Iterator[Finding]:
    free = asked.probe.get("disk_free_mb")
    if free is None:
        yield Finding("disk", "note", "unknown", "see that 1 GiB is free there: df -h ~")
    elif free < LEAST_DISK_MB:
        text = f"{free:.0f} MiB free; models, engines and timing caches need about 1 GiB"
        yield Finding("disk", "problem", text, "free 1 GiB on that disk: df -h ~")
    else:
        yield ok("disk", f"{free / 1024:.1f} GiB free")


def _store(asked: _Target) -> Iterator[Finding]:
    store = asked.part("store")
    if store.get("folder") and store.get("bytes") is not None and store.get("limit_bytes") is not None:
        yield ok("store", f"{size_text(store['bytes'])} of {size_text(store['limit_bytes'])} in {store['folder']}")
