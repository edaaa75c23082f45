"""JSON Schemas of what the tool reads and writes: the recipe, the manifest, the --json output of each command."""

from __future__ import annotations

from cswap_deploy import manifest as manifests
from cswap_deploy import recipe, units
from cswap_deploy.device import protocol, target
from cswap_deploy.errors import UsageError
from cswap_deploy.manifest import INTEGER, NUMBER, TEXT, Schema, nullable, record

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def of(*, manifest: bool = False, command: str | None = None, agent: bool = False) -> Schema:
    """Errors: UsageError for a command that has no --json output."""
    if (command is not None) + manifest + agent > 1:
        raise UsageError("--manifest, --command and --agent exclude each other", "ask for one of them")
    if agent:
        return of_agent()
    if command is not None:
        return _of_command(command)
    return of_manifest() if manifest else recipe.schema()


def of_manifest() -> Schema:
    return {"$schema": DRAFT, "title": "manifest of a cswap-deploy bundle", **manifests.schema()}


def of_agent() -> Schema:
    """What goes to a device's agent and what comes back, by verb."""
    verbs = {
        verb: {"request": protocol.request_schema(verb), "response": protocol.response_schema(verb)}
        for verb in protocol.VERBS
    }
    return {"$schema": DRAFT, "title": target.SCHEMA, "verbs": verbs}


def _of_command(name: str) -> Schema:
    finding = record(topic=TEXT, state={"enum": ["ok", "missing", "problem", "note"]}, text=TEXT, fix=TEXT)
    findings: Schema = {"type": "array", "items": finding}
    check = record(name=TEXT, outcome={"enum": ["passed", "failed", "skipped"]}, detail=TEXT)
    bodies: dict[str, Schema] = {
        "build": {"bundle": TEXT, "verdict": {"enum": ["pass", "fail"]}, "manifest": manifests.schema()},
        "prepare": {"work": TEXT, "onnx": TEXT, "macs": INTEGER, "reasons": {"type": "array", "items": TEXT}},
        "check": {
            "facts": {"type": "object", "additionalProperties": TEXT},
            "stages": {"type": "array", "items": record(name=TEXT, status=TEXT)},
            "groups": nullable({"type": "object"}),
        },
        "init": {"recipe": TEXT, "editor_schema": TEXT, "notes": {"type": "array", "items": TEXT}},
        "show": {"manifest": manifests.schema()},
        "deploy": {"bundle": TEXT, "verdict": {"enum": ["pass", "fail"]}, "manifest": manifests.schema()},
        "measure": {
            "target": TEXT,
            "runtime": TEXT,
            "models": {"type": "array", "items": manifests.timing_schema()},
            "speedup": nullable(NUMBER),
            "speedup_ci95": nullable({"type": "array", "items": NUMBER}),
            "conditions": {"type": "object"},
            "layers": nullable({"type": "array", "items": record(name=TEXT, op=TEXT, ms=NUMBER)}),
        },
        "sweep": {"work": TEXT, "name": TEXT, "points": {"type": "array", "items": _front_point()}},
        "verify": {"bundle": TEXT, "checks": {"type": "array", "items": check}},
        "doctor": {"host": findings, "target": record(name=TEXT, findings=findings)},
    }
    if name not in bodies:
        raise UsageError(f"--command: {name!r} has no --json output", f"choose one of {', '.join(bodies)}")
    others: dict[str, list[dict[str, Schema]]] = {"show": [{"unit": units.schema()}]}
    error = record(type=TEXT, message=TEXT, hint=TEXT, exit_code=INTEGER)
    marker: Schema = {"const": f"cswap-deploy/{name}/1"}
    forms = [bodies[name], *others.get(name, []), {"error": error}]
    return {
        "$schema": DRAFT,
        "title": f"cswap-deploy {name} --json",
        "oneOf": [record(schema=marker, **form) for form in forms],
    }


def _front_point() -> Schema:
    """One bundle of a sweep."""
    return record(
        latency_ms=NUMBER,
        verdict={"enum": ["met", "missed", "infeasible", "not needed", None]},
        achieved_ms=nullable(NUMBER),
        top1=NUMBER,
        drop_pp=NUMBER,
        macs=INTEGER,
        on_front={"type": "boolean"},
        exit_code=INTEGER,
        bundle=TEXT,
    )
