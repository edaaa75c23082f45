"""Proposed groups → proven ones: cutting some of their units at random computes what masking them does, on random images."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.artifacts import Group, InputSpec, Refusal, UnitAttribute
from cswap_deploy.errors import CswapError, reason
from cswap_deploy.prune.cut import cut_copy, fresh_copy, masked_copy

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE, SINGLE_TOLERANCE = 1e-9, 1e-4
"""Largest difference between cut and masked network, relative to the largest logit, in float64; in float32 where the
network's own forward cannot run in float64."""
COSTLY = 1e13
"""Parameters times input values from which on a forward takes many seconds: one image is enough then, else it is two."""
RELOADED = "the smaller network computes something else after it was stored and loaded"
NOISE, CLEAR = 10, 1e-2
"""The wrong ones are looked for in float32, what is found is proven in float64: a difference of at most NOISE times what
the precision alone makes is none, one above CLEAR is one, and between them float64 decides."""
LEAST, MOST = 0.3, 0.7
"""Parts of a group's units that stay while it is proven."""
TELLING = ("head", "dim", "channels", "width", "features")
"""Words in the names of attributes that count units: these are tried together first."""
MOST_NAMES = 4
"""Of attributes that are tried without one another."""
DIGITS = re.compile(r"\d+(?=.*\.)")
"""Groups whose names differ in the numbers of their blocks only are alike: where the first and the last fail, all stay."""


def proven(
    module: nn.Module, groups: Sequence[Group], spec: InputSpec
) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """The groups that may leave, alone and together, in their order; the others with the reason.

    All are tried at once; a set that fails is halved until the ones that are wrong stand alone. `module` is not changed.
    """
    return _Prover.of(module, spec, len(groups)).sort(tuple(groups)) if groups else ((), ())


def branches(
    module: nn.Module, groups: tuple[Group, ...], candidates: Collection[str], spec: InputSpec
) -> frozenset[str]:
    """Names of those `candidates` of proven groups all of whose units may leave (`Group.branch`), alone and together."""
    prover = _Prover.of(module, spec, 0)
    quick = prover._quick() or prover
    candidates = [group.name for group in groups if group.name in candidates and quick._sees_without(group)]
    if not candidates:
        return frozenset()

    def right(judge: _Prover, names: Collection[str], stored: bool = False) -> bool:
        return judge._disproof(tuple(replace(group, branch=group.name in names) for group in groups), stored) is None

    every = frozenset(candidates)
    if not right(quick, every):
        every = frozenset(name for name in candidates if right(quick, {name}))
    if not right(quick, every):
        known = frozenset[str]()
        for name in candidates:
            known |= {name} if name in every and right(quick, known | {name}) else frozenset()
        every = known
    halves = [frozenset(sorted(every)[first::2]) for first in range(2)]
    return every if all(right(prover, names, stored=True) for names in (every, *halves)) else frozenset()


def same_function(module: nn.Module, spec: InputSpec, change: Callable[[nn.Module], None]) -> bool:
    """Whether the network computes the same after a change in place, which is made on a private copy. False where it fails."""
    import torch

    prover = _Prover.of(module, spec, 0)
    with torch.no_grad():
        wanted, changed = prover.module(prover.images.clone()), fresh_copy(prover.module)
        try:
            change(changed)
            found = changed(prover.images.clone())
        except Exception:  # whatever a layout that does not fit raises
            return False
    return _difference(found, wanted) <= prover.tolerance


@dataclass
class _Prover:
    module: nn.Module
    """A private copy with lively weights, in the precision of the proof."""
    images: Tensor
    tolerance: float
    total: int
    judged: int = 0
    refused: list[Refusal] = field(default_factory=list)
    stored: bool = False
    """Whether each set is also stored and loaded."""
    exact: _Prover | None = None
    """Who decides where this one, in float32, cannot."""
    known: dict[tuple[tuple[Group, ...], bool], str | None] = field(default_factory=dict)
    """What was found of sets that were tried, stored or not."""

    @staticmethod
    def of(module: nn.Module, spec: InputSpec, total: int) -> _Prover:
        """In float64; in float32, with a warning, where the network does not run in it. `total`: groups, for progress."""
        import torch

        own = _lively(module)
        costly = sum(item.numel() for item in own.parameters()) * prod(spec.shape) > COSTLY
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1 if costly else 2, *spec.shape, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                if not bool(own.double()(images[:1].clone()).isfinite().all()):
                    own = fresh_copy(module).eval().requires_grad_(False).double()
        except Exception as error:  # whatever a forward that insists on float32 raises
            progress.warn(f"groups are proven in float32, the network does not run in float64 ({reason(error)})")
            return _Prover(_lively(module), images.float(), SINGLE_TOLERANCE, total)
        return _Prover(own, images, TOLERANCE, total)

    def sort(self, groups: tuple[Group, ...]) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
        """All at once, else what a search finds that stands this proof. Storing and loading is looked at where it decides:
        of all groups, of those that are left, of each where these fail it."""
        for every in (groups, tuple(replace(group, attributes=_named(group, _telling(group))) for group in groups)):
            if self._disproof(every, stored=True) is None:
                return self._judged(every, None), ()
        for searcher in filter(None, (self._quick(), self)):
            for searcher.stored in (False, True):
                searcher.judged, searcher.refused = 0, []
                found = searcher._proven(groups)
                fault = self._disproof(found, stored=True) if found else None
                if fault != RELOADED:
                    break
            if fault is None:
                break
        if fault:
            searcher.refused += [Refusal(group.name, fault) for group in found]
            found = ()
        order = {group.name: place for place, group in enumerate(groups)}
        return tuple(sorted(found, key=lambda group: order[group.name])), tuple(searcher.refused)

    def _quick(self) -> _Prover | None:
        """To search with: some times as fast in float32, where the network computes much the same in it.

        What fails there in another way than by a difference fails in float64 too: the whole network does not.
        """
        import torch

        if self.tolerance != TOLERANCE:
            return None
        single, images = fresh_copy(self.module).float(), self.images.float()
        with torch.no_grad():
            wanted = self.module(self.images.clone())
            try:
                found = single(images.clone())
            except Exception:  # whatever a forward that insists on a buffer in float64 raises
                return None
        noise = _difference(found, wanted)
        return _Prover(single, images, NOISE * noise, self.total, exact=self) if noise <= SINGLE_TOLERANCE else None

    def _proven(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        fault = self._disproof(groups)
        if fault is None:
            return self._judged(groups, None)
        alike: dict[str, list[Group]] = {}
        for group in groups:
            alike.setdefault(DIGITS.sub("#", group.name), []).append(group)
        if len(alike) > 1:
            kinds = [*alike.values()]
            middle = len(kinds) // 2
            return self._halves(*(tuple(itertools.chain(*half)) for half in (kinds[:middle], kinds[middle:])))
        first = groups[0]
        own = self._disproof((first,)) if len(groups) > 1 else fault
        if own and (names := self._read(first)) is not None:
            return self._proven(tuple(replace(group, attributes=_named(group, names)) for group in groups))
        if own and (len(groups) == 1 or self._disproof(groups[-1:])):
            self._judged(groups[:1], own)
            return self._judged(groups[1:], f"as in {first.name}: {own}")
        middle = len(groups) // 2
        return self._halves(groups[:middle], groups[middle:])

    def _read(self, group: Group) -> frozenset[str] | None:
        """Which of the names of a group's attributes count its units, where it is right with those alone: others had the same values."""
        names, telling = frozenset(attribute.name for attribute in group.attributes), _telling(group)
        tries = {names - {name} for name in names} | {frozenset({name}) for name in names} | {telling, frozenset[str]()}
        tries = tries - {names} if len(names) <= MOST_NAMES else set()
        return next(
            (
                one
                for one in sorted(tries, key=lambda one: (one != telling, sorted(one)))
                if not self._disproof((replace(group, attributes=_named(group, one)),))
            ),
            None,
        )

    def _judged(self, groups: tuple[Group, ...], fault: str | None) -> tuple[Group, ...]:
        self.judged += len(groups)
        progress.advance("groups proven", self.judged, self.total)
        self.refused += [Refusal(group.name, fault) for group in groups if fault]
        return () if fault else groups

    def _halves(self, first: tuple[Group, ...], second: tuple[Group, ...]) -> tuple[Group, ...]:
        return self._together(self._proven(first), self._proven(second))

    def _together(self, first: tuple[Group, ...], second: tuple[Group, ...]) -> tuple[Group, ...]:
        """Both, without those of the second that are wrong beside the others only."""
        if not (first and second):
            return first or second
        if self._disproof((*first, *second)) is None:
            return (*first, *second)
        for group in second:
            fault = self._disproof((*first, group))
            if fault is None:
                first = (*first, group)
            else:
                self.refused.append(Refusal(group.name, f"beside other groups {fault}"))
        return first

    def _disproof(self, groups: tuple[Group, ...], stored: bool = False) -> str | None:
        """Why these must not be pruned together, or None."""
        stored = stored or self.stored
        if (groups, stored) not in self.known:
            fault = self._tried(groups, stored)
            self.known[groups, stored] = fault
            if fault != RELOADED:
                self.known[groups, False] = fault
        return self.known[groups, stored]

    def _tried(self, groups: tuple[Group, ...], stored: bool) -> str | None:
        """Each group keeps a part of its own, so that a number that counts other units is not right by chance; a branch nothing."""
        import torch

        generator = torch.Generator().manual_seed(0)
        keep = {}
        for group in groups:
            part = LEAST + (MOST - LEAST) * float(torch.rand((), generator=generator))
            order = torch.randperm(group.units, generator=generator).tolist()
            keep[group.name] = () if group.branch else tuple(sorted(order[: max(1, int(part * group.units))]))
        try:
            with torch.no_grad():
                smaller = cut_copy(self.module, groups, keep)
                cut = smaller(self.images.clone())
                masked = masked_copy(self.module, groups, keep)(self.images.clone())
        except CswapError as error:
            return error.message
        except Exception as error:  # whatever the user's forward raises on the smaller layers
            return f"the network fails without some of its units: {reason(error)}"
        if cut.shape != masked.shape:
            return "its units are outputs of the network"
        if any(group.branch for group in groups) and self._blind(smaller, cut):
            return "without all of its units the network does not see the image"
        difference = _difference(cut, masked)
        if self.exact and not (difference <= self.tolerance or CLEAR <= difference < float("inf")):
            return self.exact._disproof(groups, stored)
        if not difference <= self.tolerance:
            return f"cutting its units is not the same as masking them (relative difference {difference:.1e})"
        return None if not stored or self._reloads(smaller, groups, keep, cut) else RELOADED

    def _blind(self, module: nn.Module, wanted: Tensor) -> bool:
        """Whether it gives other images what it gives these."""
        import torch

        with torch.no_grad():
            return torch.equal(module(-self.images), wanted)

    def _sees_without(self, group: Group) -> bool:
        """Whether two images that are each other's negative give different logits where nothing reads the group."""
        import torch

        weights: list[Any] = [self.module.get_submodule(member.module).weight for member in group.consumers]
        before = [weight.clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
            one, other = self.module(torch.cat([self.images[:1], -self.images[:1]]))
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        return _difference(one, other) > SINGLE_TOLERANCE

    def _reloads(
        self, smaller: nn.Module, groups: Sequence[Group], keep: dict[str, tuple[int, ...]], wanted: Tensor
    ) -> bool:
        """Whether a network with other weights, cut anew and given the smaller one's, is the smaller one: as bundles are loaded."""
        import torch

        other = fresh_copy(self.module)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(0.5)
            fresh = cut_copy(other, groups, keep)
            fresh.load_state_dict(smaller.state_dict())
            return torch.equal(fresh(self.images.clone()), wanted)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, as a part of the largest value that was wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _telling(group: Group) -> frozenset[str]:
    return frozenset(item.name for item in group.attributes if any(word in item.name for word in TELLING))


def _named(group: Group, names: frozenset[str]) -> tuple[UnitAttribute, ...]:
    return tuple(attribute for attribute in group.attributes if attribute.name in names)


def _lively(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose constant tensors are random: zeros (a last BatchNorm's, a head's) hide what a cut does."""
    import torch

    module = fresh_copy(module).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Any, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for parameter in module.parameters():
        if parameter.numel() and float(parameter.max() - parameter.min()) == 0.0:
            size = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            flat = parameter.ndim < 2 or float(parameter.flatten()[0]) != 0.0
            draw(parameter, 0.5 if flat else -size, 1.0 if flat else size)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean") and not bool(buffer.any()):
            draw(buffer, -0.2, 0.2)
        elif name.endswith("running_var") and float(buffer.max() - buffer.min()) == 0.0:
            draw(buffer, 0.5, 1.5)
    return module
