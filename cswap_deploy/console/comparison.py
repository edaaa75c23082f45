"""A bundle in a table: dense and shipped, the verdict with its reason, what to do next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cswap_deploy.console.answers import busy_lines, conditions, unstable_lines
from cswap_deploy.console.program import program, python
from cswap_deploy.console.text import from_here, mb, ms_interval, table, wrapped
from cswap_deploy.console.unit import ATTRIBUTION
from cswap_deploy.errors import DeviceError
from cswap_deploy.wording import UNPLANNED, count_text, gate, ms, percent, removed, size_text, sizes, verdict

if TYPE_CHECKING:
    from cswap_deploy.bundle import Bundle


def bundle_lines(bundle: Bundle) -> Iterator[str]:
    """The table before and after, the verdict and one sentence of reason."""
    manifest = bundle.manifest
    accuracy, model, pruned = manifest["accuracy"], manifest["model"], manifest["pruned"]
    dense, shipped = accuracy["source"], accuracy["shipped"]
    rows = [
        ("top-1", percent(dense["top1"]), percent(shipped["top1"]), f"drop {accuracy['drop_pp']:+.2f} points"),
        ("  95 % interval", _interval(dense["top1_ci95"]), _interval(shipped["top1_ci95"]), _drop_interval(accuracy)),
        ("top-5", percent(dense["top5"]), percent(shipped["top5"]), ""),
        (
            "parameters",
            count_text(model["params"]),
            count_text(pruned["params"]),
            _kept(model["params"], pruned["params"]),
        ),
        ("MACs", count_text(model["macs"]), count_text(pruned["macs"]), _kept(model["macs"], pruned["macs"])),
        *_size_rows(manifest),
    ]
    if latency := manifest["latency"]:
        rows += _latency_rows(latency)
    yield from table(("", "dense", "ships", ""), rows, f"{manifest['name']}: {model['name']}")
    yield from wrapped(f"{verdict(manifest).upper()}: {'; '.join(manifest['reasons']) or gate(accuracy)}")
    if manifest["reasons"] and accuracy["gate"]["verdict"] == "pass":
        yield from wrapped(f"accuracy passed: {gate(accuracy)}")
    yield from _budget(manifest["budget"])
    if latency:
        if manifest["pruned"]["units_removed"]:
            yield from _slower(latency)
        yield from unstable_lines(latency["unstable_because"], "measure again: the same command with --force latency")
        yield from busy_lines(latency["conditions"])
        yield from wrapped(f"latency of {manifest['shipped']} and its dense twin, on {conditions(latency)}")
    for file in manifest["onnx"]["variants"].values():
        for mark in file.get("marks", ()):
            yield from wrapped(f"{file['file']}: {mark}")


def next_commands(bundle: Bundle) -> Iterator[str]:
    """Where things are and what to try, ready to paste into the shell that this program was started from."""
    folder = from_here(bundle.folder)
    yield f"bundle   {folder}"
    yield f"report   {folder / 'report.html'}"
    unplanned = any(UNPLANNED in reason for reason in bundle.manifest["reasons"])
    if bundle.manifest["exit_code"] == DeviceError.exit_code and not unplanned:
        yield f"finish   {shlex.join([*program(), 'deploy', str(folder.parent)])} --on TARGET"
    yield f"next     {shlex.join([*program(), 'show', str(folder)])}"
    yield f"         {shlex.join([*program(), 'verify', str(folder)])}"
    if bundle.manifest["model"]["source"] == "timm":
        code = f"import cswap_deploy; print(cswap_deploy.load_pruned({str(folder)!r}))"
        quoted = f'"{code}"' if re.fullmatch(r"[\w./-]+", str(folder)) else shlex.quote(code)
        yield f"         {shlex.quote(python())} -c {quoted}"


def file_lines(bundle: Bundle) -> Iterator[str]:
    for entry in bundle.manifest["files"]:
        yield f"{entry['path']:<31} {size_text(entry['bytes']):>9}  sha256 {entry['sha256'][:16]}"


def left_lines(bundle: Bundle) -> Iterator[str]:
    """How many units left, and what the dense network's scores said of them."""
    pruned = bundle.manifest["pruned"]
    text, scores = removed(pruned), pruned.get("scores")
    if scores and pruned["units_removed"]:
        judged = any(group.get("left") for group in pruned.get("groups", ()))
        text += "" if judged else f"; criterion {scores['criterion']} gives no verdicts"
        text += f" (by attribution: {ATTRIBUTION})" if judged and scores["estimator"] == "attribution" else ""
    yield from wrapped(text)


def _interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _drop_interval(accuracy: dict[str, Any]) -> str:
    low, high = accuracy["drop_ci95_pp"]
    return f"{low:+.2f} to {high:+.2f}"


def _kept(dense: int, shipped: int) -> str:
    return f"{100 * shipped / dense:.1f} % kept"


def _size_rows(manifest: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    if found := sizes(manifest):
        what, dense, shipped = found
        yield what, size_text(dense), size_text(shipped), _kept(dense, shipped)
        if not manifest["size"]["source_bytes"]:
            yield "  of the file", "", size_text(manifest["size"]["shipped_bytes"]), ""


def _latency_rows(latency: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    dense, shipped = latency["source"], latency["pruned"]
    low, high = latency["speedup_ci95"]
    both = "" if latency["precision"] == "fp32" else f", both {latency['precision']}"
    yield (
        f"p50{both}",
        f"{ms(dense['p50_ms'])} ms",
        f"{ms(shipped['p50_ms'])} ms",
        f"{latency['speedup']:.2f} x as fast",
    )
    yield "  95 % interval", ms_interval(dense), ms_interval(shipped), f"{low:.2f} to {high:.2f}"
    yield "p99", f"{ms(dense['p99_ms'])} ms", f"{ms(shipped['p99_ms'])} ms", ""
    if "p99_ci95_ms" in dense:  # not in bundles of earlier versions
        yield "  95 % interval", ms_interval(dense, 99), ms_interval(shipped, 99), ""
    if shipped["peak_memory_mb"]:
        yield "peak memory", f"{mb(dense)} MB", f"{mb(shipped)} MB", ""


def _budget(budget: dict[str, Any] | None) -> Iterator[str]:
    """What came of the latency that was asked for."""
    if budget:
        from cswap_deploy.report import words

        yield from wrapped(f"budget: {words.budget(budget)}")


def _slower(latency: dict[str, Any]) -> Iterator[str]:
    """What helps most where cuts have bought no time: widths that fill the blocks in which runtimes work."""
    if latency["speedup_ci95"][0] <= 1:
        word = "SLOWER" if latency["speedup_ci95"][1] < 1 else "NOT FASTER"
        advice = "runtimes work in blocks of channels, and cuts within a block buy no time"
        yield from wrapped(f"{word} than the dense model: {advice}; try --set prune.round_to=8, 16 or 32")
