"""The algebra of tensor axes: an axis is an atom of units, a sum of axes side by side, or a product of nested ones.

Terms are unified like types: what must have the same units becomes one term, and an atom that turns out to consist of parts
(a concatenation, a reshape into heads) is replaced by them wherever it stands. An atom that something mixes is frozen, with the
reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

SCATTERED = "its units are scattered over a coupled layer"
POSITION = "it is a position, not a unit"
FIXED = "a step of the forward that picks by number reads its units"


@dataclass(eq=False)
class Dim:
    """One axis. `frozen`: why its units cannot leave, "" where they can; only an atom's counts."""

    size: int
    frozen: str = ""
    kind: Literal["atom", "alias", "sum", "product"] = "atom"
    parts: list[Dim] = field(default_factory=list)
    roles: set[str] = field(default_factory=set)
    """Of an atom: `heads` where it numbers products of two activations, `dims` where such a product sums over it, `values` where it
    numbers what that gives, `groups` where it numbers the groups of a convolution."""


def found(dim: Dim) -> Dim:
    """The term that stands for `dim` now."""
    while dim.kind == "alias":
        dim = dim.parts[0]
    return dim


def product(factors: Sequence[Dim]) -> Dim:
    """Outermost first."""
    parts = [part for factor in factors for part in _parts(factor, "product") if part.size != 1]
    if len(parts) <= 1:
        return parts[0] if parts else Dim(1)
    return Dim(prod(part.size for part in parts), kind="product", parts=parts)


def side_by_side(dims: Sequence[Dim]) -> Dim:
    parts = [part for dim in dims for part in _parts(dim, "sum") if part.size]
    return parts[0] if len(parts) == 1 else Dim(sum(part.size for part in parts), kind="sum", parts=parts)


def atoms(dim: Dim) -> Iterator[Dim]:
    dim = found(dim)
    if dim.kind == "atom":
        yield dim
    for part in dim.parts:
        yield from atoms(part)


def freeze(dim: Dim, reason: str) -> None:
    for atom in atoms(dim):
        atom.frozen = atom.frozen or reason


def give_role(dim: Dim, role: str) -> None:
    for atom in atoms(dim):
        atom.roles.add(role)


def unify(a: Dim, b: Dim) -> Dim:
    """Both have the same units from now on; where their layouts cannot be brought together, both are frozen."""
    a, b = found(a), found(b)
    if a is b:
        return a
    if a.size != b.size:
        return _clash(a, b)
    if a.kind != "atom":
        a, b = b, a
    if a.kind == "atom":
        if a.frozen:
            freeze(b, a.frozen)
        for role in a.roles:
            give_role(b, role)
        a.kind, a.parts = "alias", [b]
        return b
    if a.kind == b.kind == "sum":
        fits = _unify_sums(_parts(a, "sum"), _parts(b, "sum"))
    elif a.kind == b.kind == "product":
        fits = _unify_products(_parts(a, "product"), _parts(b, "product"))
    else:
        fits = _unify_mixed(*((a, b) if a.kind == "product" else (b, a)))
    return a if fits else _clash(a, b)


def divided(dim: Dim, at: int) -> tuple[Dim, Dim] | None:
    """`dim` as two axes side by side, the first of size `at`; None where its layout does not allow that."""
    dim = found(dim)
    if at in (0, dim.size):
        empty = Dim(0)
        return (dim, empty) if at else (empty, dim)
    if dim.kind == "atom":
        halves = Dim(at), Dim(dim.size - at)
        _become(dim, "sum", halves)
        return halves
    if dim.kind == "product":
        outer, *rest = _parts(dim, "product")
        inner = product(rest)
        cut = divided(outer, at // inner.size) if at % inner.size == 0 else None
        return cut and (product([cut[0], inner]), product([cut[1], inner]))
    before: list[Dim] = []
    parts = _parts(dim, "sum")
    while parts[0].size <= at:
        at -= parts[0].size
        before.append(parts.pop(0))
    cut = divided(parts[0], at)
    return cut and (side_by_side([*before, cut[0]]), side_by_side([cut[1], *parts[1:]]))


def factored(dim: Dim, inner: int) -> tuple[Dim, Dim] | None:
    """`dim` as (outer, inner) of a product, the inner of size `inner`; None where its layout does not allow that."""
    dim = found(dim)
    if dim.size % inner:
        return None
    if inner in (1, dim.size):
        return (Dim(1), dim) if inner > 1 else (dim, Dim(1))
    if dim.kind == "atom":
        pair = Dim(dim.size // inner), Dim(inner)
        _become(dim, "product", pair)
        return pair
    if dim.kind == "sum":
        pairs = [factored(part, inner) for part in _parts(dim, "sum")]
        if any(pair is None for pair in pairs):
            return None
        shared = [pair for pair in pairs if pair is not None]
        for pair in shared[1:]:
            unify(shared[0][1], pair[1])
        return side_by_side([pair[0] for pair in shared]), shared[0][1]
    *rest, last = _parts(dim, "product")
    if inner % last.size == 0:
        deeper = factored(product(rest), inner // last.size)
        return deeper and (deeper[0], product([deeper[1], last]))
    split = factored(last, inner) if last.size % inner == 0 else None
    return split and (product([*rest, split[0]]), split[1])


def reshaped(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """The axes of a tensor with these axes after a reshape to `shape`; those that it tears apart are frozen."""
    sources, targets, result = list(dims), list(shape), list[Dim]()
    while targets:
        if targets[0] == 1:
            result.append(Dim(targets.pop(0)))
            continue
        taken, wanted = [sources.pop(0)], [targets.pop(0)]
        while (have := prod(dim.size for dim in taken)) != (need := prod(wanted)):
            if have < need:
                taken.append(sources.pop(0))
            else:
                wanted.append(targets.pop(0))
        result += _split(product(taken), wanted)
    return result


def occurrences(dim: Dim, offset: int = 0, repeat: int = 1) -> Iterator[tuple[Dim, int, int]]:
    """(atom, offset, repeat) wherever an atom stands in a term: its unit u owns `repeat` indices from offset + u * repeat on."""
    dim = found(dim)
    if dim.kind == "atom":
        yield dim, offset, repeat
    elif dim.kind == "sum":
        for part in dim.parts:
            yield from occurrences(part, offset, repeat)
            offset += part.size * repeat
    else:
        yield from _in_product(_parts(dim, "product"), offset, repeat)


def _in_product(parts: Sequence[Dim], offset: int, repeat: int) -> Iterator[tuple[Dim, int, int]]:
    sizes = [part.size for part in parts]
    for place, part in enumerate(parts):
        inner = prod(sizes[place + 1 :]) * repeat
        for outer in range(prod(sizes[:place])):
            yield from occurrences(part, offset + outer * part.size * inner, inner)


def _parts(dim: Dim, kind: str) -> list[Dim]:
    """The term's parts where it is of this kind, nested ones of the kind unfolded; else itself alone."""
    dim = found(dim)
    return [inner for part in dim.parts for inner in _parts(part, kind)] if dim.kind == kind else [dim]


def _become(atom: Dim, kind: Literal["sum", "product"], parts: Sequence[Dim]) -> None:
    for part in parts:
        part.frozen, part.roles = atom.frozen, set(atom.roles)
    atom.kind, atom.parts = kind, list(parts)


def _clash(a: Dim, b: Dim) -> Dim:
    for dim in (a, b):
        freeze(dim, SCATTERED)
    for reason in {atom.frozen for dim in (a, b) for atom in atoms(dim)}:
        freeze(a, reason)
    return a


def _unify_sums(a: list[Dim], b: list[Dim]) -> bool:
    while a and b:
        size = min(a[0].size, b[0].size)
        pair = [divided(own.pop(0), size) for own in (a, b)]
        if pair[0] is None or pair[1] is None:
            return False
        unify(pair[0][0], pair[1][0])
        for own, cut in ((a, pair[0]), (b, pair[1])):
            if cut[1].size:
                own.insert(0, cut[1])
    return True


def _unify_products(a: list[Dim], b: list[Dim]) -> bool:
    while a and b:
        size = min(a[-1].size, b[-1].size)
        pair = [factored(own.pop(), size) for own in (a, b)]
        if pair[0] is None or pair[1] is None:
            return False
        unify(pair[0][1], pair[1][1])
        for own, cut in ((a, pair[0]), (b, pair[1])):
            if cut[0].size > 1:
                own.append(cut[0])
    return True


def _unify_mixed(nested: Dim, row: Dim) -> bool:
    *rest, last = _parts(nested, "product")
    pair = factored(row, last.size)
    if pair is None:
        return False
    unify(last, pair[1])
    unify(product(rest), pair[0])
    return True


def _split(dim: Dim, shape: Sequence[int]) -> list[Dim]:
    """`dim` as nested axes of these sizes, outermost first."""
    result: list[Dim] = []
    rest = dim
    for size in reversed(shape[1:]):
        pair = factored(rest, size)
        if pair is None:
            freeze(dim, SCATTERED)
            return [Dim(size, SCATTERED) for size in shape]
        rest, inner = pair
        result.insert(0, inner)
    return [rest, *result]
