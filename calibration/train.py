"""Train the two small digit classifiers on `digits/train` alone, and report each once on `digits/holdout`.

The schedules are fixed and the last weights are kept: nothing is selected. While tuning, `--hold-back 0.2` trains on
the rest of `digits/train`, reports on the part held back, and neither writes a file nor opens `digits/holdout`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
SIDE, MEAN, STD = 32, 0.5, 0.5  # pixels; mean and standard deviation of all three channels
BATCH, WARMUP = 64, 100  # images per step; steps


@dataclass(frozen=True)
class Net:
    """A timm model by name and JSON arguments, with the schedule that trains it."""

    file: str
    timm_name: str
    kwargs: Mapping[str, Any]
    steps: int
    learning_rate: float
    weight_decay: float

    def create(self) -> nn.Module:
        return timm.create_model(self.timm_name, **self.kwargs)


CNN = Net(
    file="digits_cnn.safetensors",
    timm_name="resnet18",
    kwargs={"channels": [32, 48, 64, 64], "stem_type": "deep", "stem_width": 16, "num_classes": 10},
    steps=1500,
    learning_rate=3e-3,
    weight_decay=0.05,
)
VIT = Net(
    file="digits_vit.safetensors",
    timm_name="vit_tiny_patch16_224",
    kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 6, "num_classes": 10},
    steps=3000,
    learning_rate=1.5e-3,
    weight_decay=0.05,
)


@dataclass(frozen=True)
class Images:
    """`pixels`: float32 N x 3 x 32 x 32 in 0..1, not yet normalised; `labels`: int64 N."""

    pixels: Tensor
    labels: Tensor

    def at(self, indices: Tensor) -> Images:
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Trained:
    """A net, its model in eval mode, and the wall time of its training in seconds."""

    net: Net
    model: nn.Module
    seconds: float


def main() -> None:
    """Train the CNN, then the ViT with the CNN as its teacher; test both at the very end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-back", type=float, default=0.0, metavar="SHARE", help="tune on this share of train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of float sums, and so the weights, depend on it
    torch.use_deterministic_algorithms(True)

    out = None if arguments.hold_back else arguments.out
    learn, held = parts(load(HERE / "digits" / "train"), arguments.hold_back)
    cnn = train(CNN, learn, arguments.seed, teacher=None)
    save(cnn, out)
    vit = train(VIT, learn, arguments.seed, teacher=cnn.model)
    save(vit, out)

    test = load(HERE / "digits" / "holdout") if out else held
    rows = [row(trained, test) for trained in (cnn, vit)]
    print(*rows, sep="\n")
    if out:
        (out / "README.md").write_text(card(rows, arguments.seed), encoding="utf-8")


def load(folder: Path) -> Images:
    """Read `folder/CLASS/*.png` in path order; PIL squashes each image to 32 x 32 with bicubic interpolation."""
    paths = sorted(folder.glob("*/*.png"))
    squashed = [Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in squashed])).permute(0, 3, 1, 2)
    return Images(pixels.contiguous() / 255, torch.tensor([int(path.parent.name) for path in paths]))


def parts(images: Images, hold_back: float) -> tuple[Images, Images]:
    """What is learnt from, and the share held back; the draw does not depend on `--seed`."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    held = round(hold_back * len(order))
    return images.at(order[held:]), images.at(order[:held])


def train(net: Net, images: Images, seed: int, teacher: nn.Module | None) -> Trained:
    """Train from scratch under AdamW with warm-up and cosine decay; keep the last weights."""
    torch.manual_seed(seed)
    model = net.create().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, net.weight_decay), lr=net.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, net.learning_rate, total_steps=net.steps, pct_start=WARMUP / net.steps, cycle_momentum=False
    )
    start = time.perf_counter()
    for step in range(1, net.steps + 1):
        batch = images.at(torch.randint(len(images.labels), (BATCH,)))
        inputs = normalise(distort(batch.pixels))
        loss = loss_of(model(inputs), batch.labels, inputs, teacher)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"{net.file}  step {step} of {net.steps}  loss {loss.item():.3f}", flush=True)
    return Trained(net, model.eval(), time.perf_counter() - start)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases and norms do not."""
    flat = [p for p in model.parameters() if p.ndim == 1]
    deep = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": deep, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]


def loss_of(logits: Tensor, labels: Tensor, inputs: Tensor, teacher: nn.Module | None) -> Tensor:
    """Cross-entropy with smoothed labels; with a teacher, its mean with the cross-entropy to the teacher's answers."""
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    if teacher is None:
        return hard
    with torch.no_grad():
        answers = teacher(inputs).softmax(dim=1)
    return (hard + F.cross_entropy(logits, answers)) / 2


def distort(pixels: Tensor) -> Tensor:
    """Turn, scale, shear and shift each image on its own, then bend it by a smooth field; black comes in at the rim."""
    count = len(pixels)
    turn, shear = spread(count, 0.25), spread(count, 0.25)  # radians; slope
    wide, high = 1 + spread(count, 0.18), 1 + spread(count, 0.18)
    across, down = spread(count, 0.2), spread(count, 0.2)  # of half the side
    cosine, sine = turn.cos(), turn.sin()
    rows = [wide * cosine, shear - high * sine, across, wide * sine, high * cosine, down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), list(pixels.shape), align_corners=False)
    bend = F.interpolate(0.06 * torch.randn(count, 2, 4, 4), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return F.grid_sample(pixels, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def spread(count: int, limit: float) -> Tensor:
    """`count` draws, uniform in -limit..limit."""
    return (2 * torch.rand(count) - 1) * limit


def normalise(pixels: Tensor) -> Tensor:
    return (pixels - MEAN) / STD


def save(trained: Trained, out: Path | None) -> None:
    """Write the whole state dict; nothing where `out` is None."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in trained.model.state_dict().items()}, out / trained.net.file
        )


@torch.no_grad()
def row(trained: Trained, test: Images) -> str:
    """Test once; the net's row of the table in `card`."""
    answers = trained.model(normalise(test.pixels)).argmax(dim=1)
    right, count = int((answers == test.labels).sum()), len(test.labels)
    low, high = wilson(right, count)
    parameters = sum(p.numel() for p in trained.model.parameters())
    call = f"`timm.create_model({trained.net.timm_name!r}, **json.loads({json.dumps(trained.net.kwargs)!r}))`"
    top1 = f"{right}/{count} = {100 * right / count:.2f} % ({100 * low:.1f}..{100 * high:.1f} %)"
    return f"| `{trained.net.file}` | {call} | {parameters:,} | {top1} | {trained.seconds:.0f} s |"


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % unless `z` says otherwise."""
    share, weight = right / count, z * z / count
    middle = share + weight / 2
    reach = z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return (middle - reach) / (1 + weight), (middle + reach) / (1 + weight)


def card(rows: Sequence[str], seed: int) -> str:
    """The models' README, from this run's own figures."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "pillow", "numpy", "safetensors"))
    return CARD.format(
        rows="\n".join(rows),
        seed=seed,
        python=platform.python_version(),
        libraries=libraries,
        machine=platform.machine(),
    )


CARD = """\
# Two small digit classifiers

Written, this page included, by `python calibration/train.py --seed {seed}` under Python {python} with
{libraries}, on the CPU ({machine}), one thread.
Both nets learnt from `digits/train` alone.

| file | model | parameters | top-1 on `digits/holdout` (95 % Wilson interval) | training |
|---|---|---|---|---|
{rows}

- **Preprocessing**: PNG to RGB; squashed to 32 x 32 by PIL with bicubic interpolation, no crop; scaled to 0..1; mean
  (0.5, 0.5, 0.5), standard deviation (0.5, 0.5, 0.5).
- **Training**: from random weights at seed {seed}, under random turns, scales, shears, shifts and bends. The ViT also
  learnt from the CNN's answers. Fixed schedules, last weights; `digits/holdout` was read only after training, and
  `digits/scoring` not at all.
- **Files**: the model's whole state dict, float32; BatchNorm's `num_batches_tracked` counters alone are int64.
- **Licence**: the weights Apache-2.0; the digits CC BY 4.0, see `../digits/README.md`.
"""


if __name__ == "__main__":
    main()
