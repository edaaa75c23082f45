"""An ONNX graph some of whose weights have no elements left: what reads a branch without units is a constant, the rest is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cswap_deploy.budget.sizes import HINT
from cswap_deploy.errors import ExportError
from cswap_deploy.repeats import ELEMENTWISE

if TYPE_CHECKING:
    import onnx

CONTRACTED = {"Conv": 1, "Gemm": 0, "MatMul": -2}
"""The axis of a weight that a node sums over; a Gemm may read its weight transposed."""
Shape = tuple[int, ...]


def without_branches(
    model: onnx.ModelProto, empty: Mapping[str, Shape], behind: Mapping[str, str], whole: Mapping[str, Shape]
) -> None:
    """Change `model` in place: where a node sums over no elements its output becomes its bias, and what nothing reads any more leaves.

    `empty`: shapes of the weights that have no elements; `behind`: the weight that a value is, seen through conversions; `whole`: shapes of
    the dense network's values. Errors: ExportError where what is left reads a weight without elements.
    """
    import onnx

    graph, nodes = model.graph, list[onnx.NodeProto]()
    for node in graph.node:
        weight = next((behind[name] for name in node.input if behind.get(name) in empty), None)
        if weight is None or not _sums_over_nothing(node, empty[weight]):
            nodes.append(node)
            continue
        nodes += _constant(graph, node, weight, empty[weight], whole)
    needed, left = {item.name for item in graph.output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if needed.intersection(node.output):
            left.append(node)
            needed.update(node.input)
    if lost := needed.intersection(empty):
        raise ExportError(f"a network without a branch still reads {min(lost)!r}", HINT)
    del graph.node[:]
    graph.node.extend(reversed(left))
    kept = [item for item in graph.initializer if item.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _sums_over_nothing(node: onnx.NodeProto, shape: Shape) -> bool:
    axis = CONTRACTED.get(node.op_type)
    if axis is None:
        return False
    if node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute):
        axis = 1
    return shape[axis] == 0


def _constant(
    graph: onnx.GraphProto, node: onnx.NodeProto, weight: str, shape: Shape, whole: Mapping[str, Shape]
) -> list[onnx.NodeProto]:
    """What gives the node's output where it sums over nothing: its bias along the axis of its channels, or zeros.

    Of one value along the other axes, unless that is read by what does not repeat it.
    """
    import numpy as np
    import onnx

    output, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
    if output not in whole:
        raise ExportError(f"the shape of {output!r} cannot be inferred", HINT)
    axis = 1 if node.op_type == "Conv" else -1
    along, repeats = [1] * len(whole[output]), [*whole[output]]
    along[axis], repeats[axis] = -1, 1
    if not bias:
        kind = next(item.data_type for item in graph.initializer if item.name == weight)
        kind = kind if kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) else onnx.TensorProto.FLOAT
        channels = shape[0] if node.op_type == "Conv" or shape[-1] == 0 else shape[-1]
        zeros = np.zeros(channels, onnx.helper.tensor_dtype_to_np_dtype(kind))
        bias = f"{output} zeros"
        graph.initializer.append(onnx.numpy_helper.from_array(zeros, bias))
    axes, short = f"{output} axes", f"{output} constant"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(along, np.int64), axes))
    readers = [reader.op_type for reader in graph.node if output in reader.input]
    if readers and ELEMENTWISE.issuperset(readers):
        return [onnx.helper.make_node("Reshape", [bias, axes], [output], short)]
    times = f"{output} shape"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(repeats, np.int64), times))
    return [
        onnx.helper.make_node("Reshape", [bias, axes], [short], short),
        onnx.helper.make_node("Expand", [short, times], [output], times),
    ]
