"""Artefacts → the facts of manifest.json: what show, verify and the report read, under the names that users rely on."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from cswap_deploy.artifacts import AccuracyReport, Evaluation, InputSpec, Network, OnnxModel, PruningPlan
from cswap_deploy.intervals import discordant, paired_drop, wilson

SCHEMA = "cswap-deploy/manifest/1"
WORST_CLASSES = 5


def model_block(source: Network) -> dict[str, Any]:
    return {
        "name": source.architecture.name,
        "source": source.architecture.source,
        "kwargs": source.architecture.kwargs,
        "params": source.params,
        "macs": source.macs,
        "license": source.license,
        "input": input_block(source.input),
    }


def input_block(spec: InputSpec) -> dict[str, Any]:
    block = asdict(spec)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in block.items()}


def pruned_block(
    pruned: Network, plan: PruningPlan, units: dict[str, int], criterion: str, compensation: str
) -> dict[str, Any]:
    """`units`: dense number of units of each group."""
    kept = {name: len(plan.keep.get(name, range(size))) for name, size in units.items()}
    return {
        "params": pruned.params,
        "macs": pruned.macs,
        "units": sum(units.values()),
        "units_removed": sum(units.values()) - sum(kept.values()),
        "criterion": criterion,
        "compensation": compensation,
        "steps": len(plan.steps),
        "groups": [{"name": name, "units": size, "kept": kept[name]} for name, size in units.items()],
    }


def accuracy_block(report: AccuracyReport, labels: tuple[str, ...], holdout_reads: int) -> dict[str, Any]:
    """Fractions in 0..1, percentage points under `_pp`; the drop is dense minus shipped, its interval Tango's score interval."""
    images = len(report.labels)
    lost, won = discordant(report.labels, report.source.predicted, report.exported.predicted)
    low, high = paired_drop(lost, won, images)
    same = sum(a == b for a, b in zip(report.source.predicted, report.exported.predicted, strict=True))
    return {
        "images": images,
        "source": _outcome(report, report.source),
        "pruned": _outcome(report, report.pruned),
        "exported": _outcome(report, report.exported),
        "variants": {},
        "engine": None,
        "shipped": _outcome(report, report.exported),
        "drop_pp": 100 * (lost - won) / images,
        "drop_ci95_pp": [100 * low, 100 * high],
        "drop_interval": "Tango 1998, score interval of paired proportions",
        "only_dense_right": lost,
        "only_shipped_right": won,
        "agreement": same / images,
        "worst_classes": _worst_classes(report, labels),
        "gate": asdict(report.gate),
        "holdout_reads": holdout_reads,
    }


def onnx_block(exported: OnnxModel, shipped: OnnxModel) -> dict[str, Any]:
    return {
        "opset": shipped.opset,
        "ir_version": shipped.ir_version,
        "parity": asdict(shipped.parity),
        "nodes_exported": exported.nodes,
        "nodes_simplified": shipped.nodes,
        "note": shipped.note,
    }


def reasons(report: AccuracyReport) -> list[str]:
    """Why the verdict is not pass; empty when it is."""
    gate = report.gate
    if gate.verdict != "fail":
        return []
    lost, won = discordant(report.labels, report.source.predicted, report.exported.predicted)
    drop = 100 * (lost - won) / len(report.labels)
    what = "the drop" if gate.rule == "point" else f"the upper bound at {gate.confidence:.0%} of the drop"
    return [
        f"accuracy: {what} exceeds {gate.max_drop_pp:g} points (observed {drop:+.2f} points on {len(report.labels)} images)"
    ]


def _outcome(report: AccuracyReport, outcome: Evaluation) -> dict[str, Any]:
    hits = sum(a == y for a, y in zip(outcome.predicted, report.labels, strict=True))
    low, high = wilson(hits, len(report.labels))
    return {
        "top1": hits / len(report.labels),
        "top1_ci95": [low, high],
        "top5": sum(outcome.in_top5) / len(report.labels),
        "correct": hits,
    }


def _worst_classes(report: AccuracyReport, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Classes that lost most top-1 from dense to shipped; ties by the order of the outputs."""
    rows = list(zip(report.labels, report.source.predicted, report.exported.predicted, strict=True))
    images = Counter(y for y, _, _ in rows)
    lost = Counter(y for y, a, _ in rows if a == y)
    lost.subtract(y for y, _, b in rows if b == y)
    order = sorted(images, key=lambda y: (-lost[y] / images[y], y))[:WORST_CLASSES]
    return [{"label": labels[y], "drop_pp": 100 * lost[y] / images[y], "images": images[y]} for y in order]
