"""The Markdown of docs/zoo.md from the lines of zoo.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STEPS = ("built", "grouped", "proof", "pruned", "trained", "stored", "exported", "onnx")
REACHED = 0.705
"""Of the multiply-accumulates: as near to 70 % as whole units come."""
Facts = Mapping[str, Any]


def table(rows: Sequence[Facts], asked: int) -> str:
    """A summary in words, one line for each model, and what stays in those that do not get to 70 %."""
    head = (
        "| model | file | M params | G MACs | groups | heads | s | prunable | kept | proof | ONNX dB | torch-pruning |"
    )
    return "\n".join(
        [
            *_summary(rows, asked),
            "",
            head,
            "|---" * (head.count("|") - 1) + "|",
            *(_line(row) for row in rows),
            "",
            *_short_of_it(rows),
        ]
    )


def fault(row: Facts) -> str | None:
    """The step that failed and why; None where all of them passed."""
    for step in STEPS:
        found = row.get(step, {"failed": "not reached"})
        if "failed" in found:
            return f"{step}: {found['failed']}"
    return None


def _summary(rows: Sequence[Facts], asked: int) -> Iterator[str]:
    whole = [row for row in rows if fault(row) is None]
    reached = [row for row in whole if row["pruned"]["macs"] <= REACHED]
    peers = [row["torch_pruning"] for row in rows if "torch_pruning" in row]
    files = {row["file"] for row in rows}
    slowest = max(rows, key=lambda row: row.get("grouped", {}).get("cpu_seconds", 0.0))
    yield f"- {len(rows)} models of {len(files)} module files were run, of {asked} in the list; {len(whole)} completed every step."
    yield f"- {len(reached)} of {len(whole)} come down to 70 % of their MACs."
    if whole:
        worst = max(row["proof"]["difference"] for row in whole if row["proof"]["precision"] == "float64")
        yield f"- The largest difference between cut and masked network, relative to the largest logit, in float64: {worst:.1e}."
        yield f"- Grouping with all proofs took {slowest['grouped']['cpu_seconds']:.1f} s of one core at most ({slowest['model']})."
    if peers:
        yield f"- torch-pruning alone completes {sum('completed' in peer for peer in peers)} of {len(peers)}."


def _line(row: Facts) -> str:
    name, file = f"`{row['model']}`", row["file"]
    peer = row.get("torch_pruning", {})
    alone = "yes" if peer.get("completed") else _cell(peer.get("failed", ""))
    wrong = fault(row)
    if wrong:
        return f"| {name} | {file} | | | | | | | {_cell(wrong)} | | | {alone} |"
    built, grouped, proof, onnx = row["built"], row["grouped"], row["proof"], row["onnx"]
    cells = [
        name,
        file,
        f"{built['params'] / 1e6:.1f}",
        f"{built['macs'] / 1e9:.2f}",
        grouped["groups"],
        grouped["heads"],
        f"{grouped['cpu_seconds']:.1f}",
        f"{grouped['prunable'][1]:.0%}",
        f"{row['pruned']['macs']:.1%}",
        f"{proof['difference']:.0e}" + ("" if proof["precision"] == "float64" else " (float32)"),
        f"{onnx['sqnr_db']:.0f}",
        alone,
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _short_of_it(rows: Sequence[Facts]) -> Iterator[str]:
    """Which models stay above the target, and what holds their units."""
    for row in rows:
        if fault(row) is None and row["pruned"]["macs"] > REACHED:
            why = "; ".join(f"{reason} ({count})" for reason, count in row["grouped"]["why"])
            yield f"- `{row['model']}` keeps {row['pruned']['macs']:.1%}: {why}."


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")[:90]
