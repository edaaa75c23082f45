"""The TensorRT engine, built on the target. Not run on TensorRT by this project's own tests: see docs/jetson.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cswap_deploy import progress
from cswap_deploy.artifacts import Engine, File, Groups
from cswap_deploy.device import layers as parts
from cswap_deploy.device import trtexec
from cswap_deploy.device.building import WAIT_S, Order
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import EngineSettings
from cswap_deploy.stage import stage

LAYERS_S = WAIT_S + 600.0
"""Beside what another build or measurement on the target may still take."""
UNTIMED = "its layers were not timed"
UNCHECKED = [8, 6]
"""What is older was checked against no list of names of its own, and what it builds is marked so."""
HINTS = {
    "UNSUPPORTED_NODE_DYNAMIC": "export with onnx.dynamic_batch: false",
    "INT64": "TensorRT 8 has no 64-bit integers: export with another onnx.opset, or update to JetPack 6.1",
    "No importer": "TensorRT does not know this operator: export with a lower onnx.opset, or replace it in the network",
    "opset": "export with a lower onnx.opset",
    "zero point": "TensorRT wants symmetric int8: use the variant int8-tensorrt",
    "bias": "TensorRT takes no quantized bias: use the variant int8-tensorrt",
}
"""Words in the parser's error → what to do."""


@stage("engine", returns=Engine)
def build(
    out: Path,
    model: File,
    order: Order,
    groups: Groups,
    facts: Mapping[str, str],
    target: Target,
) -> Engine:
    """ONNX file → engine, its log, and how long each of its layers takes. Errors: DeviceError, with TensorRT's own words.

    A build may take an hour, so an engine whose layers cannot be timed is kept, and its note says so.
    """
    try:
        answer, log = order.build(target, target.put(model)[0])
    except DeviceError as error:
        raise _explained(error, model) from error
    (out / "build.log").write_text(log, encoding="utf-8")
    file = target.get(answer["engine"], out / "model.engine")
    found, rows = _layers(target, file, order.settings, model, groups)
    parts.write(
        out / "layers.json",
        {
            "layers": rows or [],
            "reformats": parts.reformats(rows or []),
            "tensorrt": found.get("layer_info"),
        },
    )
    by_trtexec = trtexec.banner_version(f"[{answer['tensorrt']}]")  # its banner, in place of a version
    version = by_trtexec or answer["tensorrt"]
    beside = tuple(answer["gpu_layers"])
    if by_trtexec and order.settings.dla_core is not None:
        beside = tuple(name for run in trtexec.runs(log, whole=False) for name in run.gpu)
    return Engine(
        file=file,
        layers=File.of(out / "layers.json"),
        tensorrt=version,
        gpu=answer["gpu"],
        seconds=answer["seconds"],
        note=_note(answer["note"], version, len(beside) if by_trtexec else 0, timed=rows is not None),
        compute_capability=answer["compute_capability"],
        board=answer["board"],
        power_mode=answer["power_mode"],
        gpu_layers=beside,
    )


def _layers(
    target: Target, file: File, settings: EngineSettings, model: File, groups: Groups
) -> tuple[Mapping[str, Any], list[dict[str, Any]] | None]:
    """The agent's answer and the rows that it makes; nothing and None where the layers could not be timed."""
    kept = {"sha256": file.sha256, "name": "the engine"}
    try:
        found = target.ask("layers", LAYERS_S, model=kept, **order_of_layers(settings))
        return found, parts.joined(found, parts.nodes_of(model.path), groups)
    except DeviceError as error:
        progress.warn(f"the engine is kept, but {UNTIMED}: {error}")
        return {}, None


def order_of_layers(settings: EngineSettings) -> dict[str, Any]:
    return {"runtime": "tensorrt", "batch": settings.batch.opt, "wait_s": WAIT_S}


def _note(told: str, version: str, on_gpu: int, timed: bool) -> str:
    """With what the agent cannot know: how many layers trtexec says it put on the GPU, and that JetPack 5 is unchecked."""
    notes = [told, f"{on_gpu} layers run on the GPU, not on the DLA" if on_gpu else ""]
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if numbers and numbers < UNCHECKED:
        notes.append(f"TensorRT {version}, that of JetPack 5, is unchecked")
    if not timed:
        notes.append(UNTIMED)
    return "; ".join(filter(None, notes))


def _explained(error: DeviceError, model: File) -> DeviceError:
    """With node, operator and a hint for each fault of TensorRT's parser; its own hint where there is none."""
    if not error.parser:
        return error
    names = list(parts.nodes_of(model.path).values())
    lines, hints = [], []
    for fault in error.parser[:5]:
        number, name, operator, text = (fault[key] for key in ("node", "name", "operator", "text"))
        if not operator and 0 <= number < len(names):  # TensorRT to 8.6 gives the number only
            name, operator = names[number].name, names[number].operator
        where = f"node {name!r} (operator {operator})" if operator else f"node {number}"
        lines.append(f"{where}: {text}")
        hints += [hint for words, hint in HINTS.items() if words.lower() in text.lower()]
    more = f" and {len(error.parser) - 5} more" if len(error.parser) > 5 else ""
    message = f"TensorRT cannot read the ONNX file: {'; '.join(lines)}{more}"
    explained = DeviceError(message, hints[0] if hints else error.hint, public=error.public, log=error.log)
    explained.kind = error.kind
    return explained
