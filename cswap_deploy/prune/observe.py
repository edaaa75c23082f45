"""One layer seen from outside: what it reads, what it gives, and the shortcut that its output is added to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.ablation import channel_axis

if TYPE_CHECKING:
    from torch import Tensor, nn

SUMS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
SMALLEST_SCALE = 1e-3
"""A channel that the way to the sum scales by less than this cannot correct anything there."""


@dataclass
class Place:
    """`shortcut` is the other operand of the sum that the layer's output goes into, `scale` the factor per channel of the
    BatchNorm or LayerScale on the way there; both None where the output goes elsewhere first."""

    inputs: Tensor
    output: Tensor
    shortcut: Tensor | None
    scale: Tensor | None

    def drift(self, other: Place, axis: int) -> Tensor | None:
        """What must be added to the layer's output so that its sum with `other`'s shortcut is what it was with this one's."""
        import torch

        if self.shortcut is None or other.shortcut is None:
            return None
        difference = self.shortcut - other.shortcut
        if self.scale is None:
            return difference
        usable = self.scale.abs() > SMALLEST_SCALE
        factor = torch.where(usable, 1 / torch.where(usable, self.scale, 1.0), 0.0)
        return difference * factor.reshape([-1 if i == axis % difference.ndim else 1 for i in range(difference.ndim)])


def observe(module: nn.Module, name: str, images: Tensor, *, as_far_as_sum: bool) -> Place:
    """Run a forward only as far as needed: to the end of layer `name`, or to the sum that takes its output.

    Without such a sum the forward runs to its end and `shortcut` is None.
    """
    watch = _watch(module, name, as_far_as_sum)
    with ExitStack() as undo:
        for child_name, child in module.named_modules():
            if child_name == name or not list(child.children()):
                undo.callback(child.register_forward_hook(watch.hook(child_name)).remove)
        try:
            with watch.mode:
                module(images)
        except _Reached:
            pass
    assert watch.inputs is not None and watch.output is not None
    return Place(watch.inputs, watch.output, watch.shortcut, watch.scale)


class _Reached(Exception):
    """Ends a forward that has gone far enough."""


class _Watch:
    """Follows one layer's output through what only scales it until it is added to something."""

    def __init__(self, module: nn.Module, name: str, as_far_as_sum: bool) -> None:
        self.name = name
        self.axis = channel_axis(module.get_submodule(name))
        self.as_far_as_sum = as_far_as_sum
        self.inputs: Tensor | None = None
        self.output: Tensor | None = None
        self.shortcut: Tensor | None = None
        self.scale: Tensor | None = None
        self.carrier: Any = None
        self.mode: Any = None

    def hook(self, child: str) -> Any:
        def after(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if child == self.name:
                self.inputs, self.output, self.carrier = inputs[0].clone(), output.clone(), output
                if not self.as_far_as_sum:
                    raise _Reached
            elif self.carrier is not None and inputs and inputs[0] is self.carrier:
                scales, factor = _scaling(layer)
                self.carrier = output if scales else None
                if scales and factor is not None:
                    self.scale = factor if self.scale is None else self.scale * factor

        return after

    def see(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before every torch function: is it the sum that is waited for?"""
        import torch

        if self.carrier is None or len(args) != 2 or kwargs or getattr(function, "__name__", "") not in SUMS:
            return
        for own, other in (args, args[::-1]):
            if own is self.carrier and isinstance(other, torch.Tensor) and other.shape == own.shape:
                self.shortcut = other.clone()
                raise _Reached

    def version(self) -> int:
        """Counts the writes into the layer's output: after one it is the layer's output no longer."""
        return -1 if self.carrier is None else int(self.carrier._version)


def _watch(module: nn.Module, name: str, as_far_as_sum: bool) -> _Watch:
    from torch.overrides import TorchFunctionMode

    watch = _Watch(module, name, as_far_as_sum)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            watch.see(func, args, kwargs or {})
            version = watch.version()
            result = func(*args, **(kwargs or {}))
            if watch.version() != version:
                watch.carrier = None
            return result

    watch.mode = Mode()
    return watch


def _scaling(layer: Any) -> tuple[bool, Tensor | None]:
    """Whether a layer in eval mode at most scales each channel (a constant shift is no matter), and by what."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    match layer:
        case nn.Identity() | _DropoutNd():
            return True, None
        case _BatchNorm() if isinstance(getattr(layer, "act", None), nn.Identity | None):
            if layer.running_var is None:
                return False, None
            deviation = (layer.running_var + layer.eps).sqrt()
            return True, (layer.weight if layer.weight is not None else 1.0) / deviation
        case _ if type(layer).__name__ == "DropPath":
            return True, None
        case _ if type(layer).__name__ in ("LayerScale", "LayerScale2d"):
            return True, layer.gamma
        case _:
            return False, None
