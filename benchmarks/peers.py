"""The criteria of torch-pruning (https://github.com/VainF/Torch-Pruning, 1.6.1), as its users get them and under our pruner.

`bare` is torch-pruning's own pruner: global ranking, defaults throughout, nothing compensated, nothing fine-tuned.
`PeerScorer` is its ranking alone: the same importance objects asked about our groups, so that selection and compensation
are ours. Importances come from torch-pruning's code in both.

What was met in 1.6.1, and what is done about it:

- `GroupHessianImportance.accumulate_grad` looks gradients up by name and stores them by parameter, so that each call
  replaces the one before: the documented loop ranks by the last image alone. `hessian` hands it the root mean square over
  all images in one call, which is what its documentation promises; `hessian_last_image` is the documented loop as it runs.
- ResNets with option A shortcuts: the residual stream is traced as if channel i of a narrow stage met channel i of a wide
  one, while the padding moves it; what is pruned there runs and is wrong. Protect the stream: `outputs_to_protect`.
- A layer of which all units rank below the global threshold is left whole, so that MACs need not fall as the ratio rises.
- `bn_scale` has no importance for groups without BatchNorm. Its own pruner never touches them; `PeerScorer` says so and
  gives their units equal values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from cswap_deploy import progress
from cswap_deploy.artifacts import Group, GroupScores, InputSpec
from cswap_deploy.model import count
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import cut_copy, positions
from cswap_deploy.prune.select import Kept

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "random": tp.importance.RandomImportance,
    "magnitude_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "magnitude_l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "bn_scale": tp.importance.BNScaleImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "hessian_last_image": tp.importance.GroupHessianImportance,
}
PEERS = tuple(name for name in IMPORTANCES if name != "hessian_last_image")
COARSE, HALVINGS = 20, 9
"""The pruning ratio rises in twentieths; the one that crosses the target is halved this often, to 1e-4."""


class OutOfReachError(ValueError):
    """torch-pruning cannot bring this network down to the target with this criterion."""


# --- with torch-pruning's own pruner


def bare(
    name: str, module: nn.Module, example: Tensor, batches: Batches, keep_macs: float, seed: int,
    protected: Collection[str] = (),
) -> nn.Module:  # fmt: skip
    """A copy of `module` that torch-pruning has pruned in one shot to `keep_macs` of the MACs, or just above: kind to the peer.

    The pruning ratio rises from 0 until the MACs first fall below the target; of all ratios then tried by bisection the one
    with the fewest MACs at or above the target counts. The outputs of `protected` layers and of the classifier (the last
    linear layer) stay whole. Timm's attention loses whole heads, at the same ratio. `batches` are for Taylor and Hessian.
    Errors: OutOfReachError.
    """
    return _search(name, module, example, batches, keep_macs, seed, protected).module


def bare_units(
    name: str, module: nn.Module, example: Tensor, batches: Batches, keep_macs: float, seed: int, groups: Sequence[Group]
) -> tuple[nn.Module, Kept]:  # fmt: skip
    """`bare` on the units of our groups alone, and which of them it kept: its selection, ready for our compensation."""
    found = _search(name, module, example, batches, keep_macs, seed, outputs_to_protect(module, groups))
    gone = _removed(found.history, groups)
    keep = {group.name: tuple(unit for unit in range(group.units) if unit not in gone[group.name]) for group in groups}
    return found.module, keep


def outputs_to_protect(module: nn.Module, groups: Sequence[Group]) -> tuple[str, ...]:
    """The layers that make no unit of our groups: protect them, and torch-pruning prunes the same units as we do."""
    makers = {member.module for group in groups for member in group.members if member.axis == 0}
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return tuple(name for name in layers if name not in makers)


@dataclass(frozen=True)
class _Attempt:
    """`history`: of each group that was cut, its root layer, whether by its outputs, and the indices that left."""

    module: nn.Module
    macs: int
    history: list[tuple[str, bool, list[int]]]


def _search(
    name: str, module: nn.Module, example: Tensor, batches: Batches, keep: float, seed: int, protected: Collection[str]
) -> _Attempt:
    prepared = _Prepared.make(name, module, batches)
    spare = {*protected, _classifier(module)}

    def attempt(ratio: float) -> _Attempt:
        return _pruned(prepared.copy(), example, ratio, spare, seed)

    best = attempt(0.0)
    target = keep * best.macs
    for step in range(1, COARSE):
        found = attempt(step / COARSE)
        if found.macs < target:
            break
        best = min(best, found, key=lambda one: one.macs)
    else:
        raise OutOfReachError(f"{name}: no pruning ratio brings the MACs down to {keep} of the dense network's")
    low, high = (step - 1) / COARSE, step / COARSE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = attempt(middle)
        if found.macs < target:
            high = middle
        else:
            low, best = middle, min(best, found, key=lambda one: one.macs)
    return best


def _pruned(prepared: _Prepared, example: Tensor, ratio: float, spare: Collection[str], seed: int) -> _Attempt:
    """The module of `prepared`, pruned in place at this ratio of its units and of its heads."""
    module, attention = prepared.module, list(_attention(prepared.module))
    heads: dict[str, Any] = {
        "num_heads": {block.qkv: block.num_heads for block in attention},
        "prune_num_heads": bool(attention),
        "prune_head_dims": not attention,
        "head_pruning_ratio": ratio,
    }
    own: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}}  # the defaults are shared by all pruners
    ignored = [module.get_submodule(layer) for layer in spare]
    with _at_work(seed):
        pruner = tp.pruner.BasePruner(
            module, example, prepared.importance, global_pruning=True, pruning_ratio=ratio, ignored_layers=ignored, **heads, **own
        )  # fmt: skip
        pruner.step()
    for block in attention:  # not from pruner.num_heads, which counts heads as gone that a refused group still has
        block.num_heads = block.qkv.out_features // (3 * block.head_dim)
        block.attn_dim = block.num_heads * block.head_dim
    module.zero_grad()
    return _Attempt(module.eval().requires_grad_(False), _macs(module, example), pruner.pruning_history())


def _removed(history: Sequence[tuple[str, bool, list[int]]], groups: Sequence[Group]) -> dict[str, set[int]]:
    """Units of our groups that left, from one step of pruning: its indices are those of the dense network."""
    gone: dict[str, set[int]] = {group.name: set() for group in groups}
    owners = {(m.module, m.axis): (group.name, m) for group in groups for m in group.members if m.parameter == "weight"}
    for layer, outputs, indices in history:
        name, member = owners[layer, 0 if outputs else 1]
        gone[name] |= {(index - member.offset) // member.repeat for index in indices}
    return gone


def _attention(module: nn.Module) -> Iterator[Any]:
    """Timm's attention blocks with a fused qkv layer."""
    for block in module.modules():
        if all(hasattr(block, part) for part in ("qkv", "proj", "num_heads", "head_dim")):
            yield block


def _classifier(module: nn.Module) -> str:
    name: str = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]
    return name


def _macs(module: nn.Module, example: Tensor) -> int:
    """Of one image, counted as for our own results."""
    channels, height, width = example.shape[1:]
    return count(module, InputSpec((channels, height, width), (0, 0, 0), (1, 1, 1), "bilinear", 1.0))[1]


# --- under our pruner


@dataclass(frozen=True)
class PeerScorer:
    """keep_value is torch-pruning's importance of what each unit is made of and read by; heads get the mean of their dimensions.

    Units that nothing reads are cut off before, so that they count in no norm and in no distance, as in torch-pruning's
    iterative pruning; their value is 0. A criterion that has no finite importance for a group gives all its units the value
    1 (the mean of the others, as torch-pruning scales them), with a warning. `seed` is for `random`.
    """

    name: str
    seed: int

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        alive = {group.name: _alive(module, group) for group in groups}
        prepared = _Prepared.make(self.name, cut_copy(module, groups, alive), batches)
        example = next(iter(batches))[0][:1]
        with _at_work(self.seed):
            graph = tp.DependencyGraph().build_dependency(prepared.module, example_inputs=example)
            values = [self._values(prepared, graph, group, len(alive[group.name])) for group in groups]
        scores = []
        for group, found in zip(groups, values, strict=True):
            value = dict(zip(alive[group.name], found, strict=True))
            units = tuple(range(group.units))
            scores.append(GroupScores(group.name, units, tuple(value.get(unit, 0.0) for unit in units)))
        return tuple(scores)

    def _values(self, prepared: _Prepared, graph: Any, group: Group, units: int) -> list[float]:
        """Of the units that are there, in their order."""
        value = prepared.importance(_their_group(prepared.module, graph, group))
        if value is None or not torch.isfinite(value).all():
            progress.warn(f"{self.name} has no importance for {group.name}: its units count as equal")
            return [1.0] * units
        assert len(value) % units == 0, f"{group.name}: {len(value)} importances for {units} units"
        return [float(mean) for mean in value.reshape(units, -1).mean(1)]


def _their_group(module: nn.Module, graph: Any, group: Group) -> Any:
    """torch-pruning's coupled group of the same units, all of them, rooted where it counts them one by one."""
    if group.kind == "heads":
        layer: Any = module.get_submodule(group.consumers[0].module)
        return graph.get_pruning_group(layer, tp.prune_linear_in_channels, list(range(layer.in_features)))
    layer = module.get_submodule(group.name)
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))


def _alive(module: nn.Module, group: Group) -> tuple[int, ...]:
    """The units that something reads; all of them where nothing reads any."""
    read = torch.zeros(group.units, dtype=torch.bool)
    for member in group.consumers:
        weight: Any = module.get_submodule(member.module).weight
        columns = weight.detach().movedim(1, 0)[positions(member, range(group.units))]
        read |= (columns != 0).reshape(group.units, -1).any(1).cpu()
    return tuple(read.nonzero().flatten().tolist()) or tuple(range(group.units))


# --- importances and what they need


@dataclass(frozen=True)
class _Prepared:
    """A module of our own whose parameters hold the gradients that the importance reads."""

    importance: Any
    module: nn.Module

    @staticmethod
    def make(name: str, module: nn.Module, batches: Batches) -> _Prepared:
        prepared = _Prepared(IMPORTANCES[name](), copy.deepcopy(module).eval().requires_grad_(True))
        with torch.enable_grad():
            match name:
                case "taylor":
                    for images, labels in batches:  # as in torch-pruning's examples: batch means, summed
                        F.cross_entropy(prepared.module(images), labels).backward()  # type: ignore[no-untyped-call]
                case "hessian":
                    prepared._root_mean_square(batches)
                    prepared.importance.accumulate_grad(prepared.module)
                case "hessian_last_image":
                    for _ in prepared._per_image(batches):
                        prepared.importance.accumulate_grad(prepared.module)
        return prepared

    def copy(self) -> _Prepared:
        """With the gradients, which deepcopy leaves behind, and with the importance's tables about the new parameters."""
        importance, module = copy.deepcopy((self.importance, self.module))
        for own, new in zip(self.module.parameters(), module.parameters(), strict=True):
            new.grad = None if own.grad is None else own.grad.clone()
        return _Prepared(importance, module)

    def _per_image(self, batches: Batches) -> Iterator[None]:
        """The gradient of each image's loss in turn; one image per forward costs less than one backward per image of a batch."""
        for images, labels in batches:
            for k in range(len(labels)):
                self.module.zero_grad()
                F.cross_entropy(self.module(images[k : k + 1]), labels[k : k + 1]).backward()  # type: ignore[no-untyped-call]
                yield

    def _root_mean_square(self, batches: Batches) -> None:
        parameters = list(self.module.parameters())
        squares = [torch.zeros_like(parameter) for parameter in parameters]
        for _ in self._per_image(batches):
            for square, parameter in zip(squares, parameters, strict=True):
                if parameter.grad is not None:
                    square += parameter.grad.square()
        for square, parameter in zip(squares, parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad = (square / len(batches)).sqrt()


@contextmanager
def _at_work(seed: int) -> Iterator[None]:
    """Seeded, with gradients on for the tracer, without its warnings about parameters outside layers."""
    with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
