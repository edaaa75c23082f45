"""JSON Schemas of what the tool reads and writes: the recipe, the manifest, the --json output of each command."""

from __future__ import annotations

from typing import Any

from cswap_deploy import manifest, recipe
from cswap_deploy.errors import UsageError

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
TEXT: Schema = {"type": "string"}
FRACTION: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def of(*, manifest: bool = False, command: str | None = None) -> Schema:
    """Errors: UsageError for a command that has no --json output."""
    if command is not None:
        return _of_command(command)
    return of_manifest() if manifest else recipe.schema()


def of_manifest() -> Schema:
    """manifest.json: fractions in 0..1, milliseconds, percentage points where a key ends in `_pp`."""
    network_input = _object(
        shape={"type": "array", "items": INTEGER, "minItems": 3, "maxItems": 3},
        mean={"type": "array", "items": NUMBER},
        std={"type": "array", "items": NUMBER},
        interpolation=TEXT,
        crop_pct=NUMBER,
    )
    document = _object(
        schema={"const": manifest.SCHEMA},
        name=TEXT,
        created={"type": "string", "format": "date-time"},
        tool=_object(version=TEXT),
        recipe_sha256=TEXT,
        shipped=TEXT,
        verdict={"enum": ["pass", "fail"]},
        reasons={"type": "array", "items": TEXT},
        model=_object(
            name=TEXT, source={"enum": ["timm", "factory"]}, params=INTEGER, macs=INTEGER, input=network_input
        ),
        pruned=_object(
            params=INTEGER,
            macs=INTEGER,
            units=INTEGER,
            units_removed=INTEGER,
            criterion=TEXT,
            compensation=TEXT,
            steps=INTEGER,
        ),
        accuracy=_accuracy(),
        onnx=_object(
            opset=INTEGER,
            ir_version=INTEGER,
            parity=_object(max_abs=NUMBER, sqnr_db=NUMBER),
            nodes_exported=INTEGER,
            nodes_simplified=INTEGER,
        ),
        latency=_nullable({"type": "object"}),
        budget=_nullable({"type": "object"}),
        engine=_nullable({"type": "object"}),
        files={"type": "array", "items": _object(path=TEXT, sha256=TEXT, bytes=INTEGER)},
        environment={"type": "object", "additionalProperties": TEXT},
    )
    return {"$schema": DRAFT, "title": "manifest of a cswap-deploy bundle", **document}


def _accuracy() -> Schema:
    outcome = _object(top1=FRACTION, top1_ci95=_pair(FRACTION), top5=FRACTION, correct=INTEGER)
    gate = _object(
        max_drop_pp=_nullable(NUMBER),
        rule={"enum": ["point", "bound"]},
        confidence=FRACTION,
        verdict={"enum": ["pass", "fail", "off"]},
        proven={"type": "boolean"},
        images_to_prove=_nullable(INTEGER),
    )
    return _object(
        images=INTEGER,
        source=outcome,
        pruned=outcome,
        exported=outcome,
        variants={"type": "object", "additionalProperties": outcome},
        engine=_nullable(outcome),
        shipped=outcome,
        drop_pp=NUMBER,
        drop_ci95_pp=_pair(NUMBER),
        agreement=FRACTION,
        worst_classes={"type": "array", "items": _object(label=TEXT, drop_pp=NUMBER, images=INTEGER)},
        gate=gate,
        holdout_reads=INTEGER,
    )


def _of_command(name: str) -> Schema:
    bodies: dict[str, Schema] = {
        "build": {"bundle": TEXT, "verdict": {"enum": ["pass", "fail"]}, "manifest": of_manifest()},
        "prepare": {"work": TEXT, "onnx": TEXT, "macs": INTEGER},
        "check": {
            "facts": {"type": "object", "additionalProperties": TEXT},
            "stages": {"type": "array", "items": _object(name=TEXT, status=TEXT)},
            "groups": _nullable({"type": "object"}),
        },
        "show": {"manifest": of_manifest()},
    }
    if name not in bodies:
        raise UsageError(f"--command: {name!r} has no --json output", f"choose one of {', '.join(bodies)}")
    error = _object(type=TEXT, message=TEXT, hint=TEXT, exit_code=INTEGER)
    marker: Schema = {"const": f"cswap-deploy/{name}/1"}
    return {
        "$schema": DRAFT,
        "title": f"cswap-deploy {name} --json",
        "oneOf": [_object(schema=marker, **bodies[name]), _object(schema=marker, error=error)],
    }


def _object(**properties: Schema) -> Schema:
    """An object that has all of these keys; it may have more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _pair(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 2}
