"""What stands where a whole branch has left: its last layer gives a constant, the layers before it give one channel of zeros.

Both have the shape that the layer would give, but for those channels: what is behind may write into them, or be shaped by them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Absent(nn.Module):
    """In the place of a convolution, a linear layer or what keeps the shape of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        own: Any = layer
        self.axis: int = own.axis if isinstance(layer, Absent) else -1 if isinstance(layer, nn.Linear) else 1
        self.window = hasattr(layer, "kernel_size")
        if self.window:  # under a convolution's names, since what stands for one may be replaced itself
            self.kernel_size, self.stride, self.padding, self.dilation = (
                own.kernel_size, own.stride, own.padding, own.dilation
            )  # fmt: skip

    def shape(self, values: Tensor, channels: int) -> list[int]:
        """Of what the layer would give, with so many channels."""
        shape = list(values.shape)
        if self.window:
            for place in range(2):
                reach = self.dilation[place] * (self.kernel_size[place] - 1) + 1
                shape[2 + place] = (shape[2 + place] + 2 * self.padding[place] - reach) // self.stride[place] + 1
        shape[self.axis] = channels
        return shape


class Constant(Absent):
    """A layer that nothing is left to read for: its bias is all that it gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        own: Any = layer
        bias = own.weight.new_zeros(len(own.weight)) if own.bias is None else own.bias.detach().clone()
        self.bias = nn.Parameter(bias, requires_grad=own.weight.requires_grad)

    def forward(self, values: Tensor) -> Tensor:
        along = [1] * values.ndim
        along[self.axis] = len(self.bias)
        return self.bias.reshape(along).expand(self.shape(values, len(self.bias))).contiguous()


class Nothing(Absent):
    """A layer whose outputs nothing reads."""

    def forward(self, values: Tensor) -> Tensor:
        return torch.zeros(self.shape(values, 1), dtype=values.dtype, device=values.device)
