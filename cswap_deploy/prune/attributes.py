"""Attributes that forward code reads and that count units: found by their values, repaired after a cut as data.

A module that reshapes, splits or slices by a number that it stores (`num_heads`, `width`, `input_split`) is known from the trace: an
integer that it holds is the size of an axis that it has handled, and groups own units of that axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import UnitAttribute
from cswap_deploy.prune.dims import Dim, found, occurrences
from cswap_deploy.prune.tracing import Trace

if TYPE_CHECKING:
    from torch import nn

DESCRIPTIVE = frozenset(
    "num_features head_hidden_size num_classes feature_info depth layer_idx kernel_size stride".split()
)
"""Names that no forward splits by, although their values may be sizes."""


def attributes(module: nn.Module, trace: Trace, groups: Mapping[Dim, str]) -> dict[str, tuple[UnitAttribute, ...]]:
    """Per group what must be set when its units leave; `groups`: by the atom of their units."""
    made: dict[str, dict[UnitAttribute, None]] = {name: {} for name in groups.values()}
    for name, layer in module.named_modules():
        if not _repaired_by_shape(layer):
            for group, attribute in _counting(name, layer, trace, groups):
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
    name: str, layer: nn.Module, trace: Trace, groups: Mapping[Dim, str]
) -> Iterator[tuple[str, UnitAttribute]]:
    """Integers, also in tuples and lists, that are the size of an axis to which a group's units belong in one way.

    A list of the sizes by which the module has split an axis belongs to its parts, in their order.
    """
    ways: dict[tuple[int, str], set[tuple[int, bool]]] = {}
    for dim in {found(dim) for dim in trace.handled.get(name, ())}:
        for group, repeat in owners(dim, groups):
            ways.setdefault((dim.size, group), set()).add((repeat, "heads" in dim.roles))
    sizes = {size for size, _ in ways}
    by_place = dict(_split_by(layer, trace.splits.get(name, ())))
    for key, part in by_place.items():
        yield from ((group, UnitAttribute(name, key, repeat)) for group, repeat in owners(part, groups))
    for key, value in ((key, value) for key, value in _integers(layer) if ways and key not in by_place):
        for group in dict.fromkeys(groups.values()) if value in sizes else ():
            known = ways.get((value, group), set())
            if "head" in key or "dim" in key:
                known = {(repeat, heads) for repeat, heads in known if heads == ("dim" not in key)}
            if len(known) == 1:
                yield group, UnitAttribute(name, key, next(iter(known))[0])


def _split_by(layer: nn.Module, splits: Sequence[tuple[Dim, ...]]) -> Iterator[tuple[str, Dim]]:
    """The items of stored lists that are the sizes of a split, with the parts of it."""
    for key, value in vars(layer).items():
        if not isinstance(value, tuple | list):
            continue
        parts = next((parts for parts in splits if [part.size for part in parts] == [*value]), ())
        yield from ((f"{key}.{place}", part) for place, part in enumerate(parts))


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
    """Or a module of another kind, which names what it counts as it likes (timm's BlurPool2d)."""
    from torch.nn.modules.conv import _ConvNd

    return not isinstance(layer, _ConvNd) or layer.groups == layer.in_channels == layer.out_channels
