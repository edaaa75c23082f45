"""Progressive paths of the one-shot benchmark: the pipeline's search, stopped at every cut, with a peer's scores or a part left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import peers
from oneshot_nets import Case
from torch import nn

from cswap_deploy import recipe
from cswap_deploy.artifacts import Curve, Group, GroupScores
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import compensated, seen
from cswap_deploy.prune.criteria import Scorer, between_steps, scorer
from cswap_deploy.prune.cut import cut_copy
from cswap_deploy.prune.damage import Damage
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.prune.search import SEARCH_IMAGES, Bench, Search, State
from cswap_deploy.prune.select import CostKind, Kept

SCORED = 256
"""Fit images that a peer scores on."""
DEFAULTS = recipe.PruneSettings()


@dataclass(frozen=True)
class How:
    """What decides which units leave and what makes up for them."""

    criterion: recipe.CriterionSettings = DEFAULTS.criterion
    peer: str = ""
    """Scores in place of the criterion."""
    allocation: recipe.AllocationSettings = DEFAULTS.allocation
    compensate: recipe.CompensationSettings = DEFAULTS.compensate
    fit: int = 1 << 30
    """Images to fit on at most."""
    without: str = ""
    """What is left out: of the refit `all layers` (the groups' consumers only) or `rectifier`; or `scaled curves`, so that all
    widths of all groups are measured in each step."""


ORDERED = recipe.MagnitudeCriterion()
"""In the place of a peer's: the lowest scores leave first, whoever gave them."""
ABLATIONS: dict[str, How] = {
    "global ranking": How(allocation=recipe.GlobalAllocation()),
    "plain attribution": How(recipe.CausalCriterion(estimator="attribution", intervention="zero")),
    "producers stay": How(compensate=recipe.LeastSquaresCompensation(producer_steps=0)),
    "mean": How(compensate=recipe.MeanCompensation()),
    "batchnorm": How(compensate=recipe.BatchNormCompensation()),
    "no compensation": How(compensate=recipe.NoCompensation()),
    "consumers only": How(without="all layers"),
    "no rectifier": How(without="rectifier"),
    "all curves anew": How(without="scaled curves"),
    "one step": How(),
    "temperature 1": How(allocation=recipe.CurvesAllocation(temperature=1.0)),
    "32 curve images": How(allocation=recipe.CurvesAllocation(images=32)),
    "64 curve images": How(allocation=recipe.CurvesAllocation(images=64)),
    "128 curve images": How(allocation=recipe.CurvesAllocation(images=128)),
    "512 curve images": How(allocation=recipe.CurvesAllocation(images=512)),
    "256 fit images": How(fit=256),
    "256 fit images without copies": How(fit=256, compensate=recipe.LeastSquaresCompensation(views=1)),
    "128 fit images": How(fit=128),
    "128 fit images without copies": How(fit=128, compensate=recipe.LeastSquaresCompensation(views=1)),
    "two views": How(compensate=recipe.LeastSquaresCompensation(views=2)),
    "384 fit images": How(fit=384),
}


@dataclass(frozen=True)
class PeerOnFew:
    """torch-pruning's importances on the first images."""

    inner: peers.PeerScorer

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        found: tuple[GroupScores, ...] = self.inner.score(module, groups, batches.first(SCORED))
        return found


@dataclass(frozen=True)
class Passing(Search):
    """The pipeline's search, stopped at every cut; a peer may score between its steps."""

    peer: Scorer | None = None
    anew: bool = False
    """Measure all curves in each step."""

    @property
    def criterion(self) -> Scorer:
        return self.peer or scorer(between_steps(self.bench.criterion), self.seed)

    def _curves(self, state: State, scores: tuple[GroupScores, ...], damage: Damage) -> tuple[Curve, ...]:
        if self.anew and state.steps:
            gauge = self.bench.gauge(state.module, state.systems, state.keep, scores, damage)
            return gauge.curves(self.bench.round_to)
        return super()._curves(state, scores, damage)

    def through(self, kind: CostKind, stride: float, cuts: Sequence[float]) -> Iterator[tuple[float, State]]:
        """(cut, state) of each cut in turn. Errors: PruningError."""
        axis = int(kind == "macs")
        share = self.bench.groups.cost({})[axis] / self.bench.priced.cost({})[axis]  # as in `towards`
        judge, state, passed = self._judge(), self.start(), 0
        for cut in sorted(cuts, reverse=True):
            while (below := 1 - (passed + 1) * stride) >= cut - 1e-9:
                state, passed = self._step(state, kind, below * share, judge), passed + 1
            yield cut, state if on_path(cut, stride) else self._step(state, kind, cut * share, judge)


def on_path(cut: float, stride: float) -> bool:
    """Whether a path in these steps has a state at the cut itself."""
    steps = (1 - cut) / stride
    return steps > 0.5 and abs(steps - round(steps)) < 1e-6


def passing(case: Case, how: How) -> Passing:
    """The search, but for what it has to know of the dense network to begin there."""
    fit = case.fit.first(how.fit)
    structure = _structure(case, how, seen(fit, how.compensate).first(SEARCH_IMAGES), case.structure)
    bench = Bench(
        case.dense,
        case.groups,
        fit,
        ORDERED if how.peer else how.criterion,
        how.compensate,
        how.allocation,
        1,
        structure,
    )
    peer = PeerOnFew(peers.PeerScorer(how.peer, case.seed)) if how.peer else None
    return Passing(bench, case.selection, (), (), case.seed, peer, how.without == "scaled curves")


def begun(search: Passing, how: How) -> Passing:
    """With scores and curves of the dense network."""
    bench = search.bench
    first = search.peer or scorer(_first(search, how), search.seed)
    scores = first.score(bench.dense, bench.groups.groups, bench.fit)
    curves: tuple[Curve, ...] = ()
    if isinstance(how.allocation, recipe.CurvesAllocation):
        module, systems = bench.compensated(bench.everything)
        gauge = bench.gauge(module, systems, bench.everything, scores, bench.damage(how.allocation))
        curves = gauge.curves(bench.round_to)
    return replace(search, scores=scores, curves=curves)


def _first(search: Passing, how: How) -> recipe.CriterionSettings:
    """Of the dense network. Where elimination orders the units no score does (every group here has a consumer that is re-fitted)."""
    return ORDERED if search.bench.eliminates else how.criterion


def shipped(case: Case, how: How, kept: Kept) -> nn.Module:
    """What ships with these units: fitted on all images, and cut."""
    fit, groups = seen(case.fit.first(how.fit), how.compensate), case.groups.groups
    structure = _structure(case, how, fit, case.shipped)
    return cut_copy(compensated(case.dense, groups, kept, fit, how.compensate, structure), groups, kept)


def _structure(case: Case, how: How, fit: Batches, whole: Structure) -> Structure:
    """Of the dense network; what `how` is without is taken out of it. `whole`: the one to use where nothing is."""
    all_images = how.fit >= len(case.fit) and getattr(how.compensate, "views", "auto") == "auto"
    if all_images and not how.without:
        return whole
    structure = Structure(reuse=whole.reuse)
    examine(case.dense, structure, fit, ())
    match how.without:
        case "all layers":
            consumers = {member.module for group in case.groups.groups for member in group.consumers}
            structure.order = tuple(name for name in structure.order if name in consumers)
        case "rectifier":
            for name, site in structure.sites.items():
                if site:
                    structure.sites[name] = replace(site, outlet=replace(site.outlet, rectified=False))
    return structure
