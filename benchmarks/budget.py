"""A latency budget on ONNX Runtime's CPU: is it met, how closely, how good is the prediction, what does it cost in accuracy and time?

    python benchmarks/budget.py --out budget.json                                          # two timm networks, latency only
    python benchmarks/budget.py --out budget.json --images DIR --weights DIR               # and a ResNet-56, accuracy too

Per network five budgets, from the narrowest to 0.9 of the dense latency; staircase and scores are shared by them. Each result is measured
again at the end by an independent interleaved run of the exported pruned and dense files. Drops are compared at the latencies of one
interleaved run of all files, those of other allocations among them. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture

from cswap_deploy import (
    accuracy,
    budget,
    data,
    export,
    latency,
    model,
    pipeline,
    planning,
    prepared,
    progress,
    prune,
    surveying,
)
from cswap_deploy.artifacts import Curve, File, Groups, ImageSet, OnnxModel, PruningPlan, Reference, Split
from cswap_deploy.budget import design
from cswap_deploy.budget.loop import Loop
from cswap_deploy.budget.narrow import Template
from cswap_deploy.budget.staircase import Steps, off_by
from cswap_deploy.budget.values import Budget, Staircase
from cswap_deploy.device import target as device
from cswap_deploy.metering import Meter
from cswap_deploy.prune.allocate import damage_at, least_damage
from cswap_deploy.prune.batches import Batches, resolve_device
from cswap_deploy.prune.cut import restore
from cswap_deploy.prune.search import Bench, Search
from cswap_deploy.prune.select import Kept, narrowest
from cswap_deploy.recipe import (
    CalibrationSettings,
    CurvesAllocation,
    LatencySettings,
    ModelSettings,
    NoCompensation,
    OnnxSettings,
    Recipe,
)
from cswap_deploy.recipe import load as load_recipe
from cswap_deploy.samples import Ratio
from cswap_deploy.stage import Workdir

HERE = Path(__file__).parent
TIMM = ("mobilenetv2_100", "resnet18")
PARTS = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Budgets: so far from the lowest to the highest, those of `--lowest` and `--highest`; the lowest not below `ROOM` times the floor."""
ROOM = 1.08
"""Times the floor that the lowest budget is at least."""
MACS = (0.6, 0.35, 0.2, 0.17)
UNIFORM = (0.75, 0.55, 0.35, 0.2, 0.1)
"""Part of the MACs, or of every group's units, that is kept otherwise: the last are about the narrowest. One path passes all MACs.

Drops between them are taken from straight lines, so they must not lie far from each other where drops bend."""
MULTIPLES = (8, 4)
"""Of units, where the multiple that pays leaves no network as narrow."""
STEP = 0.15
"""Of the dense MACs that leave in one step of that path, at most: as in the builds beside it, five to half of the latency."""
UNSEEN, UNSEEN_S = 16, 2.0
"""Random settings that the prediction is judged on, and how long each is sampled."""
LIMIT, LEAST = 1.02, 0.93
"""Of what was asked for, that the last measurement may be."""


@dataclass(frozen=True)
class Row:
    """One network and budget; `ratio` is that of the independent run in the end, `asked` the budget as a part of the dense latency."""

    network: str
    asked: float
    ratio: float
    low: float
    high: float
    trials: int
    seconds: float
    drop_pp: float | None = None
    beside: float | None = None
    """The ratio in the one run of all files that drops are compared in."""
    agreement: float | None = None
    """Part of the hold-out images to which it gives the class that the dense network gives."""

    @property
    def within(self) -> bool:
        return self.ratio <= LIMIT * self.asked

    @property
    def used(self) -> bool:
        return self.ratio >= LEAST * self.asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--work", type=Path, help="work folders, kept between runs; default: a temporary one")
    parser.add_argument(
        "--nets", default=",".join(TIMM), help="timm networks with random weights, or quickstart; latency only"
    )
    parser.add_argument("--images", type=Path, help="folder that holds cifar10-jpeg")
    parser.add_argument("--weights", type=Path, help="folder that holds cifar10jpeg_resnet56.safetensors")
    parser.add_argument("--lowest", type=float, default=0.4)
    parser.add_argument("--highest", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=3.0, help="sampling of each model per candidate")
    parser.add_argument("--seed", type=int, default=17, help="of the settings that the prediction is judged on")
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a busy machine: count CPU time, which is no latency"
    )
    parser.add_argument("--steps", type=int, default=5, help="of the ResNet-56")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", help="further settings of the ResNet-56"
    )
    options, begun = parser.parse_args(), time.monotonic()
    with progress.reporting(Log()), workplace(options.work) as folder:
        if options.cpu_time:
            count_cpu_time(folder)
        report: dict[str, Any] = {
            "load": [os.getloadavg()[0]],
            "rows": [],
            "predictions": {},
            "twins": {},
            "seed": options.seed,
        }
        report["clock"] = "CPU time" if options.cpu_time else "wall"
        for name in filter(None, options.nets.split(",")):
            of_timm(name, folder / name, options, report)
            written(report, begun, options.out)
        if options.images and options.weights:
            of_resnet56(folder / "resnet56", options, report, begun)
        report["load"].append(os.getloadavg()[0])
    written(report, begun, options.out)
    print(*table(report), sep="\n")


def written(report: dict[str, Any], begun: float, out: Path) -> None:
    """After each network, so that what is known stays where a run is stopped."""
    report["seconds"] = time.monotonic() - begun
    out.write_text(json.dumps(report, indent=1))


class Log(progress.Silent):
    """What a run notes, on standard error."""

    def note(self, message: str) -> None:
        print(f"  {message}", file=sys.stderr, flush=True)

    warn = note


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def count_cpu_time(folder: Path) -> None:
    """An agent that times each inference by what its thread has spent on a processor: one that waits for a processor does not count.

    Right for one thread only. Ratios then say what a machine would show that has nothing else to do.
    """
    text, clock = device.AGENT.read_text(), "clock, run, on_gpu = time.perf_counter_ns,"
    assert text.count(clock) == 1, "the agent's clock is not where it was"
    (folder / "agent.py").write_text(text.replace(clock, "clock, run, on_gpu = time.thread_time_ns,"))
    device.AGENT = folder / "agent.py"


# --- latency alone


def of_timm(name: str, folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """A network with random weights. Its damage is made up: what leaves costs in proportion to its MACs, and ever more."""
    begun = time.monotonic()
    images = noise(folder / "images")
    settings = ModelSettings(name=name, pretrained=False)
    if name == "quickstart":
        settings = load_recipe(HERE.parent / "recipes" / "quickstart.yaml").model
    recipe = Recipe(
        name=name.replace("_", "-"),
        model=settings,
        calibration=CalibrationSettings(images=images),
        prune={"target": {"latency_ms": 1e-3}},
        latency=LatencySettings(duration_s=options.seconds),
    )
    with Workdir(folder / "work").open() as work:
        source = work.run(model.load, settings, (), 0)
        groups = work.run(prune.find_groups, source, (), "whole", True)
        few = ImageSet(data.catalogue(images, None, 2).scoring, images)
        labels = tuple(f"class {number}" for number in range(source.outputs))

        def written(network: Any) -> OnnxModel:
            exported = work.run(export.to_onnx, network, labels, few, OnnxSettings())
            return work.run(export.simplify, exported, network, few, OnnxSettings())

        def cut(widths: Mapping[str, int]) -> File:
            plan = PruningPlan({key: tuple(range(width)) for key, width in widths.items()}, (), None)
            return written(work.run(prune.apply, source, groups, plan, few, NoCompensation(), "cpu")).graph

        dense = written(source)
        sizes = work.run(export.sizes_of, source, groups, dense, OnnxSettings(), False)
        with planning.reached(recipe, work) as (target, probe):
            meter = Meter(recipe, work, dense.graph, probe.facts("onnxruntime"), target, groups, sizes)
            first, staircase = surveying.probed(meter, surveying.asked(meter)), surveying.learned(meter)
            report["twins"][name] = twin(meter)
            report["predictions"][name] = predictions(meter, staircase, Random(options.seed))
            prepared = time.monotonic() - begun
            for asked in budgets(first, options):
                begun = time.monotonic()
                widths, trials = searched(groups, staircase, asked, meter.ratio)
                seconds = time.monotonic() - begun
                timing = LatencySettings(duration_s=2 * options.seconds)
                taken = latency.take(target, (dense.graph, cut(widths)), timing, thorough=False)
                found = taken.samples.ratio(1, 0, 50)
                row = Row(name, asked, found.value, found.low, found.high, trials, seconds + prepared)
                prepared = 0.0  # shared by all budgets, counted once
                add(row, report)


def searched(
    groups: Groups, staircase: Staircase, asked: float, measure: Callable[[dict[str, int], bool], Ratio]
) -> tuple[dict[str, int], int]:
    """The closed loop over a made-up damage."""
    steps, whole = Steps(groups, staircase), {group.name: group.units for group in groups.groups}
    allowed = {name: steps.allowed(name) for name in whole}
    curves = [proportional(groups, name, allowed[name]) for name in whole]

    def choose(target: float) -> dict[str, int]:
        return least_damage(steps, curves, whole, allowed, target)

    loop = Loop(asked, 0.05, 8, choose, steps.total, measure)
    trials = loop.run()
    return loop.best(trials, lambda widths: damage_at(curves, widths)).widths, len(trials)


def proportional(groups: Groups, name: str, allowed: tuple[int, ...]) -> Curve:
    units = groups.by_name[name].units
    macs = groups.cost({})[1] - groups.cost({name: (0,)})[1]
    widths = tuple(width for width in reversed(allowed) if width < units)
    # without units some seven times that of a quarter
    damage = tuple(macs * (units - width) / (width + units / 16) for width in widths)
    return Curve(name, tuple(range(units)), widths, damage)


def noise(folder: Path) -> Path:
    """Two classes of eight pictures: what an export is compared with PyTorch on."""
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            Picture.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


# --- what both have in common


def budgets(first: Budget, options: argparse.Namespace) -> list[float]:
    """As parts of the dense latency, the tightest first."""
    lowest = max(options.lowest, ROOM * first.floor)
    return [lowest + part * (options.highest - lowest) for part in PARTS]


def predictions(meter: Meter, staircase: Staircase, random: Random) -> list[tuple[float, float]]:
    """(predicted, measured) of random widths that the staircase has not seen; each group has any width that it may have."""
    steps, settings = Steps(meter.groups, staircase), list[dict[str, int]]()
    for number in range(UNSEEN):
        part = (number + random.random()) / UNSEEN
        settings.append({})
        for group in meter.groups.groups:
            wanted = group.units * min(1.0, max(0.0, part + random.uniform(-0.4, 0.4)))
            allowed = steps.allowed(group.name)
            settings[-1][group.name] = min(random.sample(allowed, min(3, len(allowed))), key=lambda w: abs(w - wanted))
    found = []
    for part_of in design.requests_together(settings, meter.batch):
        ratios = budget.ratios(meter.timings("unseen", part_of, UNSEEN_S), meter.percentile)
        found += [(steps.total(widths), ratio.value) for widths, ratio in zip(part_of, ratios, strict=True)]
    return found


def twin(meter: Meter) -> tuple[float, float, float]:
    """The dense file with shared weights, as a part of the one that holds its own."""
    with tempfile.TemporaryDirectory() as folder:
        template, path = Template.read(meter.dense.path, meter.groups, meter.sizes), Path(folder) / "twin.onnx"
        shared = template.shared(Path(folder))
        path.write_bytes(template.narrowed({}, shared))
        meter.target.put(shared.file)
        found = latency.take(meter.target, (meter.dense, File.of(path)), meter.timing, thorough=False)
    ratio = found.samples.ratio(1, 0, 50)
    return ratio.value, ratio.low, ratio.high


def add(row: Row, report: dict[str, Any]) -> None:
    report["rows"].append(asdict(row) | {"within": row.within, "used": row.used})
    print(f"{row.network} asked {row.asked:.3f} got {row.ratio:.3f}", file=sys.stderr, flush=True)


# --- accuracy as well


def of_resnet56(folder: Path, options: argparse.Namespace, report: dict[str, Any], start: float) -> None:
    """Whole builds, and beside each the widths of a MACs target and uniform ones, at the latency that the build has reached."""
    overrides = [
        f"calibration.images={options.images.resolve() / 'cifar10-jpeg'}",
        f"model.checkpoint={options.weights.resolve() / 'cifar10jpeg_resnet56.safetensors'}",
        f"latency={{duration_s: {options.seconds}}}",
        f"prune.steps={options.steps}",
        "accuracy.max_drop=null",
        *options.overrides,
    ]

    def recipe(target: str) -> Recipe:
        file = HERE.parent / "recipes" / "cifar10-resnet56.yaml"
        return load_recipe(file, [*overrides, f"prune.target={target}"])

    with Workdir(folder).open() as work:
        begun = time.monotonic()
        floor = pipeline.build(recipe("{latency_ms: 1.0e-6}"), work, "floor").manifest["budget"]
        report["infeasible_s"] = time.monotonic() - begun
        first = Budget(1, 50, floor["dense_ms"], (0, 0), floor["floor_ms"] / floor["dense_ms"], "met", (), None, {})
        files, pruned, multiple = list[File](), None, MULTIPLES[0]
        for asked in budgets(first, options):
            begun = time.monotonic()
            bundle = pipeline.build(recipe(f"{{latency_ms: {asked * first.dense_ms}}}"), work, f"asked-{asked:.3f}")
            seconds = time.monotonic() - begun
            files.append(bundle.file("model.onnx"))
            _, ready = prepared.find(work)
            if pruned is None and ready.plan.dense_scores:
                pruned = ready
            found = ratios_of(work, recipe("null"), files[-1:], options.seconds)[0]
            block, judged = bundle.manifest["budget"], bundle.manifest["accuracy"]
            asked = block["ratio_asked"]  # of the dense latency of that build: measured longer if it is near
            row = Row("resnet56", asked, found.value, found.low, found.high, block["trials"], seconds)
            add(replace(row, drop_pp=judged["drop_pp"], agreement=judged["agreement"]), report)
            if errors := block["staircase"]:  # none where nothing that may be chosen is as fast
                report["crossvalidated"] = {key: errors[key] for key in ("error_median", "error_p95")}
                multiple = errors["multiple"]
            written(report, start, options.out)
        if pruned is None:  # no budget was left to prune for
            return
        otherwise = others(recipe("null"), pruned, multiple, folder.parent / "otherwise")
        flat = [made.file for found in otherwise.values() for made in found]
        ratios = [found.value for found in ratios_of(work, recipe("null"), [*files, *flat], options.seconds)]
        rest = iter(ratios)
        for row in report["rows"][-len(files) :]:
            row["beside"] = next(rest)
        report["others"] = {
            kind: [(1.0, 0.0, 1.0), *((next(rest), made.drop_pp, made.agreement) for made in found)]
            for kind, found in otherwise.items()
        }


@dataclass(frozen=True)
class Otherwise:
    """A network beside the builds, and how it does on the hold-out images."""

    file: File
    drop_pp: float
    agreement: float


def others(recipe: Recipe, ready: prepared.Prepared, multiple: int, folder: Path) -> dict[str, list[Otherwise]]:
    """Networks of MACs targets and of uniform ratios: same scores, same order of units, same compensation.

    In the multiple of units that pays here, as the builds have found it, where that leaves networks narrow enough.
    Two processes of one thread, each task with a work folder of its own: a fit is only half as fast again with two threads.
    """
    multiples = (*(number for number in (multiple,) if number > MULTIPLES[0]), *MULTIPLES)
    with Workdir(folder / "split").open() as work:
        calibration = recipe.calibration
        catalogue = data.catalogue(calibration.images, None, ready.source.outputs, work.digest)
        split = work.run(data.split, catalogue, calibration.scoring, calibration.holdout, recipe.seed)
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        path = pool.submit(along_path, recipe, ready, split, multiples, folder / "path")

        def fitted(kind: str, kept: Sequence[Kept]) -> list[Future[Otherwise]]:
            return [
                pool.submit(kept_otherwise, recipe, ready, split, keep, folder / f"{kind}-{number}")
                for number, keep in enumerate(kept, 1)
            ]

        uniform = fitted("uniform", list(uniformly(ready, multiples)))
        try:
            found = {"macs": fitted("macs", path.result()), "uniform": uniform}
            return {kind: [made.result() for made in tasks] for kind, tasks in found.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def kept_otherwise(asked: Recipe, ready: prepared.Prepared, split: Split, keep: Kept, folder: Path) -> Otherwise:
    """Cut, compensated and exported as a build does it."""
    root = asked.calibration.images
    fit, holdout = ImageSet(split.fit, root), ImageSet(split.holdout, root)
    with Workdir(folder).open() as work:
        plan = PruningPlan(keep, (), None)
        pruned = work.run(prune.apply, ready.source, ready.groups, plan, fit, asked.prune.compensate, asked.device)
        exported = work.run(export.to_onnx, pruned, split.labels, fit, asked.onnx)
        shipped = work.run(export.simplify, exported, pruned, fit, asked.onnx)
        dense = Reference(ready.accuracy.labels, ready.accuracy.source)
        judged = work.run(accuracy.compare, ready.source, dense, pruned, {}, holdout, asked.device)
    wanted, given, truth = (
        np.array(each) for each in (judged.source.predicted, judged.pruned.predicted, judged.labels)
    )
    drop = 100 * ((wanted == truth).mean() - (given == truth).mean())
    print(f"{folder.name}: drop {drop:+.2f}", file=sys.stderr, flush=True)
    return Otherwise(shipped.graph, float(drop), float((given == wanted).mean()))


def uniformly(ready: prepared.Prepared, multiples: Sequence[int]) -> Iterator[Kept]:
    least = min(group.units for group in ready.groups.groups)
    for part in UNIFORM:
        keep, multiple = {}, coarsest(multiples, lambda number, part=part: 2 * part * least >= number)
        for group in ready.groups.groups:
            width = min(group.units, max(multiple, round(part * group.units / multiple) * multiple))
            keep[group.name] = tuple(sorted(ready.plan.dense_order[group.name][group.units - width :]))
        yield keep


def coarsest(multiples: Sequence[int], allows: Callable[[int], bool]) -> int:
    return next(filter(allows, multiples), multiples[-1])


def along_path(
    asked: Recipe, ready: prepared.Prepared, split: Split, multiples: Sequence[int], folder: Path
) -> list[Kept]:
    """As the tool prunes for MACs: without emptying branches."""
    settings, scores, where = asked.prune, ready.plan.dense_scores, resolve_device(asked.device)
    groups, multiple = ready.groups.without_branches, MULTIPLES[0]
    assert scores and isinstance(settings.allocation, CurvesAllocation)
    criterion, compensate, allocation = settings.criterion, settings.compensate, settings.allocation
    fit, selection = (ImageSet(part, asked.calibration.images) for part in (split.fit, split.selection))
    with Workdir(folder).open() as work:
        curves = work.run(
            prune.measure_curves, ready.source, groups, scores, fit, criterion, compensate, allocation, multiple, where
        )
    read = partial(Batches.read, spec=ready.source.input, device=where)
    targets = [
        (part, coarsest(multiples, lambda number, part=part: narrowest(groups, "macs", number) < part)) for part in MACS
    ]
    bench = Bench(restore(ready.source).to(where), groups, read(fit), criterion, compensate, allocation, multiple)
    return list(MacsPath(bench, read(selection), scores.groups, curves.groups, asked.seed).through(targets))


class MacsPath(Search):
    """The pipeline's search for a target in MACs, stopped at several."""

    def through(self, targets: Sequence[tuple[float, int]]) -> Iterator[Kept]:
        """What is kept at each (part of the MACs, multiple of units), the least cut first."""
        priced, dense = self.bench.priced, self.bench.groups.cost({})[1]
        share = dense / priced.cost({})[1]  # as in `towards`
        state, judge, level = self.start(), self._judge(), 1.0
        for part, multiple in targets:
            search = replace(self, bench=replace(self.bench, round_to=multiple))
            steps = ceil((level - part) / STEP - 1e-9)
            for number in range(1, steps + 1):
                state = search._step(state, "macs", (level - (level - part) * number / steps) * share, judge)
            level = part
            yield state.keep


def ratios_of(work: Workdir, recipe: Recipe, shipped: Sequence[File], seconds: float) -> list[Ratio]:
    """To the dense file: all as they ship, loaded anew and run in turn; nothing of it is stored or replayed."""
    _, ready = prepared.find(work)
    with planning.reached(recipe, work) as (target, _):
        timing = LatencySettings(duration_s=2 * seconds)
        files = ready.dense["fp32"].graph, *shipped
        samples = latency.take(target, files, timing, thorough=False).samples
        return [samples.ratio(number, 0, 50) for number in range(1, len(files))]


def at(points: Sequence[tuple[float, ...]], ratio: float, figure: int = 1) -> float:
    """The drop (or agreement: 2) at this latency, in proportion between the nearest two; beyond the fastest, that of the fastest."""
    known = sorted(points)
    return float(np.interp(ratio, [point[0] for point in known], [point[figure] for point in known]))


# --- telling


def table(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['clock']}; load average {report['load'][0]:.1f} at the beginning, {report['load'][1]:.1f} at the end\n"
    yield "| network | asked | got, 95 % | within 1.02 | above 0.93 | trials | seconds | drop | at a MACs target's | at uniform ratios' |"
    yield "|---|--:|--:|---|---|--:|--:|--:|--:|--:|"
    for row in report["rows"]:
        drops = ["", "", ""]
        if row["drop_pp"] is not None and "others" in report:
            drops = [
                f"{row['drop_pp']:+.2f} at {row['beside']:.3f}",
                *(f"{at(points, row['beside']):+.2f}" for points in report["others"].values()),
            ]
        yield (
            f"| {row['network']} | {row['asked']:.3f} | {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) "
            f"| {'yes' if row['within'] else '**no**'} | {'yes' if row['used'] else '**no**'} "
            f"| {row['trials']} | {row['seconds']:.0f} | {' | '.join(drops)} |"
        )
    rows = report["rows"]
    yield f"\nwithin: {sum(r['within'] for r in rows)} of {len(rows)}; above: {sum(r['used'] for r in rows)} of {len(rows)}"
    yield f"the whole took {report['seconds'] / 60:.0f} min"
    if "others" in report:
        yield "agreement with the dense network at the latencies of the drops:"
        for row in rows:
            if row["drop_pp"] is not None:
                rest = (f"{kind} {at(points, row['beside'], 2):.2%}" for kind, points in report["others"].items())
                yield f"  {row['beside']:.3f}: {row['agreement']:.2%}, {', '.join(rest)}"
    for name, pairs in report["predictions"].items():
        typical, worst = off_by([predicted / measured - 1 for predicted, measured in pairs])
        settings = f"{len(pairs)} settings (seed {report['seed']})"
        yield f"{name}: predictions of {settings} are off by {typical:.1%} (median), {worst:.1%} (95th percentile)"
    for name, (value, low, high) in report["twins"].items():
        yield f"{name}: with shared weights {value:.3f} ({low:.3f} to {high:.3f}) of the dense latency"
    if "infeasible_s" in report:
        yield f"resnet56: cross-validated {report.get('crossvalidated')}; infeasible after {report['infeasible_s']:.0f} s, bundle included"


if __name__ == "__main__":
    main()
