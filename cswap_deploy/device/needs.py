"""What a recipe needs of its target and does not find there, told before anything long starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cswap_deploy.device.target import NO_TENSORRT
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import Recipe

OPSETS = {(10, 0): 20, (10, 9): 22, (10, 13): 24}
"""From which TensorRT on → the highest ONNX opset that its parser reads (NVIDIA's support matrices); of 8.x it is
not known which of those that this tool writes it reads."""
DISK_MB = 512
"""Engine, timing cache and log beside the images; the agent itself leaves 256 MiB free."""
MEMORY_MB = 700
"""What TensorRT's builder takes beside its workspace, which on a Jetson is the same memory."""
NO_INT8 = ("5.3", "6.2")
"""Compute capabilities without fast int8: the first Nano and TX2."""


@dataclass(frozen=True)
class Need:
    topic: str
    text: str
    fix: str
    public: str = ""
    """What a bundle says in place of `text`, where that has a library's own words, which name paths."""


def shortfalls(recipe: Recipe, probe: Mapping[str, Any], pixels_bytes: int = 0) -> Iterator[Need]:
    """`pixels_bytes`: the hold-out images as they are sent, where that is known. What a probe does not say is no shortfall."""
    tensorrt = probe.get("tensorrt") or {}
    if (
        recipe.latency
        and recipe.latency.runtime == "onnxruntime"
        and not (probe.get("onnxruntime") or {}).get("version")
    ):
        yield Need(
            "onnxruntime",
            "latency.runtime is onnxruntime, which the target does not have",
            "python3 -m pip install onnxruntime",
        )
    engine = recipe.engine
    if not engine:
        return
    if tensorrt.get("version") is None:
        reason = tensorrt.get("reason") or "it is not there"
        fix = "sudo apt install python3-libnvinfer libnvinfer-bin"
        yield Need("tensorrt", f"an engine needs TensorRT: {reason}", fix, NO_TENSORRT)
        return
    if not tensorrt.get("module"):
        text = "the engine's accuracy needs TensorRT's Python module; trtexec alone builds and measures"
        yield Need("tensorrt module", text, "sudo apt install python3-libnvinfer")
    yield from _dla(engine.dla_core, tensorrt)
    yield from _opset(recipe.onnx.opset, str(tensorrt["version"]))
    if engine.precision == "int8" and tensorrt.get("compute_capability") in NO_INT8:
        text = f"engine.precision is int8, for which this GPU ({tensorrt['compute_capability']}) has no instructions"
        yield Need("int8", text, "set engine.precision: fp16")
    yield from _room(engine.workspace_mib, probe, pixels_bytes)


def require(recipe: Recipe, probe: Mapping[str, Any], name: str) -> None:
    """Errors: DeviceError with all that is lacking."""
    lacking = list(shortfalls(recipe, probe))
    if lacking:
        text = "; ".join(f"{need.text} ({need.fix})" for need in lacking)
        raise DeviceError(
            f"{name}: {text}",
            f"cswap-deploy doctor RECIPE --on {name} says more",
            public=lacking[0].public or lacking[0].text,
        )


def _dla(core: int | None, tensorrt: Mapping[str, Any]) -> Iterator[Need]:
    cores = tensorrt.get("dla_cores")
    if core is not None and cores is not None and core >= cores:
        has = f"the target has {cores}" if cores else "the target has none (Orin Nano and Thor have no DLA)"
        yield Need("dla", f"engine.dla_core is {core}, {has}", "remove engine.dla_core, or take an Orin NX or AGX Orin")


def _opset(opset: int, version: str) -> Iterator[Need]:
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else None
    known = [most for first, most in OPSETS.items() if release and first <= release]
    if known and opset > max(known):
        text = f"onnx.opset is {opset}, TensorRT {version} reads up to {max(known)}"
        yield Need("opset", text, f"set onnx.opset: {max(known)}, or update JetPack")


def _room(workspace_mib: int, probe: Mapping[str, Any], pixels_bytes: int) -> Iterator[Need]:
    disk, memory = probe.get("disk_free_mb"), probe.get("memory_free_mb")
    wanted = DISK_MB + (pixels_bytes >> 20)
    if disk is not None and disk < wanted:
        yield Need(
            "disk", f"{disk:.0f} MiB are free, engine and hold-out images need about {wanted}", "free some: df -h ~"
        )
    if memory and memory < workspace_mib + MEMORY_MB:
        text = f"{memory:.0f} MiB of memory are free, the build takes up to {workspace_mib} of workspace and {MEMORY_MB} more"
        fix = "set engine.workspace_mib lower, or stop the desktop: sudo systemctl isolate multi-user.target"
        yield Need("memory", text, fix)
