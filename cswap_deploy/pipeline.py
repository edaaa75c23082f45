"""The straight line from a recipe to a bundle; alone in knowing the order of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cswap_deploy import accuracy, bundle, data, export, model, prune
from cswap_deploy.artifacts import Groups, ImageSet, Network, OnnxModel, PruningPlan, Split
from cswap_deploy.bundle import Bundle
from cswap_deploy.errors import RecipeError
from cswap_deploy.factory import code_files
from cswap_deploy.recipe import (
    CausalCriterion,
    FpsTarget,
    LatencyTarget,
    Recipe,
    to_yaml,
)
from cswap_deploy.stage import Workdir, WouldRun

STAGES = (
    "source", "split", "groups", "scores", "curves", "staircase", "plan", "pruned", "exported", "simplified", "variants",
    "engine", "accuracy", "latency", "bundle",
)  # fmt: skip
"""All stage names that --force takes, in order."""
ALWAYS = ("source", "split", "pruned", "exported", "simplified", "accuracy", "bundle")
PRUNING = ("groups", "scores", "plan")


@dataclass(frozen=True)
class Prepared:
    """The host's half: everything that the device's half and the bundle are made of."""

    source: Network
    pruned: Network
    groups: Groups
    plan: PruningPlan
    exported: OnnxModel
    shipped: OnnxModel
    split: Split
    images: Path
    images_sha256: str


def build(recipe: Recipe, work: Workdir) -> Bundle:
    """Everything; `work` must be open. The bundle says pass or fail; only what cannot be built raises."""
    return finish(recipe, prepare(recipe, work), work)


def prepare(recipe: Recipe, work: Workdir) -> Prepared:
    """Load, split, prune, export, simplify."""
    require_available(recipe)
    settings, device, seed = recipe.prune, recipe.device, recipe.seed
    source = _located(work.run(model.load, recipe.model, code_files(recipe.model.factory), seed), recipe)
    images = recipe.calibration.images
    calibration = recipe.calibration
    catalogue = data.catalogue(images, calibration.labels, source.outputs, work.digest)
    split = work.run(data.split, catalogue, calibration.scoring, calibration.holdout, seed)
    fit, selection = ImageSet(split.fit, images), ImageSet(split.selection, images)
    groups, plan = Groups((), (), ()), PruningPlan({}, (), None)
    if settings.target is not None:
        learned = recipe.accuracy.max_drop is not None
        groups = work.run(prune.find_groups, source, settings.skip)
        scores = work.run(prune.score, source, groups, fit, settings.criterion, device, seed, learned)
        plan = work.run(prune.choose, source, groups, scores, fit, selection, settings, round_to(recipe), device, seed)
    pruned = _located(work.run(prune.apply, source, groups, plan, fit, settings.compensate, device), recipe)
    exported = work.run(export.to_onnx, pruned, split.labels, fit, recipe.onnx)
    shipped = work.run(export.simplify, exported, pruned, fit, recipe.onnx)
    return Prepared(source, pruned, groups, plan, exported, shipped, split, images, catalogue.sha256)


def finish(recipe: Recipe, ready: Prepared, work: Workdir) -> Bundle:
    """Judge what ships on the hold-out images and assemble the bundle in `<work>/bundle`."""
    holdout = ImageSet(ready.split.holdout, ready.images)
    report = work.run(
        accuracy.compare, ready.source, ready.pruned, ready.shipped, holdout, recipe.accuracy, recipe.device
    )
    files = work.run(
        bundle.assemble, recipe.name, _resolved(recipe, ready, work), recipe.prune, ready.source, ready.pruned,
        ready.groups, ready.plan, ready.exported, ready.shipped, report, ready.split.labels, work.holdout_reads,
    )  # fmt: skip
    return Bundle.read(work.publish(files.files, files.manifest.path.parent, "bundle"))


def _located(network: Network, recipe: Recipe) -> Network:
    """A stored network with its factory where it is now: the place does not count, so the project may have moved."""
    return replace(network, architecture=replace(network.architecture, location=recipe.model.factory or ""))


def _resolved(recipe: Recipe, ready: Prepared, work: Workdir) -> str:
    """The recipe for the bundle; of the image folder only the images that may take part count."""
    return to_yaml(recipe, lambda path: ready.images_sha256 if path == ready.images else work.digest(path))


def stages(recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages that this recipe runs, in order."""
    wanted = {*ALWAYS, *(PRUNING if recipe.prune.target is not None else ())}
    return tuple(name for name in STAGES if name in wanted)


def status(recipe: Recipe, work: Workdir) -> Iterator[tuple[str, str]]:
    """(stage, "up to date" or why it would run) for each stage; `work` must be dry. Nothing runs."""
    names = stages(recipe)
    try:
        build(recipe, work)
        stopped = len(names)
        reason = ""
    except WouldRun as first:
        stopped, reason = names.index(first.name), first.reason
    for position, name in enumerate(names):
        if position < stopped:
            yield name, "up to date"
        else:
            later = reason if reason == "not run yet" else f"runs if the result of {names[stopped]} changes"
            yield name, reason if position == stopped else later


def round_to(recipe: Recipe) -> int:
    """`auto` without an engine is 1: ONNX Runtime has no preferred width that is known in advance."""
    return 1 if recipe.prune.round_to == "auto" else recipe.prune.round_to


def require_available(recipe: Recipe) -> None:
    """Refuse what the recipe language knows and this version does not do yet, rather than leave it out in silence."""
    criterion = recipe.prune.criterion
    missing = {
        "engine": recipe.engine is not None,
        "latency": recipe.latency is not None,
        "prune.target": isinstance(recipe.prune.target, LatencyTarget | FpsTarget),
        "variants": bool(recipe.variants),
        "ship": recipe.ship != "fp32",
        "prune.criterion.estimator": isinstance(criterion, CausalCriterion) and criterion.estimator == "screened",
        "prune.criterion.intervention": isinstance(criterion, CausalCriterion) and criterion.intervention == "surgery",
    }
    refused = [key for key, asked in missing.items() if asked]
    if refused:
        raise RecipeError(
            f"{', '.join(refused)}: what it asks for is not available in this version",
            "remove it; this version exports fp32 ONNX and does not measure latency",
            where=recipe.where(refused[0]),
            key=refused[0],
        )


def unknown_force(names: Sequence[str], recipe: Recipe) -> str | None:
    """The first of these that is no stage of this recipe."""
    return next((name for name in names if name not in stages(recipe)), None)
