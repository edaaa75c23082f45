"""manifest.json: what show, verify and the report read, as a JSON Schema, and where a document breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from cswap_deploy import details
from cswap_deploy.artifacts import Verdict

SCHEMA = "cswap-deploy/manifest/1"
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SCORED = ("criterion", "estimator", "intervention", "images", "alpha")
"""How scores were found."""
SIZES = ("shipped_bytes", "source_weights_bytes", "pruned_weights_bytes")

Schema = dict[str, Any]
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
TEXT: Schema = {"type": "string"}
FRACTION: Schema = {"type": "number", "minimum": 0, "maximum": 1}


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
        budget=nullable(_budget()),
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
    required = record(
        built={"type": "boolean"},
        reason=TEXT,
        precision=TEXT,
        tensorrt=nullable(TEXT),
        gpu=nullable(TEXT),
        bytes=nullable(INTEGER),
    )
    return with_optional(
        required,
        **dict.fromkeys(("compute_capability", "board", "power_mode"), nullable(TEXT)),
        dla_core=nullable(INTEGER),
        batch=record(min=POSITIVE, opt=POSITIVE, max=POSITIVE),
        open_batch={"type": "boolean"},
        layers_beside_the_dla=INTEGER,
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
    on_gpu = record(p50_ms=NUMBER, p90_ms=NUMBER, p99_ms=NUMBER)
    reformats = record(layers=INTEGER, reformat=INTEGER, reformat_share=FRACTION)
    return with_optional(
        required,
        distribution=histograms,
        course=record(source=listing(NUMBER), pruned=listing(NUMBER)),
        layers=nullable(record(source=timed, pruned=timed)),
        cold_p50_ms=record(source=NUMBER, pruned=NUMBER),
        energy_mj=record(source=NUMBER, pruned=NUMBER),
        gpu=record(source=on_gpu, pruned=on_gpu),
        models=record(source={"type": "object"}, pruned={"type": "object"}),
        reformats=record(source=reformats, pruned=reformats),
    )


def _budget() -> Schema:
    required = record(
        latency_ms=NUMBER,
        percentile={"enum": [50, 90, 99]},
        achieved_ms=nullable(NUMBER),
        verdict={"enum": ["met", "missed", "infeasible", "not needed"]},
        trials={"type": "integer", "minimum": 0},
    )
    candidate = record(predicted=NUMBER, ratio=NUMBER, low=NUMBER, high=NUMBER)
    kind = record(name=TEXT, groups=POSITIVE, widths=listing(WHOLE), ms=listing(NUMBER))
    learned = record(
        multiple=POSITIVE,
        settings=INTEGER,
        error_median=nullable(NUMBER),
        error_p95=nullable(NUMBER),
        kinds=listing(kind),
    )
    return with_optional(
        required,
        dense_ms=NUMBER,
        dense_ci95_ms=pair(NUMBER),
        floor_ms=NUMBER,
        took_ms=NUMBER,
        took_ci95_ms=pair(NUMBER),
        ratio_asked=NUMBER,
        ratio=nullable(NUMBER),
        ratio_ci95=nullable(pair(NUMBER)),
        proven={"type": "boolean"},
        planned_here={"type": "boolean"},
        candidates=listing(candidate),
        unbuilt={"type": "integer", "minimum": 0},
        staircase=nullable(learned),
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
