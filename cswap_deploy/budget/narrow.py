"""An ONNX file with narrower groups: what a pruned network takes to run, known before anything is pruned or exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Groups
from cswap_deploy.budget.emptied import without_branches
from cswap_deploy.budget.shared import SharedWeights
from cswap_deploy.budget.sizes import HINT, Size, Sizes, resized
from cswap_deploy.errors import ExportError, reason
from cswap_deploy.repeats import shapes_of
from cswap_deploy.runtime import Session, without_folders

if TYPE_CHECKING:
    import onnx

SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
PASSING = SCALED | {"Cast", "Identity"}
"""Nodes behind which a weight is still that weight."""
QUANTISED = "_quantized"
"""What ONNX Runtime's quantiser appends to a weight's name."""
LARGE = 256
"""Elements from which on values are left out: the file then has kilobytes, whatever the network."""


@dataclass(frozen=True)
class Template:
    """A dense graph in the precision that ships, and which of its numbers shrink with which group.

    Latency does not depend on the values of weights. So units leave from the end, and the weights of all files lie in one beside
    them (`budget.shared`): a file of any width takes milliseconds to make and to send.
    """

    model: onnx.ModelProto
    units: Mapping[str, int]
    tensors: Mapping[str, Sequence[Size]]
    """By initializer."""
    nodes: Mapping[str, Sequence[Size]]
    """By the node's name: of its attributes, and of constants that others read otherwise."""
    shapes: Mapping[str, tuple[int | str, ...]]
    """Of the graph's values; empty where no group can leave whole."""

    @staticmethod
    def read(path: Path, groups: Groups, sizes: Sizes) -> Template:
        """`sizes`: of the float32 graph that this file was made from. Errors: ExportError where it has not its tensors or nodes."""
        import onnx

        model = onnx.load(path)
        graph = _Graph.of(model)
        named = {node.name: node for node in model.graph.node}
        tensors: dict[str, list[Size]] = {}
        nodes: dict[str, list[Size]] = {}
        for size in sizes.found:
            if not size.node:
                tensors.setdefault(graph.initializer(size.tensor, path), []).append(size)
                continue
            node = named.get(size.node)
            has = node and (
                node.input[size.input] in graph.shapes
                if size.tensor
                else any(item.name == size.key for item in node.attribute)
            )
            if not has:
                raise ExportError(f"{path.name} has no node {size.node!r} whose {size.key} could be changed", HINT)
            nodes.setdefault(size.node, []).append(size)
        units = {group.name: group.units for group in groups.groups}
        shapes = shapes_of(model) if any(group.branch for group in groups.groups) else {}
        return Template(model, units, {**tensors, **graph.scales(tensors)}, nodes, shapes)

    def shared(self, folder: Path) -> SharedWeights:
        """Values for the weights of every narrowed file, written into the folder where these will lie."""
        return SharedWeights.write(folder, filter(_is_large, self.model.graph.initializer))

    def narrowed(self, widths: Mapping[str, int], shared: SharedWeights) -> bytes:
        """The graph with so many units in each group; those not named stay whole. `shared`: where its weights are.

        What reads a group without units is a constant then, what makes it is left out. Errors: ExportError where it cannot be.
        """
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        removed = {name: self.units[name] - width for name, width in widths.items()}
        by_tensor = {**self.tensors, **self._split(model)}
        if not all(widths.values()):
            shapes = {
                item.name: tuple(resized(item.dims, by_tensor.get(item.name, ()), "dims", removed))
                for item in model.graph.initializer
            }
            before = {item.name: item.dims for item in model.graph.initializer}
            empty = {name: shape for name, shape in shapes.items() if 0 in shape and 0 not in before[name]}
            graph = _Graph.of(model)
            behind = {name: graph.source(name) or "" for node in model.graph.node for name in node.input}
            without_branches(model, empty, behind, self.shapes)
        for tensor in model.graph.initializer:
            sizes = by_tensor.get(tensor.name, ())
            shape = tuple(resized(tensor.dims, sizes, "dims", removed))
            if _is_large(tensor):
                shared.fill(tensor, shape)
            elif sizes:
                values = onnx.numpy_helper.to_array(tensor).copy()
                if shape:  # what has no dimensions would become a number
                    values = values[tuple(slice(size) for size in shape)]
                if any(size.key == "values" for size in sizes):
                    values.flat[:] = resized(values.ravel().tolist(), sizes, "values", removed)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for node in model.graph.node:
            for size in self.nodes.get(node.name, ()):
                item = next((item for item in node.attribute if not size.tensor and item.name == size.key), None)
                if item and item.ints:
                    item.ints[size.place] = size.shrunk(item.ints[size.place], removed)
                elif item:
                    item.i = size.shrunk(item.i, removed)
        del model.graph.value_info[:]
        return bytes(model.SerializeToString(deterministic=True))

    def _split(self, model: onnx.ModelProto) -> dict[str, list[Size]]:
        """Give each node its own copy of a constant that others read otherwise, in place; their sizes by the copies' names."""
        by_name = {tensor.name: tensor for tensor in model.graph.initializer}
        found: dict[str, list[Size]] = {}
        for node in model.graph.node:
            for size in self.nodes.get(node.name, ()):
                if size.tensor:
                    name = f"{node.name} input {size.input}"
                    if name not in found:
                        own = model.graph.initializer.add()
                        own.CopyFrom(by_name[node.input[size.input]])
                        own.name = node.input[size.input] = name
                    found.setdefault(name, []).append(size)
        return found


def require_runnable(path: Path) -> None:
    """Run a narrowed file once on zeros, on two images where it takes any number. Errors: ExportError."""
    import numpy as np

    try:
        session = Session(path, threads=1, literal=True)
        session.logits(np.zeros((2, *session.input_shape), np.float32))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ExportError(
            f"a narrowed graph does not run: {without_folders(reason(error))}",
            HINT,
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

    def scales(self, tensors: Mapping[str, Sequence[Size]]) -> dict[str, list[Size]]:
        """Scales and zero points of quantised channels shrink as the axis of the weight does that they lie along."""
        found: dict[str, list[Size]] = {}
        for node in self.model.graph.node:
            weight = self.source(node.output[0]) if node.op_type in SCALED else None
            if weight is None or weight not in tensors:
                continue
            axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
            along = [replace(size, place=0) for size in tensors[weight] if (size.key, size.place) == ("dims", axis)]
            for name in node.input[1:]:
                if self.shapes.get(name) == self.shapes[weight][axis : axis + 1] and name not in tensors:
                    found[name] = along
        return found

    def initializer(self, tensor: str, path: Path) -> str:
        """The name under which a tensor of the float32 file is stored. Errors: ExportError."""
        found = next((name for name in (tensor, tensor + QUANTISED) if name in self.shapes), None)
        if found is None:
            raise ExportError(f"{path.name} has no tensor {tensor!r} that could be narrowed", HINT)
        return found

    def source(self, name: str) -> str | None:
        """The initializer that a value is, seen through conversions; None where it is computed from an input."""
        while name not in self.shapes:
            node = self.producers.get(name)
            if node is None or node.op_type not in PASSING:
                return None
            name = node.input[0]
        return name
