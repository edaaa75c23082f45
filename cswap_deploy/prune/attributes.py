"""Attributes that forward code reads and that count units: found by name and value, repaired after a cut as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Slice, UnitAttribute
from cswap_deploy.prune.dims import Dim
from cswap_deploy.prune.tracing import Trace

if TYPE_CHECKING:
    from torch import nn

HEADS = ("num_heads", "n_heads", "heads")
"""Count heads."""
WIDTHS = ("attn_dim", "all_head_dim")
"""Count what a layer makes or reads."""


def attributes_of(module: nn.Module, trace: Trace, atom: Dim, members: Sequence[Slice]) -> tuple[UnitAttribute, ...]:
    """What must be set in the modules around a group's members when units leave."""
    layers = dict(module.named_modules())
    found: dict[UnitAttribute, None] = {}
    for weight, dim in trace.fixed_groups.items():
        owner = weight.rpartition(".")[0]
        if _is(dim, atom) and not _depthwise(layers[owner]):
            found[UnitAttribute(owner, "groups", layers[owner].groups // atom.size)] = None
    widths = _widths(members, atom.size)
    for name in dict.fromkeys(_around(members)):
        if name in layers:
            found |= dict.fromkeys(_counting(name, layers[name], atom, widths))
    return tuple(found)


def _is(dim: Dim, atom: Dim) -> bool:
    from cswap_deploy.prune.dims import atoms

    return any(own is atom for own in atoms(dim))


def _depthwise(layer: Any) -> bool:
    return bool(layer.groups == layer.in_channels == layer.out_channels)


def _widths(members: Sequence[Slice], units: int) -> dict[int, int]:
    """Sizes that an attribute may have for these units, with what one unit counts in them."""
    return {units * member.repeat: member.repeat for member in members}


def _around(members: Sequence[Slice]) -> Iterator[str]:
    """The modules that hold the members, inside out, up to the network's own."""
    for member in members:
        parts = member.module.split(".")
        for length in range(len(parts) - 1, 0, -1):
            yield ".".join(parts[:length])


def _counting(name: str, layer: Any, atom: Dim, widths: dict[int, int]) -> Iterator[UnitAttribute]:
    values = {key: value for key, value in vars(layer).items() if type(value) is int}
    if "heads" in atom.roles:
        yield from (UnitAttribute(name, key, 1) for key in HEADS if values.get(key) == atom.size)
        yield from (UnitAttribute(name, key, widths[values[key]]) for key in WIDTHS if values.get(key) in widths)
