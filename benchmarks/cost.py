"""What pruning costs: seconds by stage, and peak memory, of `cswap-deploy prepare` in a process of its own.

    python benchmarks/cost.py --images IMAGES --case resnet56 --weights cifar10jpeg_resnet56.safetensors
    python benchmarks/cost.py --images IMAGES --case resnet50       # timm's, 224 pixels, random weights, to 60 % of the MACs
    python benchmarks/cost.py --images IMAGES --case growth         # CIFAR ResNets of more and more units; more and more images
    python benchmarks/cost.py --plot docs/cost.svg                  # draws what the results file holds of `growth`

IMAGES is a folder that holds `scoring/` and `holdout/` with class folders. Weights count for nothing but accuracy, so most cases have
random ones. Results go to cost.json beside this program; a case that is run again replaces its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
STAGES = ("groups", "scores", "curves", "plan", "pruned")
"""Those that depend on the network's size; the rest is export and judging."""
CIFAR = {"size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 1.0}


@dataclass(frozen=True)
class Case:
    """`axis`: the quantity that grows from case to case of one plot."""

    name: str
    model: dict[str, Any]
    macs: float
    steps: int
    scoring: int = 1024
    axis: str = ""

    def recipe(self, images: Path) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "calibration": {"images": str(images.resolve()), "scoring": self.scoring, "holdout": 256},
            "prune": {"target": {"macs": self.macs}, "steps": self.steps},
            "accuracy": {"max_drop": None},
        }


@dataclass(frozen=True)
class Result:
    case: str
    axis: str
    units: int
    images: int
    seconds: dict[str, float]
    total: float
    peak_mb: float
    conditions: dict[str, Any] = field(default_factory=dict)


def cases(name: str, weights: Path | None) -> list[Case]:
    def cifar(depth: int) -> dict[str, Any]:
        return {"factory": f"{HERE / 'cifar_resnet.py'}:CifarResNet", "kwargs": {"depth": depth}, "input": CIFAR}

    match name:
        case "resnet56":
            checkpoint = {"checkpoint": str(weights.resolve())} if weights else {}
            return [Case("resnet56", {**cifar(56), **checkpoint}, 0.5, 5)]
        case "resnet50":
            return [Case("resnet50", {"name": "resnet50", "num_classes": 10, "pretrained": False}, 0.6, 4)]
        case _:
            deeper = [Case(f"depth-{depth}", cifar(depth), 0.6, 4, 512, "units") for depth in (8, 14, 20, 32, 56)]
            more = [
                Case(f"images-{count}", cifar(20), 0.6, 4, count, "images") for count in (256, 512, 1024, 2048, 4000)
            ]
            return [*deeper, *more]


def run(case: Case, images: Path, threads: int) -> Result:
    """Errors: SystemExit where the command fails."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "recipe.yaml").write_text(json.dumps(case.recipe(images)))
        command = [sys.executable, "-m", "cswap_deploy", "prepare", "recipe.yaml", "--work", "work", "--quiet"]
        start = time.monotonic()
        child = subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(child.pid, 0)
        total = time.monotonic() - start
        if status:
            raise SystemExit(f"{case.name}: the command failed with status {os.waitstatus_to_exitcode(status)}")
        records = {
            path.parent.parent.name: json.loads(path.read_text()) for path in folder.glob("work/stages/*/*/stage.json")
        }
        units = sum(group["units"] for group in records["groups"]["value"]["groups"])
        seconds = {name: records[name]["seconds"] for name in STAGES if name in records}
        conditions = {
            "threads": threads,
            "load": os.getloadavg(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        return Result(case.name, case.axis, units, case.scoring, seconds, total, usage.ru_maxrss / 1024, conditions)


def show(results: Sequence[Result]) -> None:
    print(
        f"{'case':<14}{'units':>7}{'images':>8}"
        + "".join(f"{stage:>9}" for stage in STAGES)
        + f"{'whole':>9}{'peak MB':>9}"
    )
    for result in results:
        stages = "".join(f"{result.seconds.get(stage, 0):9.1f}" for stage in STAGES)
        print(f"{result.case:<14}{result.units:7d}{result.images:8d}{stages}{result.total:9.1f}{result.peak_mb:9.0f}")


# --- the plot


def plot(results: Sequence[Result]) -> str:
    """Two panels, both axes logarithmic: seconds by stage over units, and over scoring images."""
    parts = []
    for number, (axis, title) in enumerate(
        (("units", "units (512 scoring images)"), ("images", "scoring images (ResNet-20)"))
    ):
        own = sorted((result for result in results if result.axis == axis), key=lambda result: getattr(result, axis))
        parts.append(_panel(own, axis, title, 60 + 420 * number))
    style = "text{font:12px sans-serif;fill:#444}path{fill:none;stroke-width:2}line{stroke:#ccc}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 330" role="img" aria-label="Seconds by stage">'
        f'<rect width="840" height="330" fill="#fff"/><style>{style}</style>{"".join(parts)}</svg>\n'
    )


COLOURS = {"scores": "#4477aa", "curves": "#ee6677", "plan": "#228833", "pruned": "#aa3377"}


def _panel(results: Sequence[Result], axis: str, title: str, left: int) -> str:
    if len(results) < 2:
        return ""
    xs = [log10(getattr(result, axis)) for result in results]
    low, high = -0.5, 3.0

    def at(x: float, seconds: float) -> tuple[float, float]:
        y = min(high, max(low, log10(max(seconds, 1e-9))))
        return left + 340 * (x - xs[0]) / (xs[-1] - xs[0]), 270 - 240 * (y - low) / (high - low)

    marks = [f'<text x="{left + 100}" y="318">{title}</text>']
    for power in range(4):
        _, y = at(xs[0], 10**power)
        marks.append(f'<line x1="{left}" x2="{left + 340}" y1="{y:.0f}" y2="{y:.0f}"/>')
        marks.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{10**power} s</text>')
    for x, result in zip(xs, results, strict=True):
        marks.append(f'<text x="{at(x, 1)[0]:.0f}" y="290" text-anchor="middle">{getattr(result, axis)}</text>')
    for number, (stage, colour) in enumerate(COLOURS.items()):
        points = [at(x, result.seconds[stage]) for x, result in zip(xs, results, strict=True)]
        line = " L".join(f"{x:.0f} {y:.0f}" for x, y in points)
        marks.append(f'<path d="M{line}" stroke="{colour}"/>')
        marks.append(f'<text x="{left + 10}" y="{30 + 16 * number}" style="fill:{colour}">{stage}</text>')
    return "".join(marks)


# --- the results file


def stored(path: Path) -> dict[str, Result]:
    return {entry["case"]: Result(**entry) for entry in json.loads(path.read_text())} if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--images", type=Path, help="folder with scoring/ and holdout/")
    cli.add_argument("--case", choices=("resnet56", "resnet50", "growth"))
    cli.add_argument("--weights", type=Path, help="of the resnet56; without it random ones")
    cli.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    cli.add_argument("--results", type=Path, default=HERE / "cost.json")
    cli.add_argument("--plot", type=Path, help="write the plot of `growth`")
    args = cli.parse_args(arguments)
    if args.case and not args.images:
        cli.error("--case needs --images")
    found = stored(args.results)
    for case in cases(args.case, args.weights) if args.case else ():
        found[case.name] = run(case, args.images, args.threads)
        args.results.write_text(json.dumps([vars(result) for result in found.values()], indent=1))
    show(list(found.values()))
    if args.plot:
        args.plot.write_text(plot(list(found.values())))


if __name__ == "__main__":
    main()
