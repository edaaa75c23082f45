"""A private copy of a network that computes the same faster: BatchNorms folded, memory laid out as the device likes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.ablation import first_argument

if TYPE_CHECKING:
    from torch import Tensor, nn


def folded_copy(module: nn.Module, images: Tensor) -> nn.Module:
    """Each BatchNorm that alone reads a convolution's output becomes part of it; a plain copy where that changes the logits."""
    import torch

    fast = copy.deepcopy(module).requires_grad_(False)
    with torch.no_grad():
        wanted = module(images)
        for conv, norm in _pairs(fast, images).items():
            _fold(fast, conv, norm)
        if images.device.type == "cpu" and any(weight.ndim == 4 for weight in fast.parameters()):
            fast = fast.to(memory_format=torch.channels_last)
        found = fast(images)
    if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max().clamp_min(1e-6))):
        return fast
    return copy.deepcopy(module).requires_grad_(False)


def _pairs(module: nn.Module, images: Tensor) -> dict[str, str]:
    """Convolution → the BatchNorm that reads its very output, both called once."""
    from torch import nn

    calls: dict[str, list[tuple[Any, Any]]] = {}

    def hook(name: str) -> Any:
        def keep(_layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append((first_argument(inputs, named), output))

        return keep

    with ExitStack() as undo:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d) or _is_norm(layer):
                undo.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        module(images)
    once = {name: found[0] for name, found in calls.items() if len(found) == 1}
    norms = {id(inputs): name for name, (inputs, _) in once.items() if _is_norm(module.get_submodule(name))}
    return {
        name: norms[id(output)]
        for name, (_, output) in once.items()
        if isinstance(module.get_submodule(name), nn.Conv2d) and id(output) in norms
    }


def _is_norm(layer: Any) -> bool:
    """A BatchNorm2d with statistics, or timm's that carries its activation along."""
    from torch import nn

    known = type(layer) is nn.BatchNorm2d or type(layer).__name__ == "BatchNormAct2d"
    return known and layer.running_var is not None and not layer.training


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    """W' = W * gamma / deviation per output, b' = beta + (b - mean) * gamma / deviation, computed in float64."""
    from torch import nn

    conv: Any = module.get_submodule(conv_name)
    norm: Any = module.get_submodule(norm_name)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = bias * scale + (norm.bias.double() if norm.bias is not None else 0)
    kind = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(kind), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(kind), requires_grad=False)
    rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    module.set_submodule(norm_name, rest)


# --- positions that nothing reads


def narrow(module: nn.Module, images: Tensor) -> None:
    """Let layers that work position by position skip the positions that no logit depends on: all but the class token of a
    transformer's last block, say. Autograd says which. Undone where it changes the logits. Their outputs there are zeros.
    """
    import torch

    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _layer, _inputs, output: seen.setdefault(name, []).append(output)

    with ExitStack() as undo, torch.enable_grad():
        for name, layer in module.named_modules():
            if _is_positionwise(layer):
                undo.callback(layer.register_forward_hook(hook(name)).remove)
        logits = module(images.detach().requires_grad_(True))
        outputs = {name: calls[0] for name, calls in seen.items() if len(calls) == 1 and calls[0].ndim == 3}
        if not outputs:
            return
        weights = torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype, device=logits.device)
        gradients = torch.autograd.grad((logits * weights).sum(), list(outputs.values()), allow_unused=True)
    patched: list[Any] = []
    for name, gradient in zip(outputs, gradients, strict=True):
        live = gradient.abs().sum((0, 2)).nonzero()[:, 0] if gradient is not None else None
        if live is not None and 0 < 2 * len(live) <= outputs[name].shape[1]:
            lazy: Any = module.get_submodule(name)
            lazy.forward = _at(live, lazy.forward, outputs[name].shape[1])
            patched.append(lazy)
    with torch.no_grad():
        same = torch.allclose(
            module(images), logits.detach(), rtol=1e-4, atol=1e-5 * float(logits.detach().abs().max())
        )
    for lazy in patched if not same else ():
        del lazy.forward


def _is_positionwise(layer: nn.Module) -> bool:
    from torch import nn

    if isinstance(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1
    return isinstance(layer, nn.Linear | nn.GELU | nn.ReLU | nn.SiLU)


def _at(live: Tensor, forward: Any, positions: int) -> Any:
    """`forward` on these positions of (rows, positions, channels) alone."""

    def narrowed(x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != positions:
            whole: Tensor = forward(x)
            return whole
        own = forward(x[:, live])
        out: Tensor = own.new_zeros(len(x), positions, own.shape[2])
        out[:, live] = own
        return out

    return narrowed
