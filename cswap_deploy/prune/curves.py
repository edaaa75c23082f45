"""Damage curves: what the whole network loses when one group narrows and its consumers are re-fitted, measured at several widths."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.artifacts import Curve, Group, Slice
from cswap_deploy.prune.cut import add_bias, positions
from cswap_deploy.prune.damage import Damage
from cswap_deploy.prune.elimination import Consumer, leaving_costs
from cswap_deploy.prune.refit import Structure
from cswap_deploy.prune.replay import Walk, in_order
from cswap_deploy.prune.select import Kept, floor_of, step_of
from cswap_deploy.prune.systems import System, Systems

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARES = (0.06, 0.15, 0.3, 0.55)
"""Parts of a group's present units that are tried to leave, beside all but the fewest."""


def leaving_order(module: nn.Module, group: Group, kept: Sequence[int], systems: Systems) -> tuple[int, ...] | None:
    """The kept units of a group, first to leave first, as its re-fitted consumers miss them; None where none is re-fitted."""
    consumers = []
    for name, members in _readers(group).items():
        if name in systems:
            system = systems[name]
            columns = system.columns(system.channels)
            place = {column: number for number, column in enumerate(columns)}
            channels = [[c for member in members for c in positions(member, [unit])] for unit in kept]
            owned = [[place[column] for column in system.columns(own)] for own in channels]
            consumers.append(_consumer(module, name, system, columns, owned))
    if not consumers:
        return None
    order, _ = leaving_costs(consumers)
    return tuple(kept[place] for place in order)


def measure(
    module: nn.Module,
    groups: Sequence[Group],
    keep: Kept,
    orders: Mapping[str, Sequence[int]],
    systems: Systems,
    damage: Damage,
    structure: Structure,
    round_to: int,
) -> tuple[Curve, ...]:
    """One curve per group of `module`, the compensated network that keeps `keep`; consumers without a system are masked only.

    What runs before a group's first consumer is computed once for all its widths. `module` is left as it was.
    """
    import torch

    module = _with_biases(module, systems)
    curves: dict[str, Curve] = {}
    with torch.no_grad():
        walk = Walk(module, damage.batches, structure.reads)
        begun = damage.of(module)
        readers = [name for group in groups for name in _readers(group)]
        order = in_order(module, readers, next(iter(damage.batches.first(1)))[0])
        place = {name: number for number, name in enumerate(order)}
        first = {group.name: min(_readers(group), key=lambda name: place[name]) for group in groups}
        for number, group in enumerate(sorted(groups, key=lambda group: place[first[group.name]]), 1):
            leaving = tuple(orders[group.name])
            widths = tried_widths(group, len(leaving), round_to)
            trials = _trials(module, group, leaving, widths, systems)
            losses = [0.0] * len(trials)
            visits = walk.visit(first[group.name], as_far_as_sum=False)
            for batch, (_, (images, _labels)) in enumerate(zip(visits, damage.batches, strict=True)):
                for at, trial in enumerate(trials):
                    with _tried(module, trial, systems), walk.rest(batch):
                        losses[at] += damage.batch(batch, module(images))
            curves[group.name] = Curve(group.name, leaving, widths, tuple(loss - begun for loss in losses))
            progress.advance("curves measured", number, len(groups))
    return tuple(curves[group.name] for group in groups)


def tried_widths(group: Group, now: int, round_to: int) -> tuple[int, ...]:
    """Below `now`, widest first, each of them one that the group may have."""
    step, least = step_of(group, round_to), floor_of(group, round_to)
    found = {least}
    for share in SHARES:
        width = min(now - 1, round(now * (1 - share)))
        found.add(max(least, width - width % step))
    return tuple(sorted((width for width in found if width < now), reverse=True))


def _consumer(module: nn.Module, name: str, system: System, columns: Sequence[int], owned: list[list[int]]) -> Consumer:
    import torch

    equations = system.equations
    index = torch.tensor([*columns, len(equations.gram) - 1], device=equations.gram.device)
    gram = equations.gram[index][:, index] + torch.diag(equations.ridge()[index])
    layer: Any = module.get_submodule(name)
    weight = layer.weight.detach().flatten(1).T[index[:-1]]
    weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
    return Consumer(gram, weight, torch.tensor(owned, device=gram.device), equations.rows)


def _trials(
    module: nn.Module, group: Group, order: Sequence[int], widths: Sequence[int], systems: Systems
) -> list[dict[str, Tensor]]:
    """Per width, what each consumer's weights become when only that many last units of `order` are left."""
    trials: list[dict[str, Tensor]] = [{} for _ in widths]
    for name, members in _readers(group).items():
        channels = [[c for member in members for c in positions(member, [unit])] for unit in order]
        system = systems.get(name)
        if system is None:
            layer: Any = module.get_submodule(name)
            for trial, width in zip(trials, widths, strict=True):
                trial[name] = layer.weight.detach().clone()
                trial[name][:, [c for own in channels[: len(order) - width] for c in own]] = 0
            continue
        own = {c for unit in channels for c in unit}
        others = system.columns([c for c in system.channels if c not in own])
        mine = [system.columns(unit) for unit in channels[::-1]]
        nested = system.equations.nested([*others, *(column for unit in mine for column in unit)], system.start)
        for trial, width in zip(trials, widths, strict=True):
            trial[name] = nested.leading(len(others) + sum(len(unit) for unit in mine[:width]))
    return trials


def _readers(group: Group) -> dict[str, list[Slice]]:
    """Per consumer layer the slices through which it reads the group's units."""
    found: dict[str, list[Slice]] = {}
    for member in group.consumers:
        found.setdefault(member.module, []).append(member)
    return found


def _with_biases(module: nn.Module, systems: Systems) -> nn.Module:
    """A copy in which every layer that will have to hold a bias has one."""
    module = copy.deepcopy(module)
    for name, system in systems.items():
        if system.mean is None:
            add_bias(module, name)
    return module


@contextmanager
def _tried(module: nn.Module, weights: Mapping[str, Tensor], systems: Systems) -> Iterator[None]:
    """Inside the block the consumers have these weights."""
    names = {*weights, *(systems[name].norm for name in weights if name in systems and systems[name].norm)}
    before = [
        (tensor, tensor.detach().clone())
        for name in sorted(names)
        for tensor in module.get_submodule(name).state_dict(keep_vars=True).values()
    ]
    try:
        for name, own in weights.items():
            if name in systems:
                systems[name].write(module, name, own)
            else:
                layer: Any = module.get_submodule(name)
                layer.weight.copy_(own)
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)
