"""An ONNX file with narrower groups: what a pruned network takes to run, known before anything is pruned or exported."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Groups, Slice
from cswap_deploy.budget.shared import SharedWeights
from cswap_deploy.checkpoint import reason
from cswap_deploy.errors import ExportError
from cswap_deploy.runtime import Session

if TYPE_CHECKING:
    import onnx

Owner = tuple[str, Slice]
"""A group by its name, and where its units lie; the slice's axis is that of the ONNX tensor."""
WEIGHTED = frozenset({"Conv", "Gemm"})
SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
PASSING = SCALED | {"Cast", "Identity"}
"""Nodes behind which a weight is still that weight."""
QUANTISED = "_quantized"
"""What ONNX Runtime's quantiser appends to a weight's name."""
LARGE = 256
"""Elements from which on values are left out: the file then has kilobytes, whatever the network."""


@dataclass(frozen=True)
class Template:
    """A dense graph in the precision that ships, and which of its tensors shrink with which group.

    Latency does not depend on the values of weights. So units leave from the end, and weights become constants that the
    runtime computes when it loads the file (ConstantOfShape), or lie in one file beside all of them (`budget.shared`): a file of
    any width takes milliseconds to make and to send.
    """

    model: onnx.ModelProto
    units: Mapping[str, int]
    owners: Mapping[str, tuple[Owner, ...]]
    """By initializer."""
    depthwise: Mapping[str, str]
    """By its output, each convolution that has as many groups as channels, and its weight."""

    @staticmethod
    def read(path: Path, groups: Groups) -> Template:
        """Errors: ExportError where a group's layers cannot be found in the graph."""
        import onnx

        model = onnx.load(path)
        graph = _Graph.of(model)
        owners = graph.owners(groups)
        for group in groups.groups:
            makers = [
                member for member in group.members if member.tensor == f"{group.name}.weight" and member.axis == 0
            ]
            for member in (*makers, *group.consumers):
                if not any(name == group.name for name, _ in owners.get(graph.initializer(member.tensor), ())):
                    raise ExportError(
                        f"{path.name} has no tensor {member.tensor!r} that group {group.name!r} could be narrowed in",
                        "prune for macs in place of a latency, or report this network",
                    )
        heads, inner = ({group.units for group in groups.groups if group.kind == kind} for kind in ("heads", "dims"))
        _open_reshapes(model, graph, heads, inner)
        return Template(model, {group.name: group.units for group in groups.groups}, owners, graph.depthwise())

    def shared(self, folder: Path) -> SharedWeights:
        """Values for the weights of every narrowed file, written into the folder where these will lie."""
        return SharedWeights.write(folder, filter(_is_large, self.model.graph.initializer))

    def narrowed(self, widths: Mapping[str, int], shared: SharedWeights | None = None) -> bytes:
        """The graph with so many units in each group; those not named stay whole. `shared`: where its weights are, if in a file."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        first: dict[str, int] = {}
        made: list[onnx.NodeProto] = []
        for tensor in model.graph.initializer:
            shape = self._shape(tensor, widths)
            first[tensor.name] = shape[0] if shape else 1
            if shared and _is_large(tensor):
                shared.fill(tensor, shape)
            elif _is_large(tensor) and prod(shape) >= LARGE:
                made.append(_constant(tensor, shape))
                name = made[-1].input[0]
                tensor.CopyFrom(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(shape)], shape))
            elif tuple(tensor.dims) != shape:
                values = onnx.numpy_helper.to_array(tensor)[tuple(slice(size) for size in shape)]
                tensor.CopyFrom(onnx.numpy_helper.from_array(values.copy(), tensor.name))
        for node in model.graph.node:
            if node.output[0] in self.depthwise:
                next(item for item in node.attribute if item.name == "group").i = first[self.depthwise[node.output[0]]]
        nodes = [*made, *model.graph.node]
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(nodes)
        return bytes(model.SerializeToString(deterministic=True))

    def _shape(self, tensor: onnx.TensorProto, widths: Mapping[str, int]) -> tuple[int, ...]:
        """What is left of a tensor's shape."""
        shape = list(tensor.dims)
        for group, member in self.owners.get(tensor.name, ()):
            shape[member.axis] -= (self.units[group] - widths.get(group, self.units[group])) * member.repeat
        return tuple(shape)


def require_runnable(path: Path, shape: tuple[int, ...]) -> None:
    """Run a narrowed file once on one input of this shape. Errors: ExportError."""
    import numpy as np

    session = Session(path, threads=1)
    try:
        session.logits(np.zeros((1, *shape), np.float32))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ExportError(
            f"a narrowed graph does not run: {reason(error)}",
            "prune for macs in place of a latency, or report this network",
        ) from error


def _is_large(tensor: onnx.TensorProto) -> bool:
    """A weight whose values are left out."""
    import onnx

    return len(tensor.dims) > 1 and prod(tensor.dims) >= LARGE and tensor.data_type != onnx.TensorProto.INT64


@dataclass(frozen=True)
class _Graph:
    """Who makes what in a graph."""

    model: onnx.ModelProto
    producers: Mapping[str, onnx.NodeProto]
    shapes: Mapping[str, tuple[int, ...]]
    """Of the initializers."""

    @staticmethod
    def of(model: onnx.ModelProto) -> _Graph:
        producers = {name: node for node in model.graph.node for name in node.output}
        return _Graph(model, producers, {item.name: tuple(item.dims) for item in model.graph.initializer})

    @cached_property
    def transposed(self) -> dict[str, str]:
        """Weights of linear layers that the exporter has transposed and renamed: found by the bias that is added behind."""
        found = {}
        for node in self.model.graph.node:
            for bias, product in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
                name, made = self.source(bias), self.producers.get(self.before(product))
                weight = self.source(made.input[1]) if made and made.op_type == "MatMul" else None
                if name and weight and (layer := name.removesuffix(QUANTISED)).endswith(".bias"):
                    found[f"{layer.removesuffix('.bias')}.weight"] = weight
        return found

    def owners(self, groups: Groups) -> dict[str, tuple[Owner, ...]]:
        """Also of what follows an axis of a weight: the bias that a folded BatchNorm left, scales of quantised channels."""
        found: dict[str, list[Owner]] = {}
        for group in groups.groups:
            for member in group.members:
                name = self.initializer(member.tensor)
                turned = replace(member, axis=1 - member.axis) if member.tensor in self.transposed else member
                if name in self.shapes:
                    found.setdefault(name, []).append((group.name, turned))
        for node in self.model.graph.node:
            weight = self.source(node.input[1]) if node.op_type in WEIGHTED and len(node.input) > 1 else None
            if weight and len(node.input) > 2 and (bias := self.source(node.input[2])):
                found.setdefault(bias, [*_along(found.get(weight, ()), 0)])
        for node in self.model.graph.node:
            weight = self.source(node.output[0]) if node.op_type in SCALED else None
            if weight is None or weight not in found:
                continue
            axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
            for name in node.input[1:]:
                if self.shapes.get(name) == self.shapes[weight][axis : axis + 1]:
                    found.setdefault(name, [*_along(found[weight], axis)])
        return {name: tuple(owners) for name, owners in found.items()}

    def depthwise(self) -> dict[str, str]:
        found = {}
        for node in self.model.graph.node:
            weight = self.source(node.input[1]) if node.op_type == "Conv" else None
            groups = next((item.i for item in node.attribute if item.name == "group"), 1)
            if weight and groups > 1 and self.shapes[weight][:2] == (groups, 1):
                found[node.output[0]] = weight
        return found

    def initializer(self, tensor: str) -> str:
        """The name under which a parameter of the module is stored."""
        name = self.transposed.get(tensor, tensor)
        return name if name in self.shapes else name + QUANTISED

    def before(self, name: str) -> str:
        """The value that was converted into this one."""
        while (node := self.producers.get(name)) and node.op_type in PASSING:
            name = node.input[0]
        return name

    def source(self, name: str) -> str | None:
        """The initializer that a value is, seen through conversions; None where it is computed from an input."""
        while name not in self.shapes:
            node = self.producers.get(name)
            if node is None or node.op_type not in PASSING:
                return None
            name = node.input[0]
        return name


def _along(owners: Sequence[Owner], axis: int) -> Iterator[Owner]:
    """Who owns what lies along this axis alone."""
    return ((name, replace(member, axis=0)) for name, member in owners if member.axis == axis)


def _open_reshapes(model: onnx.ModelProto, graph: _Graph, heads: Collection[int], inner: Collection[int]) -> None:
    """One size of a constant shape follows from the rest: that of what may leave within heads where it has one, the number of
    heads where it has one, else the last, as behind a pooling."""
    import onnx

    shapes = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"} & set(graph.shapes)
    for tensor in model.graph.initializer:
        if tensor.name not in shapes or len(sizes := onnx.numpy_helper.to_array(tensor).tolist()) < 2:
            continue
        if sizes[0] == -1:
            sizes[0] = 0  # as it was: the batch
        if -1 not in sizes:
            within = [place for place, size in enumerate(sizes) if size in inner]
            of_heads = [place for place, size in enumerate(sizes[:-1]) if size in heads]
            sizes[(within or of_heads or [-1])[-1]] = -1
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, onnx.TensorProto.INT64, [len(sizes)], sizes))


def _constant(tensor: onnx.TensorProto, shape: tuple[int, ...]) -> onnx.NodeProto:
    """A weight whose values keep activations near 1: what vanishes becomes denormal, which processors are slow at."""
    import numpy as np
    import onnx

    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    value = 1 if np.issubdtype(kind, np.integer) else shape[0] / prod(shape)
    fill = onnx.numpy_helper.from_array(np.array([value], kind))
    return onnx.helper.make_node("ConstantOfShape", [f"{tensor.name} shape"], [tensor.name], value=fill)
