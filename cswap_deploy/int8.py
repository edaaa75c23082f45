"""A float32 graph in 8 bits: static quantisation in Q/DQ form, in one of several ways; or of the weights alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cswap_deploy import onnx_file
from cswap_deploy.onnx_file import Feed
from cswap_deploy.recipe import Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

WEIGHTED = ("Conv", "Gemm", "MatMul")
TRANSFORMER = frozenset({"LayerNormalization", "Softmax"})
"""A graph with one of these is taken for a transformer: its activations have outliers that 8 bits flatten."""
METHODS = ("minmax", "percentile", "entropy")
"""Where a range ends: at the extremes, where all but 1 in 10,000 values are, where the histogram keeps most information."""
PERCENTILE = 99.99
CHUNK = 8
"""Batches whose activations are held at once for a histogram."""


@dataclass(frozen=True)
class Int8:
    """What a kind of file promises; `options` are those of ONNX Runtime's quantiser."""

    activations: Literal["QUInt8", "QInt8"]
    operators: tuple[str, ...] = ()
    """Operators that are quantised; empty: all that the quantiser knows."""
    options: Mapping[str, object] = field(default_factory=dict)
    note: str = ""

    @property
    def symmetric(self) -> bool:
        return bool(self.options.get("ActivationSymmetric"))


TENSORRT = (*WEIGHTED, "ConvTranspose", "Add")
KINDS: dict[Variant, Int8] = {
    "int8": Int8("QUInt8"),
    "int8-arm": Int8("QInt8", options={"ActivationSymmetric": True, "WeightSymmetric": True}),
    "int8-tensorrt": Int8(
        "QInt8",
        operators=TENSORRT,
        options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": False,
            "OpTypesToExcludeOutputQuantization": list(TENSORRT),
        },
        note="weights are stored as float32, each behind QuantizeLinear: the engine holds them in 8 bits",
    ),
}
"""`int8` is U8S8, for phones and x86; `int8-arm` S8S8 with zero point 0 and biases of 32 bits; `int8-tensorrt` S8S8 as
TensorRT reads it: inputs of weighted layers and of residual additions, biases in float."""


@dataclass(frozen=True)
class Way:
    """One way to quantise a graph: how ranges are found, and which weighted nodes stay in float (or are alone in 8 bits)."""

    method: str
    """One of METHODS, or `weights`: weights in 8 bits, activations in float."""
    in_float: tuple[str, ...] = ()
    only: str = ""


class Quantiser:
    """A float32 graph that can be quantised in any way; ranges of each method are found once, on `inputs`."""

    def __init__(
        self, original: onnx.ModelProto, kind: Int8, inputs: Callable[[], Iterable[Array]], scratch: Path
    ) -> None:
        self._prepared = scratch / "prepared.onnx"
        self._graph = prepared(original, self._prepared)
        self._kind, self._inputs, self._scratch = kind, inputs, scratch
        self._ranges: dict[str, Any] = {}

    @cached_property
    def outliers(self) -> tuple[str, ...]:
        """Operators that make a transformer of the graph; empty for others."""
        return tuple(sorted(TRANSFORMER & {node.op_type for node in self._graph.graph.node}))

    @cached_property
    def operators(self) -> tuple[str, ...]:
        """What is quantised in this graph; empty: all that the quantiser knows."""
        return WEIGHTED if self.outliers else self._kind.operators

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the weighted nodes, in order; products of two activations count too."""
        return tuple(node.name for node in self._graph.graph.node if node.op_type in WEIGHTED)

    def graph(self, way: Way) -> onnx.ModelProto:
        """A new graph, quantised this way."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copy = onnx.ModelProto()
        copy.CopyFrom(self._graph)
        if way.method == "weights":
            return weights_only(copy)
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType[self._kind.activations],
            tensors_range=self._found(way.method),
            nodes_to_quantize=[way.only] if way.only else [],
            nodes_to_exclude=list(way.in_float),
            op_types_to_quantize=list(self.operators) or _known_operators(),
            extra_options=dict(self._kind.options),
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        made: onnx.ModelProto = quantizer.model.model
        return made

    def _found(self, method: str) -> Any:
        """Ranges of all activations; histograms grow by CHUNK batches, since their makers hold every activation of a call."""
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        if method not in self._ranges:
            options: dict[str, object] = {"symmetric": self._kind.symmetric}
            options |= {"percentile": PERCENTILE} if method == "percentile" else {}
            calibrator = create_calibrator(
                self._prepared,
                list(self.operators) or _known_operators(),
                str(self._scratch / "augmented.onnx"),
                calibrate_method={
                    "minmax": CalibrationMethod.MinMax,
                    "percentile": CalibrationMethod.Percentile,
                    "entropy": CalibrationMethod.Entropy,
                }[method],
                extra_options=options,
            )
            with redirect_stdout(io.StringIO()):  # the histogram calibrators tell about their bins
                for some in _chunks(self._inputs(), CHUNK):
                    calibrator.collect_data(Feed(some))
                self._ranges[method] = calibrator.compute_data()
        return self._ranges[method]


def _known_operators() -> list[str]:
    """What ONNX Runtime's quantiser knows by itself, in an order that does not change between runs."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _chunks(items: Iterable[Array], size: int) -> Iterator[list[Array]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


# --- weights alone


def prepared(original: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The float32 graph as the quantiser takes it, folded and fused, all nodes with names; also written there."""
    import onnx
    from onnxruntime.quantization import quant_pre_process

    source = path.with_name("float32.onnx")
    onnx.save(original, source)
    # The exporter has written all shapes; symbolic inference would only add sympy and its failures.
    quant_pre_process(source, path, skip_symbolic_shape=True)
    graph = onnx.load(path)
    onnx_file.name_nodes(graph)
    onnx.save(graph, path)
    return graph


def weights_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constant weights of the weighted nodes in int8 per output channel behind DequantizeLinear, in place; the rest in float."""
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    done: set[str] = set()
    restores: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in WEIGHTED or node.input[1] not in constants:
            continue
        name = node.input[1]
        node.input[1] = f"{name}_restored"
        if name in done:
            continue
        done.add(name)
        values = numpy_helper.to_array(constants[name])
        axis = _output_axis(node, values.ndim)
        rounded, scales = _rounded(values, axis)
        constants[name].CopyFrom(numpy_helper.from_array(rounded, name))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
        inputs = [name, f"{name}_scale"]
        restores.append(
            onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}_restored"], f"{name}_restore", axis=axis)
        )
    stated = [value for value in graph.value_info if value.name not in done]  # the exporter states weights' types too
    del graph.value_info[:]
    graph.value_info.extend(stated)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*restores, *rest])
    return model


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight that makes the output's channels."""
    if node.op_type == "Conv":
        return 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else rank - 1


def _rounded(values: Array, axis: int) -> tuple[NDArray[np.int8], Array]:
    """Symmetric int8 in -127..127, and the scale of each channel."""
    import numpy as np

    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    return np.clip(np.rint(values / scales), -127, 127).astype(np.int8), scales.reshape(-1)
