"""`cswap-deploy check`: what a build would find wrong before its long stages, and what would run. Changes nothing on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cswap_deploy import data, model, pipeline, prepared
from cswap_deploy.artifacts import Groups, InputSpec, Network, Split
from cswap_deploy.device import needs
from cswap_deploy.device.target import Probe, reach
from cswap_deploy.errors import CswapError, DataError, DeviceError
from cswap_deploy.factory import code_files
from cswap_deploy.prune import reachable
from cswap_deploy.recipe import FpsTarget, LatencyTarget, Recipe
from cswap_deploy.stage import Workdir, WouldRun
from cswap_deploy.wording import percent, plural

BEGINS = "a build begins with the dense network's latency, and says at once whether that meets it"


@dataclass(frozen=True)
class CheckReport:
    facts: Mapping[str, str]
    stages: tuple[tuple[str, str], ...]
    """(stage, "up to date" or why it would run)."""
    groups: Groups | None
    """Of the network, where they were asked for or are known from an earlier run."""
    faults: tuple[CswapError, ...] = ()
    """What a build would end with although it can begin: a target that cannot be reached, in either sense."""


def check(recipe: Recipe, folder: Path, *, prove: bool = False) -> CheckReport:
    """`prove`: also find the groups, which takes as long as in a build. Errors: those that a build would begin with."""
    pipeline.require_inputs(recipe)
    work, faults = Workdir(folder, dry=True), list[CswapError]()
    facts = {"model": model.describe(recipe.model)}
    with work.open():
        taken, outputs, groups = _network(recipe, work, prove)
        unsaid = recipe.model.factory and not recipe.model.input and taken == model.FACTORY_INPUT
        assumed = " (ImageNet's: model.input is not given)" if unsaid else ""
        facts |= {"input": f"{taken.shown}{assumed}"} if taken else {}
        calibration = recipe.calibration
        catalogue = data.catalogue(calibration.images, calibration.labels, outputs, work.digest)
        split = data.divide(catalogue, calibration.scoring, calibration.holdout, recipe.seed)
        facts["images"] = _describe(split, calibration.images)
        faults += filter(None, [_untrained(recipe)])
        if groups is not None and recipe.prune.target is not None:
            facts["prunable"] = _prunable(recipe, groups)
            faults += filter(None, [reachable.fault(recipe, groups, pipeline.round_to(recipe))])
        if isinstance(recipe.prune.target, LatencyTarget | FpsTarget):
            goal = f"{recipe.goal_ms:.4g} ms (p{recipe.prune.target.percentile})"
            known = prepared.answer_to(recipe, work)
            facts["budget"] = f"{goal}; {f'{known.verdict} when it was planned last' if known else BEGINS}"
        if recipe.latency or recipe.engine:
            try:
                with reach(recipe.target) as target:
                    probe = Probe.of(target)
                facts["target"] = f"{recipe.target} ({probe.device}, {_runtime(recipe, probe)})"
            except DeviceError as error:
                faults.append(error)
                facts["target"] = f"{recipe.target} (problem: {error.public})"
        return CheckReport(facts, tuple(pipeline.status(recipe, work)), groups, tuple(faults))


def groups_document(groups: Groups) -> dict[str, Any]:
    dense = groups.cost({})
    narrow = groups.cost({group.name: (0,) for group in groups.groups})
    return {
        "groups": [{"name": item.name, "kind": item.kind, "units": item.units} for item in groups.groups],
        "refused": [{"name": item.name, "reason": item.reason} for item in groups.refused],
        "prunable": {"params": 1 - narrow[0] / dense[0], "macs": 1 - narrow[1] / dense[1]},
    }


def _network(recipe: Recipe, work: Workdir, prove: bool) -> tuple[InputSpec | None, int, Groups | None]:
    """Its input where it is known, its outputs, and its groups where they are known or to be proven.

    What the work folder holds was proven when it was made.

    A network with timm's own weights is not built: its name tells its outputs, and its weights may have to be fetched.
    """
    settings, code = recipe.model, code_files(recipe.model.factory)
    source: Network | None = None
    with suppress(WouldRun):
        source = pipeline.load(recipe, work)
        return source.input, source.outputs, pipeline.find_groups(recipe, source, work)
    if prove:
        with TemporaryDirectory() as scratch, Workdir(Path(scratch)).open() as elsewhere:
            source = pipeline.load(recipe, elsewhere)
            return source.input, source.outputs, pipeline.find_groups(recipe, source, elsewhere)
    if source is not None:
        return source.input, source.outputs, None
    with pipeline.blaming(recipe):
        expected = model.expected_outputs(settings)
        if expected is not None and settings.checkpoint is None:
            return None, expected, None
        return *model.proven(settings, code, recipe.seed), None


def _prunable(recipe: Recipe, groups: Groups) -> str:
    multiple = pipeline.round_to(recipe)
    macs, params = (percent(reachable.left(groups, kind, multiple), 1) for kind in ("macs", "params"))
    found = plural(len(groups.groups), "proven group")
    return (
        f"{found}; at their narrowest (round_to {multiple}) {macs} of the MACs and {params} of the parameters are left"
    )


def _untrained(recipe: Recipe) -> DataError | None:
    """Random weights and a gate: scoring refuses a network near chance."""
    settings = recipe.model
    if not settings.name or settings.pretrained or settings.checkpoint or recipe.accuracy.max_drop is None:
        return None
    return DataError(
        f"{recipe.where('model.pretrained')}: {settings.name} has random weights, so that no drop can be judged",
        "give model.checkpoint, or set accuracy.max_drop: null",
    )


def _runtime(recipe: Recipe, probe: Probe) -> str:
    """Errors: DeviceError when what the recipe needs is not on the target."""
    runtime = recipe.latency.runtime if recipe.latency else "tensorrt"
    if recipe.engine:
        probe.require_tensorrt(recipe.target)
        needs.require(recipe, probe.document, recipe.target)
    return probe.facts(runtime)["runtime"]


def _describe(split: Split, folder: Path) -> str:
    classes = len({image.label for image in split.fit})
    parts = f"{len(split.fit)} fit, {len(split.selection)} selection, {len(split.holdout)} hold-out"
    return f"{parts}, {classes} classes ({folder})"
