"""Structured pruning without fine-tuning, stage by stage: groups → scores → plan → pruned network.

Units leave progressively: measure what narrowing costs, remove a little, let the consumers absorb it, measure again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import assert_never

from cswap_deploy import progress
from cswap_deploy.artifacts import Curve, Curves, File, Groups, GroupScores, ImageSet, Network, PruningPlan, Scores
from cswap_deploy.budget.staircase import Steps
from cswap_deploy.budget.values import Approach, Staircase
from cswap_deploy.checkpoint import save_state
from cswap_deploy.codec import encode
from cswap_deploy.data import require_learned
from cswap_deploy.digests import digest_of
from cswap_deploy.model import count
from cswap_deploy.prune.batches import Batches, resolve_device
from cswap_deploy.prune.compensate import compensated, seen
from cswap_deploy.prune.criteria import between_steps, images_used, scorer
from cswap_deploy.prune.cut import cut_copy, restore, write_plan
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.refit import Structure
from cswap_deploy.prune.rotation import rotated
from cswap_deploy.prune.search import SEARCH_IMAGES, Bench, Search, State, correct
from cswap_deploy.recipe import (
    CausalCriterion,
    CompensationSettings,
    CriterionSettings,
    CurvesAllocation,
    FpsTarget,
    HeadsMode,
    LatencyTarget,
    MacsTarget,
    MaxDropTarget,
    ParamsTarget,
    PruneSettings,
)
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("torch", "timm", "numpy", "pillow")


@stage("groups", returns=Groups, libraries=LIBRARIES)
def find_groups(
    out: Path, source: Network, skip: tuple[str, ...], heads: HeadsMode = "whole", emptied: bool = False
) -> Groups:
    """Coupled groups of units that can leave, each proven; what cannot leave, and why. `emptied`: also which can leave whole."""
    return find(restore(source), source.input, skip, heads, emptied)


@stage("rotated", returns=File, libraries=(*LIBRARIES, "safetensors"))
def rotate(out: Path, source: Network, groups: Groups, fit: ImageSet, device: str) -> File:
    """Other weights for the same function: the dimensions of its heads are in the order of what they carry."""
    batches = Batches.read(fit, source.input, resolve_device(device))
    module = rotated(restore(source).to(batches.device), groups.groups, batches).cpu()
    return _saved(module, out)


@stage("scores", returns=Scores, libraries=(*LIBRARIES, "scipy"))
def score(
    out: Path,
    source: Network,
    groups: Groups,
    fit: ImageSet,
    criterion: CriterionSettings,
    device: str,
    seed: int,
    learned: bool,
) -> Scores:
    """Scores of all units on the dense network.

    `learned`: the network is expected to know its classes; near chance is then a DataError, since it means that class
    folders and outputs do not match.
    """
    batches = Batches.read(fit, source.input, resolve_device(device))
    module = restore(source).to(batches.device)
    require_learned(correct(module, batches), len(batches), source, "scoring", gated=learned)
    found = scorer(criterion, seed).score(module, groups.groups, batches)
    return _described(criterion, len(batches), found)


@stage("curves", returns=Curves, libraries=(*LIBRARIES, "scipy"))
def measure_curves(
    out: Path,
    source: Network,
    groups: Groups,
    scores: Scores,
    fit: ImageSet,
    criterion: CriterionSettings,
    compensate: CompensationSettings,
    allocation: CurvesAllocation,
    round_to: int,
    device: str,
) -> Curves:
    """What narrowing each group of the dense network costs, measured at several widths after compensation."""
    batches = Batches.read(fit, source.input, resolve_device(device))
    dense = restore(source).to(batches.device)
    bench = Bench(dense, groups, batches, criterion, compensate, allocation, round_to)
    bench.structure.key = _key(source, fit, bench.seen.first(SEARCH_IMAGES))
    module, systems = bench.compensated(bench.everything)
    damage = bench.damage(allocation)
    found = bench.gauge(module, systems, bench.everything, scores.groups, damage).curves(round_to)
    return Curves(allocation.temperature, len(damage.batches), found)


@stage("plan", returns=PruningPlan, libraries=(*LIBRARIES, "scipy"))
def choose(
    out: Path,
    source: Network,
    groups: Groups,
    scores: Scores,
    curves: Curves | None,
    fit: ImageSet,
    selection: ImageSet,
    settings: PruneSettings,
    round_to: int,
    device: str,
    seed: int,
) -> PruningPlan:
    """Which units stay: `settings.steps` rounds of measure, choose, compensate towards the target.

    `curves`: of the dense network, None where one ranking of all units decides. A `max_drop` target is judged on the
    selection images and sets its own pace: it cuts until a step's drop exceeds the limit, then goes on in smaller steps.
    """
    known = curves.groups if curves else ()
    search = _search(source, groups, scores.groups, known, fit, selection, settings, round_to, device, seed)
    match settings.target:
        case None:
            return PruningPlan(search.bench.everything, (), None, scores)
        case MacsTarget(macs=fraction):
            state = search.towards("macs", fraction, settings.steps)
        case ParamsTarget(params=fraction):
            state = search.towards("params", fraction, settings.steps)
        case MaxDropTarget(max_drop=points):
            state = search.within(points)
        case LatencyTarget() | FpsTarget():
            raise AssertionError("the budget's loop chooses: approach, then settle")
        case _:
            assert_never(settings.target)
    return _plan_of(state, search.bench, scores, curves)


@stage("plan", returns=Approach, libraries=(*LIBRARIES, "scipy"))
def approach(
    out: Path,
    source: Network,
    groups: Groups,
    fit: ImageSet,
    selection: ImageSet,
    settings: PruneSettings,
    staircase: Staircase,
    earlier: Approach,
    ratio: float,
    device: str,
    seed: int,
) -> Approach:
    """One step on the way to a latency: from where an earlier one ended to this part of the dense one, as the staircase predicts it."""
    search = _search(source, groups, earlier.scores, earlier.curves, fit, selection, settings, 1, device, seed)
    steps = Steps(groups, staircase)
    allowed = {group.name: steps.allowed(group.name) for group in groups.groups}
    state = search.approach(_begun(earlier, search), steps, allowed, ratio)
    return Approach(state.keep, state.curves, state.scores, state.steps)


@stage("plan", returns=PruningPlan, libraries=(*LIBRARIES, "scipy"))
def settle(
    out: Path,
    source: Network,
    groups: Groups,
    scores: Scores,
    curves: Curves,
    fit: ImageSet,
    selection: ImageSet,
    settings: PruneSettings,
    approached: Approach,
    widths: dict[str, int],
    device: str,
    seed: int,
) -> PruningPlan:
    """The last step: to widths that were measured on the device."""
    search = _search(source, groups, scores.groups, curves.groups, fit, selection, settings, 1, device, seed)
    return _plan_of(search.settle(_begun(approached, search), widths), search.bench, scores, curves)


def _begun(approached: Approach, search: Search) -> State:
    """Where an approach ended, without its network."""
    return State(approached.keep, search.bench.dense, {}, approached.scores, approached.curves, approached.steps)


def _search(
    source: Network,
    groups: Groups,
    scores: tuple[GroupScores, ...],
    curves: tuple[Curve, ...],
    fit: ImageSet,
    selection: ImageSet,
    settings: PruneSettings,
    round_to: int,
    device: str,
    seed: int,
) -> Search:
    where = resolve_device(device)
    fit_batches, judged = (Batches.read(images, source.input, where) for images in (fit, selection))
    dense, allocation = restore(source).to(where), settings.allocation
    bench = Bench(dense, groups, fit_batches, settings.criterion, settings.compensate, allocation, round_to)
    bench.structure.key = _key(source, fit, bench.seen.first(SEARCH_IMAGES))
    return Search(bench, judged, scores, curves, seed)


def _key(source: Network, fit: ImageSet, batches: Batches) -> str:
    """Of the structure for fits of this network on `batches`, of the first images of `fit`: what a stage has found, the next one need not
    look for."""
    network = [source.weights.sha256, source.plan and source.plan.sha256, source.outputs]
    built = [encode(part, Path()) for part in (source.architecture, source.input)]
    images = [image.sha256 for image in fit.images[: batches.originals]]
    return digest_of([*network, *built, images, batches.copies, batches.device])


def _plan_of(state: State, bench: Bench, scores: Scores, curves: Curves | None) -> PruningPlan:
    later = bench.criterion if len(state.steps) < 2 else between_steps(bench.criterion)
    scored = state.steps and (len(state.steps) == 1 or not bench.eliminates)
    last = _described(later, len(bench.fit), state.scores) if scored else None
    order = {curve.group: curve.order for curve in curves.groups} if curves else {}
    return PruningPlan(state.keep, state.steps, last, scores, order)


def _described(criterion: CriterionSettings, images: int, found: tuple[GroupScores, ...]) -> Scores:
    """Scores with how they were found on so many fit images."""
    used = images_used(criterion, images)
    if isinstance(criterion, CausalCriterion):
        return Scores(criterion.kind, used, found, criterion.estimator, criterion.intervention, criterion.alpha)
    return Scores(criterion.kind, used, found)


@stage("pruned", returns=Network, libraries=(*LIBRARIES, "safetensors"))
def apply(
    out: Path,
    source: Network,
    groups: Groups,
    plan: PruningPlan,
    fit: ImageSet,
    compensate: CompensationSettings,
    device: str,
) -> Network:
    """The smaller network: units cut, consumers compensated; weights and a plan.json from which it is rebuilt."""
    dense = pruned = restore(source)
    if plan.keep:
        batches = seen(Batches.read(fit, source.input, resolve_device(device)), compensate)
        dense = dense.to(batches.device)
        if batches.copies:
            progress.note(f"fitted on {batches.originals} images and {batches.copies} shifted copies of them")
        structure = Structure(_key(source, fit, batches))
        masked = compensated(dense, groups.groups, plan.keep, batches, compensate, structure)
        pruned = cut_copy(masked, groups.groups, plan.keep).cpu()
    write_plan(out / "plan.json", dense, pruned, source, groups.groups, plan)
    params, macs = count(pruned, source.input)
    return Network(
        architecture=source.architecture,
        plan=File.of(out / "plan.json"),
        weights=_saved(pruned, out),
        input=source.input,
        outputs=source.outputs,
        params=params,
        macs=macs,
        license=source.license,
    )


def _saved(module: nn.Module, out: Path) -> File:
    path = out / "weights.safetensors"
    save_state(module, path)
    return File.of(path)
