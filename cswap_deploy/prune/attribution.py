"""First order: the effects of all units on every image from one forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from cswap_deploy.prune.ablation import taps
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor, nn


def first_order(module: nn.Module, readings: Sequence[Sequence[Reading]], batches: Batches) -> list[Tensor]:
    """(images, units) per group: minus what leaves times the gradient of log p(true class), over consumers and positions.

    Whole heads leave through the input of `proj`: each head's output is a block of it, and what a head attends to is no matter
    once nothing reads it. So the product there is the whole first order; no softmax of attention has to be computed again.
    """

    def log_p(logits: Tensor, labels: Tensor) -> list[Tensor]:
        return [logits.log_softmax(1).gather(1, labels[:, None])[:, 0]]

    return [changes[0] for changes, _ in _changes(module, readings, batches, log_p)]


def through_softmax(module: nn.Module, readings: Sequence[Sequence[Reading]], batches: Batches) -> list[Tensor]:
    """As `first_order`, but only as far as the logits, and exactly through the softmax: where it is saturated its slope says
    nothing of what a large step does.

    Three backward passes however many classes there are: the true class, its strongest rival, and the log-sum-exp of the rest.
    """
    import torch

    def rivals(logits: Tensor, labels: Tensor) -> list[Tensor]:
        others = logits.scatter(1, labels[:, None], -torch.inf)
        best = others.argmax(1, keepdim=True)
        parts = [logits.gather(1, labels[:, None])[:, 0], logits.gather(1, best)[:, 0]]
        return [*parts, others.scatter(1, best, -torch.inf).logsumexp(1)] if logits.shape[1] > 2 else parts

    effects = []
    for changes, values in _changes(module, readings, batches, rivals):
        before, step = torch.stack(values)[:, :, None], torch.stack(changes)
        effects.append((before + step).log_softmax(0)[0] - before.log_softmax(0)[0])
    return effects


Outputs: TypeAlias = "Callable[[Tensor, Tensor], list[Tensor]]"
"""(logits, labels) to one or more values per image."""


def _changes(
    module: nn.Module, readings: Sequence[Sequence[Reading]], batches: Batches, outputs: Outputs
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Per group the first-order change of each output, (images, units) each, and the outputs themselves, (images,) each."""
    import torch

    values: list[list[Tensor]] = []
    changes: list[list[list[Tensor]]] = []
    for images, labels in batches:
        own, found = _of_batch(module, readings, images, labels, outputs)
        values.append(own)
        changes.append(found)
    whole = [torch.cat(parts).double().cpu() for parts in zip(*values, strict=True)]
    return [
        ([torch.cat([batch[k][number] for batch in changes]).double().cpu() for k in range(len(whole))], whole)
        for number in range(len(readings))
    ]


def _of_batch(
    module: nn.Module, readings: Sequence[Sequence[Reading]], images: Tensor, labels: Tensor, outputs: Outputs
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The outputs, and for each of them and each group the change (images, units)."""
    import torch

    layers = sorted({reading.member.module for own in readings for reading in own})
    behind = sorted({reading.member.module for own in readings for reading in own if reading.by_value})
    images = images.detach().clone().requires_grad_(True)
    with torch.enable_grad(), taps(module, layers) as given, _outputs(module, behind) as made:
        values = outputs(module(images), labels)
    nodes = [tap for seen in (given, made) for calls in seen.values() for tap in calls]
    slopes: list[dict[int, Tensor]] = []
    for place, value in enumerate(values):
        last = place == len(values) - 1
        gradients = torch.autograd.grad(value.sum(), nodes, allow_unused=True, retain_graph=not last)
        slopes.append({id(tap): slope for tap, slope in zip(nodes, gradients, strict=True) if slope is not None})
    with torch.no_grad():
        changes = [_sums(own, given, made, slopes, len(images)) for own in readings]
    return [value.detach() for value in values], [list(of_value) for of_value in zip(*changes, strict=True)]


def _sums(
    own: Sequence[Reading],
    given: Mapping[str, list[Tensor]],
    made: Mapping[str, list[Tensor]],
    slopes: Sequence[Mapping[int, Tensor]],
    images: int,
) -> list[Tensor]:
    """Per output, over the consumers of a group and their calls: (images, units)."""
    import torch

    totals: list[list[Tensor]] = [[] for _ in slopes]
    for reading in own:
        name = reading.member.module
        for inputs, node in zip(given[name], made[name] if reading.by_value else given[name], strict=True):
            taken = reading.taken(inputs.detach())
            for total, of_output in zip(totals, slopes, strict=True):
                slope = of_output.get(id(node))
                total.append(reading.first_order(taken, torch.zeros_like(node) if slope is None else slope, images))
    return [torch.stack(total).sum(0) for total in totals]


@contextmanager
def _outputs(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what these layers give, one per call; what follows reads a copy, which it may overwrite."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Any:
        def keep(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            seen[name].append(output)
            return output.clone()

        return keep

    with ExitStack() as undo:
        for name in layers:
            undo.callback(module.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield seen
