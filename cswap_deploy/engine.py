"""The TensorRT engine, built on the target. Not run on TensorRT by this project's own tests: see docs/architecture.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cswap_deploy.artifacts import Engine, File, InputSpec
from cswap_deploy.device.target import Target
from cswap_deploy.preprocess import INPUT
from cswap_deploy.recipe import EngineSettings
from cswap_deploy.stage import stage

BUILD_S, LAYERS_S, WAIT_S = 7200.0, 600.0, 600.0
"""Engines of transformers take the better part of an hour on a small board."""


@stage("engine", returns=Engine)
def build(
    out: Path,
    model: File,
    spec: InputSpec,
    settings: EngineSettings,
    dynamic_batch: bool,
    facts: Mapping[str, str],
    described: bool,
    target: Target,
) -> Engine:
    """ONNX file → engine. `described`: TensorRT's Python module is there to say how long each layer takes.

    Errors: DeviceError, with TensorRT's own words.
    """
    answer = target.ask(
        "build",
        BUILD_S,
        model=target.put(model)[0],
        settings=settings.model_dump(mode="json"),
        input={"name": INPUT, "shape": list(spec.shape)},
        dynamic=dynamic_batch,
        wait_s=WAIT_S,
    )
    file = target.get(answer["engine"], out / "model.engine")
    layers = None
    if described:
        kept = {"sha256": file.sha256, "name": "the engine"}
        found = target.ask("layers", LAYERS_S, runtime="tensorrt", model=kept, batch=settings.batch.opt, wait_s=WAIT_S)
        (out / "layers.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        layers = File.of(out / "layers.json")
    return Engine(file, layers, answer["tensorrt"], answer["gpu"], answer["seconds"], answer["note"])
