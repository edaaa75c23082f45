"""The progressive search: step by step units leave where that costs least, and the layers behind absorb what they can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.artifacts import Axis, CostTerm, Curve, Groups, GroupScores, HeadDims, PruningStep
from cswap_deploy.prune.allocate import Cost, Widths, choose_widths, least_damage
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import seen, with_systems
from cswap_deploy.prune.criteria import Scorer, between_steps, scorer
from cswap_deploy.prune.curves import Gauge, leaving_order
from cswap_deploy.prune.damage import Damage
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.prune.renewed import renewed
from cswap_deploy.prune.select import CostKind, Kept, choose_units, narrowest, ranking, unreachable
from cswap_deploy.prune.systems import Systems
from cswap_deploy.recipe import (
    AllocationSettings,
    CausalCriterion,
    CompensationSettings,
    CriterionSettings,
    CurvesAllocation,
    LeastSquaresCompensation,
    MeanCompensation,
)

if TYPE_CHECKING:
    from torch import nn

CURVE_MACS = 5e10
"""Multiply-accumulates of one pass over the images of the curves: 256 images of up to 200 million each."""
FEWEST_IMAGES = 32
"""But never fewer images."""
SEARCH_IMAGES = 384
"""Fit images that the networks between steps are fitted on; what ships is fitted on all."""
DROP_STEP = 0.05
"""Fraction of the MACs that leaves in one step while `max_drop` looks for its limit; halved `DROP_HALVINGS` times at the end."""
DROP_HALVINGS = 3


@dataclass(frozen=True)
class Bench:
    """The dense network with all that its compensated versions are made and judged with."""

    dense: nn.Module
    groups: Groups
    fit: Batches
    criterion: CriterionSettings
    compensate: CompensationSettings
    allocation: AllocationSettings
    round_to: int
    structure: Structure = field(default_factory=Structure)

    @property
    def everything(self) -> Kept:
        return {group.name: tuple(range(group.units)) for group in self.groups.groups}

    @cached_property
    def seen(self) -> Batches:
        """The fit images with the copies that compensation sees; criteria see none."""
        return seen(self.fit, self.compensate)

    def damage(self, allocation: CurvesAllocation) -> Damage:
        """On as many images as the recipe says; on fewer where one forward of the network costs more than a stated work."""
        affordable = max(FEWEST_IMAGES, int(CURVE_MACS / self.groups.cost({})[1]))
        return Damage.to(self.dense, self.seen.first(min(allocation.images, affordable)), allocation.temperature)

    def compensated(self, keep: Kept) -> tuple[nn.Module, Systems]:
        """The masked network that keeps these units, and its consumers' systems where they are re-fitted.

        Cheaper than what ships: on `SEARCH_IMAGES`, the makers of the units as they are.
        """
        settings = self.compensate
        if isinstance(settings, LeastSquaresCompensation):
            settings = settings.model_copy(update={"producer_steps": 0})
        images = self.seen.first(SEARCH_IMAGES)
        return with_systems(self.dense, self.groups.groups, keep, images, settings, self.structure)

    @property
    def eliminates(self) -> bool:
        """Whether the order in which units leave follows from the systems alone: for the causal effect of the surgery."""
        surgery = isinstance(self.criterion, CausalCriterion) and self.criterion.intervention == "surgery"
        curves = isinstance(self.allocation, CurvesAllocation)
        return surgery and curves and isinstance(self.compensate, LeastSquaresCompensation)

    def gauge(
        self, module: nn.Module, systems: Systems, keep: Kept, scores: Sequence[GroupScores], damage: Damage
    ) -> Gauge:
        """Units leave in the order of elimination for the causal effect of the surgery, else the lowest scores first."""
        orders: dict[str, tuple[int, ...]] = {}
        of_group = {item.group: item for item in scores}
        for group in self.groups.groups:
            kept = keep[group.name]
            if not kept:  # of a branch that has left
                orders[group.name] = ()
                continue
            fixed = isinstance(group, HeadDims) and group.queries
            found = leaving_order(module, group, kept, systems) if self.eliminates or fixed else None
            orders[group.name] = found or tuple(unit for unit, _ in reversed(ranking(of_group[group.name], kept)))
        examine(self.dense, self.structure, self.seen.first(SEARCH_IMAGES), ())
        return Gauge(module, self.groups.groups, orders, systems, damage, self.structure)

    @cached_property
    def priced(self) -> Groups:
        """The groups, with what compensation may add among the costs: a bias where neither the layer nor a BatchNorm has one."""
        match self.compensate:
            case MeanCompensation():
                names = {member.module for group in self.groups.groups for member in group.consumers}
            case LeastSquaresCompensation():
                examine(self.dense, self.structure, self.seen.first(SEARCH_IMAGES), ())
                sites = {**self.structure.sites, **self.structure.grouped}
                names = {name for name, site in sites.items() if site and not site.outlet.norm}
            case _:
                names = set()
        layers: list[tuple[str, Any]] = [(name, self.dense.get_submodule(name)) for name in sorted(names)]
        biases = tuple(self._bias(name, len(layer.weight)) for name, layer in layers if layer.bias is None)
        return replace(self.groups, terms=(*self.groups.terms, *biases))

    def _bias(self, layer: str, outputs: int) -> CostTerm:
        members = [(group.name, member) for group in self.groups.groups for member in group.members]
        owners = tuple(
            (name, member.repeat)
            for name, member in members
            if (member.module, member.parameter, member.axis) == (layer, "weight", 0)
        )
        return CostTerm(f"{layer}.bias", outputs, 0, (Axis(outputs, owners),))


@dataclass(frozen=True)
class State:
    """Where the search stands: what is kept, the compensated network that keeps it, and how it came there."""

    keep: Kept
    module: nn.Module
    systems: Systems
    scores: tuple[GroupScores, ...]
    curves: tuple[Curve, ...]
    """As the last step knew them; empty where one ranking decides."""
    steps: tuple[PruningStep, ...]


@dataclass(frozen=True)
class Search:
    """A step makes a new state and leaves the old one usable. `scores` and `curves` are those that it starts with."""

    bench: Bench
    selection: Batches
    scores: tuple[GroupScores, ...]
    curves: tuple[Curve, ...]
    seed: int

    @property
    def criterion(self) -> Scorer:
        """Of the compensated network between steps."""
        return scorer(between_steps(self.bench.criterion), self.seed)

    def start(self) -> State:
        return State(self.bench.everything, self.bench.dense, {}, self.scores, self.curves, ())

    def towards(self, kind: CostKind, fraction: float, steps: int) -> State:
        """`steps` equal cuts of the cost, down to `fraction` with what compensation adds; none where all may stay.

        Errors: PruningError.
        """
        if fraction >= 1:  # nothing leaves, so no bias comes that units would have to make room for
            return self.start()
        axis = int(kind == "macs")
        share = self.bench.groups.cost({})[axis] / self.bench.priced.cost({})[axis]
        if fault := unreachable(self.bench.priced, kind, fraction, self.bench.round_to, share):
            raise fault
        fraction *= share
        state, judge = self.start(), self._judge()
        for number in range(1, steps + 1):
            state = self._step(state, kind, 1 - (1 - fraction) * number / steps, judge)
            progress.advance("steps", number, steps)
        return state

    def approach(self, state: State, cost: Cost, allowed: Mapping[str, Sequence[int]], target: float) -> State:
        """One step, to `target` of a cost that is 1 for the dense network; scores and curves are those of what is left.

        `allowed`: widths that each group may have. Of the network of `state` nothing is used: it may be any.
        """
        judge, now = self._judge(), {name: len(units) for name, units in state.keep.items()}
        assert judge.damage
        state = self._to(state, least_damage(cost, state.curves, now, allowed, target), judge)
        scores = self._scores(state)
        return replace(state, scores=scores, curves=self._curves(state, scores, judge.damage))

    def settle(self, state: State, widths: Widths) -> State:
        """The last step: to these widths."""
        return self._to(state, widths, self._judge())

    def _to(self, state: State, widths: Widths, judge: _Judge) -> State:
        """To these widths, by the scores and curves that the state has."""
        keep = _kept(state.curves, self.bench.groups.closed(widths))
        return self._taken(state, keep, state.curves, state.scores, judge)

    def within(self, points: float) -> State:
        """Cut until the next step's drop exceeds `points`, then approach the limit by halving the step."""
        groups, round_to = self.bench.groups, self.bench.round_to
        floor = narrowest(groups, "macs", round_to) if groups.groups else 1.0
        state, level, judge = self.start(), 1.0, self._judge()
        for stride in (DROP_STEP / 2**halving for halving in range(DROP_HALVINGS + 1)):
            while level - stride >= floor:
                attempt = self._step(state, "macs", level - stride, judge)
                if attempt.steps[-1].drop_pp > points:
                    break
                state, level = attempt, level - stride
        return state

    def _judge(self) -> _Judge:
        allocation = self.bench.allocation
        damage = self.bench.damage(allocation) if isinstance(allocation, CurvesAllocation) else None
        return _Judge(self.selection, correct(self.bench.dense, self.selection), damage)

    def _step(self, state: State, kind: CostKind, fraction: float, judge: _Judge) -> State:
        """Remove units until `fraction` of the cost is left."""
        bench = self.bench
        if judge.damage is None:
            scores = self._scores(state)
            keep = choose_units(bench.priced, scores, state.keep, kind, fraction, bench.round_to)
            return self._taken(state, keep, state.curves, scores, judge)

        def choose(curves: Sequence[Curve], now: Widths) -> Widths:
            return choose_widths(bench.priced, curves, now, kind, fraction, bench.round_to)

        return self._cut(state, choose, judge)

    def _cut(self, state: State, choose: Callable[[Sequence[Curve], Widths], Widths], judge: _Judge) -> State:
        """The first time the stored curves decide, later what they have become."""
        assert judge.damage
        scores = self._scores(state)
        curves = self._curves(state, scores, judge.damage)
        widths = self.bench.groups.closed(choose(curves, {name: len(units) for name, units in state.keep.items()}))
        return self._taken(state, _kept(curves, widths), curves, scores, judge)

    def _scores(self, state: State) -> tuple[GroupScores, ...]:
        """Of what is there, the first time the stored ones; where elimination orders the units, later steps have none of their own."""
        bench = self.bench
        if not state.steps or bench.eliminates:
            return state.scores
        found = self.criterion.score(state.module, bench.groups.groups, bench.fit)
        return tuple(item.of(state.keep[item.group]) for item in found)

    def _curves(self, state: State, scores: tuple[GroupScores, ...], damage: Damage) -> tuple[Curve, ...]:
        bench = self.bench
        if not state.steps:
            return state.curves
        gauge = bench.gauge(state.module, state.systems, state.keep, scores, damage)
        return renewed(gauge, state.curves, bench.round_to)

    def _taken(
        self, state: State, keep: Kept, curves: tuple[Curve, ...], scores: tuple[GroupScores, ...], judge: _Judge
    ) -> State:
        """Remove units, compensate, judge."""
        module, systems = self.bench.compensated(keep)
        scored = not (state.steps and self.bench.eliminates)
        step = self._describe(state.keep, keep, scores if scored else (), judge.drop(module))
        progress.note(
            f"{step.macs:.1%} of the MACs, {step.params:.1%} of the parameters kept, "
            f"drop on selection {step.drop_pp:+.1f} points"
        )
        return State(keep, module, systems, scores, curves, (*state.steps, step))

    def _describe(self, before: Kept, keep: Kept, scores: Sequence[GroupScores], drop: float) -> PruningStep:
        groups = self.bench.groups
        params, macs = groups.cost(keep)
        dense_params, dense_macs = groups.cost({})
        removed = {name: tuple(sorted(set(before[name]) - set(units))) for name, units in keep.items()}
        removed = {name: units for name, units in removed.items() if units}
        left = tuple(item.of(removed[item.group]) for item in scores if item.group in removed)
        return PruningStep(params / dense_params, macs / dense_macs, removed, drop, left)


def _kept(curves: Sequence[Curve], widths: Mapping[str, int]) -> Kept:
    """The units that leave last."""
    return {item.group: tuple(sorted(item.order[len(item.order) - widths[item.group] :])) for item in curves}


@dataclass(frozen=True)
class _Judge:
    """What a step is judged with: `reference` of the selection images are right in the dense network."""

    selection: Batches
    reference: int
    damage: Damage | None

    def drop(self, module: nn.Module) -> float:
        """Percentage points of top-1 on the selection images."""
        return 100 * (self.reference - correct(module, self.selection)) / len(self.selection)


def correct(module: nn.Module, batches: Batches) -> int:
    """Images whose most likely class is the true one."""
    import torch

    with torch.no_grad():
        return sum(int((module(images).argmax(1) == labels).sum()) for images, labels in batches)
