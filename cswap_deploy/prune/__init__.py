"""Structured pruning without fine-tuning, stage by stage: groups → scores → plan → pruned network.

Units leave progressively: score what is there, remove a little, let the consumers absorb it, score again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import assert_never

from cswap_deploy import progress
from cswap_deploy.artifacts import (
    File,
    Groups,
    GroupScores,
    ImageSet,
    Network,
    PruningPlan,
    PruningStep,
    Scores,
)
from cswap_deploy.data import require_learned
from cswap_deploy.errors import PruningError
from cswap_deploy.model import count
from cswap_deploy.prune.batches import Batches, resolve_device
from cswap_deploy.prune.compensate import Structure, compensated
from cswap_deploy.prune.criteria import images_used, scorer
from cswap_deploy.prune.cut import cut_copy, restore, write_plan
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.select import CostKind, Kept, choose_units, narrowest
from cswap_deploy.recipe import (
    CompensationSettings,
    CriterionSettings,
    FpsTarget,
    LatencyTarget,
    LeastSquaresCompensation,
    MacsTarget,
    MaxDropTarget,
    MeanCompensation,
    ParamsTarget,
    PruneSettings,
)
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("torch", "timm", "numpy", "pillow")
DROP_STEP = 0.05
"""Fraction of the MACs that leaves in one step while `max_drop` looks for its limit; halved `DROP_HALVINGS` times at the end."""
DROP_HALVINGS = 3


@stage("groups", returns=Groups, libraries=(*LIBRARIES, "torch-pruning"))
def find_groups(out: Path, source: Network, skip: tuple[str, ...]) -> Groups:
    """Coupled groups of units that can leave, each proven; what cannot leave, and why."""
    return find(restore(source), source.input, skip)


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
    require_learned(_correct(module, batches), len(batches), source.outputs, "scoring", gated=learned)
    found = scorer(criterion, seed).score(module, groups.groups, batches)
    return Scores(criterion.kind, images_used(criterion, len(batches)), found)


@stage("plan", returns=PruningPlan, libraries=(*LIBRARIES, "scipy"))
def choose(
    out: Path,
    source: Network,
    groups: Groups,
    scores: Scores,
    fit: ImageSet,
    selection: ImageSet,
    settings: PruneSettings,
    round_to: int,
    device: str,
    seed: int,
) -> PruningPlan:
    """Which units stay: `settings.steps` rounds of score, select, compensate towards the target.

    A `max_drop` target is judged on the selection images and sets its own pace: it cuts until a step's drop exceeds the
    limit, then goes on in smaller steps.
    """
    search = _Search.prepare(source, groups, scores, fit, selection, settings, round_to, device, seed)
    match settings.target:
        case None:
            return PruningPlan({group.name: tuple(range(group.units)) for group in groups.groups}, (), None)
        case MacsTarget(macs=fraction):
            state = search.towards("macs", fraction, settings.steps)
        case ParamsTarget(params=fraction):
            state = search.towards("params", fraction, settings.steps)
        case MaxDropTarget(max_drop=points):
            state = search.within(points)
        case LatencyTarget() | FpsTarget():
            raise AssertionError("refused by the pipeline before anything runs")
        case _:
            assert_never(settings.target)
    last = Scores(scores.criterion, scores.images, state.scores) if state.steps else None
    return PruningPlan(state.keep, state.steps, last)


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
    from safetensors.torch import save_file

    batches = Batches.read(fit, source.input, resolve_device(device))
    dense = restore(source).to(batches.device)
    masked = compensated(dense, groups.groups, plan.keep, batches, compensate)
    pruned = cut_copy(masked, groups.groups, plan.keep).cpu()
    write_plan(out / "plan.json", dense, pruned, source, groups.groups, plan)
    save_file({name: tensor.contiguous() for name, tensor in pruned.state_dict().items()}, out / "weights.safetensors")
    params, macs = count(pruned, source.input)
    return Network(
        architecture=source.architecture,
        plan=File.of(out / "plan.json"),
        weights=File.of(out / "weights.safetensors"),
        input=source.input,
        outputs=source.outputs,
        params=params,
        macs=macs,
        license=source.license,
    )


# --- the progressive search


class _State:
    """Where the search stands: what is kept, the compensated network that keeps it, and how it came there."""

    def __init__(self, keep: Kept, module: nn.Module, scores: tuple[GroupScores, ...], steps: tuple[PruningStep, ...]):
        self.keep, self.module, self.scores, self.steps = keep, module, scores, steps


class _Search:
    """Everything a step needs; a step makes a new state and leaves the old one usable."""

    def __init__(
        self, dense: nn.Module, groups: Groups, first: Scores, fit: Batches, selection: Batches, settings: PruneSettings,
        round_to: int, seed: int,
    ) -> None:  # fmt: skip
        self.dense, self.groups, self.first = dense, groups, first
        self.fit, self.selection, self.settings = fit, selection, settings
        self.round_to, self.seed = round_to, seed
        self.reference = _correct(dense, selection)
        self.structure = Structure()

    @staticmethod
    def prepare(
        source: Network, groups: Groups, scores: Scores, fit: ImageSet, selection: ImageSet, settings: PruneSettings,
        round_to: int, device: str, seed: int,
    ) -> _Search:  # fmt: skip
        where = resolve_device(device)
        dense = restore(source).to(where)
        fit_batches = Batches.read(fit, source.input, where)
        selection_batches = Batches.read(selection, source.input, where)
        return _Search(dense, groups, scores, fit_batches, selection_batches, settings, round_to, seed)

    def start(self) -> _State:
        keep = {group.name: tuple(range(group.units)) for group in self.groups.groups}
        return _State(keep, self.dense, self.first.groups, ())

    def towards(self, kind: CostKind, fraction: float, steps: int) -> _State:
        """`steps` equal cuts of the cost, down to `fraction`."""
        if kind == "params":
            fraction -= self._new_biases() / self.groups.cost({})[0]
        self._require_reachable(kind, fraction)
        state = self.start()
        for number in range(1, steps + 1):
            state = self.step(state, kind, 1 - (1 - fraction) * number / steps)
            progress.advance("steps", number, steps)
        return state

    def within(self, points: float) -> _State:
        """Cut until the next step's drop exceeds `points`, then approach the limit by halving the step."""
        floor = narrowest(self.groups, "macs", self.round_to) if self.groups.groups else 1.0
        state, level = self.start(), 1.0
        for stride in (DROP_STEP / 2**halving for halving in range(DROP_HALVINGS + 1)):
            while level - stride >= floor:
                attempt = self.step(state, "macs", level - stride)
                if attempt.steps[-1].drop_pp > points:
                    break
                state, level = attempt, level - stride
        return state

    def step(self, state: _State, kind: CostKind, fraction: float) -> _State:
        """Score what is there (the first time the stored scores), remove down to `fraction`, compensate, judge."""
        scores = state.scores
        if state.steps:
            found = scorer(self.settings.criterion, self.seed).score(state.module, self.groups.groups, self.fit)
            scores = tuple(item.of(state.keep[item.group]) for item in found)
        keep = choose_units(self.groups, scores, state.keep, kind, fraction, self.round_to)
        module = compensated(self.dense, self.groups.groups, keep, self.fit, self.settings.compensate, self.structure)
        step = self._describe(state, keep, module)
        progress.note(
            f"{step.macs:.1%} of the MACs, {step.params:.1%} of the parameters kept, "
            f"drop on selection {step.drop_pp:+.1f} points"
        )
        return _State(keep, module, scores, (*state.steps, step))

    def _describe(self, state: _State, keep: Kept, module: nn.Module) -> PruningStep:
        params, macs = self.groups.cost(keep)
        dense_params, dense_macs = self.groups.cost({})
        removed = {name: tuple(sorted(set(state.keep[name]) - set(units))) for name, units in keep.items()}
        drop = 100 * (self.reference - _correct(module, self.selection)) / len(self.selection)
        return PruningStep(
            params / dense_params, macs / dense_macs, {name: units for name, units in removed.items() if units}, drop
        )

    def _new_biases(self) -> int:
        """Parameters that compensation adds at most: a bias for each consumer that has none."""
        if not isinstance(self.settings.compensate, MeanCompensation | LeastSquaresCompensation):
            return 0
        names = {member.module for group in self.groups.groups for member in group.consumers}
        layers: list[Any] = [self.dense.get_submodule(name) for name in names]
        return sum(len(layer.weight) for layer in layers if layer.bias is None)

    def _require_reachable(self, kind: CostKind, fraction: float) -> None:
        if not self.groups.groups and fraction < 1:
            reasons = "; ".join(f"{item.name}: {item.reason}" for item in self.groups.refused[:3])
            raise PruningError(f"nothing in this network can be pruned ({reasons})", "set prune.target: null")
        reachable = narrowest(self.groups, kind, self.round_to) if self.groups.groups else 1.0
        if fraction < reachable - 1e-9:
            raise PruningError(
                f"prune.target asks to keep {fraction:.3f} of the {kind}; with every group at its narrowest "
                f"(round_to {self.round_to}) {reachable:.3f} is left",
                f"raise prune.target.{kind}, lower prune.round_to, or shorten prune.skip",
            )


def _correct(module: nn.Module, batches: Batches) -> int:
    """Images whose most likely class is the true one."""
    import torch

    with torch.no_grad():
        return sum(int((module(images).argmax(1) == labels).sum()) for images, labels in batches)
