"""The effect of a unit by ablating it: only what follows its consumers runs, for many units in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cswap_deploy import progress
from cswap_deploy.artifacts import Group
from cswap_deploy.prune.ablation import ablated
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.folded import folded_copy, narrow
from cswap_deploy.prune.reading import Intervention, Reading, readings
from cswap_deploy.prune.replay import called_once, prefix_reused
from cswap_deploy.prune.suffix import Clean, Suffix, observed, removed

if TYPE_CHECKING:
    from torch import Tensor, nn

PROOF_IMAGES = 8
"""Images on which each group's short way is compared with the whole forward."""
PROOF_TOLERANCE = 5e-5
"""Largest difference of log p allowed there, relative to the largest |log p| (at least 1)."""
KEPT_BYTES = 1 << 30
"""Activations of one batch that are kept at a time; the groups are done in so many sections."""


@dataclass(frozen=True)
class Ablations:
    """Per-image changes of log p(true class) under one intervention, for any choice of units and images.

    `fast` computes what `module` does. Groups without a suffix go the long way: a forward for each unit.
    """

    module: nn.Module
    fast: nn.Module
    groups: tuple[Group, ...]
    readings: tuple[tuple[Reading, ...], ...]
    suffixes: tuple[Suffix | None, ...]
    batches: Batches

    @staticmethod
    def prepare(module: nn.Module, groups: Sequence[Group], batches: Batches, intervention: Intervention) -> Ablations:
        """Statistics that the intervention needs come from all images of `batches`; each group's short way is proven."""
        import torch

        some = next(iter(batches.first(PROOF_IMAGES)))
        fast = folded_copy(module, some[0])
        read = readings(fast, groups, batches, intervention)
        narrow(fast, some[0])
        with torch.no_grad():
            once = called_once(fast, some[0][:1])
            suffixes = [Suffix.of(fast, group, own, some[0][:1], once) for group, own in zip(groups, read, strict=True)]
            clean = observed(fast, suffixes, *some)
            plain = Ablations(module, fast, tuple(groups), tuple(read), (None,) * len(groups), batches)
            proven = [
                suffix if plain._agrees(number, suffix, clean) else None for number, suffix in enumerate(suffixes)
            ]
        return Ablations(module, fast, tuple(groups), tuple(read), tuple(proven), batches)

    def effects(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """wanted: (images, units) bool for each group. Effects in float64 on the CPU, nan where not asked for."""
        import torch

        found = [torch.where(mask, 0.0, torch.nan).double() for mask in wanted]
        wanted = [mask & ~self._idle(number) for number, mask in enumerate(wanted)]
        total, done = sum(int(mask.sum()) for mask in wanted), 0
        with torch.no_grad():
            for numbers in self._sections([number for number, mask in enumerate(wanted) if bool(mask.any())]):
                end = 0
                for images, labels in self.batches:
                    start, end = end, end + len(images)
                    some = [number for number in numbers if bool(wanted[number][start:end].any())]
                    if not some:
                        continue
                    short = [suffix for number in some if (suffix := self.suffixes[number]) is not None]
                    clean = observed(self.fast, short, images, labels)
                    for number in some:
                        mask = wanted[number][start:end]
                        found[number][start:end][mask] = self._batch(number, mask, clean)
                        done += int(mask.sum())
                        progress.advance("ablations", done, total)
        return found

    def _idle(self, number: int) -> Tensor:
        """Per unit, whether nothing reads it: it has no effect."""
        import torch

        strengths = [reading.strength().cpu() for reading in self.readings[number]]
        return torch.stack(strengths).sum(0) == 0

    def _batch(self, number: int, mask: Tensor, clean: Clean) -> Tensor:
        """Effects of the (image, unit) pairs of one batch in the order of `mask.nonzero()`."""
        import torch

        suffix = self.suffixes[number]
        if suffix is None:
            return self._long_way(number, mask, clean)
        taken = None if suffix.head is None else suffix.head.taken(clean.inputs[suffix.head.member.module])
        rows, units = (index.to(clean.images.device) for index in mask.nonzero().T)
        found = clean.log_p.new_zeros(len(rows))
        moved = (torch.ones_like(rows) > 0) if taken is None else suffix.moved(taken)[rows, units]
        rows, units, size = rows[moved], units[moved], self.batches.size
        if len(rows):
            parts = [
                suffix.log_p(self.fast, clean, own, some, taken)
                for own, some in zip(units.split(size), rows.split(size), strict=True)
            ]
            found[moved] = torch.cat(parts) - clean.log_p[rows]
        return found.double().cpu()

    def _long_way(self, number: int, mask: Tensor, clean: Clean) -> Tensor:
        import torch

        rows, columns = mask.any(1).nonzero()[:, 0], torch.zeros(mask.shape, dtype=torch.float64)
        some = rows.to(clean.images.device)
        clean = replace(clean, images=clean.images[some], labels=clean.labels[some])
        runner = self._runner(number)
        layers = [reading.member.module for reading in self.readings[number]]
        with prefix_reused(runner, clean.images, layers):
            whole = _log_p(runner, clean)
            for unit in mask.any(0).nonzero()[:, 0].tolist():
                with self._without(number, unit, clean):
                    columns[rows, unit] = (_log_p(runner, clean) - whole).double().cpu()
        return columns[mask]

    def _runner(self, number: int) -> nn.Module:
        """The network that goes the long way; a unit's residual belongs to the folded one."""
        surgery = any(reading.residual is not None for reading in self.readings[number])
        return self.fast if surgery else self.module

    @contextmanager
    def _without(self, number: int, unit: int, clean: Clean) -> Iterator[None]:
        import torch

        own = self.readings[number]
        if self._runner(number) is self.fast:
            units = torch.full((len(clean.images),), unit, device=clean.images.device)
            with removed(self.fast, own, units):
                yield
        else:
            means = {reading.member.module: reading.means for reading in own if reading.means is not None}
            with ablated(self.module, self.groups[number], [unit], means or None):
                yield

    def _agrees(self, number: int, suffix: Suffix, clean: Clean) -> bool:
        """Whether the short way gives what the long way gives, for the unit that is read most and its neighbour, mixed."""
        import torch

        strength = torch.stack([reading.strength() for reading in self.readings[number]]).sum(0)
        first = int(strength.argmax())
        rows = torch.arange(len(clean.images), device=clean.images.device)
        units = (first + rows % 2) % self.groups[number].units
        taken = None if suffix.head is None else suffix.head.taken(clean.inputs[suffix.head.member.module])
        found = suffix.log_p(self.fast, clean, units, rows, taken)
        wanted = torch.full_like(found, torch.nan)
        for unit in set(units.tolist()):
            own = units == unit
            part = Clean(clean.images[own], clean.labels[own], clean.log_p[own], {}, {})
            with self._without(number, unit, part):
                wanted[own] = _log_p(self._runner(number), part)
        tolerance = PROOF_TOLERANCE * max(1.0, float(wanted.abs().max()))
        return bool(((found - wanted).abs() <= tolerance).all())

    def _sections(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Of these groups those whose kept activations of one batch fit into KEPT_BYTES together."""
        import torch

        images, labels = next(iter(self.batches.first(1)))
        section: list[int] = []
        kept: dict[str, int] = {}
        for number in numbers:
            suffix = self.suffixes[number]
            own: dict[str, int] = {}
            if suffix is not None:
                with torch.no_grad():
                    clean = observed(self.fast, [suffix], images, labels)
                own = {f"{place} {name}": value.nbytes for place, values in (("in", clean.inputs), ("out", clean.outputs))
                       for name, value in values.items()}  # fmt: skip
            if section and sum((kept | own).values()) * self.batches.size > KEPT_BYTES:
                yield section
                section, kept = [], {}
            section.append(number)
            kept |= own
        if section:
            yield section


def _log_p(module: nn.Module, clean: Clean) -> Tensor:
    picked: Tensor = module(clean.images).log_softmax(1).gather(1, clean.labels[:, None])[:, 0]
    return picked
