"""Artefacts → the manifest's `onnx` block: the files, what is wrong with each, and where each runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cswap_deploy import runtimes
from cswap_deploy.artifacts import AccuracyReport, Evaluation, FileLatency, OnnxModel
from cswap_deploy.intervals import Gate, discordant, gate, paired_drop
from cswap_deploy.samples import Samples


def onnx_block(
    exported: OnnxModel,
    models: Mapping[str, OnnxModel],
    names: Mapping[str, str],
    report: AccuracyReport,
    asked: Gate,
    wishes: Sequence[str],
    measured: FileLatency | None,
) -> dict[str, Any]:
    """`names`: the bundle's file of each model; `asked`: the gate, which each file is held to on its own."""
    simplified = models["fp32"]
    speeds = _speeds(measured) if measured else {}
    variants = {}
    for name, model in models.items():
        if name != "fp32":
            speed = speeds.get(name)
            marks = [*_marks(name, model, report, asked, speed)]
            outcome = variant_outcome(report, report.models[name], asked)
            variants[name] = {
                **_file(names[name], model, wishes),
                "accuracy": outcome,
                "latency": speed,
                "marks": marks,
            }
    whole = _file(names["fp32"], simplified, wishes)
    return {
        **{key: whole[key] for key in ("opset", "parity", "note", "runs_on", "coverage", "beside")},
        "ir_version": simplified.ir_version,
        "nodes_exported": exported.nodes,
        "nodes_simplified": simplified.nodes,
        "latency": speeds.get("fp32"),
        "runtimes": list(wishes),
        "variants": variants,
    }


def _file(name: str, model: OnnxModel, wishes: Sequence[str]) -> dict[str, Any]:
    ort = name.endswith(".ort")
    return {
        "file": name,
        "bytes": model.graph.bytes,
        "beside": [file.path.name for file in model.beside],
        "opset": model.opset,
        "parity": asdict(model.parity),
        "nodes": model.nodes,
        "note": model.note,
        "quantised": _plain(asdict(model.quantised)) if model.quantised else None,
        "coverage": [_plain(asdict(each)) for each in model.coverage] if not ort else [],
        "runs_on": [_runs_on(wish, model, ort) for wish in wishes],
    }


def _runs_on(wish: str, model: OnnxModel, ort: bool) -> dict[str, Any]:
    faults = [*runtimes.misfits(wish, model.opset, model.ir_version, model.operators, model.unsigned)]
    if ort and runtimes.Runtime.of(wish).name == "tensorrt":
        faults = ["does not read ORT format"]
    return {"runtime": wish, "runs": not faults, "why_not": "; ".join(faults)}


def _plain(block: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in block.items()}


def _marks(
    name: str, model: OnnxModel, report: AccuracyReport, asked: Gate, speed: Mapping[str, Any] | None
) -> Iterator[str]:
    """What speaks against a file; empty for one without a fault."""
    judged = variant_gate(report, report.models[name], asked)
    if judged.verdict == "fail":
        lost, won = discordant(report.labels, report.source.predicted, report.models[name].predicted)
        yield f"misses the accuracy gate: top-1 drop {100 * (lost - won) / len(report.labels):+.2f} points"
    if model.quantised and not model.quantised.met:
        made = model.quantised
        yield (
            f"misses int8.max_drop: {made.drop_pp:+.2f} points on {made.images} selection images, "
            f"the best of {made.tried} that were tried"
        )
    if speed and speed["speedup_ci95"][1] < 1:
        low, high = speed["speedup_ci95"]
        yield f"slower than model.onnx on the target: {speed['speedup']:.2f} ({low:.2f} to {high:.2f}) times as fast"


def variant_gate(report: AccuracyReport, found: Evaluation, asked: Gate) -> Gate:
    """The recipe's gate on one file, against the dense network."""
    lost, won = discordant(report.labels, report.source.predicted, found.predicted)
    return gate(lost, won, len(report.labels), asked.max_drop_pp, asked.rule, asked.confidence)


def variant_outcome(report: AccuracyReport, found: Evaluation, asked: Gate) -> dict[str, Any]:
    """The drop is dense minus this file; `agreement` is with the float32 file's top-1."""
    images = len(report.labels)
    lost, won = discordant(report.labels, report.source.predicted, found.predicted)
    low, high = paired_drop(lost, won, images)
    whole = report.models["fp32"].predicted
    same = sum(a == b for a, b in zip(whole, found.predicted, strict=True))
    right = [sum(a == y for a, y in zip(p, report.labels, strict=True)) for p in (whole, found.predicted)]
    return {
        "drop_pp": 100 * (lost - won) / images,
        "drop_ci95_pp": [100 * low, 100 * high],
        "drop_from_fp32_pp": 100 * (right[0] - right[1]) / images,
        "agreement": same / images,
        "agreeing": same,
        "gate": variant_gate(report, found, asked).verdict,
    }


def _speeds(measured: FileLatency) -> dict[str, dict[str, Any]]:
    """Per file; the ratio is to the float32 file of the same run."""
    samples, found = Samples.load(measured.samples.path), {}
    for number, name in enumerate(measured.names):
        ratio = samples.speedup(number, against=0)
        found[name] = {
            "p50_ms": samples.percentile_ms(number, 50),
            "p50_ci95_ms": list(samples.percentile_ci95_ms(number, 50)),
            "samples": samples.count(number),
            "speedup": ratio.value if number else 1.0,
            "speedup_ci95": [ratio.low, ratio.high] if number else [1.0, 1.0],
        }
    return found
