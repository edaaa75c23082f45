"""Latency of models on a target, measured in turn: raw samples first, percentiles late."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cswap_deploy import progress
from cswap_deploy.artifacts import File, FileLatency, LatencyReport
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DataError, DeviceError
from cswap_deploy.recipe import LatencySettings
from cswap_deploy.samples import Samples
from cswap_deploy.stage import stage

COMPARED = ("fp32", "fp16", "int8", "int8-arm")
"""Files whose speed is compared on the target; what TensorRT's file is worth, an engine of it shows."""
LOAD_S, WAIT_S = 900.0, 120.0
"""Time for loading the models; time that another measurement on the target may still take."""


@dataclass(frozen=True)
class Measurement:
    """Samples of models 0, 1, ... and what the agent says about the circumstances."""

    samples: Samples
    document: dict[str, Any]

    @property
    def runtime(self) -> str:
        return str(self.document["models"][0]["runtime"])

    @property
    def peak_memory_mb(self) -> tuple[float, ...]:
        """Of the host's memory; what an engine takes on the GPU is not seen there, so nothing is said about engines."""
        by_onnxruntime = self.runtime.startswith("onnxruntime")
        return tuple(self.document["memory"]["peak_mb"]) if by_onnxruntime else ()

    @property
    def conditions(self) -> dict[str, Any]:
        """What a reader must know to compare the figures: the machine, its clocks, its load before and after."""
        before, after = self.document["before"], self.document["after"]
        cpu, board = after["cpu"], after["board"] or {}
        return {
            "device": board.get("model") or cpu["model"],
            "cpu": cpu["model"],
            "cores": cpu["cores"],
            "governor": cpu["governor"],
            "mhz": [before["cpu"]["mhz"], cpu["mhz"]],
            "max_mhz": cpu["max_mhz"],
            "power_mode": board.get("power_mode"),
            "gpu_clocks_locked": board.get("gpu_clocks_locked"),
            "l4t": board.get("l4t"),
            "load": [before["load"][0], after["load"][0]],
            "temperature_c": [before["temperature_c"], after["temperature_c"]],
            "system": f"{after['system']} {after['machine']}",
            "python": after["python"],
        }


@stage("latency", returns=LatencyReport, libraries=("numpy",))
def measure(
    out: Path, dense: File, shipped: File, settings: LatencySettings, facts: Mapping[str, str], target: Target
) -> LatencyReport:
    """The dense model and the one that ships, in turn, on `target`, which `facts` describe. Errors: DeviceError."""
    names = ("the dense model", "the shipped model")
    taken = take(target, (dense, shipped), settings, names=names)
    taken.samples.save(out / "samples.npz")
    layers = None
    if found := _layers(target, (dense, shipped), settings, names):
        (out / "layers.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        layers = File.of(out / "layers.json")
    return LatencyReport(
        File.of(out / "samples.npz"),
        taken.runtime,
        taken.peak_memory_mb,
        taken.document["overhead"],
        taken.conditions,
        layers,
    )


@stage("latency", returns=FileLatency, libraries=("numpy",))
def compare_files(
    out: Path, files: Mapping[str, File], settings: LatencySettings, facts: Mapping[str, str], target: Target
) -> FileLatency:
    """The bundle's ONNX files in turn on `target`, which `facts` describe: is one of fewer bits faster there?"""
    taken = take(target, tuple(files.values()), settings, names=tuple(files))
    taken.samples.save(out / "samples.npz")
    return FileLatency(tuple(files), File.of(out / "samples.npz"))


def _layers(
    target: Target, models: Sequence[File], settings: LatencySettings, names: tuple[str, ...]
) -> dict[str, Any] | None:
    """Where the time of both models goes. The samples count without it, so a target that cannot tell is warned of only."""
    try:
        found = [
            target.ask(
                "layers",
                LOAD_S + WAIT_S,
                runtime=settings.runtime,
                model=model,
                batch=settings.batch,
                threads=settings.threads,
                wait_s=WAIT_S,
            )["layers"]
            for model in target.put(*models, names=names)
        ]
    except DeviceError as error:
        progress.warn(f"layers were not timed: {error}")
        return None
    return dict(zip(("source", "pruned"), found, strict=True))


def take(
    target: Target,
    models: Sequence[File],
    settings: LatencySettings,
    names: tuple[str, ...] = (),
    trust: Sequence[str] = (),
) -> Measurement:
    """Run models in turn. `trust`: digests of engines that were not built on the target. Errors: DeviceError."""
    sampling = len(models) * (settings.warmup_s + 3 * settings.duration_s + 2)
    document = target.ask(
        "measure",
        LOAD_S + WAIT_S + sampling,
        runtime=settings.runtime,
        models=target.put(*models, names=names),
        batch=settings.batch,
        threads=settings.threads,
        warmup_s=settings.warmup_s,
        duration_s=settings.duration_s,
        wait_s=WAIT_S,
        trust=list(trust),
    )
    try:
        return Measurement(Samples.of(document["rounds"]), document)
    except DataError as error:
        raise DeviceError(f"{target.name}: {error.message}", "measure again") from error
