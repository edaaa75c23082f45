"""Constants of an ONNX graph that say the same along an axis keep one value there: a branch that left is a value per channel."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

ELEMENTWISE = frozenset({"Add", "Sub", "Mul"})
LEAST = 256
"""Elements from which on a constant is looked at."""

Shape = tuple[int | str, ...]
"""Names stand for sizes that are not fixed."""
Shapes = Mapping[str, Shape]
Readers = Mapping[str, list[Any]]


def shorten(model: onnx.ModelProto) -> None:
    """In place. Only where all that reads a constant combines it element by element with something of the same shape, so that
    nothing else changes its shape. Of constants that are stored with three axes or more, and of those that a node repeats (`Expand`).
    """
    import onnx

    graph = model.graph
    apart = any(item.data_location == onnx.TensorProto.EXTERNAL for item in graph.initializer)
    if apart or any(item.HasField("g") or item.graphs for node in graph.node for item in node.attribute):
        return
    readers = readers_of(graph)
    stored = [item for item in graph.initializer if len(item.dims) > 2 and prod(item.dims) >= LEAST]
    stored = [item for item in stored if _is_only_combined(item.name, readers)]
    repeated = [node for node in graph.node if node.op_type == "Expand"]
    if not stored and not repeated:
        return
    shapes = shapes_of(model)
    for item in stored:
        if may_be_short(item.name, tuple(item.dims), readers, shapes):
            _keep_one(item)
    constants = {item.name: item for item in graph.initializer}
    bypassed = [node for node in repeated if _bypass(graph, node, constants, readers, shapes)]
    for node in bypassed:
        graph.node.remove(node)
    if bypassed:
        drop_dead(graph)


def readers_of(graph: onnx.GraphProto) -> Readers:
    """Per value the nodes that read it, one as often as it does so."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def may_be_short(name: str, shape: Shape, readers: Readers, shapes: Shapes) -> bool:
    """Whether all that reads a value combines it element by element with something of this shape, so that one along each axis will do."""
    others = {other for node in readers.get(name, ()) for other in node.input if other != name}
    return _is_only_combined(name, readers) and all(shapes.get(other) == shape for other in others)


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """Of a graph's values, as far as they can be inferred; names stand for sizes that are not fixed."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        item.name: tuple(dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim)
        for item in (*graph.input, *graph.value_info, *graph.output)
        if item.type.tensor_type.HasField("shape")
        and all(dim.dim_param or dim.HasField("dim_value") for dim in item.type.tensor_type.shape.dim)
    }


def _is_only_combined(name: str, readers: Readers) -> bool:
    own = readers.get(name, [])
    return bool(own) and all(node.op_type in ELEMENTWISE and len({*node.input}) == 2 for node in own)


def _keep_one(item: onnx.TensorProto) -> None:
    """One value along each axis on which a tensor repeats itself, in place."""
    import onnx

    values = short = onnx.numpy_helper.to_array(item)
    for axis in range(values.ndim):
        first = short.take([0], axis)
        short = first if (short == first).all() else short
    if short.size < values.size:
        item.CopyFrom(onnx.numpy_helper.from_array(short, item.name))


def _bypass(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: Mapping[str, Any], readers: Readers, shapes: Shapes
) -> bool:
    """Let what reads a constant that this node repeats read the constant, normalised first where a BatchNormalization does that.

    Whether it was done: the node is then to leave.
    """
    import onnx

    value, output, shape = node.input[0], node.output[0], shapes.get(node.output[0])
    if value not in constants or shape is None:
        return False
    norm = next((reader for reader in readers.get(output, []) if reader.op_type == "BatchNormalization"), None)
    if norm is not None:
        if len(readers[output]) > 1 or not all(name in constants for name in norm.input[1:]):
            return False
        output = norm.output[0]
    shown = any(item.name == output for item in graph.output)
    if shown or not may_be_short(output, shape, readers, shapes):
        return False
    if norm is not None:
        values = _normalised(norm, *(onnx.numpy_helper.to_array(constants[name]) for name in (value, *norm.input[1:])))
        value = f"{output} once"
        graph.initializer.append(onnx.numpy_helper.from_array(values, value))
        graph.node.remove(norm)
    for reader in readers[output]:
        for place, name in enumerate(reader.input):
            if name == output:
                reader.input[place] = value
    return True


def _normalised(norm: onnx.NodeProto, values: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    """What a BatchNormalization makes of (n, channels, ...)."""
    epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), 1e-5)
    factor = scale / (variance + epsilon) ** 0.5
    along = (1, -1, *(1 for _ in values.shape[2:]))
    return (values * factor.reshape(along) + (bias - mean * factor).reshape(along)).astype(values.dtype)


def drop_dead(graph: onnx.GraphProto) -> None:
    """Nodes and constants that nothing reads leave, in place."""
    needed = {item.name for item in graph.output}
    for node in reversed([*graph.node]):
        if needed.intersection(node.output):
            needed.update(node.input)
        else:
            graph.node.remove(node)
    for item in [*graph.initializer]:
        if item.name not in needed:
            graph.initializer.remove(item)
