"""Engines of a recipe's files: what they are built from on a given target, and that a failed build leaves TensorRT's log."""

from __future__ import annotations

from collections.abc import Mapping

from cswap_deploy import engine, progress
from cswap_deploy.artifacts import Engine, File, Groups, InputSpec, OnnxModel
from cswap_deploy.device.building import Order
from cswap_deploy.device.target import Probe, Target
from cswap_deploy.digests import write_atomically
from cswap_deploy.errors import DeviceError
from cswap_deploy.recipe import Recipe
from cswap_deploy.stage import Workdir

FAILED = "engine.failed.log"
"""In the work folder: what TensorRT said before the last build of an engine failed."""


def build(
    recipe: Recipe,
    models: Mapping[str, OnnxModel],
    spec: InputSpec,
    groups: Groups,
    work: Workdir,
    target: Target,
    probe: Probe,
) -> Engine:
    """Of the file among `models` that carries the precision; a stored result where it was built before. Errors: DeviceError.

    `groups` say which layers are theirs; whether they may leave whole makes it no other engine.
    """
    model, named = alone(chosen(recipe, models, probe)), groups.without_branches
    try:
        return work.run(engine.build, model, order(recipe, spec), named, probe.facts("tensorrt"), target)
    except DeviceError as error:
        if error.log:
            write_atomically(work.root / FAILED, error.log)
            progress.warn(f"TensorRT's log: {work.root / FAILED}")
        raise


def order(recipe: Recipe, spec: InputSpec) -> Order:
    assert recipe.engine
    return Order(spec, recipe.engine, recipe.onnx.dynamic_batch)


def built_from(recipe: Recipe, typed: bool) -> str:
    """The file that carries the precision for this version of TensorRT: by flags to 10.x, in its own types from 11."""
    assert recipe.engine
    return "fp32" if recipe.engine.precision == "fp16" and not typed else recipe.engine_file


def chosen(recipe: Recipe, models: Mapping[str, OnnxModel], probe: Probe) -> OnnxModel:
    """The model of that file. Errors: DeviceError where it could not be made."""
    assert recipe.engine
    name = built_from(recipe, probe.typed)
    if name not in models:
        missing = f"an engine of precision {recipe.engine.precision} needs the variant {name}, which could not be made"
        raise DeviceError(missing, "see why above", public=missing)
    return models[name]


def alone(model: OnnxModel) -> File:
    """The file that goes to a target, which takes no weights beside it. Errors: DeviceError."""
    if model.beside:
        missing = "the model is beyond 2 GB, so that its weights lie in a file beside it, which is not sent to a target"
        raise DeviceError(missing, "leave latency and engine out", public=missing)
    return model.graph
