"""Damage curves: what the whole network loses when one group narrows and its consumers are re-fitted, measured at several widths."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.artifacts import Curve, Group, HeadDims, Slice
from cswap_deploy.prune.cut import add_bias, positions, silence
from cswap_deploy.prune.damage import Damage
from cswap_deploy.prune.elimination import Consumer, leaving_costs
from cswap_deploy.prune.refit import Structure
from cswap_deploy.prune.replay import Walk, in_order
from cswap_deploy.prune.select import floor_of, step_of
from cswap_deploy.prune.systems import System, Systems

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARES = (0.06, 0.15, 0.3, 0.55)
"""Parts of a group's present units that are tried to leave, beside all but the fewest."""


def leaving_order(module: nn.Module, group: Group, kept: Sequence[int], systems: Systems) -> tuple[int, ...] | None:
    """The kept units of a group, first to leave first, as its re-fitted consumers miss them; None where none is re-fitted.

    Dimensions of queries leave last to first: rotation has put them in the order of what they carry.
    """
    if isinstance(group, HeadDims) and group.queries:
        return tuple(sorted(kept, reverse=True))
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


@dataclass(frozen=True)
class Gauge:
    """Tells what narrowing costs `module`, the compensated network that keeps `keep`; it is left as it was.

    Consumers without a system are masked only. `orders`: per group its kept units, first to leave first.
    """

    module: nn.Module
    groups: Sequence[Group]
    orders: Mapping[str, Sequence[int]]
    systems: Systems
    damage: Damage
    structure: Structure

    def losses(self, asked: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
        """Per group what the network loses at each of the widths asked for, beyond what it has lost already (nats).

        What runs before a group's first consumer is computed once for all its widths.
        """
        import torch

        module, begun = self._measured, self._begun
        found: dict[str, tuple[float, ...]] = {}
        with torch.no_grad():
            walk = Walk(module, self.damage.batches, self.structure.reuse)
            inside = [(first, group) for first, group in self._in_order if asked.get(group.name)]
            for number, (first, group) in enumerate(inside, 1):
                widths = asked[group.name]
                trials = _trials(module, group, self.orders[group.name], widths, self.systems)
                losses = [0.0] * len(trials)
                visits = walk.visit(first, as_far_as_sum=False)
                for batch, (_, (images, _labels)) in enumerate(zip(visits, self.damage.batches, strict=True)):
                    for at, trial in enumerate(trials):
                        silent = _silent(group, self.orders[group.name], widths[at])
                        with _tried(module, trial, self.systems, silent), walk.rest(batch):
                            losses[at] += self.damage.batch(batch, module(images))
                found[group.name] = tuple(loss - begun for loss in losses)
                progress.advance("curves measured", number, len(inside))
        return found

    def curves(self, round_to: int) -> tuple[Curve, ...]:
        """Of every group, at five widths spread over all that it may have, and without units where it is a branch."""
        widths = {group.name: tried_widths(group, len(self.orders[group.name]), round_to) for group in self.groups}
        losses = self.losses(widths)
        return tuple(
            Curve(group.name, tuple(self.orders[group.name]), widths[group.name], losses.get(group.name, ()))
            for group in self.groups
        )

    @cached_property
    def _measured(self) -> nn.Module:
        return _with_biases(self.module, self.systems)

    @cached_property
    def _begun(self) -> float:
        return self.damage.of(self._measured)

    @cached_property
    def _in_order(self) -> list[tuple[str, Group]]:
        """Each group with the first layer that changes with it, in a forward's order: a consumer, or what makes queries."""
        readers = [name for group in self.groups for name in _changing(group)]
        order = in_order(self._measured, readers, next(iter(self.damage.batches.first(1)))[0])
        place = {name: number for number, name in enumerate(order)}
        first = [(min(_changing(group), key=lambda name: place[name]), group) for group in self.groups]
        return sorted(first, key=lambda pair: place[pair[0]])


def tried_widths(group: Group, now: int, round_to: int) -> tuple[int, ...]:
    """Below `now`, widest first, each of them one that the group may have."""
    step, least = step_of(group, round_to), floor_of(group, round_to)
    found = {least, 0} if group.branch else {least}
    for share in SHARES:
        width = min(now - 1, round(now * (1 - share)))
        found.add(max(least, width - width % step))
    return tuple(sorted((width for width in found if width < now), reverse=True))


def _consumer(module: nn.Module, name: str, system: System, columns: Sequence[int], owned: list[list[int]]) -> Consumer:
    import torch

    equations = system.equations
    index = torch.tensor([*columns, len(equations.gram) - 1], device=equations.gram.device)
    gram = equations.regularised(index)
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


def _changing(group: Group) -> list[str]:
    """The layers whose weights change with a group's width."""
    queries = (
        [group.queries.modules[0], group.keys.modules[0]]
        if isinstance(group, HeadDims) and group.queries and group.keys
        else []
    )
    return [*queries, *_readers(group)]


def _silent(group: Group, order: Sequence[int], width: int) -> dict[str, tuple[int, ...]]:
    """The rows of queries and keys that are 0 at a width."""
    return group.silenced(order[: len(order) - width]) if isinstance(group, HeadDims) else {}


def _with_biases(module: nn.Module, systems: Systems) -> nn.Module:
    """A copy in which every layer that will have to hold a bias has one."""
    module = copy.deepcopy(module)
    for name, system in systems.items():
        if system.mean is None:
            add_bias(module, name)
    return module


@contextmanager
def _tried(
    module: nn.Module, weights: Mapping[str, Tensor], systems: Systems, silent: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """Inside the block the consumers have these weights, and these rows of layers give 0."""
    names = {*weights, *silent, *(systems[name].norm for name in weights if name in systems and systems[name].norm)}
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
        silence(module, silent)
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)
