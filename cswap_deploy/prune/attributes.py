"""Attributes that forward code reads and that count units: found by their values, repaired after a cut as data.

A module that reshapes, splits or slices by a number that it stores (`num_heads`, `width`, `input_split`) is known from the trace: an
integer that it holds is the size of an axis that it has handled, and groups own units of that axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import UnitAttribute
from cswap_deploy.prune.dims import Dim, found, occurrences
from cswap_deploy.prune.tracing import Trace

if TYPE_CHECKING:
    from torch import nn

DESCRIPTIVE = frozenset("num_features head_hidden_size num_classes embed_dim feature_info depth layer_idx kernel_size stride".split())
"""Names that no forward splits by, although their values may be sizes."""


def attributes(module: nn.Module, trace: Trace, groups: Mapping[Dim, str]) -> dict[str, tuple[UnitAttribute, ...]]:
    """Per group what must be set when its units leave; `groups`: by the atom of their units."""
    made: dict[str, dict[UnitAttribute, None]] = {name: {} for name in groups.values()}
    for name, layer in module.named_modules():
        if not _repaired_by_shape(layer):
            for group, attribute in _counting(name, layer, trace.handled.get(name, ()), groups):
                made[group][attribute] = None
    for weight, dim in trace.fixed_groups.items():
        owner = weight.rpartition(".")[0]
        if not _depthwise(module.get_submodule(owner)):
            for group, repeat in owners(dim, groups):
                made[group][UnitAttribute(owner, "groups", repeat)] = None
    return {name: tuple(found) for name, found in made.items()}


def owners(dim: Dim, groups: Mapping[Dim, str]) -> Iterator[tuple[str, int]]:
    """(group, indices per unit) of the groups whose units an axis consists of."""
    totals: dict[str, int] = {}
    for atom, _, repeat in occurrences(dim):
        if atom in groups:
            totals[groups[atom]] = totals.get(groups[atom], 0) + repeat
    yield from totals.items()


def _counting(
    name: str, layer: nn.Module, handled: Iterator[Dim] | Any, groups: Mapping[Dim, str]
) -> Iterator[tuple[str, UnitAttribute]]:
    """Integers, also in tuples and lists, that are the size of one axis that groups shorten."""
    sizes: dict[int, dict[tuple[tuple[str, int], ...], bool]] = {}
    for dim in handled:
        if own := tuple(owners(dim, groups)):
            heads = "heads" in found(dim).roles
            sizes.setdefault(dim.size, {})[own] = heads
    for key, value in _integers(layer) if sizes else ():
        known = sizes.get(value, {})
        if "head" in key:
            known = {own: heads for own, heads in known.items() if heads}
        if len(known) == 1:
            for group, repeat in next(iter(known)):
                yield group, UnitAttribute(name, key, repeat)


def _integers(layer: nn.Module) -> Iterator[tuple[str, int]]:
    for key, value in vars(layer).items():
        if key.startswith("_") or key in DESCRIPTIVE:
            continue
        if type(value) is int:
            yield key, value
        elif isinstance(value, tuple | list):
            yield from ((f"{key}.{place}", item) for place, item in enumerate(value) if type(item) is int)


def _repaired_by_shape(layer: nn.Module) -> bool:
    """`cut` sets what these layers say of their sizes."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvNd

    return isinstance(layer, _ConvNd | nn.Linear | _NormBase | nn.PReLU)


def _depthwise(layer: Any) -> bool:
    return bool(layer.groups == layer.in_channels == layer.out_channels)
