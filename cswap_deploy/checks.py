"""`cswap-deploy check`: is the recipe sound, are images and model there, and what would run. Changes nothing on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cswap_deploy import data, model, pipeline, prune
from cswap_deploy.artifacts import Groups, Split
from cswap_deploy.device.target import Probe, reach
from cswap_deploy.errors import DeviceError
from cswap_deploy.factory import code_files
from cswap_deploy.recipe import Recipe
from cswap_deploy.stage import Workdir


@dataclass(frozen=True)
class CheckReport:
    facts: Mapping[str, str]
    stages: tuple[tuple[str, str], ...]
    """(stage, "up to date" or why it would run)."""
    fault: DeviceError | None = None
    """Why the target cannot do what the recipe asks of it; the host's half could still run."""


def check(recipe: Recipe, folder: Path) -> CheckReport:
    """Errors: those that a build would end with before its first long stage."""
    outputs = model.expected_outputs(recipe.model)
    calibration = recipe.calibration
    facts = {"model": model.describe(recipe.model)}
    work = Workdir(folder, dry=True)
    if outputs is not None:
        catalogue = data.catalogue(calibration.images, calibration.labels, outputs, work.digest)
        split = data.divide(catalogue, calibration.scoring, calibration.holdout, recipe.seed)
        facts["images"] = _describe(split, calibration.images)
    else:
        facts["images"] = f"{calibration.images} (classes are compared once the factory has run)"
    fault = None
    if recipe.latency or recipe.engine:
        try:
            with reach(recipe.target) as target:
                probe = Probe.of(target)
            facts["target"] = f"{recipe.target} ({probe.device}, {_runtime(recipe, probe)})"
        except DeviceError as error:
            fault = error
            facts["target"] = f"{recipe.target} (problem: {error.public})"
    with work.open():
        return CheckReport(facts, tuple(pipeline.status(recipe, work)), fault)


def provable_groups(recipe: Recipe) -> Groups:
    """Load the network and prove its groups, outside any work folder."""
    with TemporaryDirectory() as scratch:
        source = model.load(Path(scratch), recipe.model, code_files(recipe.model.factory), recipe.seed)
        return prune.find_groups(Path(scratch), source, recipe.prune.skip)


def groups_document(groups: Groups) -> dict[str, Any]:
    dense = groups.cost({})
    narrow = groups.cost({group.name: (0,) for group in groups.groups})
    return {
        "groups": [{"name": item.name, "kind": item.kind, "units": item.units} for item in groups.groups],
        "refused": [{"name": item.name, "reason": item.reason} for item in groups.refused],
        "prunable": {"params": 1 - narrow[0] / dense[0], "macs": 1 - narrow[1] / dense[1]},
    }


def _runtime(recipe: Recipe, probe: Probe) -> str:
    """Errors: DeviceError when what the recipe needs is not on the target."""
    runtime = recipe.latency.runtime if recipe.latency else "tensorrt"
    if recipe.engine:
        probe.require_tensorrt(recipe.target)
    return probe.facts(runtime)["runtime"]


def _describe(split: Split, folder: Path) -> str:
    classes = len({image.label for image in split.fit})
    parts = f"{len(split.fit)} fit, {len(split.selection)} selection, {len(split.holdout)} hold-out"
    return f"{parts}, {classes} classes ({folder})"
