"""Artefacts → the facts of manifest.json, under the names that users rely on (`manifest.schema`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from cswap_deploy import details
from cswap_deploy.artifacts import (
    AccuracyReport,
    Engine,
    Evaluation,
    Groups,
    GroupScores,
    InputSpec,
    LatencyReport,
    Network,
    OnnxModel,
    PruningPlan,
)
from cswap_deploy.device import conditions
from cswap_deploy.intervals import Gate, discordant, gate, paired_drop, wilson
from cswap_deploy.manifest import SCORED, VERDICTS
from cswap_deploy.prepared import Reason
from cswap_deploy.recipe import AccuracySettings, EngineSettings, LatencySettings, without_folder
from cswap_deploy.samples import Samples
from cswap_deploy.wording import level

GATE_FAILED = 7
"""Exit code of a build whose accuracy gate failed."""
WORST_CLASSES = 5


def model_block(source: Network) -> dict[str, Any]:
    return {
        "name": without_folder(source.architecture.name),
        "source": source.architecture.source,
        "kwargs": without_folder(source.architecture.kwargs),
        "params": source.params,
        "macs": source.macs,
        "license": source.license,
        "outputs": source.outputs,
        "input": input_block(source.input),
    }


def input_block(spec: InputSpec) -> dict[str, Any]:
    block = asdict(spec)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in block.items()}


def pruned_block(
    pruned: Network, plan: PruningPlan, groups: Groups, criterion: str, compensation: str, allocation: str
) -> dict[str, Any]:
    """What is left of the network, by group, by layer and by step."""
    units = {group.name: group.units for group in groups.groups}
    keep = {name: plan.keep.get(name, tuple(range(size))) for name, size in units.items()}
    dense = plan.dense_scores
    scores = {item.group: item for item in dense.groups} if dense else {}
    return {
        "params": pruned.params,
        "macs": pruned.macs,
        "units": sum(units.values()),
        "units_removed": sum(units.values()) - sum(map(len, keep.values())),
        "criterion": criterion,
        "compensation": compensation,
        "allocation": allocation,
        "steps": len(plan.steps),
        "scores": {name: getattr(dense, name) for name in SCORED} if dense else None,
        "groups": [
            {"name": name, "units": size, "kept": len(keep[name]), **_judged(scores.get(name), keep[name])}
            for name, size in units.items()
        ],
        "layers": details.layers(groups, plan),
        "trace": details.trace(plan),
    }


def _judged(scores: GroupScores | None, kept: Collection[int]) -> dict[str, Any]:
    """What a group's scores on the dense network say of all of its units (`dense`) and of those that `left`."""
    if scores is None or not scores.verdict:
        return {"dense": None, "left": None}
    return {"dense": _verdicts(scores), "left": _verdicts(scores.of(set(scores.units) - set(kept)))}


def _verdicts(scores: GroupScores) -> dict[str, Any]:
    """How many units have each verdict, and the range and quantiles of their effects (null where there is no unit)."""
    counts: dict[str, Any] = {verdict: scores.verdict.count(verdict) for verdict in VERDICTS}
    bounds = [min(scores.effect), max(scores.effect)] if scores.effect else None
    return {**counts, "effect": bounds, "quantiles": details.quantiles(scores.effect)}


def gate_of(report: AccuracyReport, shipped: Evaluation, settings: AccuracySettings) -> Gate:
    """What ships against the dense network."""
    lost, won = discordant(report.labels, report.source.predicted, shipped.predicted)
    return gate(lost, won, len(report.labels), settings.max_drop, settings.rule, settings.confidence)


def accuracy_block(
    report: AccuracyReport,
    engine: Evaluation | None,
    shipped: Evaluation,
    verdict: Gate,
    labels: tuple[str, ...],
    holdout_reads: int,
) -> dict[str, Any]:
    """Fractions in 0..1, percentage points under `_pp`; the drop is dense minus shipped, its interval Tango's score interval."""
    images = len(report.labels)
    lost, won = discordant(report.labels, report.source.predicted, shipped.predicted)
    low, high = paired_drop(lost, won, images)
    same = sum(a == b for a, b in zip(report.source.predicted, shipped.predicted, strict=True))
    return {
        "images": images,
        "source": _outcome(report, report.source),
        "pruned": _outcome(report, report.pruned),
        "exported": _outcome(report, report.models["fp32"]),
        "variants": {name: _outcome(report, found) for name, found in report.models.items() if name != "fp32"},
        "engine": _outcome(report, engine) if engine else None,
        "shipped": _outcome(report, shipped),
        "drop_pp": 100 * (lost - won) / images,
        "drop_ci95_pp": [100 * low, 100 * high],
        "drop_interval": "Tango 1998, score interval of paired proportions",
        "only_dense_right": lost,
        "only_shipped_right": won,
        "agreement": same / images,
        "worst_classes": _worst_classes(report, shipped, labels),
        "gate": asdict(verdict),
        "holdout_reads": holdout_reads,
    }


def size_block(source: Network, pruned: Network, dense: OnnxModel | None, shipped_bytes: int) -> dict[str, Any]:
    """Of the file that ships and of its dense twin (null where none was made), and of both networks' float32 weights."""
    return {
        "source_bytes": model_bytes(dense) if dense else None,
        "shipped_bytes": shipped_bytes,
        "source_weights_bytes": source.weights.bytes,
        "pruned_weights_bytes": pruned.weights.bytes,
    }


def model_bytes(model: OnnxModel) -> int:
    """With the weights that a model beyond 2 GB keeps beside its graph; a list of operators is no part of it."""
    return model.graph.bytes + sum(file.bytes for file in model.beside if file.path.suffix == ".data")


def latency_block(report: LatencyReport, settings: LatencySettings, precision: str, remote: bool) -> dict[str, Any]:
    """Milliseconds of one inference of a whole batch; `speedup`: how many times faster the shipped model is."""
    samples = Samples.load(report.samples.path)
    faster = samples.speedup(1, against=0)
    faults = [f"{name}: {text}" for model, name in enumerate(("dense", "ships")) for text in samples.faults(model)]
    faults += conditions.faults(report.conditions, settings.runtime)
    memory = report.peak_memory_mb or (None, None)
    return {
        "target": "ssh" if remote else "local",
        "runtime": settings.runtime,
        "runtime_version": report.runtime.partition(" ")[2],
        "precision": precision,
        "batch": settings.batch,
        "threads": settings.threads,
        "warmup_s": settings.warmup_s,
        "duration_s": report.duration_s or settings.duration_s,
        "source": timing_block(samples, 0, memory[0]),
        "pruned": timing_block(samples, 1, memory[1]),
        "speedup": faster.value,
        "speedup_ci95": [faster.low, faster.high],
        "stable": not faults,
        "unstable_because": faults,
        "peak_memory_mb": memory[1],
        "overhead": report.overhead,
        "conditions": report.conditions,
        "distribution": details.distribution(samples),
        "course": details.course(samples),
        "layers": details.layer_times(report.layers),
        **details.engine_times(report),
    }


def timing_block(samples: Samples, model: int, peak_memory_mb: float | None) -> dict[str, Any]:
    """The p99's interval begins where the p50's does, or above: with few rounds it would reach further down than can be."""
    middle, tail = (samples.percentile_ci95_ms(model, p) for p in (50, 99))
    return {
        **{f"p{p}_ms": samples.percentile_ms(model, p) for p in (50, 90, 99)},
        "p50_ci95_ms": list(middle),
        "p99_ci95_ms": [max(middle[0], tail[0]), tail[1]],
        "samples": samples.count(model),
        "rounds": len(samples.rounds),
        "peak_memory_mb": peak_memory_mb,
    }


def engine_block(engine: Engine | None, settings: EngineSettings, reason: str, dynamic: bool) -> dict[str, Any]:
    """`reason`: why there is none. `dynamic`: its batch is open, within that of the settings."""
    return {
        "built": engine is not None,
        "reason": reason,
        "precision": settings.precision,
        "tensorrt": engine.tensorrt if engine else None,
        "gpu": engine.gpu if engine else None,
        "bytes": engine.file.bytes if engine else None,
        "sha256": engine.file.sha256 if engine else None,
        "build_seconds": engine.seconds if engine else None,
        "note": engine.note if engine else "",
        "compute_capability": engine.compute_capability if engine else None,
        "board": engine.board if engine else None,
        "power_mode": engine.power_mode if engine else None,
        "dla_core": settings.dla_core,
        "batch": settings.batch.model_dump(),
        "open_batch": dynamic,
        "layers_beside_the_dla": len(engine.gpu_layers) if engine else 0,
    }


def gate_reasons(report: AccuracyReport, shipped: Evaluation, verdict: Gate) -> list[Reason]:
    """Why the gate is not passed; empty when it is, or when there is none."""
    if verdict.verdict != "fail":
        return []
    lost, won = discordant(report.labels, report.source.predicted, shipped.predicted)
    drop, images = 100 * (lost - won) / len(report.labels), len(report.labels)
    what = "the drop" if verdict.rule == "point" else f"the upper bound at {level(verdict.confidence)} of the drop"
    text = f"{what} exceeds {verdict.max_drop_pp:g} points (observed {drop:+.2f} points on {images} images)"
    return [Reason(GATE_FAILED, f"accuracy: {text}")]


def _outcome(report: AccuracyReport, outcome: Evaluation) -> dict[str, Any]:
    hits = sum(a == y for a, y in zip(outcome.predicted, report.labels, strict=True))
    low, high = wilson(hits, len(report.labels))
    return {
        "top1": hits / len(report.labels),
        "top1_ci95": [low, high],
        "top5": sum(outcome.in_top5) / len(report.labels),
        "correct": hits,
    }


def _worst_classes(report: AccuracyReport, shipped: Evaluation, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Classes that lost most top-1 from dense to shipped; ties by the order of the outputs."""
    rows = list(zip(report.labels, report.source.predicted, shipped.predicted, strict=True))
    images = Counter(y for y, _, _ in rows)
    lost = Counter(y for y, a, _ in rows if a == y)
    lost.subtract(y for y, _, b in rows if b == y)
    order = sorted(images, key=lambda y: (-lost[y] / images[y], y))[:WORST_CLASSES]
    return [{"label": labels[y], "drop_pp": 100 * lost[y] / images[y], "images": images[y]} for y in order]
