"""What the other commands answer, as lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.console.program import program
from cswap_deploy.console.text import mb, ms_interval, table, wrapped
from cswap_deploy.wording import SLOWEST, busy, load_text, ms, percent, plural, size_text

if TYPE_CHECKING:
    from cswap_deploy.artifacts import Groups
    from cswap_deploy.checks import CheckReport
    from cswap_deploy.findings import Finding
    from cswap_deploy.prepared import Prepared
    from cswap_deploy.starter import Starter
    from cswap_deploy.verify import Check


def prepared_lines(ready: Prepared, reasons: Sequence[str], work: Path | None, for_board: Path | None) -> Iterator[str]:
    """`reasons` why it will not pass; `work`: the folder to go on with, None where this command is to be run again."""
    share, file = ready.pruned.macs / ready.source.macs, ready.models["fp32"].graph
    yield from wrapped(f"pruned to {percent(share, 1)} of the MACs: {file.path} ({size_text(file.bytes)})")
    for reason in reasons:
        yield from wrapped(f"failed: {reason}")
    if work:
        yield f"next     {shlex.join([*program(), 'deploy', str(work)])}"
    if work and for_board:
        yield from wrapped(f"or copy {work} to a board without a network, and there: python3 {for_board.name}/agent.py")


def measured_lines(document: dict[str, Any]) -> Iterator[str]:
    """Percentiles of one or two files, the ratio with its interval, whether that can be trusted, the conditions."""
    models = document["models"]
    files = [Path(model["file"]).name for model in models]
    same = len(set(files)) < len(files)
    names = [f"{file} ({number})" if same else file for number, file in enumerate(files, 1)]
    rows = [
        (name, *(ms(model[f"p{p}_ms"]) for p in (50, 90, 99)), ms_interval(model), str(model["samples"]), mb(model))
        for name, model in zip(names, models, strict=True)
    ]
    yield from table(("ms", "p50", "p90", "p99", "p50, 95 %", "samples", "peak MB"), rows, document["runtime"])
    if same:
        yield from (f"{name}: {model['file']}" for name, model in zip(names, models, strict=True))
    if document["speedup"] is not None:
        low, high = document["speedup_ci95"]
        ratio = f"{document['speedup']:.3f} times as fast as {names[1]} (95 %: {low:.3f} to {high:.3f})"
        yield from wrapped(f"{names[0]} is {ratio}")
    yield from unstable_lines(
        [f"{name}: {why}" for name, m in zip(names, models, strict=True) for why in m["unstable_because"]]
    )
    yield from busy_lines(document["conditions"])
    yield from wrapped(f"on {conditions(document)}")
    if document["layers"]:
        yield from layer_lines(document["layers"])


def layer_lines(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The layers that take longest."""
    total = sum(layer["ms"] for layer in layers) or 1  # ONNX Runtime counts whole microseconds, which may all be 0
    slowest = sorted(layers, key=lambda layer: -float(layer["ms"]))[:SLOWEST]
    rows = [(layer["name"], layer["op"], ms(layer["ms"]), percent(layer["ms"] / total, 1)) for layer in slowest]
    yield from table(("layer", "op", "ms", "share"), rows, f"{len(slowest)} slowest of {len(layers)} layers")


def verified_lines(checks: Sequence[Check]) -> Iterator[str]:
    for check in checks:
        yield from wrapped(f"{check.name}: {check.detail}", first=f"{check.outcome:<8} ", rest=f"{'':9}")
    failed = sum(check.outcome == "failed" for check in checks)
    skipped = sum(check.outcome == "skipped" for check in checks)
    more = f", {skipped} skipped" if skipped else ""
    yield f"{'FAIL' if failed else 'PASS'}: {failed} of {len(checks)} checks failed{more}"


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield from wrapped(f"{finding.topic}: {finding.text}", first=f"{finding.state:<8} ", rest=f"{'':9}")
        if finding.fix:
            yield from wrapped(f"fix: {finding.fix}", first=f"{'':9}", rest=f"{'':11}")


def check_lines(report: CheckReport) -> Iterator[str]:
    for name, fact in report.facts.items():
        yield from wrapped(fact, first=f"{name:<12} ", rest=f"{'':13}")
    yield ""
    for name, status in report.stages:
        yield from wrapped(status, first=f"{name:<12} ", rest=f"{'':13}")


def starter_lines(made: Starter) -> Iterator[str]:
    """What was written, what was seen, what to do with it."""
    yield f"recipe   {made.recipe}"
    yield f"schema   {made.schema}, for editors"
    for note in made.notes:
        yield from wrapped(note, rest=" " * 9)
    yield f"next     {shlex.join([*program(), 'check', str(made.recipe)])}"
    yield f"         {shlex.join([*program(), 'build', str(made.recipe)])}"


def group_lines(groups: Groups) -> Iterator[str]:
    """What can be pruned, and what cannot and why."""
    rows = [(group.name, group.kind, str(group.units), str(len(group.consumers))) for group in groups.groups]
    yield ""
    dense, least = groups.cost({}), groups.cost({group.name: (0,) for group in groups.groups})
    shares = [1 - low / high if high else 0.0 for low, high in zip(least, dense, strict=True)]
    yield from wrapped(f"{shares[1]:.1%} of the MACs and {shares[0]:.1%} of the parameters could leave")
    yield from table(("group", "kind", "units", "read by"), rows, f"{len(groups.groups)} proven groups")
    for refusal in groups.refused:
        yield from wrapped(f"not pruned: {refusal.name}: {refusal.reason}")


def unstable_lines(reasons: Sequence[str], then: str = "") -> Iterator[str]:
    """Every reason for which the figures cannot be trusted, and what to do."""
    for reason in reasons:
        yield from wrapped(f"UNSTABLE: {reason}")
    if reasons and then:
        yield from wrapped(then)


def conditions(document: dict[str, Any]) -> str:
    """Where and how it was measured, in one line."""
    found = document["conditions"]
    runtime = " ".join([document["runtime"], *filter(None, [document.get("runtime_version")])])
    parts = [found["device"], runtime, f"batch {document['batch']}", plural(document["threads"], "thread")]
    parts += [f"power mode {found['power_mode']}"] if found["power_mode"] else []
    parts += [f"governor {found['governor']}"] if found["governor"] else []
    return ", ".join([*parts, load_text(found), f"{document['duration_s']:g} s each, in turn"])


def busy_lines(found: dict[str, Any]) -> Iterator[str]:
    if said := busy(found):
        yield from wrapped(f"BUSY: {said}")
