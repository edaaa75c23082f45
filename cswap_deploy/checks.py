"""`cswap-deploy check`: is the recipe sound, are images and model there, and what would run. Changes nothing on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cswap_deploy import data, model, pipeline, prune
from cswap_deploy.artifacts import Groups
from cswap_deploy.recipe import Recipe
from cswap_deploy.stage import Workdir


@dataclass(frozen=True)
class CheckReport:
    facts: Mapping[str, str]
    stages: tuple[tuple[str, str], ...]
    """(stage, "up to date" or why it would run)."""


def check(recipe: Recipe, folder: Path) -> CheckReport:
    """Errors: those that a build would end with before its first long stage."""
    pipeline.require_available(recipe)
    outputs = model.expected_outputs(recipe.model)
    calibration = recipe.calibration
    facts = {"model": model.describe(recipe.model)}
    if outputs is not None:
        listing = data.scan(calibration.images, calibration.labels, outputs)
        facts["images"] = _describe(listing, calibration.images)
    else:
        facts["images"] = f"{calibration.images} (classes are compared once the factory has run)"
    work = Workdir(folder, dry=True)
    with work.open():
        return CheckReport(facts, tuple(pipeline.status(recipe, work)))


def provable_groups(recipe: Recipe) -> Groups:
    """Load the network and prove its groups, outside any work folder."""
    with TemporaryDirectory() as scratch:
        source = model.load(Path(scratch), recipe.model, recipe.model.factory_file)
        return prune.find_groups(Path(scratch), source, recipe.prune.skip)


def groups_document(groups: Groups) -> dict[str, Any]:
    dense = groups.cost({})
    narrow = groups.cost({group.name: (0,) for group in groups.groups})
    return {
        "groups": [{"name": item.name, "kind": item.kind, "units": item.units} for item in groups.groups],
        "refused": [{"name": item.name, "reason": item.reason} for item in groups.refused],
        "prunable": {"params": 1 - narrow[0] / dense[0], "macs": 1 - narrow[1] / dense[1]},
    }


def _describe(listing: data.Listing, folder: Path) -> str:
    classes = len(Counter(label for _, label in listing.scoring))
    if listing.holdout is None:
        return f"{len(listing.scoring)} in {classes} classes, to be divided by seed ({folder})"
    return f"{len(listing.scoring)} scoring, {len(listing.holdout)} hold-out, {classes} classes ({folder})"
