"""One written ONNX file: it stands alone, tells nothing about the machine that made it, and is compared with PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import File, ImageSet, Network, OnnxModel, Parity, TestVectors
from cswap_deploy.errors import ExportError, reason
from cswap_deploy.images import load, normalise
from cswap_deploy.preprocess import INPUT
from cswap_deploy.prune.cut import restore
from cswap_deploy.recipe import OnnxSettings
from cswap_deploy.runtimes import MAX_IR
from cswap_deploy.usability import coverage

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LARGEST_PROTOBUF = 2_000_000_000
"""Bytes; protobuf ends at 2 GiB. A larger model keeps its tensors in one file beside it."""
EXTERNAL_FROM = 1024
"""Bytes from which on a tensor of such a model lies in that file."""
PARITY_IMAGES = 16
MAX_SQNR = 200.0
"""What is reported where no difference is left."""
PRODUCER = "cswap-deploy"


# --- reading and writing


def read(path: Path) -> onnx.ModelProto:
    """Errors: ExportError when it is not an ONNX file."""
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's DecodeError; its package is not ours to import
        raise ExportError(f"{path.name} is not an ONNX file", "report this network") from error


def write(model: onnx.ModelProto, path: Path, what: str = "the exported graph") -> None:
    """Check the graph, types and shapes included, then write it: equal graphs give equal bytes. Errors: ExportError.

    Tensors of more than 2 GB go to `<name>.data` beside it.
    """
    import onnx

    if model.ir_version > MAX_IR:
        model.ir_version = MAX_IR
    if large := is_large(model):
        _save_apart(model, path, f"{path.name}.data")
    try:
        onnx.checker.check_model(str(path) if large else model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{what} is not valid ONNX: {reason(error)}", "report this network") from error
    if not large:
        path.write_bytes(model.SerializeToString(deterministic=True))


def is_large(model: onnx.ModelProto) -> bool:
    """Whether its tensors are more than one protobuf message can hold, with room for its structure."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_PROTOBUF


def _save_apart(model: onnx.ModelProto, path: Path, location: str) -> None:
    """The graph, and its tensors in the file `location` beside it; `model` keeps them."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data, load_external_data_for_model

    path.with_name(location).unlink(missing_ok=True)
    convert_model_to_external_data(model, location=location, size_threshold=EXTERNAL_FROM)
    onnx.save(model, path)
    load_external_data_for_model(model, str(path.parent))
    for tensor in model.graph.initializer:
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def require_as_asked(path: Path, settings: OnnxSettings) -> None:
    """A tool may silently choose another opset than asked for: read the file. Errors: ExportError."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    opset = opset_of(model)
    if opset != settings.opset:
        raise ExportError(
            f"the written file has opset {opset}, onnx.opset asks for {settings.opset}", f"set onnx.opset: {opset}"
        )
    foreign = sorted({entry.domain for entry in model.opset_import} - {"", "ai.onnx"})
    if foreign:
        raise ExportError(
            f"the written file needs operators of the domains {', '.join(foreign)}", "report this network"
        )
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    if bool(batch.dim_param) != settings.dynamic_batch:
        raise ExportError(
            "the written file's batch axis is not what onnx.dynamic_batch asks for", "report this network"
        )


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operators; 0 where none is imported."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def described(path: Path, parity: Parity, vectors: TestVectors, note: str) -> OnnxModel:
    """The artefact of a written file; opset, IR version and nodes are read from it."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    beside = tuple(File.of(file) for file in sorted(path.parent.glob("*.onnx.data")))
    return OnnxModel(
        File.of(path), opset_of(model), model.ir_version, len(model.graph.node), parity, vectors, note, beside=beside,
        operators=tuple(sorted({node.op_type for node in model.graph.node})), unsigned=_unsigned(model),
        coverage=coverage(path),
    )  # fmt: skip


def _unsigned(model: onnx.ModelProto) -> bool:
    """Whether a zero point is not the 0 of int8."""
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    points |= {node.input[2] for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) > 2}
    zeros = [constants[name] for name in points if name in constants]
    return any(
        zero.data_type == TensorProto.UINT8 or bool(numpy_helper.to_array(zero).any())
        for zero in zeros
        if zero.data_type in (TensorProto.UINT8, TensorProto.INT8)
    )


def name_nodes(model: onnx.ModelProto) -> None:
    """The converters tell nodes apart by their names, which ONNX leaves optional."""
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"


class Feed:
    """ONNX Runtime's CalibrationDataReader over batches of normalised images."""

    def __init__(self, inputs: Iterable[Array]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, Array] | None:
        return next(({INPUT: batch} for batch in self._inputs), None)


# --- what tools leave in a model


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove, in place, what tools write about themselves: stack traces and paths of the build machine, removed nodes."""
    import onnx

    for holder in _holders(model):
        del holder.metadata_props[:]
        holder.doc_string = ""
    keep = [entry for entry in model.opset_import if entry.domain in {"", *(node.domain for node in model.graph.node)}]
    own = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in keep]
    del model.opset_import[:]
    model.opset_import.extend(own)
    model.producer_name, model.producer_version = PRODUCER, ""
    return model


def restore_metadata(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Give `model` the metadata of `original` alone, in place."""
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)


def _holders(model: onnx.ModelProto) -> Iterator[Any]:
    """Everything in a model that can carry metadata or a doc string."""
    yield from (model, *_inside(model.graph))
    for function in model.functions:
        yield from (function, *_nodes(function))


def _inside(graph: onnx.GraphProto) -> Iterator[Any]:
    yield from (graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *_nodes(graph))


def _nodes(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[Any]:
    """Nodes, and what lies in the graphs that branches and loops carry."""
    for node in body.node:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _inside(graph)


# --- parity


def reference(network: Network, images: ImageSet) -> tuple[Array, Array]:
    """The first PARITY_IMAGES images, normalised, and PyTorch's logits for them."""
    import torch

    pixels, _ = load(ImageSet(images.images[:PARITY_IMAGES], images.root), network.input)
    inputs = normalise(pixels, network.input)
    with torch.no_grad():
        return inputs, restore(network)(torch.from_numpy(inputs.copy())).numpy()


def parity(found: Array, wanted: Array) -> Parity:
    """Distance of an ONNX file's logits from PyTorch's; NaN where one of them is not finite."""
    import numpy as np

    difference = found.astype(np.float64) - wanted.astype(np.float64)
    noise, signal = float((difference**2).mean()), float((wanted.astype(np.float64) ** 2).mean())
    sqnr = min(MAX_SQNR, 10 * float(np.log10(signal / noise))) if noise > 0 else MAX_SQNR
    return Parity(len(wanted), float(np.abs(difference).max()), sqnr)
