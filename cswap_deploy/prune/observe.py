"""One layer seen from outside: what it reads, what it gives, and the sum and the rectifier that its output goes into."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.ablation import channel_axis, first_argument
from cswap_deploy.prune.descent import descent

if TYPE_CHECKING:
    from torch import Tensor, nn

SUMS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
RECTIFIERS = frozenset({"relu", "relu_"})
QUESTIONS = frozenset({"__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point"})
"""What asks about a tensor without reading its values, unless it gives another tensor."""
OUTWARDS = frozenset({"tolist", "numpy", "__array__"})
"""What hands values over to Python without any operator."""
UNIT = "unit"
BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
SMALLEST_SCALE = 1e-3
"""A channel that the way to the sum scales by less than this cannot correct anything there."""


@dataclass(frozen=True)
class Place:
    """What a layer reads and gives on a batch; `shortcut` is the other operand of the sum that its output goes into.

    It does not depend on the output: a branch that reads that is no shortcut.
    """

    inputs: Tensor
    output: Tensor
    shortcut: Tensor | None


@dataclass(frozen=True)
class Outlet:
    """What becomes of a layer's output, the same for all images.

    `summed`: after at most a scaling it is added to a shortcut; `rectified`: the only thing that reads it then (or the sum) is a
    ReLU; `norm`: the BatchNorm that alone reads it first, "" where there is none; `scale` and `shift`: what BatchNorm and
    LayerScale on the way do to each channel, None where there is nothing. `axis` is the channels'.
    """

    summed: bool
    rectified: bool
    norm: str
    scale: Tensor | None
    shift: Tensor | None
    axis: int

    def beside(self, place: Place) -> Tensor:
        """What the sum adds to the layer's output, in terms of that output; zeros where there is no sum."""
        if place.shortcut is None:
            return place.output.new_zeros(()).expand_as(place.output)
        return place.shortcut * self._per_channel(self._factor(place.output), place.shortcut)

    def constant(self, output: Tensor) -> Tensor:
        """What BatchNorm and LayerScale on the way add to each channel, in terms of the layer's output."""
        factor = self._factor(output)
        return factor * 0 if self.shift is None else self.shift * factor

    def sign(self, outputs: int) -> Tensor:
        """Per channel the direction in which the output must grow to be passed on; 0 where the scale all but closes it."""
        import torch

        if self.scale is None:
            return torch.ones(outputs)
        return self.scale.sign() * (self.scale.abs() > SMALLEST_SCALE)

    def _factor(self, output: Tensor) -> Tensor:
        """Per channel the inverse of the scale; 0 where that all but closes it."""
        import torch

        if self.scale is None:
            return output.new_ones(output.shape[self.axis])
        usable = self.scale.abs() > SMALLEST_SCALE
        return torch.where(usable, 1 / torch.where(usable, self.scale, 1.0), 0.0)

    def _per_channel(self, values: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.ndim
        shape[self.axis] = -1
        return values.reshape(shape)


def observe(module: nn.Module, name: str, images: Tensor, *, as_far_as_sum: bool) -> Place:
    """Run a forward only as far as needed: to the end of layer `name`, or to the sum with a shortcut that takes its output.

    Without such a sum the forward runs to its end and `shortcut` is None.
    """
    watch = _Watch(module, name, "sum" if as_far_as_sum else "output")
    watch.run(images)
    assert watch.inputs is not None and watch.output is not None
    return Place(watch.inputs, watch.output, watch.shortcut)


def outlet(module: nn.Module, name: str, images: Tensor) -> Outlet:
    """Follow the output of layer `name` through a whole forward."""
    watch = _Watch(module, name, "end")
    watch.run(images)
    alone = watch.rectified and not watch.read_again
    norms = [child for child, layer in module.named_modules() if getattr(layer, "running_mean", None) is watch.norm]
    direct = watch.norm is not None and not watch.norm_read_again
    norm = norms[0] if norms and direct else ""
    return Outlet(watch.shortcut is not None, alone, norm, watch.scale, watch.shift, watch.axis)


def compact(value: Tensor) -> Tensor:
    """A copy where keeping the tensor itself would keep more memory than it has values."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


class Reached(Exception):
    """Ends a forward that has gone far enough."""


class _Watch:
    """Follows one layer's output through what only scales it until it is added to something, and to the rectifier behind."""

    def __init__(self, module: nn.Module, name: str, until: str) -> None:
        """`until`: the layer's "output", the "sum" that takes it, or the forward's "end"."""
        self.module, self.name, self.until = module, name, until
        self.axis = channel_axis(module.get_submodule(name))
        self.inputs: Tensor | None = None
        self.output: Tensor | None = None
        self.shortcut: Tensor | None = None
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.carrier: Any = None
        """The tensor that stands for the layer's output now."""
        self.former: list[Any] = []
        self.norm: Any = None
        """The running mean of the BatchNorm that alone reads the very output."""
        self.descent = descent()
        """Of the layer's output."""
        self.operand: Any = None
        """What the function that runs adds to the carrier."""
        self.apart = False
        """Whether the operand does not depend on the layer's output."""
        self.rectified = self.read_again = self.norm_read_again = self.inside = False

    def run(self, images: Tensor) -> None:
        with ExitStack() as undo:
            for child_name, child in self.module.named_modules():
                if child_name == self.name:
                    undo.callback(child.register_forward_hook(self._capture, with_kwargs=True).remove)
                elif _scaling(child) is not None:
                    undo.callback(child.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                    undo.callback(child.register_forward_hook(self._leave).remove)
            try:
                with _mode(self), nullcontext() if self.until == "output" else self.descent:
                    self.module(images)
            except Reached:
                pass

    # --- modules

    def _capture(self, _layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        if self.until == "output":  # nothing runs any more that could write into the output
            self.inputs, self.output = first_argument(inputs, named).clone(), compact(output)
            raise Reached
        if self.until == "sum":
            self.inputs, self.output = first_argument(inputs, named).clone(), output.clone()
        self.descent.begin(output)
        self.carrier = output

    def _enter(self, _layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.inside = self.carrier is not None and first_argument(inputs, named) is self.carrier

    def _leave(self, layer: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if self.inside and self.carrier is not None:
            factor = _scaling(layer)
            self._go_on(output, None if factor is UNIT else factor, None)
        self.inside = False

    # --- functions

    def before(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Is it the sum that is waited for? Told beforehand: it may write into its operands."""
        self.operand = self._other_operand(function, args, kwargs)
        self.apart = self.operand is not None and not self.descent.holds(self.operand)
        if self.until == "sum" and self.apart:
            self.shortcut = self.operand.clone()
            raise Reached

    def after(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, written: bool
    ) -> None:
        """What a function made of the tensor that is followed; `written`: it wrote into it."""
        import torch

        name = getattr(function, "__name__", "")
        if name in OUTWARDS and self.descent.holds(args):
            self.descent.lost = True
        if self.inside or (name in QUESTIONS and not isinstance(result, torch.Tensor)):
            return
        values = [
            item
            for given in (*args, *kwargs.values())
            for item in (given if isinstance(given, list | tuple) else [given])
        ]
        if any(value is old for value in values for old in self.former):
            self.read_again = self.norm_read_again = True
        if self.carrier is None or not any(value is self.carrier for value in values):
            self.carrier = None if written else self.carrier
            return
        if name == "batch_norm" and args[0] is self.carrier and (norm := _in_eval(args, kwargs)):
            self._read_by_norm(norm, result)
        elif self.apart and self.shortcut is None:
            self.shortcut = self.operand
            self._go_on(result, None, None)
        elif name in RECTIFIERS:
            self.rectified = True
            self.former += [] if written else [self.carrier]
            self.carrier = None
        else:
            self.read_again = True
            if written or self.operand is not None:  # a sum with what depends on the output ends the way
                self.carrier = None

    def _read_by_norm(self, norm: Mapping[str, Any], result: Any) -> None:
        mean, weight, bias = norm["running_mean"], norm.get("weight"), norm.get("bias")
        factor = (norm["running_var"] + norm["eps"]).rsqrt() * (1.0 if weight is None else weight)
        if self.norm is None and self.scale is None and self.shortcut is None and not self.read_again:
            self.norm = mean
        self._go_on(result, factor, -mean * factor + (0.0 if bias is None else bias))

    def _go_on(self, result: Any, factor: Tensor | None, shift: Tensor | None) -> None:
        """From now on `result` is followed: what was followed times `factor` plus `shift`, per channel."""
        if self.shortcut is not None and factor is not None:  # what a ReLU behind it cuts off is not known of the sum
            self.read_again = True
        elif factor is not None:
            self.scale = factor if self.scale is None else self.scale * factor
            self.shift = self.shift if self.shift is None else self.shift * factor
        if self.shortcut is None and shift is not None:
            self.shift = shift if self.shift is None else self.shift + shift
        if result is not self.carrier:
            self.former.append(self.carrier)
        self.carrier = result

    def _other_operand(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        import torch

        if self.carrier is None or len(args) != 2 or kwargs or getattr(function, "__name__", "") not in SUMS:
            return None
        for own, other in (args, args[::-1]):
            if own is self.carrier and isinstance(other, torch.Tensor) and other.shape == own.shape:
                return other
        return None

    def version(self) -> int:
        """Counts the writes into the tensor that is followed."""
        return -1 if self.carrier is None or self.carrier.is_inference() else int(self.carrier._version)


def _mode(watch: _Watch) -> Any:
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            watch.before(func, args, kwargs)
            version = watch.version()
            result = func(*args, **kwargs)
            watch.after(func, args, kwargs, result, watch.version() != version)
            return result

    return Mode()


def _in_eval(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of torch.nn.functional.batch_norm by name where it applies stored statistics."""
    norm = {**dict(zip(BATCH_NORM, args, strict=False)), **kwargs}
    return norm if norm.get("running_mean") is not None and not norm.get("training", False) else None


def _scaling(layer: Any) -> Any:
    """What a layer in eval mode multiplies each channel by if it does nothing else, UNIT for nothing; None for other layers."""
    from torch import nn
    from torch.nn.modules.dropout import _DropoutNd

    match layer:
        case nn.Identity() | _DropoutNd():
            return UNIT
        case _ if type(layer).__name__ == "DropPath":
            return UNIT
        case _ if type(layer).__name__ in ("LayerScale", "LayerScale2d"):
            return layer.gamma
        case _:
            return None
