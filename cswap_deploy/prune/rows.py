"""A layer as a linear system: each output position pairs what the layer reads there (its receptive field) with a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    """`columns` unknowns per output (bias aside), `outputs` outputs; `share` of the output positions is drawn.

    The columns of a layer are those of `weight.flatten(1)`, the columns of its receptive fields lie as `order` says: pixel by
    pixel, as in memory, so that gathering them costs next to nothing.
    """

    layer: nn.Module
    columns: int
    outputs: int
    share: float

    @staticmethod
    def of(layer: nn.Module, inputs: Tensor, output: Tensor, length: int) -> Rows | None:
        """None where the layer's forward is not the plain product of its weight with its receptive fields.

        `inputs`, `output`: one example call on a batch; `length`: of their first dimension over all batches, which counts images
        or, in windowed attention, windows.
        """
        import torch

        own: Any = layer
        if getattr(own, "groups", 1) != 1 or not is_sized(own, inputs, output):
            return None
        weight = own.weight
        columns, outputs = int(weight[0].numel()), len(weight)
        everything = Rows(layer, columns, outputs, 1.0)
        bias = own.bias if own.bias is not None else weight.new_zeros(outputs)
        for fields, targets in everything.draw(inputs, output, seed=0):
            found = weight.flatten(1)[:, everything.order()] @ fields + bias[:, None]
            if not torch.allclose(found, targets, rtol=1e-3, atol=1e-3 * float(targets.abs().max().clamp_min(1e-6))):
                return None
        return Rows.sampled(layer, columns, columns, output, length)

    @staticmethod
    def sampled(layer: Any, columns: int, unknowns: int, output: Tensor, length: int) -> Rows:
        """With as large a share as so many unknowns per output need; `output`, `length`: as in `of`."""
        outputs = len(layer.weight)
        positions = output.numel() // outputs // len(output) * length
        wanted = min(max(ROWS_PER_COLUMN * unknowns, ROWS), MEMORY // (4 * (columns + 2 * outputs)))
        return Rows(layer, columns, outputs, min(1.0, wanted / positions))

    def denser(self, times: float) -> Rows:
        """As many positions in all, or all that there are, from so many times fewer images."""
        return replace(self, share=min(1.0, self.share * times))

    def order(self, channels: Sequence[int] | None = None) -> Tensor:
        """(columns,) of the receptive fields of these input channels, all where None: the layer's column that each is."""
        import torch

        weight: Any = self.layer.weight
        kernel = weight[0, 0].numel()
        of = torch.arange(self.columns // kernel) if channels is None else torch.tensor([*channels], dtype=torch.long)
        found: Tensor = (of * kernel + torch.arange(kernel)[:, None]).flatten().to(weight.device)
        return found

    def draw(
        self, inputs: Tensor, target: Tensor, seed: int, channels: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of (images, columns, positions) receptive fields and (images, outputs, positions) targets.

        `inputs` is what the layer reads, of which these `channels` count, `target` has the shape of what it gives; the positions
        are the same for all images of a call.
        """
        return self.fields(inputs, self.pick(target, seed), self.flat(target).shape[2], seed, channels)

    def pick(self, values: Tensor, seed: int) -> Tensor:
        """(images, outputs, drawn positions) of something that has the shape of the layer's output."""
        flat = self.flat(values)
        chosen = self._chosen(flat.shape[2], seed, values.device)
        return flat if chosen is None else flat[:, :, chosen]

    def fields(
        self, inputs: Tensor, picked: Tensor, positions: int, seed: int, channels: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `draw`, with targets that were picked with the same seed; `positions`: of one output, before any is drawn."""
        chosen = self._chosen(positions, seed, inputs.device)
        weight: Any = self.layer.weight
        columns = self.columns if channels is None else weight[0, 0].numel() * len(channels)
        step = max(1, CHUNK // max(1, picked.shape[2] * columns))
        for start in range(0, len(inputs), step):
            yield self._fields(inputs[start : start + step], chosen, channels), picked[start : start + step]

    def _chosen(self, positions: int, seed: int, device: torch.device) -> Tensor | None:
        """None: all of them."""
        import torch

        count = max(1, round(self.share * positions))
        if count >= positions:
            return None
        order = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))
        return order[:count].sort().values.to(device)

    def _fields(self, inputs: Tensor, chosen: Tensor | None, channels: Sequence[int] | None) -> Tensor:
        import torch
        from torch import nn

        layer: Any = self.layer
        wanted = None if channels is None else torch.tensor([*channels], dtype=torch.long, device=inputs.device)
        if isinstance(layer, nn.Linear):
            rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
            rows = rows if chosen is None else rows.index_select(1, chosen)
            return (rows if wanted is None else rows.index_select(2, wanted)).transpose(1, 2)
        pixels = inputs if wanted is None else inputs.index_select(1, wanted)
        return _receptive_fields(layer, pixels, chosen).transpose(1, 2)

    def flat(self, values: Tensor) -> Tensor:
        """(images, channels, positions) of a convolution's or a linear layer's values."""
        from torch import nn

        if isinstance(self.layer, nn.Linear):
            return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)
        return values.flatten(2)


def is_sized(layer: Any, inputs: Tensor, output: Tensor) -> bool:
    """Whether a convolution or linear layer gives the shape that its attributes say; timm's Conv2dSame pads in its forward."""
    from torch import nn

    if isinstance(layer, nn.Linear):
        return output.shape == (*inputs.shape[:-1], len(layer.weight))
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    if inputs.ndim != 4:
        return False
    reach = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    sides = zip(inputs.shape[2:], layer.padding, reach, layer.stride, strict=True)
    found = ((side + 2 * pad - wide) // stride + 1 for side, pad, wide, stride in sides)
    return output.shape == (len(inputs), len(layer.weight), *found)


def _receptive_fields(layer: Any, inputs: Tensor, chosen: Tensor | None) -> Tensor:
    """(images, positions, kernel x channels) of a convolution's input, at the `chosen` output positions."""
    import torch
    import torch.nn.functional as F

    vertical, horizontal = layer.padding
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical)).permute(0, 2, 3, 1).contiguous()
    images, height, width, channels = padded.shape
    tall, wide = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    down, across = layer.stride
    rows, columns = (height - tall) // down + 1, (width - wide) // across + 1
    places = torch.arange(rows * columns, device=inputs.device) if chosen is None else chosen
    corner = places // columns * (down * width) + places % columns * across
    vertically, horizontally = (torch.arange(k) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    offsets = (vertically[:, None] * width + horizontally).flatten().to(inputs.device)
    index = (corner[:, None] + offsets).flatten()
    pixels = padded.reshape(images, height * width, channels).index_select(1, index)
    return pixels.reshape(images, len(places), len(offsets) * channels)
