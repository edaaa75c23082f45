"""Trace → groups of dimensions within attention heads, and which rows make queries, keys and values: found by trying.

A network does not say which third of a fused layer its queries are. But it is known of the right ones that queries times a matrix and
keys times its inverse transpose, values times a matrix and their columns of the projection times its inverse, change nothing. So each
layout is tried on the network itself with random matrices, in float64: what norms, rotary embeddings or activations come between,
or what reads a head in another way, does not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from math import isclose
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import HeadDims, HeadRows, InputSpec, Refusal, Slice
from cswap_deploy.prune.attributes import attributes, owners
from cswap_deploy.prune.dims import Dim, unify
from cswap_deploy.prune.proof import proven, same_function
from cswap_deploy.prune.proposals import Place, block_of, named_apart, places_of, unfit_dims
from cswap_deploy.prune.rotation import turn_columns, turn_rows
from cswap_deploy.prune.tracing import Trace

if TYPE_CHECKING:
    from torch import Tensor, nn

UNTURNABLE = "its heads cannot be rotated: more than a product is between their queries and keys, or their values and a projection"


@dataclass(frozen=True)
class Inner:
    """Groups of dimensions that were proven, what their units are in the trace, and what is not among them, and why."""

    groups: tuple[HeadDims, ...] = ()
    atoms: dict[str, Dim] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()


def within_heads(module: nn.Module, trace: Trace, spec: InputSpec, leave: Callable[[HeadDims], str | None]) -> Inner:
    """`leave`: why a group is left alone, None where it is not.

    Queries and keys are one group, values another, unless one layer's layout or a number that forward code reads binds them: then they
    are one. `trace` learns of that.
    """
    first = _tried(module, trace, spec, leave)
    bound = list(_bound(first))
    for one, other in bound:
        unify(one, other)
    return _tried(module, trace, spec, leave) if bound else first


def _tried(module: nn.Module, trace: Trace, spec: InputSpec, leave: Callable[[HeadDims], str | None]) -> Inner:
    order = {name: position for position, (name, _) in enumerate(module.named_modules())}
    candidates: dict[Dim, HeadDims] = {}
    refused = []
    for atom, places in places_of(module, trace, order).items():
        inside = atom.roles & {"dims", "values"} and "heads" not in atom.roles
        if not inside or not any(place.role == "makes" for place in places):
            continue
        group = _group(atom, places)
        reason = unfit_dims(atom, places) or leave(group)
        if reason:
            refused.append(Refusal(group.name, reason))
        else:
            candidates[atom] = group
    candidates = named_apart(candidates)
    counted = attributes(module, trace, {atom: group.name for atom, group in candidates.items()})
    layouts = {
        group.name: list(
            _layouts(module, replace(group, attributes=counted[group.name], scales=_scales(module, trace, atom)), atom)
        )
        for atom, group in candidates.items()
    }
    turned = _turnable(module, spec, layouts)
    refused += [Refusal(name, UNTURNABLE) for name in layouts if name not in turned]
    groups, disproven = proven(module, tuple(turned.values()), spec)
    atoms = {group.name: atom for atom, group in candidates.items()}
    return Inner(tuple(group for group in groups if isinstance(group, HeadDims)), atoms, (*refused, *disproven))


def _bound(found: Inner) -> Iterator[tuple[Dim, Dim]]:
    """Queries and keys with the values of the same attention where neither may go alone."""
    failed = {item.name for item in found.refused} & set(found.atoms)
    for name in failed:
        other = name.removesuffix(QUERIES) + VALUES
        if name.endswith(QUERIES) and other in failed and found.atoms[name].size == found.atoms[other].size:
            yield found.atoms[name], found.atoms[other]


QUERIES, VALUES, BOTH = "qk_dims", "v_dims", "dims"


def _group(atom: Dim, places: Sequence[Place]) -> HeadDims:
    read = any(place.role == "reads" for place in places)
    what = (BOTH if read else QUERIES) if "dims" in atom.roles else VALUES
    name = f"{block_of([place.member for place in places if place.role != 'carries'])}.{what}".lstrip(".")
    members = tuple(place.member for place in places)
    return HeadDims(name, "dims", atom.size, members, queries=None, keys=None, values=None, scales=())


def _scales(module: nn.Module, trace: Trace, atom: Dim) -> tuple[tuple[str, str], ...]:
    """Numbers of modules that handle the dimensions of queries which are the inverse root of how many there are."""
    if "dims" not in atom.roles:
        return ()
    return tuple(
        (name, key)
        for name, layer in module.named_modules()
        if any(owner == "" for dim in trace.handled.get(name, ()) for owner, _ in owners(dim, {atom: ""}))
        for key, value in vars(layer).items()
        if type(value) is float and isclose(value, atom.size**-0.5, rel_tol=1e-9)
    )


def _layouts(module: nn.Module, group: HeadDims, atom: Dim) -> Iterator[HeadDims]:
    """Which rows may be queries, keys and values, likeliest first; one without values that are turned last where none has to be."""
    chains = _chains(module, group.members)
    columns = group.consumers
    rows = sum(len(offsets) for offsets in chains.values())
    fused, alone = bool(columns) and "dims" in atom.roles, "dims" not in atom.roles
    heads = len(columns) if columns else rows // 2
    whole = heads and rows == heads * (3 if fused else 1 if alone else 2)
    tidy = all(member.repeat == 1 for member in group.members) and len({member.module for member in columns}) <= 1
    for side_by_side in (True, False) if whole and tidy else ():
        slots = [
            HeadRows(
                chain,
                offsets[part * heads : (part + 1) * heads] if side_by_side else offsets[part :: len(offsets) // heads],
            )
            for chain, offsets in chains.items()
            for part in range(len(offsets) // heads)
        ]
        if any(len(slot.offsets) != heads for slot in slots):
            continue
        for place in (2, 0, 1) if fused else (0,):
            values = slots[place] if fused or alone else None
            queries, keys = (None, None) if alone else (slot for slot in slots if slot is not values)
            yield replace(group, queries=queries, keys=keys, values=values)
    if alone:
        yield group


def _chains(module: nn.Module, members: Sequence[Slice]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Per layer that makes units, with the BatchNorm behind it, the rows where its heads begin; none where there is more between."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    rows: dict[str, list[int]] = {}
    for member in members:
        if member.axis == 0 and member.parameter in ("weight", "running_mean"):
            rows.setdefault(member.module, []).append(member.offset)
        elif member.axis == 0 and member.parameter not in ("bias", "running_var"):
            return {}
    chains: list[tuple[str, ...]] = []
    for name, offsets in rows.items():
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            chains.append((name,))
        elif (
            isinstance(layer, _BatchNorm)
            and chains
            and layer.affine
            and rows[chains[-1][0]] == offsets[: len(offsets) // 2]
        ):
            chains[-1] = (chains[-1][0], name)
        else:
            return {}
    return {chain: tuple(sorted(rows[chain[0]])) for chain in chains}


def _turnable(module: nn.Module, spec: InputSpec, layouts: dict[str, list[HeadDims]]) -> dict[str, HeadDims]:
    """Per group the first layout that may be turned by any matrices: all groups at once, those that fail one by one."""
    found: dict[str, HeadDims] = {}
    first = [tried[0] for tried in layouts.values() if tried]
    if first and same_function(module, spec, partial(_turned, groups=first)):
        return {group.name: group for group in first}
    for name, tried in layouts.items():
        right = (group for group in tried if same_function(module, spec, partial(_turned, groups=[group])))
        found.update((name, group) for group in islice(right, 1))
    return found


def _turned(module: nn.Module, groups: Sequence[HeadDims]) -> None:
    """By random matrices, in place."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for rows in (group.queries, group.values):
            if rows is None:
                continue
            shape = len(rows.offsets), group.units, group.units
            matrices: Tensor = (
                torch.eye(group.units).double()
                + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64) / group.units
            )
            other: Any = torch.linalg.inv(matrices)
            turn_rows(module, rows, matrices)
            if rows is group.queries:
                assert group.keys
                turn_rows(module, group.keys, other.mT)
            else:
                turn_columns(module, group, other)
