"""What a board without a network is to be asked: the requests of `pipeline.deploy`, in its order, written down beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cswap_deploy import accuracy, engine, latency, metering, progress
from cswap_deploy.artifacts import File, OnnxModel
from cswap_deploy.device import recorded
from cswap_deploy.device.target import SCHEMA
from cswap_deploy.engines import alone, built_from, order
from cswap_deploy.errors import DeviceError
from cswap_deploy.prepared import Prepared
from cswap_deploy.recipe import Recipe
from cswap_deploy.stage import Workdir

Step = dict[str, Any]
DIALECTS = {"flags": False, "typed": True}
"""What a TensorRT takes precision from, as a probe names it → whether that is the graph's own types."""


def lay(recipe: Recipe, ready: Prepared, work: Workdir) -> Path | None:
    """The folder for the board, in the work folder; None when nothing is built or measured, or a model is too large to be sent."""
    if not ready.dense:
        return None
    try:
        return recorded.lay(work.root, _steps(recipe, ready, work.root))
    except DeviceError as error:
        progress.warn(f"nothing was written down for a board: {error}")
        return None


def _steps(recipe: Recipe, ready: Prepared, root: Path) -> Iterator[Step]:
    yield _step("this board", "probe")
    if recipe.engine:
        yield from _engine("the engine", "shipped", ready.models, recipe, ready, root)
        if ready.pixels:
            order = accuracy.order(ready.accuracy.labels, ready.source.input, recipe.engine.batch.opt)
            what, images = f"{len(ready.accuracy.labels)} hold-out images", _file(ready.pixels, root)
            yield _step(what, "infer", "outcomes", model=_made("shipped"), images=images, **order)
    if recipe.latency and recipe.latency.runtime == "tensorrt":
        yield from _engine("the dense engine", "dense", ready.dense, recipe, ready, root)
        yield from _measured(recipe, ready, [_made("dense"), _made("shipped")])
    elif recipe.latency and recipe.shipped_file in ready.dense and recipe.shipped_file in ready.models:
        models = [alone(part[recipe.shipped_file]) for part in (ready.dense, ready.models)]
        yield from _measured(recipe, ready, [_file(model, root) for model in models])
        files = [_file(alone(model), root) for name, model in ready.models.items() if name in latency.COMPARED]
        if len(files) > 1:
            yield _step(
                "latency of the files", "measure", models=files, trust=[], **latency.order(recipe.latency, len(files))
            )


def _engine(
    what: str, makes: str, models: dict[str, OnnxModel], recipe: Recipe, ready: Prepared, root: Path
) -> Iterator[Step]:
    """From the file that the board's TensorRT takes, which is known only there; then its layers."""
    assert recipe.engine
    asked = order(recipe, ready.source.input).request
    names = {dialect: built_from(recipe, typed) for dialect, typed in DIALECTS.items()}
    for dialect, name in names.items():
        if name in models:
            model = _file(alone(models[name]), root)
            yield {**_step(what, "build", makes, model=model, **asked), "precision": dialect}
    yield _step(f"layers of {what}", "layers", model=_made(makes), **engine.order_of_layers(recipe.engine))


def _measured(recipe: Recipe, ready: Prepared, models: list[Step]) -> Iterator[Step]:
    timing = metering.timing_of(recipe, ready.budget)
    yield _step("latency, in turn", "measure", models=models, trust=[], **latency.order(timing, len(models)))
    for model in models:
        yield _step("its layers", "layers", model=model, **latency.order_of_layers(timing))


def _step(what: str, verb: str, makes: str = "", **request: Any) -> Step:
    """`precision`: only on a board whose TensorRT takes it that way; empty: on any."""
    return {"what": what, "makes": makes, "precision": "", "request": {"schema": SCHEMA, "verb": verb, **request}}


def _file(file: File, root: Path) -> Step:
    """As the board finds it: relative to the work folder."""
    relative = file.path.resolve().relative_to(root.resolve())
    return {"path": relative.as_posix(), "sha256": file.sha256, "name": file.path.name}


def _made(name: str) -> Step:
    return {"made": name, "name": f"the {name} engine"}
