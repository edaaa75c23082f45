"""Criteria and compensations side by side on one recipe: same images, same target, one run.

    python benchmarks/criteria.py                                   # recipes/quickstart.yaml
    python benchmarks/criteria.py recipes/cifar10-resnet56.yaml --set model.factory=benchmarks/cifar_resnet.py:resnet20 \\
        --set calibration.images=/path/to/cifar10 --set model.checkpoint=/path/to/cifar10_resnet20.safetensors --keep 0.6

Prints a table and writes JSON. Hold-out images only report. "signed" and "squared" rank the causal criterion's units by the
signed mean and the mean square of the per-image effect in place of its mean absolute value.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from cswap_deploy import data, model, prune, recipe
from cswap_deploy.artifacts import Group, Groups, GroupScores, ImageSet, Network
from cswap_deploy.intervals import discordant, paired_drop
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.criteria import Scorer, scorer
from cswap_deploy.prune.criteria.causal import CausalEffect
from cswap_deploy.prune.cut import restore
from cswap_deploy.prune.select import choose_units

TEMPERATURE = 4.0
CRITERIA = ("causal", "causal signed", "causal squared", "taylor", "magnitude", "variance", "random")
COMPENSATIONS = ("none", "mean", "batchnorm", "least_squares")


@dataclass(frozen=True)
class Reranked:
    """The causal criterion with another summary of the per-image effects."""

    causal: CausalEffect
    how: str

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        found = self.causal.score(module, groups, batches)
        count = min(len(batches), self.causal.settings.images)
        return tuple(
            replace(item, keep_value=tuple(self._value(item, k, count) for k in range(len(item.units))))
            for item in found
        )

    def _value(self, item: GroupScores, unit: int, images: int) -> float:
        """The square's mean is variance plus squared mean; the variance is the squared standard error times the images."""
        mean, error = item.effect[unit], item.error[unit]
        return -mean if self.how == "signed" else mean**2 + images * error**2


@dataclass(frozen=True)
class Bench:
    network: Network
    groups: Groups
    fit: Batches
    holdout: Batches
    steps: int
    keep: float
    seed: int

    def run(self, criterion: str, compensation: str) -> dict[str, Any]:
        """Prune progressively to `keep` of the MACs and judge on the hold-out images."""
        start = time.monotonic()
        dense = restore(self.network)
        settings = {"none": recipe.NoCompensation(), "mean": recipe.MeanCompensation(), "batchnorm": recipe.BatchNormCompensation(),
                    "least_squares": recipe.LeastSquaresCompensation()}[compensation]  # fmt: skip
        keep = {group.name: tuple(range(group.units)) for group in self.groups.groups}
        pruned = dense
        for step in range(1, self.steps + 1):
            scores = _scorer(criterion, self.seed).score(pruned, self.groups.groups, self.fit)
            fraction = 1 - (1 - self.keep) * step / self.steps
            keep = choose_units(self.groups, scores, keep, "macs", fraction, 1)
            pruned = compensated(dense, self.groups.groups, keep, self.fit, settings)
        macs = self.groups.cost(keep)[1] / self.groups.cost({})[1]
        return {"criterion": criterion, "compensation": compensation, "macs": macs, **self._judge(dense, pruned),
                "seconds": time.monotonic() - start}  # fmt: skip

    @torch.no_grad()
    def _judge(self, dense: nn.Module, pruned: nn.Module) -> dict[str, Any]:
        truth, before, after, divergence = [], [], [], 0.0
        for images, labels in self.holdout:
            a, b = dense(images), pruned(images)
            log_a, log_b = (a / TEMPERATURE).log_softmax(1), (b / TEMPERATURE).log_softmax(1)
            divergence += float((log_a.exp() * (log_a - log_b)).sum()) * TEMPERATURE**2
            truth += labels.tolist()
            before += a.argmax(1).tolist()
            after += b.argmax(1).tolist()
        lost, won = discordant(truth, before, after)
        low, high = paired_drop(lost, won, len(truth))
        return {
            "images": len(truth),
            "dense_top1": sum(x == y for x, y in zip(before, truth, strict=True)) / len(truth),
            "top1": sum(x == y for x, y in zip(after, truth, strict=True)) / len(truth),
            "drop_pp": 100 * (lost - won) / len(truth),
            "drop_ci95_pp": [100 * low, 100 * high],
            "agreement": sum(x == y for x, y in zip(before, after, strict=True)) / len(truth),
            "kl": divergence / len(truth),
        }


def _scorer(name: str, seed: int) -> Scorer:
    kinds = {"taylor": recipe.TaylorCriterion(), "magnitude": recipe.MagnitudeCriterion(),
             "variance": recipe.VarianceCriterion(), "random": recipe.RandomCriterion()}  # fmt: skip
    if name in kinds:
        return scorer(kinds[name], seed)
    causal = CausalEffect(recipe.CausalCriterion())
    how = name.removeprefix("causal").strip()
    return Reranked(causal, how) if how else causal


def prepare(path: Path, overrides: Sequence[str], steps: int, keep: float, scratch: Path) -> Bench:
    settings = recipe.load(path, overrides)
    network = model.load(scratch, settings.model, seed=settings.seed)
    calibration = settings.calibration
    catalogue = data.catalogue(calibration.images, calibration.labels, network.outputs)
    split = data.divide(catalogue, calibration.scoring, calibration.holdout, settings.seed)
    fit, holdout = (
        Batches.read(ImageSet(part, calibration.images), network.input, "cpu") for part in (split.fit, split.holdout)
    )
    groups = prune.find_groups(scratch, network, settings.prune.skip)
    return Bench(network, groups, fit, holdout, steps, keep, settings.seed)


def main() -> None:
    here = Path(__file__).parent
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("recipe", type=Path, nargs="?", default=here.parent / "recipes" / "quickstart.yaml")
    cli.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    cli.add_argument("--keep", type=float, default=0.5, help="fraction of the MACs kept")
    cli.add_argument("--steps", type=int, default=4)
    cli.add_argument("--criteria", nargs="+", default=CRITERIA, choices=CRITERIA)
    cli.add_argument("--compensations", nargs="+", default=COMPENSATIONS, choices=COMPENSATIONS)
    cli.add_argument("--json", type=Path, default=here / "criteria.json")
    args = cli.parse_args()
    with TemporaryDirectory() as scratch:
        bench = prepare(args.recipe, args.overrides, args.steps, args.keep, Path(scratch))
        rows = []
        print(
            f"{'criterion':<16}{'compensation':<15}{'MACs':>6}{'top-1':>8}{'drop':>8}{'95 % interval':>18}{'KL':>8}{'s':>6}"
        )
        for criterion in args.criteria:
            for compensation in args.compensations:
                row = bench.run(criterion, compensation)
                rows.append(row)
                low, high = row["drop_ci95_pp"]
                print(
                    f"{criterion:<16}{compensation:<15}{row['macs']:6.3f}{100 * row['top1']:8.2f}{row['drop_pp']:+8.2f}"
                    f"{low:+9.2f} to{high:+6.2f}{row['kl']:8.3f}{row['seconds']:6.0f}",
                    flush=True,
                )
    conditions = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
                  "recipe": args.recipe.name, "keep": args.keep, "steps": args.steps}  # fmt: skip
    args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))
    print(
        f"dense top-1 {100 * rows[0]['dense_top1']:.2f} on {rows[0]['images']} hold-out images; written to {args.json.name}"
    )


if __name__ == "__main__":
    main()
