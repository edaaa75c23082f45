"""`cswap-deploy sweep`: one bundle for each of several latencies, from one staircase and one scoring, and the front that they make."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cswap_deploy import pipeline, progress
from cswap_deploy.bundle import Bundle
from cswap_deploy.digests import write_atomically
from cswap_deploy.errors import UsageError
from cswap_deploy.recipe import Recipe
from cswap_deploy.report import render_sweep
from cswap_deploy.stage import Workdir

HOW = ("runtime", "runtime_version", "precision", "batch", "threads")
"""What was measured, beside the percentile."""
COLUMNS = (
    "latency_ms", "verdict", "achieved_ms", "ratio", "ratio_low", "ratio_high", "trials", "top1", "drop_pp", "drop_low_pp",
    "drop_high_pp", "macs", "params", "bytes", "gate", "on_front", "exit_code", "bundle", "percentile", *HOW,
)  # fmt: skip
Place = tuple[float, float]
"""Part of the dense latency, and top-1."""
NAME = "sweep"
"""Of the files in the work folder: .csv, .json, .html."""


def latencies_of(text: str) -> list[float]:
    """`3,4,5` as numbers, each once, the longest first. Errors: UsageError."""
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()}, reverse=True)
    except ValueError:
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        raise UsageError(
            f"--latency: {text!r} is no list of milliseconds above 0", "give some, such as --latency 3,4,5"
        )
    return found


def overrides_of(recipe: Recipe, latency_ms: float) -> list[str]:
    """What `--set` would be given for this latency: other settings of the recipe's own target stay."""
    target = recipe.prune.target
    kept = {key: getattr(target, key) for key in ("percentile", "trials", "tolerance") if hasattr(target, key)}
    return [f"prune.target={json.dumps({'latency_ms': latency_ms, **kept})}"]


def sweep(recipes: Sequence[Recipe], work: Workdir) -> dict[str, Any]:
    """Build every recipe, which differ in their latency alone, and write table and page into the work folder.

    Where the target was lost, a point has a bundle and no latency. What is written is complete after each bundle, as far as it goes.
    """
    points, conditions = [], None
    dense: dict[str, Any] = {"latency_ms": None, "top1": None, "top1_precision": None}
    for number, recipe in enumerate(recipes):
        goal = recipe.prune.target
        folder = f"bundle-{goal.latency_ms:.12g}ms"  # type: ignore[union-attr]
        progress.note(f"latency {number + 1} of {len(recipes)}: {goal.latency_ms:g} ms")  # type: ignore[union-attr]
        bundle = pipeline.build(recipe, work, folder, [other.prune.target.latency_ms for other in recipes])  # type: ignore[union-attr]
        about = {"latency_ms": goal.latency_ms, "percentile": goal.percentile}  # type: ignore[union-attr]
        points.append({**about, **_point(bundle, folder)})
        latency = bundle.manifest["latency"]
        dense |= _dense(bundle, dense)
        conditions = latency["conditions"] if latency else conditions
        places = [_place(point) for point in points]
        for point, place in zip(points, places, strict=True):
            point["on_front"] = point["verdict"] != "infeasible" and _on_front(place, places)
        document = {"name": recipe.name, "dense": dense, "points": points, "conditions": conditions}
        write(document, work.root)
    return document


def write(document: dict[str, Any], folder: Path) -> None:
    """The front as CSV, as JSON and as a page."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["points"])
    write_atomically(folder / f"{NAME}.csv", table.getvalue())
    write_atomically(folder / f"{NAME}.json", json.dumps({"schema": "cswap-deploy/sweep/1", **document}, indent=1))
    write_atomically(folder / f"{NAME}.html", render_sweep(document))


def _on_front(place: Place | None, others: Sequence[Place | None]) -> bool:
    """Whether no other bundle that was measured is at least as fast and as accurate, and better in one of the two."""
    return place is not None and not any(
        there != place and there[0] <= place[0] and there[1] >= place[1] for there in others if there
    )


def _place(point: dict[str, Any]) -> Place | None:
    """Where the dense network ships at its latency, whatever noise says; None where nothing was measured."""
    took = 1.0 if point["verdict"] in ("not needed", "infeasible") else point["ratio"]
    return None if took is None else (took, point["top1"])


def _point(bundle: Bundle, folder: str) -> dict[str, Any]:
    manifest = bundle.manifest
    budget, accuracy = manifest["budget"] or {}, manifest["accuracy"]
    latency = manifest["latency"] or {}
    ratio = budget.get("ratio_ci95") or (None, None)
    low, high = accuracy["drop_ci95_pp"]
    return {
        **{key: budget.get(key) for key in ("verdict", "achieved_ms", "ratio", "trials")},
        "ratio_low": ratio[0],
        "ratio_high": ratio[1],
        **_accuracy(bundle, "shipped"),
        "drop_pp": accuracy["drop_pp"],
        "drop_low_pp": low,
        "drop_high_pp": high,
        **{key: manifest["pruned"][key] for key in ("macs", "params")},
        "bytes": manifest["size"]["shipped_bytes"],
        "gate": accuracy["gate"]["verdict"],
        "exit_code": manifest["exit_code"],
        "bundle": folder,
        **{key: latency.get(key) for key in HOW},
    }


def _dense(bundle: Bundle, known: dict[str, Any]) -> dict[str, Any]:
    """Of the dense network, in the precision that ships where one of the bundles holds it, and of float32 before."""
    budget, latency = bundle.manifest["budget"], bundle.manifest["latency"]
    found: dict[str, Any] = {"latency_ms": budget["dense_ms"]} if budget else {}
    if budget and latency and budget["verdict"] in ("not needed", "infeasible"):
        found |= _accuracy(bundle, "shipped") | {"top1_precision": latency["precision"]}
    elif known["top1"] is None:
        found |= _accuracy(bundle, "source") | {"top1_precision": "fp32"}
    return found


def _accuracy(bundle: Bundle, which: str) -> dict[str, float]:
    return {"top1": bundle.manifest["accuracy"][which]["top1"]}
