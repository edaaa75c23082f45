"""JSON Schemas of what the tool reads and writes: the recipe, the manifest, the --json output of each command."""

from __future__ import annotations

from cswap_deploy import manifest as facts
from cswap_deploy import recipe
from cswap_deploy.errors import UsageError
from cswap_deploy.manifest import INTEGER, TEXT, Schema, nullable, record

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def of(*, manifest: bool = False, command: str | None = None) -> Schema:
    """Errors: UsageError for a command that has no --json output."""
    if command is not None and manifest:
        raise UsageError("--manifest and --command exclude each other", "ask for one of them")
    if command is not None:
        return _of_command(command)
    return of_manifest() if manifest else recipe.schema()


def of_manifest() -> Schema:
    return {"$schema": DRAFT, "title": "manifest of a cswap-deploy bundle", **facts.schema()}


def _of_command(name: str) -> Schema:
    bodies: dict[str, Schema] = {
        "build": {"bundle": TEXT, "verdict": {"enum": ["pass", "fail"]}, "manifest": facts.schema()},
        "prepare": {"work": TEXT, "onnx": TEXT, "macs": INTEGER},
        "check": {
            "facts": {"type": "object", "additionalProperties": TEXT},
            "stages": {"type": "array", "items": record(name=TEXT, status=TEXT)},
            "groups": nullable({"type": "object"}),
        },
        "show": {"manifest": facts.schema()},
    }
    if name not in bodies:
        raise UsageError(f"--command: {name!r} has no --json output", f"choose one of {', '.join(bodies)}")
    error = record(type=TEXT, message=TEXT, hint=TEXT, exit_code=INTEGER)
    marker: Schema = {"const": f"cswap-deploy/{name}/1"}
    return {
        "$schema": DRAFT,
        "title": f"cswap-deploy {name} --json",
        "oneOf": [record(schema=marker, **bodies[name]), record(schema=marker, error=error)],
    }
