"""Latency of models on a target, measured in turn: raw samples first, percentiles late."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cswap_deploy import progress
from cswap_deploy.artifacts import File, FileLatency, Groups, LatencyReport
from cswap_deploy.budget.narrow import Template, require_runnable
from cswap_deploy.budget.sizes import Sizes
from cswap_deploy.budget.values import Unbuilt, WidthTimings
from cswap_deploy.device import conditions, exports, trtexec
from cswap_deploy.device.building import Order, refused
from cswap_deploy.device.layers import joined, nodes_of
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DataError, DeviceError
from cswap_deploy.recipe import LatencySettings
from cswap_deploy.samples import Samples
from cswap_deploy.stage import stage

COMPARED = ("fp32", "fp16", "int8", "int8-arm")
"""Files whose speed is compared on the target; what TensorRT's file is worth, an engine of it shows."""
LOAD_S, WAIT_S = 900.0, 120.0
"""Time for loading the models; time that another measurement on the target may still take."""
BLOCK_S, ROUND_S = 0.05, 0.2
"""A model's turn, and what a round of many models records: what slows the machine down for half a second then slows all of a round."""
COLD, LONGEST_PAUSE_S = 10, 0.1
"""Single inferences after pauses, as a camera of ten pictures a second calls; in short measurements the pauses are shorter."""


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
        return conditions.describe(self.document)

    @property
    def on_gpu(self) -> Samples | None:
        """Engines only: between two events on the GPU."""
        rounds = self.document.get("gpu_rounds")
        return Samples.of(rounds) if rounds else None

    @property
    def cold_ms(self) -> tuple[float, ...]:
        """Per model, the median of single inferences after pauses."""
        cold = [times for times in self.document.get("cold", ()) if times]
        return tuple(median(times) / 1e6 for times in cold)


@stage("latency", returns=LatencyReport, libraries=("numpy",))
def measure(
    out: Path,
    dense: File,
    shipped: File,
    graphs: tuple[File, File],
    groups: Groups,
    settings: LatencySettings,
    facts: Mapping[str, str],
    target: Target,
) -> LatencyReport:
    """The dense model and the one that ships, in turn, on `target`, which `facts` describe. Errors: DeviceError.

    `graphs`: their ONNX files, which are the models themselves or what the engines were built from.
    """
    names = ("the dense model", "the model that ships")
    taken = take(target, (dense, shipped), settings, names=names)
    taken.samples.save(out / "samples.npz")
    on_gpu = None
    if taken.on_gpu:
        taken.on_gpu.save(out / "gpu.npz")
        on_gpu = File.of(out / "gpu.npz")
    layers = None
    if found := _layers(target, (dense, shipped), settings, names, graphs, groups):
        (out / "layers.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        layers = File.of(out / "layers.json")
    return LatencyReport(
        File.of(out / "samples.npz"),
        taken.runtime,
        taken.peak_memory_mb,
        taken.document["overhead"],
        dict(facts),
        taken.conditions,
        layers,
        on_gpu,
        taken.cold_ms,
        conditions.energy_mj(taken.document),
        tuple(taken.document["models"]),
        settings.duration_s,
    )


@stage("staircase", returns=WidthTimings, libraries=("numpy", "onnx"))
def of_widths(
    out: Path,
    dense: File,
    groups: Groups,
    sizes: Sizes,
    settings: tuple[dict[str, int], ...],
    timing: LatencySettings,
    facts: Mapping[str, str],
    target: Target,
) -> WidthTimings:
    """Made from the dense network (`budget.narrow`): the same with shared weights, and narrower ones, all in turn.

    `sizes`: how they differ. A setting: the units of the groups that are not whole. What is made is not kept. The first
    narrower one is run here before any goes to the target. Errors: DeviceError, ExportError.
    """
    template = Template.read(dense.path, groups, sizes)
    with tempfile.TemporaryDirectory() as folder:
        shared = template.shared(Path(folder))
        files = [
            _written(template.narrowed(widths, shared), Path(folder) / f"{n}.onnx")
            for n, widths in enumerate(({}, *settings))
        ]
        for narrow in files[1:2]:
            require_runnable(narrow.path)
        target.put(shared.file)
        names = tuple(f"the model with other weights or widths ({n})" for n in range(len(files)))
        taken = take(target, files, timing, names=names, thorough=False)
    taken.samples.save(out / "samples.npz")
    return WidthTimings(File.of(out / "samples.npz"), settings, taken.runtime, taken.conditions)


@stage("staircase", returns=WidthTimings, libraries=("numpy", "onnx"))
def of_engines(
    out: Path,
    graph: File,
    groups: Groups,
    sizes: Sizes,
    settings: tuple[dict[str, int], ...],
    order: Order,
    timing: LatencySettings,
    facts: Mapping[str, str],
    target: Target,
) -> WidthTimings:
    """As `of_widths`, of engines that are built on the target: of the dense network with shared weights, and of each setting.

    `graph`: what the dense engine was built from. A setting of which TensorRT makes no engine is left out, and said. Errors: DeviceError
    where the twin cannot be built or the target fails otherwise.
    """
    template = Template.read(graph.path, groups, sizes)
    engines, seconds = list[dict[str, str]](), list[float]()
    measured, unbuilt = list[dict[str, int]](), list[Unbuilt]()
    with tempfile.TemporaryDirectory() as folder:
        shared = template.shared(Path(folder))
        for number, widths in enumerate(({}, *settings)):
            progress.advance("engines built", number, 1 + len(settings))
            model = _written(template.narrowed(widths, shared), Path(folder) / f"{number}.onnx")
            if number == 1:
                require_runnable(model.path)
            try:
                weights, named = target.put(shared.file, model)
                answer, _ = order.build(target, named, weights)
            except DeviceError as error:
                if not (widths and refused(error)):
                    raise
                progress.warn(f"an engine with narrower groups could not be built and is left out: {error.message}")
                unbuilt.append(Unbuilt(widths, error.public))
                continue
            engines.append({"sha256": answer["engine"]["sha256"], "name": f"an engine of other widths ({number})"})
            seconds += [] if answer.get("reused") else [answer["seconds"]]
            measured += [widths] if number else []
    taken = take_named(target, engines, timing, thorough=False)
    taken.samples.save(out / "samples.npz")
    return WidthTimings(
        File.of(out / "samples.npz"), tuple(measured), taken.runtime, taken.conditions, tuple(unbuilt), tuple(seconds)
    )


def _written(content: bytes, path: Path) -> File:
    path.write_bytes(content)
    return File.of(path)


@stage("latency", returns=FileLatency, libraries=("numpy",))
def compare_files(
    out: Path, files: Mapping[str, File], settings: LatencySettings, facts: Mapping[str, str], target: Target
) -> FileLatency:
    """The bundle's ONNX files in turn on `target`, which `facts` describe: is one of fewer bits faster there?"""
    return _files(out, take(target, tuple(files.values()), settings, names=tuple(files)), tuple(files))


@stage("staircase", returns=FileLatency, libraries=("numpy",))
def alone(out: Path, model: File, settings: LatencySettings, facts: Mapping[str, str], target: Target) -> FileLatency:
    """One model, a file or an engine that was built there, on `target`, which `facts` describe. Errors: DeviceError."""
    return _files(out, take(target, (model,), settings, names=("the dense model",), thorough=False), ("dense",))


def _files(out: Path, taken: Measurement, names: tuple[str, ...]) -> FileLatency:
    taken.samples.save(out / "samples.npz")
    return FileLatency(names, File.of(out / "samples.npz"))


def _layers(
    target: Target,
    models: Sequence[File],
    settings: LatencySettings,
    names: tuple[str, ...],
    graphs: Sequence[File],
    groups: Groups,
) -> dict[str, Any] | None:
    """Where the time of both models goes. The samples count without it, so a target that cannot tell is warned of only."""
    try:
        found = [
            target.ask("layers", LOAD_S + WAIT_S, model=model, **order_of_layers(settings))
            for model in target.put(*models, names=names)
        ]
        if settings.runtime == "tensorrt":
            rows = [joined(each, nodes_of(graph.path), groups) for each, graph in zip(found, graphs, strict=True)]
        else:
            rows = [each["layers"] for each in found]
    except DeviceError as error:
        progress.warn(f"layers were not timed: {error}")
        return None
    return dict(zip(("source", "pruned"), rows, strict=True))


def take(
    target: Target,
    models: Sequence[File],
    settings: LatencySettings,
    names: tuple[str, ...] = (),
    trust: Sequence[str] = (),
    thorough: bool = True,
) -> Measurement:
    """Run models in turn. `trust`: digests of engines that were not built on the target. Errors: DeviceError.

    `thorough`: also what each takes in memory, when it is called now and then, and in energy.
    """
    return take_named(target, target.put(*models, names=names), settings, trust, thorough)


def take_named(
    target: Target,
    models: Sequence[Mapping[str, str]],
    settings: LatencySettings,
    trust: Sequence[str] = (),
    thorough: bool = True,
) -> Measurement:
    """The same of models that are on the target, as a request names them."""
    sampling = len(models) * (settings.warmup_s + 3 * settings.duration_s + 2 + conditions.LEAST_ENERGY_S)
    document, log = target.ask_with_log(
        "measure",
        LOAD_S + WAIT_S + sampling,
        models=[dict(model) for model in models],
        trust=list(trust),
        **order(settings, len(models), thorough),
    )
    if "times" in document:
        document |= _by_trtexec(document["times"], log)
    try:
        return Measurement(Samples.of(document["rounds"]), document)
    except DataError as error:
        raise DeviceError(f"{target.name}: {error.message}", "measure again") from error


def order(settings: LatencySettings, models: int, thorough: bool = True) -> dict[str, Any]:
    """What the agent's `measure` is told beside so many models."""
    long_enough = thorough and settings.duration_s >= conditions.LEAST_ENERGY_S / 2
    return {
        **order_of_layers(settings),
        "warmup_s": settings.warmup_s,
        "block_s": min(BLOCK_S, ROUND_S / models),
        "duration_s": settings.duration_s,
        "cold": COLD if thorough else 0,
        "pause_s": min(LONGEST_PAUSE_S, settings.duration_s / 50),
        "energy_s": conditions.LEAST_ENERGY_S + 0.5 if long_enough else 0,
        "memory": thorough,
    }


def order_of_layers(settings: LatencySettings) -> dict[str, Any]:
    return {
        "runtime": settings.runtime,
        "batch": settings.batch,
        "threads": settings.threads,
        "wait_s": WAIT_S,
    }


def _by_trtexec(times: Sequence[Sequence[str]], log: str) -> dict[str, Any]:
    """Rounds and runtime from what trtexec exported and printed. Errors: DeviceError when a run failed or the two contradict."""
    found = [[exports.times(text).latency_ms for text in texts] for texts in times]
    runs = [run for run in trtexec.require_passed(log) if run.queries is not None]
    counted = sorted(len(ms) for texts in found for ms in texts)
    if counted != sorted(run.queries or 0 for run in runs):
        raise DeviceError("trtexec's exported times are not as many as its log counts", "measure again")
    rounds = [[[round(1e6 * ms) for ms in texts] for texts in blocks] for blocks in found]
    return {"rounds": rounds, "models": [{"runtime": f"tensorrt {runs[0].version} by trtexec"} for _ in rounds[0]]}
