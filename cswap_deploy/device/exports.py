"""trtexec's JSON exports, read on the host: raw times, layer profile, layer information. TensorRT 8.4 to 11.1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isclose
from typing import Any

from cswap_deploy.device.trtexec import NUMBER, ROUNDED, Layer
from cswap_deploy.errors import DeviceError

KEYS = {
    "startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs", "endD2hMs",
    "h2dMs", "computeMs", "d2hMs", "latencyMs",
}  # fmt: skip
AGAIN = "measure again; if it stays, report trtexec's output"
PROFILED = re.compile(
    rf', \{{ "name" : "(.*)", "timeMs" : {NUMBER}, "averageMs" : {NUMBER}, "medianMs" : {NUMBER}, "percentage" : {NUMBER} \}}'
)
"""Names are not escaped, so a quote in one makes the document no JSON: it is read by lines."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of each query, in order; warm-up excluded."""

    latency_ms: tuple[float, ...]
    compute_ms: tuple[float, ...]


@dataclass(frozen=True)
class LayerInfo:
    """One layer of an engine. `kind` is empty and `nodes` is None where the engine was built without detailed verbosity."""

    name: str
    kind: str
    nodes: tuple[str, ...] | None
    """ONNX nodes that it was made of, as TensorRT 8.6 and newer note them; None: it does not say."""


def times(text: str) -> Times:
    """A document of --exportTimes. Errors: DeviceError for one that is cut off, or whose figures contradict each other."""
    rows = _json(text, "times")
    if not isinstance(rows, list) or not rows:
        raise DeviceError("trtexec exported no times", AGAIN)
    for number, row in enumerate(rows, 1):
        if fault := _time_fault(row):
            raise DeviceError(f"trtexec's exported times: query {number} {fault}", AGAIN)
    for number, (before, after) in enumerate(pairwise(rows), 2):
        if after["startEnqMs"] < before["startEnqMs"] or after["startComputeMs"] < before["startComputeMs"]:
            raise DeviceError(f"trtexec's exported times: query {number} starts before the one before it", AGAIN)
    return Times(tuple(row["latencyMs"] for row in rows), tuple(row["computeMs"] for row in rows))


def _time_fault(row: Any) -> str:
    if not isinstance(row, dict) or row.keys() != KEYS:
        return "has other keys than trtexec writes"
    if not all(isinstance(value, int | float) and 0 <= value < 1e9 for value in row.values()):
        return "holds something else than milliseconds"
    if not isclose(row["latencyMs"], row["h2dMs"] + row["computeMs"] + row["d2hMs"], rel_tol=ROUNDED):
        return "has a latency that is not the sum of its parts"
    for name in ("H2d", "Compute", "D2h"):
        start, end, long = row[f"start{name}Ms"], row[f"end{name}Ms"], row[f"{name[0].lower()}{name[1:]}Ms"]
        if abs(end - start - long) > 2e-5 * max(end, 1):  # moments have six digits, so later ones have fewer decimals
            return f"has a {name[0].lower()}{name[1:]}Ms that is not between its start and its end"
    return ""


def profile(text: str) -> tuple[Layer, ...]:
    """A document of --exportProfile. Errors: DeviceError, as for `times`."""
    lines = [line.strip() for line in text.strip().splitlines()]
    head = re.fullmatch(r'\{ "count" : (\d+) \}', lines[1]) if len(lines) > 2 else None
    if not head or lines[0] != "[" or lines[-1] != "]" or not int(head[1]):
        raise DeviceError("trtexec's exported profile is cut off", AGAIN)
    found = []
    for number, line in enumerate(lines[2:-1], 3):
        row = PROFILED.fullmatch(line)
        values = [float(value) for value in row.groups()[1:]] if row else []
        if not row or any(f"{value:g}" != text for value, text in zip(values, row.groups()[1:], strict=True)):
            raise DeviceError(f"trtexec's exported profile: line {number} is damaged: {line[:80]!r}", AGAIN)
        found.append(Layer(row[1], *values))
        if not isclose(values[1] * int(head[1]), values[0], rel_tol=ROUNDED):
            raise DeviceError(
                f"trtexec's exported profile: line {number} has a mean that is not its total / {head[1]}", AGAIN
            )
    timed = [layer for layer in found if layer.total_ms]
    for layer in timed[1:]:
        if not isclose(layer.percent / layer.total_ms, timed[0].percent / timed[0].total_ms, rel_tol=2 * ROUNDED):
            raise DeviceError(f"trtexec's exported profile: the share of {layer.name!r} is not that of its time", AGAIN)
    return tuple(found)


def layer_info(text: str) -> tuple[LayerInfo, ...]:
    """A document of --exportLayerInfo, or of the engine inspector, which is the same. Errors: DeviceError."""
    document = _json(text, "layer information")
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise DeviceError("trtexec's layer information holds no list of layers", AGAIN)
    return tuple(_layers(layers))


def _layers(layers: list[Any]) -> Iterator[LayerInfo]:
    for number, layer in enumerate(layers, 1):
        if isinstance(layer, str):
            yield LayerInfo(layer, "", None)
        elif isinstance(layer, dict) and isinstance(layer.get("Name"), str) and isinstance(layer.get("LayerType"), str):
            noted = layer.get("Metadata")
            nodes = (
                re.findall(r"\[ONNX Layer: (.*?)\](?=\x1e|\[ONNX Layer: |\s*$)", noted)
                if isinstance(noted, str)
                else None
            )
            yield LayerInfo(layer["Name"], layer["LayerType"], None if nodes is None else tuple(nodes))
        else:
            raise DeviceError(f"trtexec's layer information: layer {number} has no name", AGAIN)


def _json(text: str, what: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    def unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unlike)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"trtexec's exported {what} cannot be read: {error}", AGAIN) from error
