"""Trace → groups that may leave, as frozen data, and what must stay, with the reason. None of them is proven here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cswap_deploy.artifacts import Group, Refusal, Slice
from cswap_deploy.prune.attributes import attributes
from cswap_deploy.prune.dims import Dim, occurrences
from cswap_deploy.prune.tracing import Trace

if TYPE_CHECKING:
    from torch import nn

MOST_SLICES = 4096
"""Of one group; beyond it its units lie too scattered to be of use."""


SUMMED = "a product of two activations sums over it"
AnyGroup = TypeVar("AnyGroup", bound=Group)
Role = Literal["makes", "reads", "regroups", "columns", "carries"]
"""What a slice is to its layer: rows of a weight, its columns, those of a grouped one or of another layer; or it only goes along."""


@dataclass(frozen=True)
class Proposals:
    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    atoms: dict[str, Dim]
    """Per group what its units are in the trace."""


@dataclass(frozen=True)
class Place:
    """Where the units of an atom live in one tensor: a slice, with what the slice is to its layer."""

    member: Slice
    role: Role


def propose(module: nn.Module, trace: Trace) -> Proposals:
    """One group per atom that layers make and layers read; of atoms that stand nested in one axis the preferred one."""
    order = {name: position for position, (name, _) in enumerate(module.named_modules())}
    places = places_of(module, trace, order)
    candidates: dict[Dim, Group] = {}
    reasons: dict[Dim, str] = {}
    for atom, own in places.items():
        if not any(place.role == "makes" for place in own):
            continue
        reason = _unfit(atom, own)
        if reason is None:
            candidates[atom] = _group(atom, own, order)
        else:
            reasons[atom] = reason
    chosen = named_apart(_preferred(candidates))
    refused: dict[str, dict[str, None]] = {}
    for item in _refusals(reasons, chosen, places):
        refused.setdefault(item.name, {})[item.reason] = None
    stay = tuple(Refusal(name, "; ".join(why)) for name, why in refused.items())
    atoms = {group.name: atom for atom, group in chosen.items()}
    counted = attributes(module, trace, {atom: group.name for atom, group in chosen.items()})
    groups = tuple(replace(group, attributes=counted[group.name]) for group in chosen.values())
    return Proposals(groups, stay, atoms)


def _refusals(reasons: dict[Dim, str], chosen: dict[Dim, Group], places: dict[Dim, list[Place]]) -> Iterator[Refusal]:
    """Named after the layer that makes the units; of a layer whose other units may leave, with the first index."""
    owned: dict[str, list[tuple[Slice, int]]] = {}
    for group in chosen.values():
        for member in group.members:
            owned.setdefault(f"{member.tensor}, {member.axis}", []).append((member, group.units))
    for atom, reason in reasons.items():
        maker = next(place.member for place in places[atom] if place.role == "makes")
        others = owned.get(f"{maker.tensor}, {maker.axis}", [])
        if not any(overlap(maker, atom.size, other, units) for other, units in others):
            yield Refusal(f"{maker.module}[{maker.offset}:]" if others else maker.module, reason)


ALONE = "it has one unit only"


def places_of(module: nn.Module, trace: Trace, order: dict[str, int]) -> dict[Dim, list[Place]]:
    """Per atom where it stands in parameters and buffers, in the order of the layers."""
    layers = dict(module.named_modules())
    found_at: dict[Dim, list[Place]] = {}
    for tensor, dims in trace.parameters.items():
        owner, _, leaf = tensor.rpartition(".")
        for axis, dim in enumerate(dims):
            for atom, offset, repeat in occurrences(dim):
                member = Slice(owner, leaf, axis, offset, repeat)
                found_at.setdefault(atom, []).append(Place(member, _role(layers[owner], leaf, axis)))
    for own in found_at.values():
        own.sort(key=lambda place: _layer_order(order, place.member))
    return found_at


def _layer_order(order: dict[str, int], member: Slice) -> Any:
    return order[member.module], member.axis, member.parameter, member.offset


def _role(layer: Any, parameter: str, axis: int) -> Role:
    from torch import nn

    if parameter != "weight" or axis > 1:
        return "carries"
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "carries" if axis == 0 else "columns"
    if axis == 1 and getattr(layer, "groups", 1) > 1:
        return "regroups"
    return "makes" if axis == 0 else "reads"


def unfit_dims(atom: Dim, places: Sequence[Place]) -> str | None:
    """Why these dimensions within heads must stay: queries and keys need nobody who reads them through weights."""
    return _unfit(atom, places, within=True)


def _unfit(atom: Dim, places: Sequence[Place], *, within: bool = False) -> str | None:
    """Why these units must stay. `within`: heads, they may be what a product of two activations sums over."""
    if atom.frozen:
        return atom.frozen
    if atom.size < 2:
        return ALONE
    if len(places) > MOST_SLICES:
        return "its units are scattered over a coupled layer"
    if any(place.role == "regroups" for place in places):
        return "a grouped convolution reads it by its place in each group"
    if "dims" in atom.roles and not within:
        return SUMMED
    if any(place.role == "columns" for place in places):
        return "it is coupled to the columns of a layer that is neither linear nor a convolution"
    if not any(place.role == "reads" for place in places) and not (within and "dims" in atom.roles):
        return "no layer reads it through its weights"
    return None


def _group(atom: Dim, places: Sequence[Place], order: dict[str, int]) -> Group:
    """Named after the first layer that makes its units; heads after the block that they belong to."""
    members = [place.member for place in places]
    maker = next(place.member for place in places if place.role == "makes")
    kind: Literal["channels", "heads"] = "heads" if "heads" in atom.roles else "channels"
    name = maker.module
    if kind == "heads":
        members.sort(key=lambda member: (order[member.module], member.parameter != "weight", member.offset))
        name = f"{block_of([place.member for place in places if place.role != 'carries'])}.heads"
    return Group(name, kind, atom.size, tuple(members))


def named_apart(chosen: dict[Dim, AnyGroup]) -> dict[Dim, AnyGroup]:
    """Of several groups that one layer makes, the later ones are called by the first index of their units too."""
    taken: set[str] = set()
    for atom, group in chosen.items():
        if group.name in taken:
            made = next(member for member in group.members if member.module == group.name or group.kind != "channels")
            chosen[atom] = replace(group, name=f"{group.name}[{made.offset}:]")
        taken.add(chosen[atom].name)
    return chosen


def block_of(members: Sequence[Slice]) -> str:
    """The innermost module that holds all of them."""
    paths = [member.module.split(".") for member in members]
    shared = []
    for parts in zip(*(path[:-1] for path in paths)):
        if len({*parts}) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _preferred(candidates: dict[Dim, Group]) -> dict[Dim, Group]:
    """Of what is nested: whole heads, then whole groups of convolutions, then the more units; in the order of the layers."""
    ranked = sorted(candidates, key=lambda atom: ("heads" not in atom.roles, "groups" not in atom.roles, -atom.size))
    owned: dict[tuple[str, int], list[tuple[Slice, int]]] = {}
    chosen: set[Dim] = set()
    for atom in ranked:
        group = candidates[atom]
        if any(overlap(member, group.units, other, units)
               for member in group.members for other, units in owned.get((member.tensor, member.axis), ())):  # fmt: skip
            continue
        chosen.add(atom)
        for member in group.members:
            owned.setdefault((member.tensor, member.axis), []).append((member, group.units))
    return {atom: group for atom, group in candidates.items() if atom in chosen}


def overlap(a: Slice, units: int, b: Slice, others: int) -> bool:
    return a.offset < b.offset + others * b.repeat and b.offset < a.offset + units * a.repeat
