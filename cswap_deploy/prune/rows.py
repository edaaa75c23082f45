"""A layer as a linear system: each output position pairs what the layer reads there (its receptive field) with a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ROWS = 1 << 15
"""Output positions that a fit looks at, over all images; beyond it they are sampled."""
ROWS_PER_COLUMN = 16
"""But never fewer than this times the unknowns per output."""
MEMORY = 1 << 29
"""Unless they take more bytes than this."""
CHUNK = 4_000_000
"""Elements of one block: bounds the memory of unfolding to 16 MB."""


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

        if not _is_linear_map(layer):
            return None
        own: Any = layer
        weight = own.weight
        columns, outputs = int(weight[0].numel()), len(weight)
        everything = Rows(layer, columns, outputs, 1.0)
        bias = own.bias if own.bias is not None else weight.new_zeros(outputs)
        for fields, targets in everything.draw(inputs, output, seed=0):
            found = weight.flatten(1) @ fields + bias[:, None]
            if not torch.allclose(found, targets, rtol=1e-3, atol=1e-3 * float(targets.abs().max().clamp_min(1e-6))):
                return None
        return Rows.sampled(layer, columns, columns, output, images)

    @staticmethod
    def sampled(layer: Any, columns: int, unknowns: int, output: Tensor, images: int) -> Rows:
        """With as large a share as so many unknowns per output need; `output`: one example batch, of `images` to come."""
        outputs = len(layer.weight)
        positions = output.numel() // outputs // len(output) * images
        wanted = min(max(ROWS_PER_COLUMN * unknowns, ROWS), MEMORY // (4 * (columns + 2 * outputs)))
        return Rows(layer, columns, outputs, min(1.0, wanted / positions))

    def draw(self, inputs: Tensor, target: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of (images, columns, positions) receptive fields and (images, outputs, positions) targets.

        `inputs` is what the layer reads, `target` has the shape of what it gives; the positions are the same for all images of
        a call.
        """
        return self.fields(inputs, self.pick(target, seed), self.flat(target).shape[2], seed)

    def pick(self, values: Tensor, seed: int) -> Tensor:
        """(images, outputs, drawn positions) of something that has the shape of the layer's output."""
        flat = self.flat(values)
        chosen = self._chosen(flat.shape[2], seed, values.device)
        return flat if chosen is None else flat[:, :, chosen]

    def fields(self, inputs: Tensor, picked: Tensor, positions: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `draw`, with targets that were picked with the same seed; `positions`: of one output, before any is drawn."""
        chosen = self._chosen(positions, seed, inputs.device)
        step = max(1, CHUNK // (picked.shape[2] * self.columns))
        for start in range(0, len(inputs), step):
            yield self._fields(inputs[start : start + step], chosen), picked[start : start + step]

    def _chosen(self, positions: int, seed: int, device: torch.device) -> Tensor | None:
        """None: all of them."""
        import torch

        count = max(1, round(self.share * positions))
        if count >= positions:
            return None
        order = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))
        return order[:count].sort().values.to(device)

    def _fields(self, inputs: Tensor, chosen: Tensor | None) -> Tensor:
        import torch.nn.functional as F
        from torch import nn

        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            flat = self.flat(inputs)
            return flat if chosen is None else flat[:, :, chosen]
        if chosen is None:
            return F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        fields = _receptive_fields(layer, inputs)
        width = fields.shape[3]
        picked = fields[:, :, chosen // width, chosen % width]
        return picked.movedim(2, -1).reshape(len(inputs), self.columns, -1)

    def flat(self, values: Tensor) -> Tensor:
        """(images, channels, positions) of a convolution's or a linear layer's values."""
        from torch import nn

        if isinstance(self.layer, nn.Linear):
            return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)
        return values.flatten(2)


def _is_linear_map(layer: Any) -> bool:
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
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
