"""Attention as plain products where PyTorch's ONNX exporter knows no attention: it takes (batch, heads, tokens, dims) alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KNOWN_AXES = 4


@contextmanager
def exportable() -> Iterator[None]:
    """While this holds, `scaled_dot_product_attention` of tensors with another number of axes (windows, blocks) is spelt out."""
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    class Spelt(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention and args and args[0].ndim != KNOWN_AXES:
                return spelt(*args, **kwargs)
            return func(*args, **kwargs)

    with Spelt():
        yield


def spelt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k' scale + mask) v, as PyTorch defines it, of tensors (..., tokens, dims), in inference: nothing is dropped."""
    import torch

    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    weights = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attn_mask is not None:
        outside = (
            torch.zeros_like(weights).masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else attn_mask
        )
        weights = weights + outside
    return weights.softmax(-1) @ value
