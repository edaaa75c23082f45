"""Exports of narrower networks → how each number in the dense network's ONNX file follows the widths of its groups.

Widths stand in shapes of weights, in constants by which forward code reshapes, splits or slices, and in attributes. Which of them a group
owns is not read off the graph, whose exporter folds, transposes and renames: the network is cut and exported with a few random
settings of widths, as what ships will be, and each number that differs is explained by the units that left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import gcd
from random import Random
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Groups
from cswap_deploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

LEAST, MOST = 2, 12
"""Settings that are exported: as few as tell apart all that a number may follow."""
TRIES = 10
"""Of so many exports, until they do."""
DRAWS = 200
"""Of a group's widths, until it shrinks like no other."""
SMALL = 64
"""Integers in a constant, at most, that are compared one by one: a shape, sizes of a split."""
HINT = "prune for macs in place of a latency, or report this network"

Widths = Mapping[str, int]
Changes = tuple[int, ...]
"""By how much a number is less in each export."""
PerUnit = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Size:
    """A number of the dense graph, and by how much it shrinks for each unit that leaves a group."""

    tensor: str
    """The initializer that it stands in; empty: in an attribute of `node`."""
    node: str
    """The name of the one node that reads it so; empty: all that read the tensor do. Constants that are equal in the dense network are
    one, whatever each of their readers follows."""
    input: int
    """Of that node, which one it is."""
    key: str
    """`dims` or `values` of the tensor, or the attribute's name."""
    place: int
    """Among several."""
    per_unit: PerUnit

    def shrunk(self, number: int, removed: Widths) -> int:
        return number - sum(removed.get(group, 0) * each for group, each in self.per_unit)


@dataclass(frozen=True)
class Sizes:
    """All numbers of one file that follow widths."""

    found: tuple[Size, ...]
    branches: bool = True
    """Whether the file can also be that of a network without branches."""


def settings(groups: Groups) -> tuple[dict[str, int], ...]:
    """Units of each group in a few exports, so that no two sums that a number may follow shrink in proportion. Seeded.

    Groups of one unit stay. Errors: ExportError where so many exports do not tell the groups apart.
    """
    units, random = _narrowable(groups), Random(0)
    sums = _sums(groups)
    for count in range(LEAST, MOST + 1):
        for _ in range(TRIES):
            found = _apart(units, count, random)
            if found is None:
                break
            exports = tuple({name: widths[number] for name, widths in found.items()} for number in range(count))
            removed = _removed(groups, exports)
            if len({_direction(_changes(parts, removed)) for parts in sums}) == len(sums):
                return exports
    raise ExportError(f"{MOST} exports do not tell {len(units)} groups apart", HINT)


def another(groups: Groups, exported: Sequence[Widths]) -> dict[str, int]:
    """Units of each group, none whole, in a setting on which what was learned is tried. Seeded.

    Unlike all that were exported, where so many narrow settings exist.
    """
    units, random, found = _narrowable(groups), Random(1), dict[str, int]()
    for _ in range(DRAWS):
        found = {name: min(_drawn(many, random), many - 1) for name, many in units.items()}
        if found not in exported:
            break
    return found


def _narrowable(groups: Groups) -> dict[str, int]:
    return {group.name: group.units for group in groups.groups if group.units > 1}


def _apart(units: Mapping[str, int], count: int, random: Random) -> dict[str, tuple[int, ...]] | None:
    """Widths of each group in so many exports; None where no draw sets one apart from those before."""
    taken = {(0,) * count}
    found: dict[str, tuple[int, ...]] = {}
    for name, many in units.items():
        for _ in range(DRAWS):
            widths = tuple(_drawn(many, random) for _ in range(count))
            if (direction := _direction(tuple(many - width for width in widths))) not in taken:
                taken.add(direction)
                found[name] = widths
                break
        else:
            return None
    return found


def _drawn(units: int, random: Random) -> int:
    """A third or more; 1 only of two units: some of what has size 1 is exported otherwise."""
    return random.randint(min(units - 1, max(2, -(-units // 3))) if units > 2 else 1, units)


def learned(groups: Groups, dense: Numbers, narrower: Sequence[tuple[Widths, Numbers]]) -> Sizes:
    """`narrower`: widths, and the numbers of what the network was exported to with them.

    Errors: ExportError where a number is not explained, or the graphs differ in more than numbers.
    """
    for _, other in narrower:
        if other.structure != dense.structure:
            raise ExportError(f"a narrower network is exported to other nodes: {_difference(dense, other)}", HINT)
    known = _explanations(groups, _removed(groups, [widths for widths, _ in narrower]))
    uses: dict[str, dict[tuple[str, int], set[Size]]] = {}
    found = list[Size]()
    for place, number, *narrow in zip(
        dense.places, dense.values, *(other.values for _, other in narrower), strict=True
    ):
        changes = tuple(number - other for other in narrow)
        per_unit = known.of(changes) if any(changes) else ()
        if per_unit is None:
            raise ExportError(f"{place.key} of {place.tensor or place.node} follow no width that was cut", HINT)
        sizes = {replace(place, per_unit=per_unit)} if per_unit else set()
        if place.tensor:
            own = uses.setdefault(place.tensor, {}).setdefault((place.node, place.input), set())
            own |= {replace(size, node="", input=0) for size in sizes}
        else:
            found += sizes
    for by_use in uses.values():
        first, *others = by_use.values()
        if all(sizes == first for sizes in others):
            found += first
        else:
            found += (replace(size, node=node, input=at) for (node, at), sizes in by_use.items() for size in sizes)
    return Sizes(tuple(sorted(found, key=lambda size: (size.tensor, size.node, size.input, size.key, size.place))))


def resized(numbers: Iterable[int], sizes: Sequence[Size], key: str, removed: Widths) -> list[int]:
    """What is left of the numbers."""
    left = list(numbers)
    for size in sizes:
        if size.key == key:
            left[size.place] = size.shrunk(left[size.place], removed)
    return left


# --- what explains a number


def _direction(changes: Changes) -> Changes:
    common = _common(changes)
    return tuple(change // common for change in changes)


def _common(changes: Changes) -> int:
    """The greatest common divisor, with the sign of the first change: what grows as a width shrinks is explained by it too."""
    first = next((change for change in changes if change), 1)
    return (gcd(*changes) or 1) * (1 if first > 0 else -1)


@dataclass(frozen=True)
class _Explanations:
    """By direction: who shrinks so, and by what when its units left."""

    known: Mapping[Changes, tuple[PerUnit, int]]

    def of(self, changes: Changes) -> PerUnit | None:
        owners, common = self.known.get(_direction(changes), ((), 1))
        times = _common(changes)
        whole = owners and all(repeat * times % common == 0 for _, repeat in owners)
        return tuple((name, repeat * times // common) for name, repeat in owners) if whole else None


def _explanations(groups: Groups, removed: Sequence[Widths]) -> _Explanations:
    found: dict[Changes, tuple[PerUnit, int]] = {}
    for parts in _sums(groups):
        changes = _changes(parts, removed)
        if any(changes):
            found.setdefault(_direction(changes), (parts, _common(changes)))
    return _Explanations(found)


def _removed(groups: Groups, settings: Iterable[Widths]) -> list[dict[str, int]]:
    """Units that left each group, by setting."""
    units = {group.name: group.units for group in groups.groups}
    return [{name: units[name] - width for name, width in widths.items()} for widths in settings]


def _changes(parts: PerUnit, removed: Sequence[Widths]) -> Changes:
    return tuple(sum(each.get(name, 0) * repeat for name, repeat in parts) for each in removed)


def _sums(groups: Groups) -> list[PerUnit]:
    """What a number may follow, a multiple aside: a single group, or groups that lie side by side on one axis of a tensor."""
    axes: dict[tuple[str, int], list[tuple[int, str, int]]] = {}
    for group in groups.groups:
        for member in group.members:
            axes.setdefault((member.tensor, member.axis), []).append((member.offset, group.name, member.repeat))
    narrowable, sums = _narrowable(groups), dict[frozenset[tuple[str, int]], PerUnit]()

    def add(total: Mapping[str, int]) -> None:
        common = gcd(*total.values())
        parts = tuple((name, repeat // common) for name, repeat in total.items())
        sums.setdefault(frozenset(parts), parts)

    for name in narrowable:
        add({name: 1})
    for ordered in dict.fromkeys(tuple(sorted(owners)) for owners in axes.values()):
        for start in range(len(ordered)):
            total: dict[str, int] = {}
            for _, name, repeat in ordered[start:]:
                if name not in narrowable:
                    continue
                total = {**total, name: total.get(name, 0) + repeat}
                add(total)
    return list(sums.values())


# --- what a graph says


@dataclass(frozen=True)
class Numbers:
    """Every number of a graph that could follow a width, in order, and all else that graphs of two widths must share."""

    places: tuple[Size, ...]
    """Where each stands; `per_unit` is empty."""
    values: tuple[int, ...]
    structure: tuple[Any, ...]

    @staticmethod
    def of(model: onnx.ModelProto) -> Numbers:
        """Numbers of a constant count once for each node that reads it."""
        import onnx

        tensors = {item.name: item for item in model.graph.initializer}
        seen: dict[str, int] = {item.name: -1 - place for place, item in enumerate(model.graph.input)}
        numbers: list[tuple[Size, int]] = []
        structure: list[Any] = []
        for node in model.graph.node:
            parts = list[Any]()
            for at, name in enumerate(node.input):
                tensor = tensors.get(name)
                if tensor is None:
                    parts.append(seen.get(name))
                    continue
                parts.append((tensor.data_type, len(tensor.dims), *_rest(tensor)))
                for key, own in (("dims", tensor.dims), ("values", _integers(tensor))):
                    numbers += ((Size(name, node.name, at, key, place, ()), value) for place, value in enumerate(own))
            for item in sorted(node.attribute, key=lambda item: item.name):
                own = [*item.ints] + ([item.i] if item.type == onnx.AttributeProto.INT else [])
                numbers += ((Size("", node.name, 0, item.name, place, ()), value) for place, value in enumerate(own))
                parts.append((item.name, len(own), *(_rest(item.t) if item.HasField("t") else ())))
            structure.append((node.op_type, *parts, len(node.output)))
            seen |= {name: len(seen) + number for number, name in enumerate(node.output)}
        places, values = zip(*numbers) if numbers else ((), ())
        return Numbers(places, values, tuple(structure))


def _is_whole(tensor: onnx.TensorProto) -> bool:
    import onnx

    return tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def _integers(tensor: onnx.TensorProto) -> list[int]:
    import onnx

    if not _is_whole(tensor) or len(tensor.dims) > 1 or (tensor.dims and tensor.dims[0] > SMALL):
        return []
    return [int(value) for value in onnx.numpy_helper.to_array(tensor).ravel()]


def _rest(tensor: onnx.TensorProto) -> Iterator[Any]:
    """How many integers are compared one by one; of others a digest, so that what changes in them is not passed over."""
    import onnx

    yield (few := len(_integers(tensor)))
    if _is_whole(tensor) and not few:
        yield sha256(onnx.numpy_helper.to_array(tensor).tobytes()).hexdigest()


def _difference(one: Numbers, other: Numbers) -> str:
    pairs = zip(one.structure, other.structure)
    here, there = next(
        ((a, b) for a, b in pairs if a != b), (f"{len(one.structure)} nodes", f"{len(other.structure)} nodes")
    )
    return f"{here} is {there}"
