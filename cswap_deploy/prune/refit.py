"""Least squares: every layer behind the first cut is re-fitted in execution order, on the already compensated prefix.

W = argmin |U W - Y|^2 + ridge |W - W_dense|^2 over the inputs that are left: U what the layer reads in the compensated
network; Y what it gives in the dense one, plus what the shortcut that it is added to has lost by then. Where a ReLU alone reads
the result, a value below zero is as good as any other (nonlinear reconstruction, Zhang et al. 2015, arXiv 1505.06798): Y is
moved there to what the fit gives, and the fit repeated. What makes the units of a group that one layer reads is moved before that
layer is fitted (`producers`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.grouped import grouped_rows, refit_grouped
from cswap_deploy.prune.least_squares import crossed
from cswap_deploy.prune.observe import Place, observe, outlet
from cswap_deploy.prune.producers import FEWEST_IMAGES as FEWEST_MOVERS
from cswap_deploy.prune.producers import MAPS_BYTES, MOST_IMAGES, Movers, Partner
from cswap_deploy.prune.replay import CACHE_BYTES, Reuse, Walk, finished_before, in_order
from cswap_deploy.prune.rows import Rows
from cswap_deploy.prune.systems import Block, Site, System, Systems

if TYPE_CHECKING:
    from torch import Tensor, nn

EXAMINED = 2
"""Structures of a key that are remembered: of one network that of the search, and that of what ships."""
WANTED_BYTES = 1 << 30
"""Memory for what the dense network gives; beyond it that is computed for each fit."""
MOST_COLUMNS = 10_000
"""Inputs of a layer that is fitted or explained, at most: its Gram matrix then has 0.8 GB, and ordering units by it three more. The
matrices of a grouped convolution may have as many values together."""
FEWEST_IMAGES = 64
"""Fitted on at least, however large the network's activations are."""


@dataclass
class Structure:
    """What holds for the layers of a network whatever leaves: found at the first fit, used by the later ones."""

    key: str = ""
    """Of the network and the images: what is found, but `wanted`, holds for all structures of this key in this process. "": for none."""
    sites: dict[str, Site | None] = field(default_factory=dict)
    grouped: dict[str, Site] = field(default_factory=dict)
    """Convolutions of several groups that can be fitted group by group."""
    unfitted: dict[str, str] = field(default_factory=dict)
    """Why the other layers are not fitted, in words."""
    reuse: Reuse = field(default_factory=Reuse)
    order: tuple[str, ...] = ()
    """Convolutions and linear layers in the order in which a forward calls them."""
    images: int = 0
    """Fitted on: as many as the memory for replayed outputs holds."""
    movers: int = 0
    """Of these the first that producers are moved by."""
    wanted: dict[str, list[Tensor]] = field(default_factory=dict)
    """What the dense network gives, per layer and batch, at the positions that are drawn."""

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for parts in self.wanted.values() for part in parts)

    def remember(self, name: str, wanted: list[Tensor]) -> None:
        """While memory allows."""
        if name not in self.wanted and sum(part.nbytes for part in wanted) + self.bytes <= WANTED_BYTES:
            self.wanted[name] = wanted

    def draw_denser(self, times: float) -> None:
        """All sites, as `Rows.denser`."""

        def denser(site: Site) -> Site:
            return replace(site, rows=site.rows.denser(times))

        self.sites = {name: site and denser(site) for name, site in self.sites.items()}
        self.grouped = {name: denser(site) for name, site in self.grouped.items()}


def refit(
    dense: nn.Module,
    module: nn.Module,
    gone: Mapping[str, list[int]],
    batches: Batches,
    structure: Structure,
    producers: Mapping[str, Partner],
    steps: int,
    silent: Mapping[str, Sequence[int]],
    systems: Systems | None = None,
) -> None:
    """Fit the layers of `module`, a masked copy of `dense`, in place; note in `systems` those of the layers in `gone`.

    `gone`: per consumer of a group the input channels that have left, perhaps none. Layers before the first cut stay as they are.
    `structure` is that of `dense`, examined on these images. Producers are moved in `steps` steps where their consumer has lost
    something; what is between the two is then left as it is, since it is to pass on other things than it did. `silent`: per layer
    the outputs that stay 0, as they are in `module`.
    """
    batches = batches.first(structure.images)
    there, here = Walk(dense, batches, structure.reuse), Walk(module, batches, structure.reuse)
    same = not any(gone.values()) and not any(silent.values())  # nothing else differs in a masked copy
    some = batches.first(structure.movers)
    movers = Movers(dense, module, some, structure.reuse, structure.sites, structure.order, len(batches), steps)
    changed, kept = False, set[str]()
    for number, name in enumerate(structure.order, 1):
        lost, partner, quiet = gone.get(name), producers.get(name), silent.get(name, ())
        moves = bool(steps and partner and _narrowed(module, partner.consumer, gone.get(partner.consumer, ())))
        if lost is None and not changed and not moves and not quiet:
            continue
        fits = changed or bool(lost)
        changed = fits or bool(quiet)
        site, grouped = structure.sites[name], structure.grouped.get(name)
        if grouped and fits and name not in kept and not lost:
            refit_grouped(grouped, dense, module, name, _wanted(grouped, name, there, structure), here)
        if site is None:
            continue
        visits = _visits(site, name, here, None if same else there, structure)
        system, blocks = _gather(site, dense, name, visits, frozenset(lost or ()), quiet)
        if lost is not None and systems is not None:
            systems[name] = system
        weights = _solution(system, site, blocks) if fits else system.start
        if fits:
            system.write(module, name, weights)
        if moves and partner:
            moved = movers.move(name, partner.consumer, system, weights, frozenset(gone[partner.consumer]))
            kept |= partner.between if moved else set()
        progress.advance("layers fitted", number, len(structure.order))


def _narrowed(module: nn.Module, consumer: str, lost: Sequence[int]) -> bool:
    """Whether a layer has lost some of its inputs, but not all."""
    layer: Any = module.get_submodule(consumer)
    return 0 < len(lost) < int(layer.weight.shape[1])


# --- structure


_examined: dict[str, Structure] = {}
"""What was found, by key."""


def examine(dense: nn.Module, structure: Structure, batches: Batches, consumers: Collection[str]) -> None:
    """Once per network: its layers in order and as linear systems, and how many images fit into the memory for replayed outputs."""
    if structure.order:
        return
    found = _examined.get(structure.key) or _found(dense, batches, structure.reuse)
    structure.order, structure.sites, structure.grouped = found.order, dict(found.sites), dict(found.grouped)
    structure.reuse, structure.images, structure.movers = found.reuse, found.images, found.movers
    for name, why in found.unfitted.items():
        if name in consumers:
            progress.warn(f"{name} is not refitted: {why}")
    if structure.images < len(batches):
        progress.note(
            f"layers are fitted on {structure.images} of {len(batches)} images: the activations fill the memory"
        )
    if structure.key:
        _examined[structure.key] = found
        for oldest in [*_examined][:-EXAMINED]:
            del _examined[oldest]


def _found(dense: nn.Module, batches: Batches, reuse: Reuse) -> Structure:
    import torch
    from torch import nn

    structure = Structure(reuse=reuse)
    image, pair = next(iter(batches.first(1)))[0], next(iter(batches.first(2)))[0]
    names = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    largest = 1
    with torch.no_grad():
        structure.order = tuple(in_order(dense, names, image))
        walk = Walk(dense, batches.first(1), structure.reuse)
        for name in structure.order:
            read = walk.read_from(name, image) or ()
            with finished_before(dense, [name], walk.once, read) as done:
                place = observe(dense, name, pair, as_far_as_sum=False)
            largest = max(largest, sum(value.nbytes for key, value in done.items() if key in read) // len(pair))
            alone, length = _alone(dense, name, walk.once), len(place.output) * len(batches) // len(pair)
            rows = Rows.of(dense.get_submodule(name), place.inputs, place.output, length) if alone else None
            structure.sites[name] = _site(dense, name, rows, pair, walk.once) if rows else None
            if rows is None and alone:
                own = grouped_rows(dense.get_submodule(name), place.inputs, place.output, length)
                structure.grouped |= {name: _site(dense, name, own, pair, walk.once)} if own else {}
            if rows is None and name not in structure.grouped:
                structure.unfitted[name] = "it is no plain convolution or linear layer that is called once"
            if why := _too_large(dense.get_submodule(name), rows, structure.grouped.get(name)):
                structure.sites[name], structure.unfitted[name] = None, why
                structure.grouped.pop(name, None)
    structure.unfitted |= _without_a_fit(dense)
    structure.images = min(len(batches), max(FEWEST_IMAGES, CACHE_BYTES // largest))
    structure.movers = min(structure.images, MOST_IMAGES, max(FEWEST_MOVERS, MAPS_BYTES // largest))
    if structure.images < len(batches):
        structure.draw_denser(len(batches) / structure.images)
    return structure


def _too_large(layer: Any, rows: Rows | None, grouped: Site | None) -> str | None:
    """Why a layer's Gram matrices, of one group or of several, are not summed."""
    columns = layer.weight[0].numel()
    if rows and columns > MOST_COLUMNS:
        return f"the fit of its {columns} inputs would not fit into memory"
    if grouped and layer.groups * columns**2 > MOST_COLUMNS**2:
        return f"the fits of its {layer.groups} groups of {columns} inputs would not fit into memory"
    return None


def _without_a_fit(dense: nn.Module) -> dict[str, str]:
    """The layers that may read units and are of a kind that is never fitted."""
    from torch import nn

    others = (nn.Conv1d, nn.Conv3d)
    return {
        name: f"layers of the kind {type(layer).__name__} are not fitted"
        for name, layer in dense.named_modules()
        if isinstance(layer, others)
    }


def _alone(dense: nn.Module, name: str, once: Collection[str]) -> bool:
    """False for a layer that is called again or whose parameters are another's too: what fits one use would spoil the other."""
    layer = dense.get_submodule(name)
    own = [id(parameter) for parameter in layer.parameters(recurse=False)]
    others = (other for other in dense.modules() if other is not layer)
    return name in once and all(
        id(parameter) not in own for other in others for parameter in other.parameters(recurse=False)
    )


def _site(dense: nn.Module, name: str, rows: Rows, images: Tensor, once: Collection[str]) -> Site:
    way = outlet(dense, name, images)
    return Site(rows, way if way.norm in once else replace(way, norm=""))


# --- one layer


def _wanted(site: Site, name: str, there: Walk, structure: Structure) -> list[Tensor]:
    """Per batch (images, outputs, positions): what the sum, or where there is none the output, was in the dense network.

    In terms of the layer's output, at the positions that are drawn of each batch. Kept from fit to fit while memory allows.
    """
    if name in structure.wanted:
        return structure.wanted[name]
    places = there.visit(name, as_far_as_sum=site.outlet.summed)
    found = [_target(site, place, seed) for seed, place in enumerate(places)]
    structure.remember(name, found)
    return found


def _target(site: Site, place: Place, seed: int) -> Tensor:
    return site.rows.pick(place.output + site.outlet.beside(place), seed).contiguous()


def _visits(
    site: Site, name: str, here: Walk, there: Walk | None, structure: Structure
) -> Iterator[tuple[Place, Tensor]]:
    """Per batch what the layer does in the compensated network, and what `_wanted` says; `there` is None where both networks are one."""
    places = here.visit(name, as_far_as_sum=site.outlet.summed)
    if there is not None:
        yield from zip(places, _wanted(site, name, there, structure), strict=True)
        return
    found: list[Tensor] = []
    for seed, place in enumerate(places):
        found.append(_target(site, place, seed))
        yield place, found[-1]
    structure.remember(name, found)


def _gather(
    site: Site,
    dense: nn.Module,
    name: str,
    visits: Iterable[tuple[Place, Tensor]],
    gone: frozenset[int],
    silent: Sequence[int],
) -> tuple[System, list[Block]]:
    """The layer's system; the blocks that it was summed over where a rectifier follows, for which they are needed again."""
    system, kept = System.begin(site, dense, gone, tuple(silent)), list[Block]()

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for seed, (found, wanted) in enumerate(visits):
            for block in Block.of(site, found, wanted, seed, system.read):
                kept.extend([block] if site.outlet.rectified else [])
                yield block.fields, block.targets

    system.equations.add(blocks(), site.rows.order(system.read))
    return system, kept


def _solution(system: System, site: Site, blocks: Sequence[Block]) -> Tensor:
    """(columns + 1, outputs)"""
    plain = system.nested()
    weights = plain.leading()
    if not blocks:
        return weights
    order, cross = site.rows.order(system.read), system.equations.cross
    gains = _rectified_gains(weights, site.outlet.sign(weights.shape[1]), blocks, order)
    return plain.towards(cross + crossed(gains, order, cross)).leading()


def _rectified_gains(
    weights: Tensor, sign: Tensor, blocks: Sequence[Block], order: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fields, and how far the rectifier lets the targets be moved towards the fit."""
    for block in blocks:
        fit = block.fields.transpose(1, 2) @ weights[order] + weights[-1]
        yield block.fields, block.moved(fit.transpose(1, 2), sign) - block.targets
