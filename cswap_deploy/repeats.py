"""Constants of an ONNX graph that say the same along an axis keep one value there: a branch that left is a value per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

ELEMENTWISE = frozenset({"Add", "Sub", "Mul"})
LEAST = 256
"""Elements from which on a constant is looked at."""


def shorten(model: onnx.ModelProto) -> None:
    """In place. Of constants of three axes or more, and only where all that reads them combines them element by element with
    something of the same shape, so that nothing else changes its shape.
    """
    import numpy as np
    import onnx

    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    large = [
        item
        for item in graph.initializer
        if len(item.dims) > 2
        and np.prod(item.dims) >= LEAST
        and all(node.op_type in ELEMENTWISE and len({*node.input}) == 2 for node in readers.get(item.name, ()))
    ]
    if not large or any(item.data_location == onnx.TensorProto.EXTERNAL for item in graph.initializer):
        return
    shapes = shapes_of(model)
    for item in large:
        others = {name for node in readers.get(item.name, ()) for name in node.input if name != item.name}
        if others and all(shapes.get(name) == tuple(item.dims) for name in others):
            values = short = onnx.numpy_helper.to_array(item)
            for axis in range(values.ndim):
                first = short.take([0], axis)
                short = first if (short == first).all() else short
            if short.size < values.size:
                item.CopyFrom(onnx.numpy_helper.from_array(short, item.name))


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Of a graph's values, as far as they can be inferred; names stand for sizes that are not fixed."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        item.name: tuple(dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim)
        for item in (*graph.value_info, *graph.input, *graph.output)
        if item.type.tensor_type.HasField("shape")
    }
