"""Facts of the manifest that charts are drawn from: layers, steps, spread of effects and of latencies. All are additions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from cswap_deploy.artifacts import File, Groups, LatencyReport, PruningPlan
from cswap_deploy.device.layers import reformats
from cswap_deploy.samples import Samples

QUANTILES = (10, 25, 50, 75, 90)
"""Percent; of the effects of a group's units."""
BINS = 160
"""Of a latency histogram, each wider than the last by the same factor."""
TAIL = 1.5
"""A histogram ends at the higher p99, but at most at this many times the higher p50: a tail would squeeze the rest."""
ROOM = 0.97
"""Of the range that is left free at either end, on a logarithmic axis."""
POINTS = 60
"""Of the course of a measurement."""


def layers(groups: Groups, plan: PruningPlan) -> list[dict[str, Any]]:
    """Parameters and MACs of each layer that computes, before and after, in the network's order; empty without pruning."""
    removed = {name: groups.by_name[name].units - len(units) for name, units in plan.keep.items()}
    rows = []
    for name, terms in groupby(groups.terms, key=lambda term: term.name.rpartition(".")[0]):
        own = [(term, term.fraction(removed)) for term in terms]
        row = {
            "name": name,
            "params": sum(term.params for term, _ in own),
            "params_kept": round(sum(term.params * kept for term, kept in own)),
            "macs": sum(term.macs for term, _ in own),
            "macs_kept": round(sum(term.macs * kept for term, kept in own)),
        }
        rows += [row] if row["macs"] else []
    return rows


def trace(plan: PruningPlan) -> list[dict[str, Any]]:
    """After each step: fractions kept, units that left in it, drop on the selection images."""
    return [
        {
            "params": step.params,
            "macs": step.macs,
            "units_removed": sum(map(len, step.removed.values())),
            "drop_pp": step.drop_pp,
        }
        for step in plan.steps
    ]


def layer_times(file: File | None) -> dict[str, Any] | None:
    """Milliseconds of each layer of the dense and the shipped model, in the order in which they run."""
    if file is None:
        return None
    found = json.loads(file.path.read_text(encoding="utf-8"))
    return {model: [{**layer, "ms": _short(layer["ms"])} for layer in rows] for model, rows in found.items()}


def engine_times(report: LatencyReport) -> dict[str, Any]:
    """Additions for engines: times on the GPU alone, single calls, graphs, and layers that only reformat; empty without."""
    found: dict[str, Any] = {}
    names = ("source", "pruned")
    if report.cold_ms:
        found["cold_p50_ms"] = dict(zip(names, report.cold_ms, strict=True))
    if report.energy_mj:
        found["energy_mj"] = dict(zip(names, report.energy_mj, strict=True))
    if report.models:
        found["models"] = dict(zip(names, report.models, strict=True))
    if report.gpu_samples:
        samples = Samples.load(report.gpu_samples.path)
        found["gpu"] = {
            name: {f"p{p}_ms": samples.percentile_ms(model, p) for p in (50, 90, 99)}
            for model, name in enumerate(names)
        }
        if report.layers:
            rows = json.loads(report.layers.path.read_text(encoding="utf-8"))
            found["reformats"] = {name: reformats(rows[name]) for name in names}
    return found


def quantiles(effects: tuple[float, ...]) -> list[float] | None:
    """At QUANTILES; None where there is no unit."""
    return [_short(value) for value in np.percentile(effects, QUANTILES)] if effects else None


def distribution(samples: Samples) -> dict[str, Any]:
    """Histograms of the dense and the shipped model over the same bins, and how many samples lie above the last."""
    ns = [np.concatenate([blocks[model] for blocks in samples.rounds]) for model in (0, 1)]
    low = ROOM * min(int(each.min()) for each in ns)
    high = min(
        max(samples.percentile_ms(model, 99) for model in (0, 1)),
        TAIL * max(samples.percentile_ms(model, 50) for model in (0, 1)),
    )
    edges = np.geomspace(low, high * 1e6 / ROOM, BINS + 1)
    counts = [np.histogram(each, edges)[0] for each in ns]
    return {
        "from_ms": _short(low / 1e6),
        "to_ms": _short(float(edges[-1]) / 1e6),
        "source": counts[0].tolist(),
        "pruned": counts[1].tolist(),
        "above": [int(len(each) - count.sum()) for each, count in zip(ns, counts, strict=True)],
        "max_ms": [_short(int(each.max()) / 1e6) for each in ns],
    }


def course(samples: Samples) -> dict[str, list[float]]:
    """Median milliseconds of neighbouring rounds, in the order in which they ran, at most POINTS for each model."""
    names = ("source", "pruned")
    parts = np.array_split(np.arange(len(samples.rounds)), min(POINTS, len(samples.rounds)))
    return {name: [*_medians(samples, model, parts)] for model, name in enumerate(names)}


def _medians(samples: Samples, model: int, parts: list[Any]) -> Iterator[float]:
    for part in parts:
        yield _short(float(np.median(np.concatenate([samples.rounds[number][model] for number in part]))) / 1e6)


def _short(value: float) -> float:
    """To five significant digits, which no chart can show."""
    return float(f"{value:.5g}")
