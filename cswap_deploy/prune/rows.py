"""A layer as a linear system: each output position is one row of inputs (the receptive field) and one row of targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

WORK = 2e11
"""Multiplications that one Gram matrix may cost; beyond it positions are sampled."""
ROWS_PER_COLUMN = 8
"""But never fewer rows than this times the unknowns per output."""
CHUNK = 8_000_000
"""Elements of one block of rows: bounds the memory of unfolding to 32 MB."""


@dataclass(frozen=True)
class Rows:
    """`columns` unknowns per output (bias aside), `outputs` outputs; `share` of the output positions is drawn."""

    layer: nn.Module
    columns: int
    outputs: int
    share: float

    @staticmethod
    def of(layer: nn.Module, inputs: Tensor, output: Tensor, images: int) -> Rows | None:
        """None where the layer's forward is not the plain product of its weight with its receptive fields.

        `inputs`, `output`: one example call on a batch; `images`: how many will come in all.
        """
        import torch

        weight: Any = layer.weight
        columns, outputs = weight[0].numel(), len(weight)
        per_image = output.numel() // (outputs * len(output))
        wanted = max(ROWS_PER_COLUMN * columns, WORK / columns**2)
        rows = Rows(layer, columns, outputs, min(1.0, wanted / (per_image * images)))
        if not _is_linear_map(layer):
            return None
        bias = layer.bias if layer.bias is not None else 0.0
        for unfolded, targets in Rows(layer, columns, outputs, 1.0).draw(inputs, output, seed=0):
            scale = targets.abs().max().clamp_min(1e-6)
            if not torch.allclose(unfolded @ weight.flatten(1).T + bias, targets, rtol=1e-3, atol=1e-3 * float(scale)):
                return None
        return rows

    def draw(self, inputs: Tensor, target: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, columns) inputs and (n, outputs) targets of sampled positions, in blocks.

        `inputs` is what the layer reads, `target` has the shape of what it gives.
        """
        import torch

        targets = target.movedim(1, -1) if target.ndim == 4 else target
        positions = targets.reshape(len(targets), -1, self.outputs).shape[1]
        count = max(1, round(self.share * positions))
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(positions, generator=generator)[:count].sort().values.to(inputs.device)
        step = max(1, CHUNK // (count * self.columns))
        for start in range(0, len(inputs), step):
            rows = self._unfold(inputs[start : start + step], chosen, everything=count == positions)
            wanted = targets[start : start + step].reshape(-1, positions, self.outputs)[:, chosen]
            yield rows, wanted.reshape(-1, self.outputs)

    def _unfold(self, inputs: Tensor, chosen: Tensor, *, everything: bool) -> Tensor:
        import torch.nn.functional as F
        from torch import nn

        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            return inputs.reshape(len(inputs), -1, self.columns)[:, chosen].reshape(-1, self.columns)
        if everything:
            unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            return unfolded.movedim(1, 2).reshape(-1, self.columns)
        fields = _receptive_fields(layer, inputs)
        width = fields.shape[3]
        return fields[:, :, chosen // width, chosen % width].movedim(1, 2).reshape(-1, self.columns)


def _is_linear_map(layer: Any) -> bool:
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return bool(plain)
    return isinstance(layer, nn.Linear)


def _receptive_fields(layer: Any, inputs: Tensor) -> Tensor:
    """A view of a convolution's padded input as (n, channels, height, width, kernel, kernel)."""
    import torch.nn.functional as F

    vertical, horizontal = layer.padding
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical)).contiguous()
    n, channels, height, width = padded.shape
    tall, wide = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    down, across = layer.stride
    shape = (n, channels, (height - tall) // down + 1, (width - wide) // across + 1, *layer.kernel_size)
    a, b, c, d = padded.stride()
    return padded.as_strided(shape, (a, b, c * down, d * across, c * layer.dilation[0], d * layer.dilation[1]))
