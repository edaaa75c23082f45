"""Tiny networks that between them hold every coupling that the pruner meets; weights and statistics are random, seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from cswap_deploy.artifacts import Group, Groups, InputSpec
from cswap_deploy.prune import groups
from cswap_deploy.prune.batches import Batches

CLASSES = 5


def spec(side: int, channels: int = 3) -> InputSpec:
    return InputSpec((channels, side, side), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0)


# --- networks


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def pooled(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def chain() -> nn.Module:
    return nn.Sequential(conv_bn(3, 6), conv_bn(6, 8, stride=2), nn.Conv2d(8, 7, 1), nn.GELU(), pooled(7))


class Block(nn.Module):
    """A basic residual block; `down`: its shortcut is a strided 1x1 convolution."""

    def __init__(self, inputs: int, middle: int, outputs: int, *, down: bool) -> None:
        super().__init__()
        stride = 2 if down else 1
        self.conv1 = nn.Conv2d(inputs, middle, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if down:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = self.bn2(self.conv2(inner))
        inner += shortcut
        return F.relu(inner)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.layer1 = Block(6, 8, 6, down=False)
        self.layer2 = Block(6, 8, 8, down=True)
        self.layer3 = Block(8, 6, 8, down=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(x.mean((2, 3)))


def separable() -> nn.Module:
    """Inverted residuals without the shortcut: expand, depthwise, project."""
    return nn.Sequential(
        conv_bn(3, 6, stride=2),
        conv_bn(6, 10, 1),
        conv_bn(10, 10, groups=10),
        conv_bn(10, 8, 1),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.ReLU6(),
        pooled(6),
    )


class Concat(nn.Module):
    """Two branches side by side, the second also through a dense skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.left = conv_bn(4, 5)
        self.right = conv_bn(4, 6, 1)
        self.fuse = nn.Conv2d(4 + 5 + 6, 8, 1)
        self.head = pooled(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        both = torch.cat([x, self.left(x), self.right(x)], 1)
        out: Tensor = self.head(F.relu(self.fuse(both)))
        return out


def flattened() -> nn.Module:
    """Each unit of the last convolution owns 16 inputs of the first linear layer."""
    return nn.Sequential(
        conv_bn(3, 4, stride=2),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(6 * 16, 9),
        nn.ReLU(),
        nn.Linear(9, CLASSES),
    )


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.act = nn.PReLU(8)
        self.next = nn.Conv2d(8, 6, 3, padding=1)
        self.head = pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        out: Tensor = self.head(F.relu(self.next(x * gate)))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 12), nn.ReLU(), nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, CLASSES)
    )


def linear() -> nn.Module:
    """Linear up to the logits: effects have a closed form."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6), nn.Linear(6, CLASSES))


def inert() -> nn.Module:
    """Dropout and Identity between the layers, a BatchNorm1d without parameters of its own."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 64, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.Identity(),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(12, 8),
        nn.Dropout(0.1),
        nn.GELU(),
        nn.Linear(8, CLASSES),
    )


class ChannelsLast(nn.Module):
    """A ConvNeXt-like MLP: linear layers that read (images, height, width, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        out: Tensor = self.head(F.layer_norm(x.mean((2, 3)), (6,)))
        return out


class Recurrent(nn.Module):
    """One layer that runs twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.alias = self.again
        self.wide = nn.Conv2d(6, 8, 1)
        self.head = pooled(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.alias(F.relu(self.again(x))))
        out: Tensor = self.head(F.relu(self.wide(x)))
        return out


class Shared(nn.Module):
    """Two layers that hold the same weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.wide = nn.Conv2d(6, 8, 1)
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.inner = nn.Conv2d(8, 7, 1)
        self.head = pooled(7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(self.stem(x)))
        x = F.relu(self.second(F.relu(self.first(x))))
        out: Tensor = self.head(F.relu(self.inner(x)))
        return out


class Normalised(nn.Module):
    """GroupNorm and LayerNorm over units, and a grouped convolution that reads what must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.free = nn.Conv2d(8, 6, 1)
        self.tokens = nn.Conv2d(6, 4, 1)
        self.layer_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.norm(self.stem(x))))
        x = self.tokens(F.relu(self.free(F.relu(x))))
        out: Tensor = self.head(self.layer_norm(x.flatten(2).mean(2)))
        return out


class PaddedShortcut(nn.Module):
    """ResNet's option A: the shortcut is subsampled and its new channels are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.conv1 = conv_bn(4, 6, stride=2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.head = pooled(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        out: Tensor = self.head(F.relu(self.conv2(self.conv1(x)) + shortcut))
        return out


class InPlace(nn.Module):
    """All layers side by side in one module, what is between them written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 7, 3, padding=1)
        self.conv3 = nn.Conv2d(7, 6, 3, padding=1)
        self.conv4 = nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x += 0.25
        x = F.relu_(x)
        y = F.relu_(self.conv2(x))
        y = self.conv3(y)
        y += x
        y.clamp_(-1, 1)
        y = self.conv4(y).relu_()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def vit() -> nn.Module:
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    module: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)
    return module


def resnet() -> nn.Module:
    import timm

    module: nn.Module = timm.create_model("resnet18", num_classes=CLASSES, channels=[8, 8, 16, 16])
    return module


# --- entries


@dataclass(frozen=True)
class Entry:
    factory: Callable[[], nn.Module]
    spec: InputSpec
    seed: int

    def build(self) -> nn.Module:
        """In eval mode, with random statistics and affine parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return randomised(self.factory()).eval()

    @property
    def groups(self) -> Groups:
        return _groups(self)


@cache
def _groups(entry: Entry) -> Groups:
    return groups.find(entry.build(), entry.spec)


ZOO = {
    "chain": Entry(chain, spec(8), 1),
    "residual": Entry(Residual, spec(8), 2),
    "separable": Entry(separable, spec(8), 3),
    "concat": Entry(Concat, spec(8), 4),
    "flattened": Entry(flattened, spec(16), 5),
    "squeeze-excite": Entry(SqueezeExcite, spec(8), 6),
    "mlp": Entry(mlp, spec(8), 7),
    "linear": Entry(linear, spec(8), 8),
    "inert": Entry(inert, spec(8), 9),
    "channels-last": Entry(ChannelsLast, spec(8), 10),
    "recurrent": Entry(Recurrent, spec(8), 11),
    "shared": Entry(Shared, spec(8), 17),
    "normalised": Entry(Normalised, spec(8), 12),
    "padded-shortcut": Entry(PaddedShortcut, spec(8), 13),
    "in-place": Entry(InPlace, spec(8), 16),
    "vit": Entry(vit, spec(16), 14),
    "resnet": Entry(resnet, spec(16), 15),
}
PRUNABLE = [name for name in ZOO if name != "padded-shortcut"]


def randomised(module: nn.Module) -> nn.Module:
    """Away from the constructors' zeros and ones, which would hide what a wrong cut does."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats:
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
            if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) and layer.weight is not None:
                layer.weight.uniform_(0.6, 1.4)
            if isinstance(getattr(layer, "bias", None), nn.Parameter):
                layer.bias.normal_(0, 0.2)
    return module


# --- data and planted units


def batches(entry: Entry, count: int = 24, seed: int = 0) -> Batches:
    """Random pixels and labels."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, *entry.spec.shape), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, count, dtype=np.int64)
    return Batches(pixels, labels, entry.spec, "cpu")


def images(entry: Entry, count: int = 3, seed: int = 0) -> Tensor:
    """Normal noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *entry.spec.shape, generator=generator, dtype=torch.float64)


def kill(module: nn.Module, group: Group, unit: int) -> None:
    """Nothing reads this unit any more."""
    with torch.no_grad():
        for member in group.consumers:
            start = member.offset + unit * member.repeat
            module.get_submodule(member.module).weight[:, start : start + member.repeat] = 0


def duplicate(module: nn.Module, group: Group, source: int, target: int) -> None:
    """Give unit `target` what unit `source` computes from; who reads it, and how, stays."""
    state = module.state_dict()
    with torch.no_grad():
        for member in group.members:
            if member in group.consumers:
                continue
            rows = state[member.tensor].movedim(member.axis, 0)
            own, copy = (
                slice(member.offset + u * member.repeat, member.offset + (u + 1) * member.repeat)
                for u in (source, target)
            )
            rows[copy] = rows[own].clone()


def same_reading(module: nn.Module, group: Group, source: int, target: int) -> None:
    """Let all consumers read unit `target` as they read unit `source`."""
    with torch.no_grad():
        for member in group.consumers:
            weight = module.get_submodule(member.module).weight
            for k in range(member.repeat):
                weight[:, member.offset + target * member.repeat + k] = weight[
                    :, member.offset + source * member.repeat + k
                ]


def scramble(module: nn.Module, found: Groups, keep: dict[str, tuple[int, ...]]) -> None:
    """Write nonsense into all that makes the units which left."""
    state = module.state_dict()
    for group in found.groups:
        for unit in set(range(group.units)) - set(keep.get(group.name, range(group.units))):
            for member in set(group.members) - set(group.consumers):
                start = member.offset + unit * member.repeat
                state[member.tensor].movedim(member.axis, 0)[start : start + member.repeat] = 7.0


def fingerprint(module: nn.Module) -> dict[str, object]:
    """All that a function which promises to leave a module alone must leave alone."""
    facts: dict[str, object] = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        facts[f"{name}: requires_grad, grad"] = (parameter.requires_grad, parameter.grad is None)
    for name, layer in module.named_modules():
        hooks = [
            len(table) for key, table in sorted(vars(layer).items()) if "hooks" in key and hasattr(table, "__len__")
        ]
        plain = {k: v for k, v in vars(layer).items() if isinstance(v, int | float | str | tuple)}
        facts[f"{name}: layer"] = (layer.training, hooks, sorted(set(vars(layer))), plain)
    return facts


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    """Whether two fingerprints are equal, tensors bit by bit."""
    return before.keys() == after.keys() and all(
        torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]  # type: ignore[arg-type]
        for key, value in before.items()
    )


@st.composite
def keeps(draw: st.DrawFn, found: Groups) -> dict[str, tuple[int, ...]]:
    """A plan: at least one unit of each group that it names, and it need not name all of them."""
    part = {
        group.name: st.none() | st.sets(st.integers(0, group.units - 1), min_size=1, max_size=group.units)
        for group in found.groups
    }
    drawn = {name: draw(strategy) for name, strategy in part.items()}
    return {name: tuple(sorted(units)) for name, units in drawn.items() if units is not None}


def half(found: Groups, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Every group keeps a random half of its units."""
    generator = np.random.default_rng(seed)
    return {
        group.name: tuple(sorted(generator.permutation(group.units)[: (group.units + 1) // 2].tolist()))
        for group in found.groups
    }
