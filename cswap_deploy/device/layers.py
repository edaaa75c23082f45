"""Where an engine's time goes: the layers that TensorRT made, joined back to the ONNX nodes and the groups that they came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cswap_deploy.artifacts import Groups
from cswap_deploy.device import exports
from cswap_deploy.device.exports import LayerInfo

REFORMAT = "Reformat"
"""The operator under which layers are shown that only change a tensor's layout or precision."""
REFORMATTING = re.compile(
    r"^(?:Reformatting CopyNode for (?:Input|Output) Tensor \d+ to |reformat_)|\bReformatting CopyNode\b"
)
PASSED_OVER = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Transpose", "Reshape")
"""Between a weight and the node that it belongs to."""
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LayerNormalization", "Softmax")
"""What a fused layer is named after, heaviest first; else after its first node."""


@dataclass(frozen=True)
class Node:
    name: str
    operator: str
    module: str
    """The module of the network whose parameters it reads; empty where there is none."""


def nodes_of(path: Path) -> dict[str, Node]:
    """By name, in order. Empty where the onnx package is not installed: layers are then shown as TensorRT names them."""
    if find_spec("onnx") is None:
        return {}
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}

    def module(name: str, depth: int = 0) -> str:
        if name in weights and "." in name:
            return name.rpartition(".")[0]
        node = made_by.get(name)
        return (
            module(node.input[0], depth + 1)
            if node and node.op_type in PASSED_OVER and node.input and depth < 8
            else ""
        )

    found = {}
    for node in graph.node:
        owners = [module(name) for name in node.input[1:]] if node.op_type not in PASSED_OVER else []
        found[node.name] = Node(node.name, node.op_type, next(filter(None, owners), ""))
    return found


def joined(answer: Mapping[str, Any], nodes: Mapping[str, Node], groups: Groups | None) -> list[dict[str, Any]]:
    """Rows of `name`, `op` and `ms`, and of `nodes` and `groups`, from a `layers` answer of the agent. Errors: DeviceError."""
    timed = [(row["name"], row["ms"]) for row in answer["layers"]]
    if answer.get("profile"):  # by trtexec
        timed = [(layer.name, layer.median_ms) for layer in exports.profile(answer["profile"])]
    information = exports.layer_info(answer["layer_info"]) if answer.get("layer_info") else ()
    by_name = {layer.name: layer for layer in information}
    members = _groups_by_module(groups)
    rows = []
    for name, ms in timed:
        layer = by_name.get(name, LayerInfo(name, "", None))
        own = [nodes[node] for node in _nodes(layer, nodes)]
        modules = {node.module for node in own if node.module}
        rows.append(
            {
                "name": name,
                "op": _operator(layer, own),
                "ms": ms,
                "nodes": [node.name for node in own],
                "groups": sorted({group for module in modules for group in members.get(module, ())}),
            }
        )
    return rows


def reformats(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many layers there are, how many only reformat, and the share of the time that these take."""
    changing = [row["ms"] for row in rows if row["op"] == REFORMAT]
    whole = sum(row["ms"] for row in rows)
    return {"layers": len(rows), "reformat": len(changing), "reformat_share": sum(changing) / whole if whole else 0.0}


def _groups_by_module(groups: Groups | None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group in groups.groups if groups else ():
        for member in group.members:
            found.setdefault(member.module, set()).add(group.name)
    return found


def _operator(layer: LayerInfo, own: Sequence[Node]) -> str:
    quantizes = any(node.operator in ("QuantizeLinear", "DequantizeLinear") for node in own)
    if REFORMATTING.search(layer.name) or (layer.kind == REFORMAT and not quantizes):
        return REFORMAT
    operators = [node.operator for node in own]
    return next((kind for kind in HEAVY if kind in operators), operators[0] if operators else layer.kind)


def _nodes(layer: LayerInfo, nodes: Mapping[str, Node]) -> list[str]:
    """Names of the ONNX nodes of a layer: as TensorRT notes them, else from the layer's own name."""
    if layer.nodes is not None and any(node in nodes for node in layer.nodes):
        return [node for node in dict.fromkeys(layer.nodes) if node in nodes]
    if REFORMATTING.search(layer.name):
        return []
    return list(dict.fromkeys(_named(layer.name, nodes)))


def _named(name: str, nodes: Mapping[str, Node]) -> Iterator[str]:
    """`a + b`, `PWN(PWN(a), b)`, `{ForeignNode[a...b]}`: the last is all that lies between, in the graph's order."""
    order = list(nodes)
    for first, last in re.findall(r"ForeignNode\[(.+?)\.\.\.(.+?)\]", name):
        if first in nodes and last in nodes:
            yield from order[order.index(first) : order.index(last) + 1]
    for part in re.split(r" \+ |[(),{}\[\]]|\|\|", name):
        if part.strip() in nodes:
            yield part.strip()


def write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
