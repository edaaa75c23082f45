"""The preprocessing inside the graph: an image of 8-bit pixels in, probabilities out, standard operators alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import InputSpec
from cswap_deploy.onnx_file import PRODUCER
from cswap_deploy.preprocess import IMAGE, INPUT, OUTPUT, PREPROCESS_KEY, PROBABILITIES, preprocess_inside

if TYPE_CHECKING:
    import onnx


def wrapped(model: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """`image` uint8 (n, H, W, C) → Cast → Transpose → Mul → Sub → `model` → Softmax → `probabilities` (n, classes).

    Resizing and cropping stay outside: their standard operator does not filter as the images were filtered.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    channels, height, width = spec.shape
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    first = batch.dim_param or batch.dim_value
    std = np.array(spec.std[:channels], np.float64).reshape(-1, 1, 1)
    mean = np.array(spec.mean[:channels], np.float64).reshape(-1, 1, 1)
    before = [
        helper.make_node("Cast", [IMAGE], ["image_float"], "image_float", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["image_float"], ["image_planes"], "image_planes", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["image_planes", "image_scale"], ["image_scaled"], "image_scaled"),
        helper.make_node("Sub", ["image_scaled", "image_offset"], [INPUT], "image_normalised"),
    ]
    nodes = [*before, *graph.node, helper.make_node("Softmax", [OUTPUT], [PROBABILITIES], PROBABILITIES, axis=1)]
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    values = [graph.input[0], graph.output[0], *graph.value_info]
    rebuilt = helper.make_graph(
        nodes,
        graph.name,
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [first, height, width, channels])],
        [helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [first, classes])],
        [
            numpy_helper.from_array((1 / (255 * std)).astype(np.float32), "image_scale"),
            numpy_helper.from_array((mean / std).astype(np.float32), "image_offset"),
            *graph.initializer,
        ],
        value_info=values,
    )
    made: onnx.ModelProto = helper.make_model(rebuilt, opset_imports=copy.opset_import, ir_version=copy.ir_version)
    made.producer_name = PRODUCER
    for entry in copy.metadata_props:
        value = json.dumps(preprocess_inside(spec)) if entry.key == PREPROCESS_KEY else entry.value
        made.metadata_props.add(key=entry.key, value=value)
    return made
