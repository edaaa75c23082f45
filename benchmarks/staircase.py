"""How few networks may a staircase be learned from? Matters where each is an engine that takes a minute to build.

    python benchmarks/staircase.py --out staircase.json --cpu-time

Settings are measured with ONNX Runtime on one thread, those that several designs have once; designs are judged on random widths that
none has seen, of those that all of them may choose. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from budget import Log, count_cpu_time, noise, workplace

from cswap_deploy import budget, data, export, model, planning, progress, prune, surveying
from cswap_deploy.artifacts import ImageSet
from cswap_deploy.budget import design
from cswap_deploy.budget.staircase import Steps, off_by
from cswap_deploy.budget.values import WidthTimings
from cswap_deploy.metering import Meter
from cswap_deploy.recipe import CalibrationSettings, LatencySettings, ModelSettings, OnnxSettings, Recipe
from cswap_deploy.stage import Workdir

DESIGNS = "1:40,1:24,3:40,0:24,0:16,0:12"
TESTS, TESTS_S = 24, 2.0
"""Settings that predictions are judged on, and how long each is sampled: more than what is learned from."""
FLOOR = 0.2
"""Of the dense latency: below that nothing is asked for, as a rule, and errors are told apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--work", type=Path, help="work folders, kept between runs; default: a temporary one")
    parser.add_argument("--nets", default="resnet18,mobilenetv2_100", help="timm networks, with random weights")
    parser.add_argument(
        "--designs",
        default=DESIGNS,
        help="widths of each kind of group that are measured alone : settings of all groups",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a busy machine: count CPU time, which is no latency"
    )
    options = parser.parse_args()
    report: dict[str, Any] = {"load": [os.getloadavg()[0]], "clock": "CPU time" if options.cpu_time else "wall"}
    designs = [
        (int(alone), int(count)) for alone, _, count in (part.partition(":") for part in options.designs.split(","))
    ]
    with progress.reporting(Log()), workplace(options.work) as folder:
        if options.cpu_time:
            count_cpu_time(folder)
        report["nets"] = {name: judged(name, folder / name, designs) for name in options.nets.split(",")}
    report["load"].append(os.getloadavg()[0])
    options.out.write_text(json.dumps(report, indent=1))
    print(*table(report), sep="\n")


def judged(name: str, folder: Path, designs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Each design's size and its relative errors, with the ratio that each belongs to."""
    images = noise(folder / "images")
    recipe = Recipe(
        name=name.replace("_", "-"),
        model=ModelSettings(name=name, pretrained=False),
        calibration=CalibrationSettings(images=images),
        prune={"target": {"latency_ms": 1e-3}},
        latency=LatencySettings(duration_s=1.0),
    )
    with Workdir(folder / "work").open() as work:
        source = work.run(model.load, recipe.model, (), 0)
        groups = work.run(prune.find_groups, source, (), "whole", True)
        few = ImageSet(data.catalogue(images, None, 2).scoring, images)
        labels = tuple(f"class {number}" for number in range(source.outputs))
        exported = work.run(export.to_onnx, source, labels, few, OnnxSettings())
        dense = work.run(export.simplify, exported, source, few, OnnxSettings())
        sizes = work.run(export.sizes_of, source, groups, dense, OnnxSettings(), False)
        with planning.reached(recipe, work) as (target, probe):
            meter = Meter(recipe, work, dense.graph, probe.facts("onnxruntime"), target, groups, sizes)
            floor = meter.timings("floor", design.extremes(groups, meter.design, None), surveying.WIDTHS_S)
            multiple, found = surveying.alignment(meter)
            first = (floor, *found)
            kinds = design.kinds_of(groups)
            pools, together, options = {}, {}, {}
            for alone, count in sorted(set(designs)):
                wanted = replace(meter.design, alone=alone)
                if alone not in pools:
                    narrow = wanted.widths_alone(groups, kinds, multiple, exact=False)
                    pools[alone] = measured(meter, design.requests_alone(design.alone(kinds, narrow), meter.batch))
                seen = [item for timings in (*first, *pools[alone]) for item in budget.observed(timings, 50)]
                own = budget.widths(groups, seen, multiple) if alone else design.options(groups, kinds, multiple)
                options[alone] = design.emptied(groups, own)
                settings = design.together(groups, kinds, options[alone], count, count // 8 - 1)
                together[alone, count] = measured(meter, design.requests_together(settings, meter.batch))
            shared = {kind: min((found[kind] for found in options.values()), key=len) for kind in kinds}
            random, tests, allowed = Random(17), [], design.allowed(groups, kinds, shared)
            for number in range(TESTS):
                part = (number + random.random()) / TESTS
                tests.append({})
                for group in groups.groups:
                    wanted = group.units * min(1.0, max(0.0, part + random.uniform(-0.4, 0.4)))
                    tests[-1][group.name] = min(allowed[group.name], key=lambda width: abs(width - wanted))
            requests = design.requests_together(tests, meter.batch)
            truth = [item for timings in measured(meter, requests, TESTS_S) for item in budget.observed(timings, 50)]
        rows = []
        for alone, count in designs:
            known = (*first, *pools[alone], *together[alone, count])
            learned = work.run(budget.learn, groups, known, multiple, options[alone])
            steps = Steps(groups, learned)
            errors = [(item.ratio.value, steps.total(item.widths) / item.ratio.value - 1) for item in truth]
            rows.append({"alone": alone, "together": count, "networks": learned.settings, "errors": errors})
        return rows


def measured(
    meter: Meter, requests: Sequence[Sequence[dict[str, int]]], seconds: float = surveying.WIDTHS_S
) -> list[WidthTimings]:
    return [meter.timings("pool", request, seconds) for request in requests]


def table(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['clock']}; load average {report['load'][0]:.1f} at the beginning, {report['load'][1]:.1f} at the end\n"
    yield f"| network | alone | all | networks | median error | 95th percentile | the same above {FLOOR} of the dense latency |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name, rows in report["nets"].items():
        for row in rows:
            every = [error for _, error in row["errors"]]
            wide = [error for ratio, error in row["errors"] if ratio >= FLOOR]
            shown = ["{:.1%} | {:.1%}".format(*off_by(part)) for part in (every, wide)]
            yield f"| {name} | {row['alone']} | {row['together']} | {row['networks']} | {shown[0]} | {shown[1].replace(' |', ',')} |"


if __name__ == "__main__":
    main()
