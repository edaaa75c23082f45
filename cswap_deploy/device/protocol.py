"""What host and agent say to each other, as JSON Schemas. Later versions only add keys; files follow a line."""

from __future__ import annotations

from cswap_deploy.device.target import SCHEMA
from cswap_deploy.manifest import NUMBER, POSITIVE, TEXT, Schema, nullable, record

VERBS = ("probe", "missing", "store", "fetch", "build", "measure", "infer", "layers")
FAULTS = ("request", "file", "disk", "busy", "transfer", "runtime", "model", "engine", "internal")
"""Kinds of error; `internal` is a bug of ours."""

COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "number", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}
NUMBERS: Schema = {"type": "array", "items": NUMBER}


def request_schema(verb: str) -> Schema:
    """The host's line. After that of `store` come the file's bytes."""
    assert verb in VERBS, verb
    demanded, allowed = _requests()[verb]
    return _with(record(schema={"const": SCHEMA}, verb={"const": verb}, **demanded), **allowed)


def response_schema(verb: str) -> Schema:
    """The agent's line: an answer or an error. After that of `fetch` come the file's bytes."""
    assert verb in VERBS, verb
    demanded, allowed = _answers()[verb]
    answer = _with(record(schema={"const": SCHEMA}, **demanded), **allowed)
    error = record(kind={"enum": list(FAULTS)}, message=TEXT, hint=TEXT)
    return {"anyOf": [answer, record(schema={"const": SCHEMA}, error=error)]}


def _requests() -> dict[str, tuple[dict[str, Schema], dict[str, Schema]]]:
    """Verb → keys that its request has, and keys that it may have."""
    file: Schema = {"anyOf": [_with(record(sha256=TEXT), name=TEXT), _with(record(path=TEXT), sha256=TEXT, name=TEXT)]}
    runtime: Schema = {"enum": ["onnxruntime", "tensorrt"]}
    alone = {"wait_s": SECONDS}
    once = {"cold": COUNT, "pause_s": SECONDS, "energy_s": SECONDS}
    running = {"graph": BOOLEAN, "batch": POSITIVE, "threads": POSITIVE, "trust": TEXTS, **alone}
    files: Schema = {"type": "array", "items": file, "minItems": 1}
    return {
        "probe": ({}, {}),
        "missing": ({"sha256": TEXTS}, {}),
        "store": ({"sha256": TEXT, "bytes": COUNT}, {}),
        "fetch": ({"file": file}, {}),
        "build": ({"model": file, "settings": _settings(), "input": _input(), "dynamic": BOOLEAN}, alone),
        "measure": (
            {"runtime": runtime, "models": files, "warmup_s": SECONDS, "duration_s": SECONDS},
            {"block_s": SECONDS, "memory": BOOLEAN, **once, **running},
        ),
        "infer": (
            {"runtime": runtime, "model": file, "images": file, "mean": NUMBERS, "std": NUMBERS},
            {"labels": {"type": "array", "items": COUNT}, **running},
        ),
        "layers": ({"runtime": runtime, "model": file}, running),
    }


def _answers() -> dict[str, tuple[dict[str, Schema], dict[str, Schema]]]:
    """Verb → keys that its answer has, and keys that it may have."""
    kept = record(sha256=TEXT, bytes=COUNT)
    unknown = ("gpu", "compute_capability", "board", "power_mode")
    built = {"tensorrt": TEXT, "note": TEXT, "gpu_layers": TEXTS, **dict.fromkeys(unknown, nullable(TEXT))}
    layer = record(name=TEXT, op=TEXT, ms=SECONDS)
    return {
        "probe": (_probe(), {}),
        "missing": ({"missing": TEXTS}, {}),
        "store": ({"stored": kept}, {}),
        "fetch": ({"bytes": COUNT}, {}),
        "build": ({"engine": kept, "seconds": SECONDS, **built}, {}),
        "measure": _measurement(),
        "infer": ({"outcomes": kept, "images": COUNT}, {}),
        "layers": ({"layers": {"type": "array", "items": layer}}, {"layer_info": TEXT, "profile": TEXT}),
    }


def _settings() -> Schema:
    """The recipe's `engine`."""
    settings = record(
        precision={"enum": ["fp32", "fp16", "int8"]},
        workspace_mib=POSITIVE,
        optimization_level=COUNT,
        dla_core=nullable(COUNT),
        batch=record(min=POSITIVE, opt=POSITIVE, max=POSITIVE),
        keep_fp32={"anyOf": [{"const": "auto"}, TEXTS]},
    )
    return _with(settings, dla_fallback=BOOLEAN)


def _input() -> Schema:
    return record(name=TEXT, shape={"type": "array", "items": POSITIVE, "minItems": 3, "maxItems": 3})


def _machine() -> dict[str, Schema]:
    """State of the device: the conditions of a measurement."""
    clocks = {
        "mhz": nullable(COUNT),
        "max_mhz": nullable(COUNT),
        "locked": nullable(BOOLEAN),
        "governor": nullable(TEXT),
    }
    cpu = record(model=TEXT, cores=POSITIVE, **clocks)
    unknown = ("l4t", "chip", "power_mode")
    board = record(model=TEXT, gpu_clocks_locked=nullable(BOOLEAN), **dict.fromkeys(unknown, nullable(TEXT)))
    gpu = record(min_mhz=nullable(COUNT), load=nullable(SECONDS), **clocks)
    return {
        "python": TEXT,
        "machine": TEXT,
        "system": TEXT,
        "cpu": cpu,
        "board": nullable(board),
        "memory_mb": COUNT,
        "memory_free_mb": COUNT,
        "load": {"type": "array", "items": SECONDS, "minItems": 3, "maxItems": 3},
        "temperature_c": nullable(NUMBER),
        "zones_c": {"type": "object", "additionalProperties": NUMBER},
        "gpu": nullable(gpu),
        "rails_mw": {"type": "object", "additionalProperties": NUMBER},
    }


def _probe() -> dict[str, Schema]:
    tensorrt = record(
        module=BOOLEAN,
        trtexec=nullable(TEXT),
        gpu=nullable(TEXT),
        reason=TEXT,
        version=nullable(TEXT),
        precision={"enum": ["flags", "typed", None]},
        compute_capability=nullable(TEXT),
        cuda=nullable(TEXT),
        dla_cores=nullable(COUNT),
        banner=nullable(TEXT),
    )
    return {
        **_machine(),
        "id": TEXT,
        "disk_free_mb": COUNT,
        "numpy": nullable(TEXT),
        "onnxruntime": record(version=nullable(TEXT), providers=TEXTS, reason=TEXT),
        "tensorrt": tensorrt,
        "store": record(folder=TEXT, bytes=COUNT, limit_bytes=POSITIVE),
    }


def _measurement() -> tuple[dict[str, Schema], dict[str, Schema]]:
    """`rounds[r][m]`: durations in ns of model m in round r; by trtexec `times[r][m]`: the document that it exported."""
    durations: Schema = {"type": "array", "items": COUNT, "minItems": 1}
    rounds: Schema = {"type": "array", "items": {"type": "array", "items": durations, "minItems": 1}, "minItems": 1}
    memory = record(peak_mb=NUMBERS, runtime_mb=NUMBER, agent_mb=NUMBER)
    facts = {
        "load_s": SECONDS,
        "device_mb": SECONDS,
        "cuda_graph": BOOLEAN,
        "graph_note": TEXT,
        "host_waits": TEXT,
        "cuda": TEXT,
    }
    moment: Schema = {"type": "array", "items": {"anyOf": [COUNT, {"type": "object"}]}, "minItems": 2}
    watch = record(moments={"type": "array", "items": moment}, tegrastats=nullable(TEXT))
    demanded: dict[str, Schema] = {
        "models": {"type": "array", "items": _with(record(runtime=TEXT), **facts), "minItems": 1},
        "overhead": nullable(NUMBER),
        "memory": nullable(memory),
        "watch": watch,
        "before": record(**_machine()),
        "after": record(**_machine()),
    }
    allowed: dict[str, Schema] = {
        "rounds": rounds,
        "gpu_rounds": nullable(rounds),
        "times": {"type": "array", "items": TEXTS},
        "cold": {"type": "array", "items": {"type": "array", "items": COUNT}},
        "energy": {"type": "array", "items": record(start_ns=COUNT, end_ns=COUNT, runs=POSITIVE)},
        "idle_until_ns": COUNT,
        "sampling_ns": {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2},
    }
    return demanded, allowed


def _with(schema: Schema, **properties: Schema) -> Schema:
    """A record that may have these keys as well."""
    return {**schema, "properties": {**schema["properties"], **properties}}
