"""Tiny variants of timm's families: between them every kind of structure that groups are found in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import zoo
from torch import nn

from cswap_deploy.artifacts import Architecture, Groups, InputSpec
from cswap_deploy.model import build
from cswap_deploy.prune.groups import find


@dataclass(frozen=True)
class Family:
    """`holds`: what it is here for; `heads`, `groups`: how many of them must at least be found."""

    name: str
    side: int
    holds: str
    groups: int
    heads: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    fitted: bool = False
    """Whether least squares is tried on it."""
    make: Callable[[], nn.Module] | None = None
    """Where timm's name takes no sizes."""

    @property
    def spec(self) -> InputSpec:
        return zoo.spec(self.side)

    @property
    def architecture(self) -> Architecture:
        return Architecture("timm", self.name, {"num_classes": zoo.CLASSES, **self.kwargs}, "timm 0.0.1")

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.make() if self.make else build(self.architecture)
            return lively(zoo.randomised(module)).eval().requires_grad_(False)

    @property
    def groups_found(self) -> Groups:
        return _found(self)


@cache
def _found(family: Family) -> Groups:
    return find(family.build(), family.spec)


def lively(module: nn.Module) -> nn.Module:
    """Layer scales of 1e-5 and heads of zeros would hide what a wrong cut does."""
    with torch.no_grad():
        for tensor in module.parameters():
            if float(tensor.abs().max()) < 1e-3 or float(tensor.max() - tensor.min()) == 0.0:
                tensor.uniform_(-0.3, 0.7).mul_((tensor[0].numel() if tensor.ndim > 1 else 1) ** -0.5)
    return module


def _resmlp() -> nn.Module:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2, "mlp_ratio": 4}
    return MlpMixer(num_classes=zoo.CLASSES, block_layer=ResBlock, norm_layer=Affine, **sizes)


def _poolformer() -> nn.Module:
    from timm.layers import GroupNorm1
    from timm.models.metaformer import MetaFormer

    return MetaFormer(
        num_classes=zoo.CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), downsample_norm=None, mlp_act=nn.GELU,
        mlp_bias=True, norm_layers=GroupNorm1, layer_scale_init_values=1e-5, res_scale_init_values=None, use_mlp_head=False,
    )  # fmt: skip


SMALL_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 4)}
FAMILIES = [
    Family("test_resnet", 32, "residual streams of basic and bottleneck blocks", 5),
    Family("resnext50_32x4d", 32, "grouped convolutions", 5,
           fitted=True, kwargs={"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "cardinality": 4, "base_width": 16}),
    Family("test_byobnet", 32, "re-parameterised blocks, gates", 5),
    Family("mobileone_s0", 32, "re-parameterised blocks of MobileOne", 20),
    Family("test_efficientnet", 32, "depthwise convolutions, squeeze-excite", 5),
    Family("densenet121", 32, "dense concatenation", 8, fitted=True, kwargs={"growth_rate": 4, "block_config": (2, 2)}),
    Family("ghostnet_050", 32, "concatenation with slices", 10),
    Family("res2net50_26w_4s", 32, "a split by a stored width", 8,
           fitted=True, kwargs={"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16), "base_width": 26}),
    Family("resnest14d", 32, "split attention", 5, kwargs={"channels": (16, 16, 32, 32), "stem_width": 8}),
    Family("rexnet_100", 32, "shortcuts of the first channels", 10, kwargs={"width_mult": 0.3}),
    Family("test_nfnet", 32, "scaled convolutions without norms", 5),
    Family("test_convnext", 32, "ConvNeXt blocks, layer scale", 5),
    Family("convnextv2_atto", 32, "global response norm", 0, kwargs={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    Family("resmlp", 32, "token mixing without LayerNorm", 3, make=_resmlp),
    Family("poolformer", 32, "layer scale by a stored shape", 4, make=_poolformer),
    Family("test_vit2", 32, "fused attention, layer scale, register tokens", 16, 8),
    Family("levit_128s", 64, "attention with cached biases, keys and values of other sizes", 8, 3,
           fitted=True, kwargs={"img_size": 64, "embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "key_dim": 8}),
    Family("swin_tiny_patch4_window7_224", 32, "windows with tables of biases", 6, 3, fitted=True, kwargs=SMALL_SWIN),
    Family("pvt_v2_b0", 32, "separate queries, spatial reduction", 4,
           kwargs={"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    Family("cait_xxs24_224", 32, "talking heads, class attention", 3,
           kwargs={"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    Family("xcit_nano_12_p16_224", 32, "attention over channels", 3, kwargs={"img_size": 32, "embed_dim": 32, "depth": 2}),
    Family("edgenext_xx_small", 64, "hybrids with split depthwise convolutions", 5,
           kwargs={"depths": (2, 2, 2, 2), "dims": (8, 16, 24, 32)}),
    Family("mobilevit_xxs", 64, "convolutions and transformers side by side", 20, 5),
    Family("efficientvit_b0", 64, "linear attention at several scales", 8, 2, kwargs={"widths": (8, 16, 16, 32, 32)}),
    Family("shvit_s1", 64, "one head on a part of the channels", 5,
           kwargs={"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "partial_dim": (8, 8, 12)}),
    Family("fastvit_t8", 64, "FastViT's mobile blocks", 4,
           kwargs={"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}),
    Family("tresnet_m", 64, "blurring with a stored number of channels", 5,
           kwargs={"layers": (1, 1, 1, 1), "width_factor": 0.25}),
    Family("coat_tiny", 64, "weights that blocks share, class tokens that are handed on", 2,
           kwargs={"img_size": 64, "embed_dims": (8, 8, 8, 8), "serial_depths": (2, 1, 1, 1), "parallel_depth": 1,
                   "num_heads": 2, "mlp_ratios": (2, 2, 2, 2), "crpe_window": {3: 2}}),
]  # fmt: skip
