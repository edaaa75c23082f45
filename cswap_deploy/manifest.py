"""Artefacts → the facts of manifest.json: what show, verify and the report read, under the names that users rely on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any, get_args

from cswap_deploy import details
from cswap_deploy.artifacts import (
    AccuracyReport,
    Engine,
    Evaluation,
    Gate,
    Groups,
    GroupScores,
    InputSpec,
    LatencyReport,
    Network,
    OnnxModel,
    PruningPlan,
    Reason,
    Verdict,
)
from cswap_deploy.intervals import discordant, gate, paired_drop, wilson
from cswap_deploy.recipe import AccuracySettings, EngineSettings, LatencySettings
from cswap_deploy.samples import Samples

SCHEMA = "cswap-deploy/manifest/1"
GATE_FAILED = 7
"""Exit code of a build whose accuracy gate failed."""
WORST_CLASSES = 5
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SCORED = ("criterion", "estimator", "intervention", "images", "alpha")
"""How scores were found."""
SIZES = ("shipped_bytes", "source_weights_bytes", "pruned_weights_bytes")

Schema = dict[str, Any]
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
TEXT: Schema = {"type": "string"}
FRACTION: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def model_block(source: Network) -> dict[str, Any]:
    return {
        "name": source.architecture.name,
        "source": source.architecture.source,
        "kwargs": source.architecture.kwargs,
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
        "source_bytes": dense.graph.bytes if dense else None,
        "shipped_bytes": shipped_bytes,
        "source_weights_bytes": source.weights.bytes,
        "pruned_weights_bytes": pruned.weights.bytes,
    }


def latency_block(report: LatencyReport, settings: LatencySettings, precision: str, remote: bool) -> dict[str, Any]:
    """Milliseconds of one inference of a whole batch; `speedup`: how many times faster the shipped model is."""
    samples = Samples.load(report.samples.path)
    faster = samples.speedup(1, against=0)
    faults = [f"{name}: {text}" for model, name in enumerate(("dense", "shipped")) for text in samples.faults(model)]
    memory = report.peak_memory_mb or (None, None)
    return {
        "target": "ssh" if remote else "local",
        "runtime": settings.runtime,
        "runtime_version": report.runtime.partition(" ")[2],
        "precision": precision,
        "batch": settings.batch,
        "threads": settings.threads,
        "warmup_s": settings.warmup_s,
        "duration_s": settings.duration_s,
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


def engine_block(engine: Engine | None, settings: EngineSettings, reason: str) -> dict[str, Any]:
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
    }


def gate_reasons(report: AccuracyReport, shipped: Evaluation, verdict: Gate) -> list[Reason]:
    """Why the gate is not passed; empty when it is, or when there is none."""
    if verdict.verdict != "fail":
        return []
    lost, won = discordant(report.labels, report.source.predicted, shipped.predicted)
    drop, images = 100 * (lost - won) / len(report.labels), len(report.labels)
    what = "the drop" if verdict.rule == "point" else f"the upper bound at {verdict.confidence:.0%} of the drop"
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


# --- schema


def record(**properties: Schema) -> Schema:
    """An object that has all of these keys; it may have more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def listing(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def with_optional(schema: Schema, **properties: Schema) -> Schema:
    """The record, which may also have these keys."""
    return {**schema, "properties": {**schema["properties"], **properties}}


def scored_schema() -> Schema:
    """How scores were found: `estimator`, `intervention` and `alpha` are null unless the criterion is causal."""
    return record(
        criterion=TEXT,
        estimator=nullable(TEXT),
        intervention=nullable(TEXT),
        images={"type": "integer", "minimum": 0},
        alpha=nullable(FRACTION),
    )


def schema() -> Schema:
    """manifest.json: fractions in 0..1, milliseconds, percentage points where a key ends in `_pp`.

    `sha256` is of the rest as JSON with sorted keys and without spaces: whether a value was changed or damaged since.
    """
    network_input = record(
        shape={"type": "array", "items": INTEGER, "minItems": 3, "maxItems": 3},
        mean={"type": "array", "items": NUMBER},
        std={"type": "array", "items": NUMBER},
        interpolation=TEXT,
        crop_pct=NUMBER,
    )
    manifest = record(
        schema={"const": SCHEMA},
        name=TEXT,
        created={"type": "string", "format": "date-time"},
        tool=record(version=TEXT),
        recipe_sha256=TEXT,
        shipped=TEXT,
        verdict={"enum": ["pass", "fail"]},
        reasons={"type": "array", "items": TEXT},
        exit_code={"type": "integer", "minimum": 0, "maximum": 8},
        model=record(
            name=TEXT,
            source={"enum": ["timm", "factory"]},
            kwargs={"type": "object"},
            params=POSITIVE,
            macs=POSITIVE,
            input=network_input,
        ),
        pruned=_pruned(),
        accuracy=_accuracy(),
        onnx=_onnx(),
        latency=nullable(_latency()),
        budget=nullable({"type": "object"}),
        engine=nullable(_engine()),
        files={"type": "array", "items": record(path=TEXT, sha256=TEXT, bytes=INTEGER)},
        environment={"type": "object", "additionalProperties": TEXT},
    )
    size = record(source_bytes=nullable(POSITIVE), **dict.fromkeys(SIZES, POSITIVE))
    return with_optional(manifest, size=size, sha256=TEXT)


def _pruned() -> Schema:
    """`dense` and `left` of a group are null unless the criterion is causal; effects in nats."""
    counts: dict[str, Schema] = {key: {"type": "integer", "minimum": 0} for key in VERDICTS}
    spread = nullable(numbers(len(details.QUANTILES)))
    judged = nullable(with_optional(record(**counts, effect=nullable(pair(NUMBER))), quantiles=spread))
    group = with_optional(record(name=TEXT, units=INTEGER, kept=INTEGER), dense=judged, left=judged)
    return with_optional(
        record(
            params=INTEGER,
            macs=INTEGER,
            units=INTEGER,
            units_removed=INTEGER,
            criterion=TEXT,
            compensation=TEXT,
            steps=INTEGER,
        ),
        allocation=TEXT,
        scores=nullable(scored_schema()),
        groups=listing(group),
        layers=listing(record(name=TEXT, params=INTEGER, params_kept=INTEGER, macs=POSITIVE, macs_kept=INTEGER)),
        trace=listing(record(params=NUMBER, macs=NUMBER, units_removed=INTEGER, drop_pp=NUMBER)),
    )


def _onnx() -> Schema:
    """What onnx_facts.py writes."""
    parity = record(max_abs=NUMBER, sqnr_db=NUMBER)
    speed = record(p50_ms=NUMBER, p50_ci95_ms=pair(NUMBER), samples=POSITIVE, speedup=NUMBER, speedup_ci95=pair(NUMBER))
    covered = record(
        provider=TEXT,
        supported=INTEGER,
        nodes=INTEGER,
        partitions=INTEGER,
        suitable=TEXT,
        missing=listing(TEXT),
        note=TEXT,
    )
    quantised = record(
        method=TEXT, in_float=listing(TEXT), nodes=INTEGER, images=INTEGER, drop_pp=NUMBER, divergence=NUMBER,
        tried=INTEGER, met={"type": "boolean"},
    )  # fmt: skip
    more: dict[str, Schema] = {
        "beside": listing(TEXT),
        "coverage": listing(covered),
        "runs_on": listing(record(runtime=TEXT, runs={"type": "boolean"}, why_not=TEXT)),
        "latency": nullable(speed),
    }
    judged = record(
        drop_pp=NUMBER, drop_ci95_pp=pair(NUMBER), drop_from_fp32_pp=NUMBER, agreement=FRACTION, agreeing=INTEGER,
        gate={"enum": ["pass", "fail", "off"]},
    )  # fmt: skip
    variant = with_optional(
        record(file=TEXT, opset=INTEGER, parity=parity, nodes=INTEGER, note=TEXT),
        **more,
        accuracy=judged,
        bytes=INTEGER,
        quantised=nullable(quantised),
        marks=listing(TEXT),
    )
    block = record(
        opset=INTEGER,
        ir_version=INTEGER,
        parity=parity,
        nodes_exported=INTEGER,
        nodes_simplified=INTEGER,
        variants={"type": "object", "additionalProperties": variant},
    )
    return with_optional(block, **more, runtimes=listing(TEXT))


def _engine() -> Schema:
    return record(
        built={"type": "boolean"},
        reason=TEXT,
        precision=TEXT,
        tensorrt=nullable(TEXT),
        gpu=nullable(TEXT),
        bytes=nullable(INTEGER),
    )


def _latency() -> Schema:
    timing = timing_schema()
    required = record(
        target=TEXT,
        runtime=TEXT,
        precision=TEXT,
        batch=POSITIVE,
        threads=POSITIVE,
        source=timing,
        pruned=timing,
        speedup=NUMBER,
        speedup_ci95=pair(NUMBER),
        stable={"type": "boolean"},
        unstable_because={"type": "array", "items": TEXT},
        peak_memory_mb=nullable(NUMBER),
        conditions={"type": "object"},
    )
    timed = listing(record(name=TEXT, op=TEXT, ms=NUMBER))
    counts: Schema = listing({"type": "integer", "minimum": 0})
    histograms = record(
        from_ms=NUMBER,
        to_ms=NUMBER,
        source=counts,
        pruned=counts,
        above=pair(INTEGER),
        max_ms=pair(NUMBER),
    )
    return with_optional(
        required,
        distribution=histograms,
        course=record(source=listing(NUMBER), pruned=listing(NUMBER)),
        layers=nullable(record(source=timed, pruned=timed)),
    )


def timing_schema() -> Schema:
    timing = record(p50_ms=NUMBER, p90_ms=NUMBER, p99_ms=NUMBER, p50_ci95_ms=pair(NUMBER), samples=POSITIVE)
    return with_optional(timing, p99_ci95_ms=pair(NUMBER))


def _accuracy() -> Schema:
    outcome = record(top1=FRACTION, top1_ci95=pair(FRACTION), top5=FRACTION, correct=INTEGER)
    gate = record(
        max_drop_pp=nullable(NUMBER),
        rule={"enum": ["point", "bound"]},
        confidence=FRACTION,
        verdict={"enum": ["pass", "fail", "off"]},
        proven={"type": "boolean"},
        images_to_prove=nullable(INTEGER),
    )
    return record(
        images=POSITIVE,
        source=outcome,
        pruned=outcome,
        exported=outcome,
        variants={"type": "object", "additionalProperties": outcome},
        engine=nullable(outcome),
        shipped=outcome,
        drop_pp=NUMBER,
        drop_ci95_pp=pair(NUMBER),
        agreement=FRACTION,
        worst_classes={"type": "array", "items": record(label=TEXT, drop_pp=NUMBER, images=INTEGER)},
        gate=gate,
        holdout_reads=INTEGER,
    )


def faults(value: Any, schema: Schema, place: str = "") -> Iterator[str]:
    """Where a JSON document breaks a schema of this module; numbers beyond 64 bits and NaN are no numbers here."""
    if "anyOf" in schema:
        if all(any(faults(value, choice)) for choice in schema["anyOf"]):
            yield f"{place}: none of the allowed forms"
        return
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        if value not in allowed:
            yield f"{place}: expected {' or '.join(map(str, allowed))}"
        return
    if not _is_of_type(value, schema["type"]):
        yield f"{place}: expected {schema['type']}, found {type(value).__name__}"
    elif isinstance(value, dict):
        yield from (f"{place}: {key!r} is missing" for key in schema.get("required", ()) if key not in value)
        known, other = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            if wanted := known.get(key, other):
                yield from faults(item, wanted, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{place}: {len(value)} items"
        for number, item in enumerate(value):
            yield from faults(item, schema["items"], f"{place}[{number}]")
    elif "minimum" in schema and not schema["minimum"] <= value <= schema.get("maximum", value):
        yield f"{place}: {value} is out of range"


def _is_of_type(value: Any, name: str) -> bool:
    match name:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case _:
            numbers = int | float if name == "number" else int
            return isinstance(value, numbers) and not isinstance(value, bool) and -(2**63) < value < 2**63


def pair(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 2}


def numbers(count: int) -> Schema:
    return {"type": "array", "items": NUMBER, "minItems": count, "maxItems": count}
