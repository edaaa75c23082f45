"""A sweep in a table: what was asked for, what came of it, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cswap_deploy.console.text import from_here, table
from cswap_deploy.wording import answered, count_text, ms, percent


def sweep_lines(front: dict[str, Any], folder: Path) -> Iterator[str]:
    """One row for each latency, the dense network first."""
    dense = front["dense"]
    rows = [("dense", "", _took(dense["latency_ms"]), percent(dense["top1"]), "", "")]
    measured = next((point["precision"] for point in front["points"] if point["precision"]), "fp32")
    for point in front["points"]:
        verdict, achieved = answered(point), _took(point["achieved_ms"])
        row = (f"{point['latency_ms']:g} ms", verdict, achieved, percent(point["top1"]))
        rows.append((*row, f"{point['drop_pp']:+.2f}", count_text(point["macs"])))
    yield from table(("asked", "", "achieved", "top-1", "drop", "MACs"), rows, f"{front['name']}: sweep")
    if dense["top1_precision"] != measured:
        yield f"dense: its latency is that in {measured}, its top-1 that in {dense['top1_precision']}"
    for point in front["points"]:
        if point["verdict"] == "infeasible":
            yield f"{point['latency_ms']:g} ms cannot be reached: the dense network is in {point['bundle']}"
        if point["gate"] == "fail":
            yield f"FAIL: {point['latency_ms']:g} ms: accuracy gate, drop {point['drop_pp']:+.2f} points (exit code {point['exit_code']})"
    yield f"bundles  {from_here(folder / 'bundle-*ms')}"
    yield f"table    {from_here(folder / 'sweep.csv')}"
    yield f"chart    {from_here(folder / 'sweep.html')}"


def _took(milliseconds: float | None) -> str:
    return "not measured" if milliseconds is None else f"{ms(milliseconds)} ms"
