"""Interventions on a running network, as context managers; every hook is gone when the block ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group, Slice
from cswap_deploy.prune.cut import positions

if TYPE_CHECKING:
    from torch import Tensor, nn


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's input that its weight's axis 1 reads: 1 for convolutions, the last for linear layers."""
    from torch import nn

    return -1 if isinstance(layer, nn.Linear) else 1


@contextmanager
def taps(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of these layers, one per call, each an autograd node that only its own layer reads."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def tap(name: str) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            own = inputs[0].clone()
            if own.requires_grad:
                own.retain_grad()
            seen[name].append(own)
            return (own, *inputs[1:])

        return hook

    with ExitStack() as undo:
        for name in layers:
            handle = module.get_submodule(name).register_forward_pre_hook(tap(name))
            undo.callback(handle.remove)
        yield seen


@contextmanager
def ablated(
    module: nn.Module, group: Group, units: Sequence[int], means: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Every consumer of the group reads, in place of these units, zero or the means of its input channels."""

    def replace(member: Slice) -> Any:
        indices = positions(member, units)

        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            changed = inputs[0].clone().movedim(channel_axis(layer), -1)
            changed[..., indices] = means[member.module][indices] if means else 0.0
            return (changed.movedim(-1, channel_axis(layer)), *inputs[1:])

        return hook

    with ExitStack() as undo:
        for member in group.consumers:
            handle = module.get_submodule(member.module).register_forward_pre_hook(replace(member))
            undo.callback(handle.remove)
        yield


@contextmanager
def prefix_reused(module: nn.Module, images: Tensor, layers: Sequence[str]) -> Iterator[None]:
    """Inside the block, `module(images)` repeats nothing that ended before the first of `layers` began.

    One forward notes when each submodule begins and ends and keeps the outputs of the outermost ones that were done by
    then; inside the block those return what was kept.
    """
    kept = _finished_before(module, images, layers)

    def answer(value: Tensor) -> Any:
        return lambda *_args, **_kwargs: value.clone()

    with ExitStack() as undo:
        for name, value in kept.items():
            layer = module.get_submodule(name)
            layer.forward = answer(value)
            undo.callback(layer.__dict__.pop, "forward")
        yield


def _finished_before(module: nn.Module, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of the outermost submodules, called once, that ended before any of `layers` began."""
    import torch

    done: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    begun: set[str] = set()

    def enter(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            begun.update({name} & set(layers))

        return hook

    def leave(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if begun or not isinstance(output, torch.Tensor):
                return
            for inner in [other for other in done if other.startswith(f"{name}.")]:
                del done[inner]
            done[name] = output.clone()

        return hook

    with ExitStack() as undo:
        for name, layer in module.named_modules():
            if name:
                undo.callback(layer.register_forward_pre_hook(enter(name)).remove)
                undo.callback(layer.register_forward_hook(leave(name)).remove)
        module(images)
    return {name: output for name, output in done.items() if calls[name] == 1}


def unit_sums(values: Tensor, member: Slice, layer: nn.Module, units: int) -> Tensor:
    """Sum a layer's input-shaped values over positions and over each unit's channels: (images, units)."""
    last = values.movedim(channel_axis(layer), -1)
    own = last[..., member.offset : member.offset + units * member.repeat]
    return own.reshape(len(values), -1, units, member.repeat).sum((1, 3))
