"""The rest of a network behind a group's consumers, run for many ablated units at once: rows of (unit, image) in one batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group
from cswap_deploy.prune.ablation import channel_axis, first_argument, unit_sums, with_first
from cswap_deploy.prune.reading import Reading
from cswap_deploy.prune.replay import answering, finished_before, still_read

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Clean:
    """One batch through the network as it is: log p(true class), and what the suffixes go on from."""

    images: Tensor
    labels: Tensor
    log_p: Tensor
    outputs: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Suffix:
    """What must run for a group. `head`: the consumer whose changed output it starts from; None: the ablation happens on the way."""

    group: Group
    readings: tuple[Reading, ...]
    head: Reading | None
    read: tuple[str, ...]
    unread: Mapping[str, tuple[Tensor, bool]]

    @staticmethod
    def of(module: nn.Module, group: Group, readings: Sequence[Reading], images: Tensor, once: Sequence[str]) -> Suffix:
        """`images`: one image; `once`: the modules that a forward calls once."""
        names = [reading.member.module for reading in readings]
        with finished_before(module, names, once) as done, _calls(module, names) as calls:
            module(images)
        first = next(iter(calls))
        inputs, output = calls[first]
        head = next(reading for reading in readings if reading.member.module == first)
        if head.plain and first in once and names.count(first) == 1 and len(output) == len(inputs) == len(images):
            begun = {**done, first: output}
            read = still_read(module, images, begun)
            if read is not None and first in read:
                return Suffix(group, tuple(readings), head, tuple(sorted(read)), _unread(module, images, begun, read))
        read = still_read(module, images, done)
        if read is None:
            return Suffix(group, tuple(readings), None, (), {})
        return Suffix(group, tuple(readings), None, tuple(sorted(read)), _unread(module, images, done, read))

    def moved(self, taken: Tensor) -> Tensor:
        """(images, units) whether anything leaves with a unit: one that is silent on an image takes nothing with it."""
        import torch

        assert self.head is not None
        if len(self.readings) > 1 or self.head.by_value:
            return torch.ones(len(taken), self.group.units, dtype=torch.bool, device=taken.device)
        return unit_sums(taken.abs(), self.head.member, self.head.layer, self.group.units, len(taken)) > 0

    def log_p(self, module: nn.Module, clean: Clean, units: Tensor, rows: Tensor, taken: Tensor | None) -> Tensor:
        """log p(true class) of image `rows[n]` without unit `units[n]`; `taken` is what the head's units take with them."""
        values = {name: clean.outputs[name][rows] for name in self.read}
        for name, (zeros, whole) in self.unread.items():
            values[name] = zeros.new_zeros(len(rows) if whole else 1, *zeros.shape[1:])
        own = self.readings
        if self.head is not None:
            assert taken is not None
            name = self.head.member.module
            values[name] = self.head.changed(values[name], taken, units, rows)
            own = tuple(reading for reading in own if reading is not self.head)
        with answering(module, values), removed(module, own, units):
            logits = module(clean.images[rows])
        found: Tensor = logits.log_softmax(1).gather(1, clean.labels[rows, None])[:, 0]
        return found


def observed(module: nn.Module, suffixes: Sequence[Suffix], images: Tensor, labels: Tensor) -> Clean:
    """One forward that keeps what these suffixes start from."""
    wanted = {name for suffix in suffixes for name in suffix.read}
    heads = {suffix.head.member.module for suffix in suffixes if suffix.head is not None}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> None:
            if name in wanted:
                outputs[name] = output.detach().clone()
            if name in heads:
                inputs[name] = first_argument(given, named).detach().clone()

        return keep

    with ExitStack() as undo:
        for name in wanted | heads:
            undo.callback(module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True).remove)
        log_p = module(images).log_softmax(1).gather(1, labels[:, None])[:, 0]
    return Clean(images, labels, log_p.detach(), outputs, inputs)


@contextmanager
def removed(module: nn.Module, readings: Sequence[Reading], units: Tensor) -> Iterator[None]:
    """Row n of each consumer's output is what it would be without unit `units[n]`; several rows of a layer per row in succession."""
    import torch

    def plainly(reading: Reading) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
            each = units.repeat_interleave(len(output) // len(units))
            rows = torch.arange(len(each), device=each.device)
            return reading.changed(output, reading.taken(first_argument(inputs, named)), each, rows)

        return hook

    def masked(reading: Reading) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            given = first_argument(inputs, named)
            each = units.repeat_interleave(len(given) // len(units))
            changed = given.clone().movedim(channel_axis(layer), -1)
            size = reading.member.repeat
            index = reading.member.offset + each[:, None] * size + torch.arange(size, device=each.device)
            row = torch.arange(len(each), device=each.device)[:, None]
            flat = changed.reshape(len(each), -1, changed.shape[-1])
            new = (
                torch.zeros((), dtype=flat.dtype, device=flat.device)
                if reading.means is None
                else reading.means[index][:, :, None]
            )
            flat[row, :, index] = new.to(flat.dtype)
            changed = flat.reshape(changed.shape)
            return with_first(inputs, named, changed.movedim(-1, channel_axis(layer)))

        return hook

    with ExitStack() as undo:
        for reading in readings:
            layer = module.get_submodule(reading.member.module)
            if reading.plain:
                undo.callback(layer.register_forward_hook(plainly(reading), with_kwargs=True).remove)
            else:
                undo.callback(layer.register_forward_pre_hook(masked(reading), with_kwargs=True).remove)
        yield


def _unread(
    module: nn.Module, images: Tensor, outputs: Mapping[str, Tensor], read: Collection[str]
) -> dict[str, tuple[Tensor, bool]]:
    """Zeros in place of the outputs that nothing reads: of a single row where the forward runs on that, else (true) of all rows.

    `images` and `outputs` are of one row.
    """
    import torch

    zeros = {name: torch.zeros_like(value) for name, value in outputs.items() if name not in read}
    values = {name: torch.cat([value] * 3) for name, value in outputs.items() if name in read}
    try:
        with answering(module, values | {name: value.clone() for name, value in zeros.items()}):
            found = module(torch.cat([images] * 3))
    except Exception:  # whatever a forward raises that puts them beside its values
        found = None
    with torch.no_grad():
        wanted = torch.cat([module(images)] * 3)
    fits = found is not None and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
    return {name: (value, not fits) for name, value in zeros.items()}


@contextmanager
def _calls(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(inputs, output) of the first call of these layers, in the order in which they begin."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> None:
            seen.setdefault(name, (first_argument(inputs, named).clone(), output.clone()))

        return keep

    with ExitStack() as undo:
        for name in names:
            undo.callback(module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True).remove)
        yield seen
