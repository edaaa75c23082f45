"""Interventions on a running network, as context managers; every hook is gone when the block ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group, Slice
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.cut import positions

if TYPE_CHECKING:
    from torch import Tensor, nn


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's input that its weight's axis 1 reads: 1 for convolutions, the last for linear layers."""
    from torch import nn

    return -1 if isinstance(layer, nn.Linear) else 1


def first_argument(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a layer reads, however it is called."""
    return inputs[0] if inputs else next(iter(named.values()), None)


def with_first(inputs: tuple[Any, ...], named: dict[str, Any], value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call on another value."""
    return ((value, *inputs[1:]), named) if inputs else ((), {**named, next(iter(named)): value})


@contextmanager
def taps(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of these layers, one per call, each an autograd node that only its own layer reads."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def tap(name: str) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
            own = first_argument(inputs, named).clone()
            if own.requires_grad:
                own.retain_grad()
            seen[name].append(own)
            return with_first(inputs, named, own)

        return hook

    with ExitStack() as undo:
        for name in layers:
            handle = module.get_submodule(name).register_forward_pre_hook(tap(name), with_kwargs=True)
            undo.callback(handle.remove)
        yield seen


@contextmanager
def ablated(
    module: nn.Module, group: Group, units: Sequence[int], means: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Every consumer of the group reads, in place of these units, zero or the means of its input channels."""

    def replace(member: Slice) -> Any:
        indices = positions(member, units)

        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
            changed = first_argument(inputs, named).clone().movedim(channel_axis(layer), -1)
            changed[..., indices] = means[member.module][indices] if means else 0.0
            return with_first(inputs, named, changed.movedim(-1, channel_axis(layer)))

        return hook

    with ExitStack() as undo:
        for member in group.consumers:
            layer = module.get_submodule(member.module)
            handle = layer.register_forward_pre_hook(replace(member), with_kwargs=True)
            undo.callback(handle.remove)
        yield


def unit_sums(values: Tensor, member: Slice, layer: nn.Module, units: int, images: int) -> Tensor:
    """Sum a layer's input-shaped values over positions and over each unit's channels: (images, units).

    A layer that runs on windows or patches has several rows per image, those of one image in succession.
    """
    if len(values) % images:
        raise PruningError(
            f"{member.module} reads {len(values)} rows for {images} images: effects cannot be told apart by image",
            f"list {member.module!r} under prune.skip",
        )
    last = values.movedim(channel_axis(layer), -1)
    own = last[..., member.offset : member.offset + units * member.repeat]
    return own.reshape(images, -1, units, member.repeat).sum((1, 3))
