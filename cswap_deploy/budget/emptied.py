"""An ONNX graph some of whose weights have no elements left: what reads a branch without units is a constant, the rest is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cswap_deploy.budget.sizes import HINT
from cswap_deploy.errors import ExportError
from cswap_deploy.repeats import Readers, Shape, drop_dead, may_be_short, readers_of

if TYPE_CHECKING:
    import onnx

CONTRACTED = {"Conv": 1, "Gemm": 0, "MatMul": -2}
"""The axis of a weight that a node sums over; a Gemm may read its weight transposed."""
Fixed = tuple[int, ...]


def without_branches(
    model: onnx.ModelProto, empty: Mapping[str, Fixed], behind: Mapping[str, str], whole: Mapping[str, Shape]
) -> None:
    """Change `model` in place: where a node sums over no elements its output becomes a constant, and what nothing reads any more leaves.

    `empty`: shapes of the weights that have no elements; `behind`: the weight that a value is, seen through conversions; `whole`: shapes of
    the dense network's values. Errors: ExportError where what is left reads a weight without elements.
    """
    import onnx

    graph, nodes = model.graph, list[onnx.NodeProto]()
    readers, vectors = readers_of(graph), {item.name: item.dims[0] for item in graph.initializer if len(item.dims) == 1}
    sums = {}
    for node in graph.node:
        if weight := _summed(node, empty, behind):
            output, bias = _with_bias(node, readers, vectors, whole)
            sums[output] = node, weight, bias
    beside = {name: shape for name, shape in whole.items() if name not in sums}
    for node in graph.node:
        output = node.output[0]
        if output in sums:
            short = output in whole and may_be_short(output, whole[output], readers, beside)
            nodes += _constant(graph, output, *sums[output], empty[sums[output][1]], whole, short=short)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_dead(graph)
    if lost := {item.name for item in graph.initializer} & set(empty):
        raise ExportError(f"a network without a branch still reads {min(lost)!r}", HINT)


def _summed(node: onnx.NodeProto, empty: Mapping[str, Fixed], behind: Mapping[str, str]) -> str | None:
    """The weight without elements over which a node sums, if it does."""
    axis = CONTRACTED.get(node.op_type)
    weight = next((behind[name] for name in node.input if behind.get(name) in empty), None)
    if axis is None or weight is None:
        return None
    if node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute):
        axis = 1
    return weight if empty[weight][axis] == 0 else None


def _with_bias(
    node: onnx.NodeProto, readers: Readers, vectors: Mapping[str, int], whole: Mapping[str, Shape]
) -> tuple[str, str]:
    """Where a layer's output is and the name of its bias, which a layer over tokens adds in a node of its own.

    `vectors`: lengths of the constants of one axis.
    """
    output, added = node.output[0], readers.get(node.output[0], [])
    if node.op_type == "MatMul" and len(added) == 1 and added[0].op_type == "Add" and added[0].output[0] in whole:
        for name in added[0].input:
            if vectors.get(name) == whole[added[0].output[0]][-1]:
                return added[0].output[0], name
    return output, node.input[2] if len(node.input) > 2 else ""


def _constant(
    graph: onnx.GraphProto,
    output: str,
    node: onnx.NodeProto,
    weight: str,
    bias: str,
    shape: Fixed,
    whole: Mapping[str, Shape],
    *,
    short: bool,
) -> list[onnx.NodeProto]:
    """What gives the `output` of a layer that sums over nothing: its bias along the axis of its channels, or zeros.

    Of one value along the other axes where it may be `short`.
    """
    import numpy as np
    import onnx

    if output not in whole:
        raise ExportError(f"the shape of {output!r} cannot be inferred", HINT)
    axis = 1 if node.op_type == "Conv" else -1
    along, repeats = [1] * len(whole[output]), [*whole[output]]
    along[axis], repeats[axis] = -1, 1
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or None
    if any(isinstance(size, str) for size in repeats[1:]) or (isinstance(repeats[0], str) and repeats[0] != batch):
        raise ExportError(f"the shape of {output!r} is not fixed", HINT)
    if bias not in {
        item.name for item in graph.initializer
    }:  # none, or one that is converted first: its values do not matter
        kind = next(item.data_type for item in graph.initializer if item.name == weight)
        kind = kind if kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) else onnx.TensorProto.FLOAT
        channels = shape[0] if node.op_type == "Conv" or shape[-1] == 0 else shape[-1]
        zeros = np.zeros(channels, onnx.helper.tensor_dtype_to_np_dtype(kind))
        bias = f"{output} zeros"
        graph.initializer.append(onnx.numpy_helper.from_array(zeros, bias))
    axes, narrow, times = f"{output} axes", f"{output} constant", f"{output} shape"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(along, np.int64), axes))
    if short:
        return [onnx.helper.make_node("Reshape", [bias, axes], [output], narrow)]
    made = [onnx.helper.make_node("Reshape", [bias, axes], [narrow], narrow)]
    fixed = [size for size in repeats if isinstance(size, int)]
    rest = f"{output} sizes" if len(fixed) < len(repeats) else times
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(fixed, np.int64), rest))
    if rest != times:
        images = f"{output} images"
        made.append(onnx.helper.make_node("Shape", [graph.input[0].name], [images], images, start=0, end=1))
        made.append(onnx.helper.make_node("Concat", [images, rest], [times], f"{output} sizes", axis=0))
    return [*made, onnx.helper.make_node("Expand", [narrow, times], [output], times)]
