"""ORT format: what minimal builds of ONNX Runtime load, and the list of operators that such a build must have."""

from __future__ import annotations

import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

from cswap_deploy.errors import ExportError

MODEL, OPERATORS = "model.ort", "model.required_operators.config"
IDENTIFIER = b"ORTM"
"""Bytes 4 to 8 of a file in ORT format."""


def convert(path: Path, out: Path, scratch: Path) -> None:
    """Write `out/model.ort`, optimised for no particular processor, and `out/model.required_operators.config`.

    The converter writes the paths of this machine into the configuration's comments: they are left out.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    (source := scratch / "source").mkdir()
    (made := scratch / "made").mkdir()
    shutil.copyfile(path, source / "model.onnx")
    with redirect_stdout(io.StringIO()):
        convert_onnx_models_to_ort(
            source, made, [OptimizationStyle.Fixed], target_platform="arm", enable_type_reduction=True
        )
    models, configs = list(made.glob("*.ort")), list(made.glob("*.config"))
    if len(models) != 1 or len(configs) != 1:
        raise ExportError("ONNX Runtime's converter wrote no file in ORT format", "remove onnx.ort_format")
    shutil.copyfile(models[0], out / MODEL)
    lines = configs[0].read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not re.match(r"\s*#", line)]
    (out / OPERATORS).write_text("# operators and types that model.ort needs\n" + "\n".join(kept) + "\n", "utf-8")
