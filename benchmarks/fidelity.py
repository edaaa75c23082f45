"""Are the estimators of the causal criterion as right as they are fast? Each against a plain loop of full forwards, in one run.

    python benchmarks/fidelity.py --resnet20 cifar10_resnet20.safetensors IMAGES --vit cifar10_vit.safetensors IMAGES

plain        one forward of the whole network per unit and batch with the same intervention, in batches of the same size. Timed on
             a drawn sample of units in three parts, before, between and after the others, and scaled to all units.
exact        every unit; its effects are the reference of the rank correlation and of the verdicts. `of effects` is the largest
             difference of a unit's effect, the mean over the images, from the plain loop's, over the sampled units; `of images` that of
             the change of log p on one image. What of it is rounding is told by the same loop in float64, over the first few.
screened     what it finds with its fewer ablations.
attribution  first order alone.

Prints a table and writes JSON. Seconds are wall time; `cpu` is the ratio of processor times, which other programs disturb less.
IMAGES is a folder that holds `scoring/` and `holdout/` with class folders.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from cswap_deploy import data, model, prune
from cswap_deploy.artifacts import Group, ImageSet
from cswap_deploy.prune.ablation import ablated
from cswap_deploy.prune.attribution import first_order
from cswap_deploy.prune.batches import Batches, resolve_device
from cswap_deploy.prune.cut import restore
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.reading import input_means, readings
from cswap_deploy.prune.screened import Screened, screen
from cswap_deploy.prune.verdicts import verdicts
from cswap_deploy.recipe import InputSettings, ModelSettings

T = TypeVar("T")
ALPHA = 0.05
IN_DOUBLE = 6
"""Sampled units that the plain loop is repeated on in float64."""
INPUT = {"size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0}
NETS: dict[str, dict[str, Any]] = {
    "resnet20": {"factory": f"{Path(__file__).parent / 'cifar_resnet.py'}:resnet20"},
    "vit": {"name": "vit_tiny_patch16_224", "num_classes": 10,
            "kwargs": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}},
}  # fmt: skip


@dataclass
class Spent:
    """Wall and processor seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def on(self, work: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return found


@dataclass
class Bench:
    module: nn.Module
    groups: tuple[Group, ...]
    batches: Batches
    intervention: Any
    seed: int

    def plain(self, chosen: Sequence[tuple[int, int]], means: dict[str, Tensor]) -> dict[tuple[int, int], Tensor]:
        """Per-image effects of these (group, unit) pairs."""
        return _loop(self.module, self.groups, self.batches, chosen, means)

    def in_double(self, chosen: Sequence[tuple[int, int]], means: dict[str, Tensor]) -> dict[tuple[int, int], Tensor]:
        module = copy.deepcopy(self.module).double()
        wide = {name: value.double() for name, value in means.items()}
        return _loop(module, self.groups, [(x.double(), y) for x, y in self.batches], chosen, wide)

    def run(self, sample: int) -> dict[str, Any]:
        units = [(number, unit) for number, group in enumerate(self.groups) for unit in range(group.units)]
        order = np.random.default_rng(self.seed).permutation(len(units))[:sample]
        parts = [[units[k] for k in order[part::3]] for part in range(3)]
        layers = sorted({member.module for group in self.groups for member in group.consumers})
        means = input_means(self.module, layers, self.batches) if self.intervention == "mean" else {}
        spent = {name: Spent() for name in ("plain", "exact", "screened", "attribution")}
        loop = spent["plain"].on(lambda: self.plain(parts[0], means))
        first = spent["attribution"].on(self._attribution)
        screened = spent["screened"].on(lambda: screen(self._prepare(), ALPHA))
        loop |= spent["plain"].on(lambda: self.plain(parts[1], means))
        exact = spent["exact"].on(self._exact)
        loop |= spent["plain"].on(lambda: self.plain(parts[2], means))
        scale = len(units) / len(loop)
        double = self.in_double(parts[0][:IN_DOUBLE], means)
        rounding = {
            "plain": max(float((loop[place] - true).abs().max()) for place, true in double.items()),
            "exact": max(float((exact.effects[n][:, u] - true).abs().max()) for (n, u), true in double.items()),
        }
        rows: dict[str, Any] = {"plain": {"seconds": spent["plain"].wall * scale, "units": len(loop)}}
        for name, found in (("exact", exact), ("screened", screened), ("attribution", first)):
            rows[name] = {
                "seconds": spent[name].wall,
                "faster": spent["plain"].wall * scale / spent[name].wall,
                "faster_cpu": spent["plain"].cpu * scale / spent[name].cpu,
                "of_effects": max(abs(float((found.effects[n][:, u] - loop[n, u]).mean())) for n, u in loop),
                "of_images": max(float((found.effects[n][:, u] - loop[n, u]).abs().max()) for n, u in loop),
                "from_float64": rounding if name == "exact" else None,
                **self._fidelity(found, exact, decisive=name != "attribution"),
            }
        return {"units": len(units), "images": len(self.batches), "batch": self.batches.size, "rows": rows}

    def _prepare(self) -> Ablations:
        return Ablations.prepare(self.module, self.groups, self.batches, self.intervention)

    def _exact(self) -> Screened:
        everything = [torch.ones(len(self.batches), group.units, dtype=torch.bool) for group in self.groups]
        return Screened.all(self._prepare().effects(everything), exact=True)

    def _attribution(self) -> Screened:
        read = readings(self.module, self.groups, self.batches, self.intervention)
        return Screened.all(first_order(self.module, read, self.batches), exact=False)

    def _fidelity(self, found: Screened, exact: Screened, *, decisive: bool) -> dict[str, Any]:
        keep, truth = (torch.cat(each.effects, 1).abs().mean(0).numpy() for each in (found, exact))
        said = [v for own in verdicts(found.effects, ALPHA, decisive=decisive, spread=found.spread) for v in own]
        true = [v for own in verdicts(exact.effects, ALPHA, decisive=True) for v in own]
        agree = np.mean([one == other for one, other in zip(said, true, strict=True)])
        return {
            "spearman": float(spearmanr(keep, truth)[0]),
            "spearman_of_groups": {
                group.name: float(spearmanr(a.abs().mean(0), b.abs().mean(0))[0])
                for group, a, b in zip(self.groups, found.effects, exact.effects, strict=True)
            },
            "verdicts": float(agree),
            "critical": true.count("critical"),
            "detrimental": true.count("detrimental"),
            "verified": sum(map(sum, found.verified)),
        }


def _loop(
    module: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[tuple[Tensor, Tensor]],
    chosen: Sequence[tuple[int, int]],
    means: dict[str, Tensor],
) -> dict[tuple[int, int], Tensor]:
    def log_p(images: Tensor, labels: Tensor) -> Tensor:
        return module(images).log_softmax(1).gather(1, labels[:, None])[:, 0]

    with torch.no_grad():
        whole = [log_p(*batch) for batch in batches]
        found = {}
        for number, unit in chosen:
            with ablated(module, groups[number], [unit], means or None):
                parts = [log_p(*batch) - clean for batch, clean in zip(batches, whole, strict=True)]
            found[number, unit] = torch.cat(parts).double().cpu()
    return found


def prepare(name: str, weights: Path, folder: Path, args: argparse.Namespace, scratch: Path) -> Bench:
    device = resolve_device(args.device)
    settings = ModelSettings(**NETS[name], checkpoint=weights.resolve(), input=InputSettings(**INPUT))
    network = model.load(scratch, settings, seed=args.seed)
    images = data.catalogue(folder.resolve(), None, network.outputs)
    fit = data.divide(images, 1024, None, args.seed).fit
    batches = Batches.read(ImageSet(fit, folder.resolve()), network.input, device).first(args.images)
    groups = prune.find_groups(scratch, network, ()).groups
    return Bench(restore(network).to(device), groups, batches, args.intervention, args.seed)


def show(name: str, found: dict[str, Any]) -> None:
    for estimator, row in found["rows"].items():
        if estimator == "plain":
            print(
                f"{name:<10}{'plain':<13}{row['seconds']:9.1f}   {row['units']} of {found['units']} units timed",
                flush=True,
            )
            continue
        print(
            f"{name:<10}{estimator:<13}{row['seconds']:9.1f}{row['faster']:8.1f}{row['faster_cpu']:8.1f}"
            f"{row['of_effects']:12.1e}{row['of_images']:12.1e}"
            f"{row['spearman']:10.4f}{row['verdicts']:10.1%}{row['verified']:10d}",
            flush=True,
        )
        if row["from_float64"]:
            print(
                f"{'':<23}an image's from float64: exact {row['from_float64']['exact']:.1e}, plain {row['from_float64']['plain']:.1e}"
            )


def main() -> None:
    here = Path(__file__).parent
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in NETS:
        cli.add_argument(f"--{name}", type=Path, nargs=2, metavar=("WEIGHTS", "IMAGES"))
    cli.add_argument("--intervention", choices=("zero", "mean"), default="zero")
    cli.add_argument("--images", type=int, default=256)
    cli.add_argument("--sample", type=int, default=60, help="units that the plain loop is timed on")
    cli.add_argument("--device", default="cpu")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--json", type=Path, default=here / "fidelity.json")
    args = cli.parse_args()
    print(
        f"{'net':<10}{'estimator':<13}{'seconds':>9}{'faster':>8}{'cpu':>8}"
        f"{'of effects':>12}{'of images':>12}{'Spearman':>10}{'verdicts':>10}{'verified':>10}"
    )
    nets = {}
    for name in NETS:
        if getattr(args, name):
            with TemporaryDirectory() as scratch:
                nets[name] = prepare(name, *getattr(args, name), args, Path(scratch)).run(args.sample)
            show(name, nets[name])
    conditions = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
                  "load": os.getloadavg(), "intervention": args.intervention, "seed": args.seed, "device": args.device}  # fmt: skip
    args.json.write_text(json.dumps({"conditions": conditions, "nets": nets}, indent=1))
    print(f"written to {args.json.name}")


if __name__ == "__main__":
    main()
