"""What every parameter tensor and every product costs, as a product over the axes that groups shorten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Axis, CostTerm, Group, InputSpec
from cswap_deploy.model import count_by_module
from cswap_deploy.prune.attributes import owners
from cswap_deploy.prune.dims import Dim
from cswap_deploy.prune.tracing import Product, Trace

if TYPE_CHECKING:
    from torch import nn


def cost_terms(
    module: nn.Module, spec: InputSpec, trace: Trace, groups: Sequence[Group], atoms: Mapping[str, Dim]
) -> tuple[CostTerm, ...]:
    """`atoms`: per group what its units are in the trace. Multiply-accumulates are of one image, as `model.count` counts them."""
    axes = _axes(module, groups)
    names = {atoms[group.name]: group.name for group in groups}
    counted_macs = count_by_module(module, spec)
    terms = []
    counted: set[Any] = set()
    for name, layer in module.named_modules():
        own = counted_macs[name]
        prefix = f"{name}." if name else ""
        tensors = dict(layer.named_parameters(recurse=False))
        products = [product for product in trace.products if product.module == name]
        shown = f"{prefix}product" if "weight" in tensors else name
        apart = [replace(term, name=shown) for term in _apart(name, products, names, axes)] if own else []
        apart = apart if sum(term.macs for term in apart) <= own else []  # what `count` does not count costs nothing
        macs = own - sum(term.macs for term in apart)
        for leaf, values in tensors.items():
            mine = macs if leaf == "weight" else 0
            terms.append(
                CostTerm(prefix + leaf, 0 if values in counted else values.numel(), mine, axes.get(prefix + leaf, ()))
            )
            counted.add(values)
        terms += apart
        if macs and "weight" not in tensors:
            terms.append(CostTerm(name, 0, macs, ()))
    return tuple(_told_apart(terms))


def _told_apart(terms: Sequence[CostTerm]) -> Iterator[CostTerm]:
    """With a number behind a name that another one has: two products of an attention, say."""
    seen = Counter[str]()
    for term in terms:
        seen[term.name] += 1
        yield replace(term, name=f"{term.name} {seen[term.name]}") if seen[term.name] > 1 else term


def _apart(
    name: str, products: Sequence[Product], groups: Mapping[Dim, str], axes: Mapping[str, tuple[Axis, ...]]
) -> Iterator[CostTerm]:
    """Products that do not simply shrink with the module's weight; those that shrink alike as one term."""
    totals: dict[tuple[Axis, ...], int] = {}
    weight = f"{name}.weight" if name else "weight"
    for product in products:
        own = tuple(Axis(dim.size, parts) for dim in product.dims if (parts := tuple(owners(dim, groups))))
        if product.weight != weight or sorted(_summed(own)) != sorted(_summed(axes.get(weight, ()))):
            totals[own] = totals.get(own, 0) + product.macs
    for own, macs in totals.items():
        yield CostTerm(name, 0, macs, own)


def _summed(axes: Sequence[Axis]) -> Iterator[tuple[int, tuple[tuple[str, int], ...]]]:
    """Each axis with its owners in one order and once each."""
    for axis in axes:
        totals: dict[str, int] = {}
        for group, repeat in axis.owners:
            totals[group] = totals.get(group, 0) + repeat
        yield axis.size, tuple(sorted(totals.items()))


def _axes(module: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[Axis, ...]]:
    shortened: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group in groups:
        for member in group.members:
            shortened.setdefault((member.tensor, member.axis), []).append((group.name, member.repeat))
    sizes = {name: tensor.shape for name, tensor in module.named_parameters()}
    axes: dict[str, tuple[Axis, ...]] = {}
    for (tensor, axis), parts in shortened.items():
        if tensor in sizes:
            axes[tensor] = (*axes.get(tensor, ()), Axis(int(sizes[tensor][axis]), tuple(parts)))
    return axes
