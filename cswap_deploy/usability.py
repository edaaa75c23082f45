"""How much of an ONNX file the accelerators of phones take, by ONNX Runtime's own checker and its tables of operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cswap_deploy.artifacts import Coverage
from cswap_deploy.errors import reason
from cswap_deploy.runtime import without_folders

XNNPACK = frozenset("AveragePool Conv ConvTranspose Gemm MatMul MaxPool Resize Softmax".split())
"""Operators of its execution provider in float32, by ONNX Runtime's documentation: the checker has no table of it."""
QUANTISED = frozenset({"QuantizeLinear", "DequantizeLinear"})


def coverage(path: Path) -> tuple[Coverage, ...]:
    """Nodes that each execution provider takes, after ONNX Runtime's basic optimisation, by operator and rank alone.

    `suitable` is the checker's own word, which counts nodes and partitions, not time; a checker that fails is named.
    """
    try:
        return _coverage(path)
    except Exception as error:  # ONNX Runtime's tools raise whatever a graph makes them stumble over
        return (Coverage("all", 0, 0, 0, "unknown", (), f"the checker failed: {without_folders(reason(error))}"),)


def _coverage(path: Path) -> tuple[Coverage, ...]:
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with TemporaryDirectory(dir=path.parent) as folder:
        optimised = Path(folder) / "optimised.onnx"
        optimize_model(path, optimised, use_external_initializers=True)
        model = ModelProtoWithShapeInfo(optimised).model_with_shape_info
    fixed = not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    checks: dict[str, Callable[[], Any]] = {
        "NNAPI": lambda: checker.check_nnapi_partitions(model, fixed),
        "CoreML NeuralNetwork": lambda: checker.check_coreml_partitions(
            model, fixed, "coreml_supported_neuralnetwork_ops.md"
        ),
        "CoreML MLProgram": lambda: checker.check_coreml_partitions(model, fixed, "coreml_supported_mlprogram_ops.md"),
    }
    note = "" if fixed else "with the batch fixed: onnxruntime.tools.make_dynamic_shape_fixed"
    found = [_of(name, check(), note) for name, check in checks.items()]
    return (*found, _xnnpack(Counter(node.op_type for node in model.graph.node)))


def _of(name: str, checked: Any, note: str) -> Coverage:
    missing = tuple(sorted(operator.removeprefix("ai.onnx:") for operator in checked.unsupported_ops))
    return Coverage(
        name,
        checked.num_supported_nodes,
        checked.num_nodes,
        checked.num_partitions,
        checked.suitability().name.lower(),
        missing,
        note,
    )


def _xnnpack(operators: Counter[str]) -> Coverage:
    """Counted by type alone: which convolutions it takes it decides when it loads the model."""
    taken = sum(count for name, count in operators.items() if name in XNNPACK)
    missing = tuple(sorted(set(operators) - XNNPACK))
    note = "by ONNX Runtime's documentation; the rest runs on the CPU provider beside it"
    note += "; convolutions between Q/DQ too" if QUANTISED & set(operators) else ""
    return Coverage("XNNPACK", taken, sum(operators.values()), 0, "unknown", missing, note)
