"""Exports of narrower networks → how each number in the dense network's ONNX file follows the widths of its groups.

Widths stand in shapes of weights, in constants by which forward code reshapes, splits or slices, and in attributes. Which of them a group
owns is not read off the graph, whose exporter folds, transposes and renames: the network is cut and exported with a few random
settings of widths, as what ships will be, and each number that differs is explained by the units that left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from random import Random
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Groups
from cswap_deploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

LEAST, MOST = 3, 8
"""Settings that are exported: as few as tell all groups apart."""
DRAWS = 50
SMALL = 64
"""Integers in a constant, at most, that are compared by value: a shape, sizes of a split."""
HINT = "prune for macs in place of a latency, or report this network"

Widths = Mapping[str, int]
Changes = tuple[int, ...]
"""By how much a number is less in each export."""


@dataclass(frozen=True)
class Size:
    """A number of the dense graph, and by how much it shrinks for each unit that leaves a group."""

    owner: str
    """An initializer, or the first output of a node."""
    key: str
    """Of an initializer `dims` or `values`; of a node an attribute, or `2 values` of the initializer that is its input 2: constants
    that are equal in the dense network are one, whatever they follow."""
    place: int
    """Among several."""
    per_unit: tuple[tuple[str, int], ...]

    def shrunk(self, number: int, removed: Widths) -> int:
        return number - sum(removed.get(group, 0) * each for group, each in self.per_unit)


@dataclass(frozen=True)
class Sizes:
    """All numbers of one file that follow widths."""

    found: tuple[Size, ...]


def settings(groups: Groups) -> tuple[dict[str, int], ...]:
    """Units of each group in a few exports, so that no two groups shrink in proportion. Seeded."""
    random = Random(0)
    units = {group.name: group.units for group in groups.groups if group.units > 1}
    best: tuple[dict[str, int], ...] = ()
    for count in range(LEAST, MOST + 1):
        for _ in range(DRAWS):
            best = tuple({name: _drawn(many, random) for name, many in units.items()} for _ in range(count))
            apart = {_direction(tuple(many - each[name] for each in best)) for name, many in units.items()}
            if len(apart) == len(units) and (0,) * count not in apart:
                return best
    return best


def _drawn(units: int, random: Random) -> int:
    """At least a third: what has size 1 is exported differently."""
    return random.randint(min(units, max(2, -(-units // 3))) if units > 2 else 1, units)


def learned(groups: Groups, dense: onnx.ModelProto, narrower: Sequence[tuple[Widths, onnx.ModelProto]]) -> Sizes:
    """`narrower`: widths, and what the network was exported to with them. Errors: ExportError where a number is not explained."""
    places, shape = _numbers(dense)
    columns = []
    for _, model in narrower:
        numbers, other = _numbers(model)
        if other != shape:
            raise ExportError(f"a narrower network is exported to other nodes: {_difference(shape, other)}", HINT)
        columns.append([number for _, number in numbers])
    units = {group.name: group.units for group in groups.groups}
    removed = [{name: units[name] - width for name, width in widths.items()} for widths, _ in narrower]
    known = _explanations(groups, removed)
    uses: dict[str, dict[tuple[str, int], set[Size]]] = {}
    found = list[Size]()
    for (place, number), *narrow in zip(places, *columns, strict=True):
        changes = tuple(number - other for other in narrow)
        per_unit = _explained(changes, known) if any(changes) else ()
        if per_unit is None:
            raise ExportError(f"{place.key} of {place.tensor or place.node} follow no width that was cut", HINT)
        if place.tensor:
            own = uses.setdefault(place.tensor, {}).setdefault((place.node, place.input), set())
            own |= {Size(place.tensor, place.key, place.number, per_unit)} if per_unit else set()
        elif per_unit:
            found.append(Size(place.node, place.key, place.number, per_unit))
    for by_use in uses.values():
        if all(sizes == next(iter(by_use.values())) for sizes in by_use.values()):
            found += next(iter(by_use.values()))
        else:
            found += [
                replace(size, owner=node, key=f"{number} {size.key}")
                for (node, number), sizes in by_use.items()
                for size in sizes
            ]
    return Sizes(tuple(sorted(found, key=lambda size: (size.owner, size.key, size.place))))


# --- what explains a number


def _direction(changes: Changes) -> Changes:
    common = gcd(*changes) or 1
    return tuple(change // common for change in changes)


def _explanations(groups: Groups, removed: Sequence[Widths]) -> dict[Changes, tuple[tuple[str, int], ...]]:
    """By direction: a single group, or what lies side by side on one axis, from its beginning on."""
    axes: dict[tuple[str, int], list[tuple[int, str, int]]] = {}
    for group in groups.groups:
        for member in group.members:
            axes.setdefault((member.tensor, member.axis), []).append((member.offset, group.name, member.repeat))
    sums: list[dict[str, int]] = [{group.name: 1} for group in groups.groups]
    for owners in axes.values():
        ordered = sorted(owners)
        for start in (0, *range(1, len(ordered) - 1)):
            total: dict[str, int] = {}
            for _, name, repeat in ordered[start:]:
                total = {**total, name: total.get(name, 0) + repeat}
                sums.append(total)
    found: dict[Changes, tuple[tuple[str, int], ...]] = {}
    for parts in sums:
        changes = tuple(sum(each.get(name, 0) * repeat for name, repeat in parts.items()) for each in removed)
        if any(changes):
            found.setdefault(_direction(changes), (*parts.items(), ("", gcd(*changes))))
    return found


def _explained(
    changes: Changes, known: Mapping[Changes, tuple[tuple[str, int], ...]]
) -> tuple[tuple[str, int], ...] | None:
    if (parts := known.get(_direction(changes))) is None:
        return None
    *owners, (_, common) = parts
    times = gcd(*changes)
    if any(repeat * times % common for _, repeat in owners):
        return None
    return tuple((name, repeat * times // common) for name, repeat in owners)


# --- what a graph says


@dataclass(frozen=True)
class _Place:
    """Of a number: the first output of its node and, where it is no attribute, which input of it is which tensor."""

    node: str
    tensor: str
    input: int
    key: str
    number: int


def _numbers(model: onnx.ModelProto) -> tuple[list[tuple[_Place, int]], list[Any]]:
    """Every number of a graph that could follow a width, in order, and the structure that two graphs must share to be compared."""
    import onnx

    tensors = {item.name: item for item in model.graph.initializer}
    seen: dict[str, int] = {item.name: -1 - place for place, item in enumerate(model.graph.input)}
    numbers: list[tuple[_Place, int]] = []
    shape: list[Any] = []
    for node in model.graph.node:
        first, inputs = node.output[0], list[Any]()
        for at, name in enumerate(node.input):
            if (tensor := tensors.get(name)) is None:
                inputs.append(seen.get(name))
                continue
            values = _integers(tensor)
            for key, own in (("dims", tensor.dims), ("values", values)):
                numbers += [(_Place(first, name, at, key, number), value) for number, value in enumerate(own)]
            inputs.append((tensor.data_type, len(tensor.dims), len(values)))
        for item in sorted(node.attribute, key=lambda item: item.name):
            whole = list(item.ints) if item.type == onnx.AttributeProto.INTS else []
            whole += [item.i] if item.type == onnx.AttributeProto.INT else []
            numbers += [(_Place(first, "", 0, item.name, number), value) for number, value in enumerate(whole)]
            inputs.append((item.name, len(whole)))
        shape.append((node.op_type, inputs, len(node.output)))
        for name in node.output:
            seen[name] = len(seen)
    return numbers, shape


def _integers(tensor: onnx.TensorProto) -> list[int]:
    import onnx

    whole = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    if not whole or len(tensor.dims) > 1 or (tensor.dims and tensor.dims[0] > SMALL):
        return []
    return [int(value) for value in onnx.numpy_helper.to_array(tensor).ravel()]


def _difference(one: Sequence[Any], other: Sequence[Any]) -> str:
    pair = next(((a, b) for a, b in zip(one, other) if a != b), (f"{len(one)} items", f"{len(other)}"))
    return f"{pair[0]} is {pair[1]}"


# --- applied


def resized(numbers: Iterable[int], sizes: Sequence[Size], key: str, removed: Widths) -> list[int]:
    """What is left of the numbers."""
    left = list(numbers)
    for size in sizes:
        if size.key == key:
            left[size.place] = size.shrunk(left[size.place], removed)
    return left
