"""What the command line shows: progress of a run on standard error, results as lines. Readable at 80 columns and in a pipe."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cswap_deploy.errors import DeviceError
from cswap_deploy.manifest import VERDICTS

if TYPE_CHECKING:
    from cswap_deploy.artifacts import Groups, Prepared
    from cswap_deploy.bundle import Bundle
    from cswap_deploy.checks import CheckReport
    from cswap_deploy.doctor import Finding
    from cswap_deploy.verify import Check

WIDTH = 80
REFRESH_S = 0.1
SLOWEST = 15
ATTRIBUTION = "it calls no unit critical or detrimental"


class Console:
    """A reporter: one numbered line per stage, a live line on a terminal, plain lines in a pipe.

    A stream that nobody reads any more does not end the run: what it would have shown is dropped.
    """

    def __init__(self, stages: Sequence[str], *, silent: bool = False, stream: TextIO | None = None) -> None:
        self._stages = list(stages)
        self._silent = silent
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and not silent
        self._pending = False
        self._shown_at = 0.0
        self._stage = ""

    def stage_started(self, name: str, reason: str) -> None:
        self._stage = name
        self._line(f"{self._number(name)} {name:<10} {reason}")

    def stage_finished(self, name: str, seconds: float | None, path: str, size: int) -> None:
        if seconds is None:
            self._line(f"{self._number(name)} {name:<10} up to date")
        else:
            files = f", {size_text(size)} in {path}" if size else ""
            self._line(f"{'':7} {name:<10} done in {seconds:.1f} s{files}")

    def note(self, message: str) -> None:
        self._line(f"{'':7} {message}")

    def warn(self, message: str) -> None:
        self._write(f"warning: {printable(message)}\n")

    def advance(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._live or (now - self._shown_at < REFRESH_S and done < total):
            return
        self._shown_at = now
        columns = min(WIDTH, shutil.get_terminal_size().columns)
        self._write(printable(f"{'':7} {self._stage:<10} {what} {done}/{total}")[: columns - 1])
        self._pending = True

    def close(self) -> None:
        """Take the live line away, so that what follows starts on a line of its own."""
        self._write("")

    def _line(self, text: str) -> None:
        if not self._silent:
            self._write(printable(text) + "\n")

    def _write(self, text: str) -> None:
        clear = "\r\x1b[2K" if self._pending else ""
        self._pending = False
        with suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
            self._stream.write(clear + text)
            self._stream.flush()

    def _number(self, name: str) -> str:
        position = self._stages.index(name) + 1 if name in self._stages else 0
        return f"[{position:>2}/{len(self._stages)}]"


def bundle_lines(bundle: Bundle) -> Iterator[str]:
    """The table before and after, the verdict and one sentence of reason."""
    manifest = bundle.manifest
    accuracy, model, pruned = manifest["accuracy"], manifest["model"], manifest["pruned"]
    dense, shipped = accuracy["source"], accuracy["shipped"]
    rows = [
        ("top-1", _percent(dense["top1"]), _percent(shipped["top1"]), f"drop {accuracy['drop_pp']:+.2f} points"),
        ("  95 % interval", _interval(dense["top1_ci95"]), _interval(shipped["top1_ci95"]), _drop_interval(accuracy)),
        ("top-5", _percent(dense["top5"]), _percent(shipped["top5"]), ""),
        ("parameters", count_text(model["params"]), count_text(pruned["params"]), _ratio(pruned, model, "params")),
        ("MACs", count_text(model["macs"]), count_text(pruned["macs"]), _ratio(pruned, model, "macs")),
    ]
    if latency := manifest["latency"]:
        rows += _latency_rows(latency)
    yield from table(("", "dense", "shipped", ""), rows, f"{manifest['name']}: {model['name']}")
    word = (
        "NO GATE"
        if accuracy["gate"]["verdict"] == "off" and manifest["verdict"] == "pass"
        else manifest["verdict"].upper()
    )
    yield from _wrapped(f"{word}: {_sentence(manifest)}")
    if manifest["reasons"] and accuracy["gate"]["verdict"] == "pass":
        yield from _wrapped(f"accuracy passed: {_accuracy_sentence(accuracy)}")
    if latency:
        yield from _slower(latency)
        yield from _unstable(latency["unstable_because"], " Measure again with --force latency.")
        yield from _wrapped(f"latency of {manifest['shipped']} and its dense twin, on {_conditions(latency)}")


def next_commands(bundle: Bundle) -> Iterator[str]:
    """Where things are and what to try, ready to paste into the shell that this program was started from."""
    folder = _from_here(bundle.folder)
    yield f"bundle   {folder}"
    yield f"report   {folder / 'report.html'}"
    program = _from_here(Path(sys.argv[0])) if os.sep in sys.argv[0] else Path("cswap-deploy")
    if program.name != "cswap-deploy":
        program = Path("cswap-deploy")
    if bundle.manifest["exit_code"] == DeviceError.exit_code:
        yield f"finish   {shlex.join([str(program), 'deploy', str(folder.parent)])} --on TARGET"
    yield f"next     {shlex.join([str(program), 'show', str(folder)])}"
    if bundle.manifest["model"]["source"] == "timm":
        code = f"import cswap_deploy; print(cswap_deploy.load_pruned({str(folder)!r}))"
        python = str(program.with_name("python")) if program.parent != Path() else "python"
        plain = re.fullmatch(r"[\w./-]+", str(folder)) and " " not in python
        quoted = f'{python} -c "{code}"' if plain else shlex.join([python, "-c", code])
        yield f"         {quoted}"


def _from_here(path: Path) -> Path:
    """The path as one would type it: relative where it lies below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def file_lines(bundle: Bundle) -> Iterator[str]:
    for entry in bundle.manifest["files"]:
        yield f"{entry['path']:<28} {size_text(entry['bytes']):>9}  sha256 {entry['sha256'][:16]}"


def left_lines(bundle: Bundle) -> Iterator[str]:
    """How many units left, and what the dense network's scores said of them."""
    pruned = bundle.manifest["pruned"]
    count, scores = pruned["units_removed"], pruned.get("scores")
    text = f"{count} of {_plural(pruned['units'], 'unit')} left"
    judged = [group["left"] for group in pruned.get("groups", ()) if group.get("left")]
    if count and judged:
        totals = {verdict: sum(group[verdict] for group in judged) for verdict in VERDICTS}
        said = ", ".join(f"{total} {verdict}" for verdict, total in totals.items() if total)
        text += f"; on the dense network: {said}"
        text += f" (by attribution: {ATTRIBUTION})" if scores and scores["estimator"] == "attribution" else ""
    elif count and scores:
        text += f"; criterion {scores['criterion']} gives no verdicts"
    yield from _wrapped(text)


def unit_lines(unit: dict[str, Any]) -> Iterator[str]:
    """Whether a unit left, when, and what its scores were on the dense network and at that moment."""
    step, name = unit["step"], f"{printable(unit['group'])}:{unit['index']}"
    if step:
        yield from _wrapped(f"{name} left in step {step['number']} of {unit['steps']}")
    else:
        yield from _wrapped(f"{name} stayed: it is unit {unit['kept_as']} of the {unit['kept']} that are kept")
    found = {"dense network": unit["dense"]} if unit["dense"] else {}
    first = (step["number"] if step else unit["steps"]) == 1  # the first step goes by the dense network's scores
    later = unit["last"] if step is None else step["scores"]
    if later and not (first and found):
        those = " that left" if step and unit["by_elimination"] else ""
        found["when it left" if step else "before the last step"] = {**later, "among": f"{later['among']}{those}"}
    rows = [[label, *map(show, found.values())] for label, show in UNIT_ROWS.items()]
    yield from table(["", *found], [row for row in rows if any(row[1:])], "") if found else [""]
    yield from _wrapped(_widths(unit))
    if unit["turn"]:
        yield from _wrapped(f"On the dense network its turn to leave was {unit['turn']} of {unit['units']}.")
    if not found:
        yield from _wrapped("Its scores were not kept.")
    others = [layer for layer in unit["layers"] if layer != unit["group"]]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    yield from _wrapped(printable(f"Coupled to it: its parts of {', '.join(others[:8]) or 'no other layer'}{more}."))
    yield ""
    for text in _explained(unit, [*found.values()]):
        yield from _wrapped(text)


def _widths(unit: dict[str, Any]) -> str:
    """What became of the unit's group."""
    step, kind = unit["step"], unit["kind"]
    if not step:
        share = "all" if unit["units"] == unit["kept"] else f"{unit['kept']} of"
        return printable(f"Its group keeps {share} {unit['units']} {kind}.")
    return printable(
        f"Its group went from {unit['units']} to {unit['kept']} {kind}, in step {step['number']} from {step['width_before']} to "
        f"{step['width_after']}. Of all groups {_plural(step['gone_before'], 'unit')} had left before that step, which kept "
        f"{step['macs']:.1%} of the MACs at a drop of {step['drop_pp']:+.1f} points on the selection images."
    )


def _explained(unit: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures mean and how they decided, as far as they did."""
    if unit["by_elimination"]:
        yield (
            "Of a group those units leave first that the layers behind can best do without, one after the other; the keep value "
            "is not that order, and verdicts do not decide."
        )
    else:
        yield "Of a group the units with the lowest keep values leave first; verdicts do not decide."
    if unit["allocation"] == "curves":
        yield "How many leave follows from the damage that narrowing does, measured group by group."
    if found and found[0]["effect"] is None:
        yield printable(f"Criterion {found[0]['criterion']} gives no effect, error or verdict.")
    elif found:
        yield from _verdicts_explained(found)


def _verdicts_explained(found: list[dict[str, Any]]) -> Iterator[str]:
    from cswap_deploy.prune.verdicts import NEUTRAL_MARGIN

    yield (
        "Effect: mean change of log p(true class) when the unit leaves, in nats; negative: it helps, positive: it harms. "
        "Keep value: the mean size of that change."
    )
    yield (
        f"Neutral: the interval lies within {NEUTRAL_MARGIN:g} nats of zero; critical, detrimental: it does not, and the effect is "
        "significantly negative, positive; unresolved: neither."
    )
    if (alpha := found[0]["alpha"]) is not None:
        yield (
            f"The false discovery rate over all units is held at {100 * alpha:g} % (Benjamini-Hochberg); the interval, at "
            f"{100 * (1 - alpha):g} %, is of this unit alone."
        )
    if any(facts["estimator"] == "attribution" for facts in found):
        yield f"Attribution is of first order, and {ATTRIBUTION}."


def _ablated(facts: dict[str, Any]) -> str:
    """On how many of the images the unit really was taken out."""
    if facts["verified"] is None or facts["estimator"] is None:
        return ""
    return "all images" if facts["verified"] else "no image" if facts["estimator"] == "attribution" else "some images"


def _effect(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


UNIT_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "verdict": lambda facts: facts["verdict"] or "",
    "effect": lambda facts: _effect(facts["effect"]),
    "  interval": lambda facts: " to ".join(map(_effect, facts["interval"] or ())),
    "  standard error": lambda facts: "" if facts["error"] is None else f"{facts['error']:.3g}",
    "keep value": lambda facts: f"{facts['keep_value']:.3g}",
    "  rank, lowest first": lambda facts: f"{facts['rank']} of {facts['among']}",
    "estimator": lambda facts: printable(facts["estimator"] or facts["criterion"]),
    "intervention": lambda facts: printable(facts["intervention"] or ""),
    "images": lambda facts: str(facts["images"] or ""),
    "ablated on": _ablated,
}
"""What is shown of a unit's scores."""


def prepared_lines(ready: Prepared, work: Path) -> Iterator[str]:
    share, file = ready.pruned.macs / ready.source.macs, ready.models["fp32"].graph
    yield f"pruned to {share:.1%} of the MACs: {file.path} ({size_text(file.bytes)})"
    for reason in ready.reasons:
        yield from _wrapped(f"failed: {reason.text}")
    yield f"next     {shlex.join(['cswap-deploy', 'deploy', str(work)])}"


def measured_lines(document: dict[str, Any]) -> Iterator[str]:
    """Percentiles of one or two files, the ratio with its interval, whether that can be trusted, the conditions."""
    models = document["models"]
    files = [Path(model["file"]).name for model in models]
    same = len(set(files)) < len(files)
    names = [f"{file} ({number})" if same else file for number, file in enumerate(files, 1)]
    rows = [
        (name, *(_ms(model[f"p{p}_ms"]) for p in (50, 90, 99)), _ms_interval(model), str(model["samples"]), _mb(model))
        for name, model in zip(names, models, strict=True)
    ]
    yield from table(("ms", "p50", "p90", "p99", "p50, 95 %", "samples", "peak MB"), rows, document["runtime"])
    if same:
        yield from (f"{name}: {model['file']}" for name, model in zip(names, models, strict=True))
    if document["speedup"] is not None:
        low, high = document["speedup_ci95"]
        ratio = f"{document['speedup']:.3f} times as fast as {names[1]} (95 %: {low:.3f} to {high:.3f})"
        yield from _wrapped(f"{names[0]} is {ratio}")
    yield from _unstable(
        [f"{name}: {why}" for name, m in zip(names, models, strict=True) for why in m["unstable_because"]]
    )
    yield from _wrapped(f"on {_conditions(document)}")
    if document["layers"]:
        yield from layer_lines(document["layers"])


def layer_lines(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The layers that take longest."""
    total = sum(layer["ms"] for layer in layers) or 1  # ONNX Runtime counts whole microseconds, which may all be 0
    slowest = sorted(layers, key=lambda layer: -float(layer["ms"]))[:SLOWEST]
    rows = [(layer["name"], layer["op"], _ms(layer["ms"]), f"{layer['ms'] / total:.1%}") for layer in slowest]
    yield from table(("layer", "op", "ms", "share"), rows, f"{len(slowest)} slowest of {len(layers)} layers")


def verified_lines(checks: Sequence[Check]) -> Iterator[str]:
    for check in checks:
        yield from _wrapped(f"{check.outcome:<8} {check.name}: {check.detail}")
    failed = sum(check.outcome == "failed" for check in checks)
    skipped = sum(check.outcome == "skipped" for check in checks)
    more = f", {skipped} skipped" if skipped else ""
    yield f"{'FAIL' if failed else 'PASS'}: {failed} of {len(checks)} checks failed{more}"


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield from _wrapped(f"{finding.state:<8} {finding.topic}: {finding.text}")
        if finding.fix:
            yield from (f"{'':9}{line}" for line in _wrapped(f"fix: {finding.fix}"))


def check_lines(report: CheckReport) -> Iterator[str]:
    for name, fact in report.facts.items():
        yield f"{name:<12} {fact}"
    yield ""
    for name, status in report.stages:
        yield f"{name:<12} {status}"


def group_lines(groups: Groups) -> Iterator[str]:
    """What can be pruned, and what cannot and why."""
    rows = [(group.name, group.kind, str(group.units), str(len(group.consumers))) for group in groups.groups]
    yield ""
    yield from table(("group", "kind", "units", "read by"), rows, f"{len(groups.groups)} proven groups")
    for refusal in groups.refused:
        yield from _wrapped(f"not pruned: {refusal.name}: {refusal.reason}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Iterator[str]:
    """A plain table as lines; the first column is flush left."""
    import rich.box
    from rich.console import Console as RichConsole
    from rich.table import Table

    grid = Table(
        title=title, title_justify="left", title_style="", header_style="", box=rich.box.SIMPLE_HEAD, pad_edge=False
    )
    for position, name in enumerate(header):
        grid.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    target = io.StringIO()
    RichConsole(file=target, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False).print(grid)
    yield from (line.rstrip() for line in target.getvalue().rstrip("\n").split("\n"))


def printable(text: str) -> str:
    """Names come from bundles and folders: control characters, which a terminal would obey, are spelt out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def size_text(size: int) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} B"


def count_text(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.999995 * limit:  # what would round up to 1000.00 of the unit below
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _drop_interval(accuracy: dict[str, Any]) -> str:
    low, high = accuracy["drop_ci95_pp"]
    return f"{low:+.2f} to {high:+.2f}"


def _ratio(pruned: dict[str, Any], model: dict[str, Any], key: str) -> str:
    return f"{100 * pruned[key] / model[key]:.1f} % kept"


def _latency_rows(latency: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    dense, shipped = latency["source"], latency["pruned"]
    low, high = latency["speedup_ci95"]
    both = "" if latency["precision"] == "fp32" else f", both {latency['precision']}"
    yield (
        f"p50{both}",
        f"{_ms(dense['p50_ms'])} ms",
        f"{_ms(shipped['p50_ms'])} ms",
        f"{latency['speedup']:.2f} x as fast",
    )
    yield "  95 % interval", _ms_interval(dense), _ms_interval(shipped), f"{low:.2f} to {high:.2f}"
    yield "p99", f"{_ms(dense['p99_ms'])} ms", f"{_ms(shipped['p99_ms'])} ms", ""
    if shipped["peak_memory_mb"]:
        yield "peak memory", f"{_mb(dense)} MB", f"{_mb(shipped)} MB", ""


def _slower(latency: dict[str, Any]) -> Iterator[str]:
    """What helps most where cuts have bought no time: widths that fill the blocks in which runtimes work."""
    if latency["speedup_ci95"][0] <= 1:
        word = "SLOWER" if latency["speedup_ci95"][1] < 1 else "NOT FASTER"
        advice = "runtimes work in blocks of channels, and cuts within a block buy no time"
        yield from _wrapped(f"{word} than the dense model: {advice}; try --set prune.round_to=8, 16 or 32")


def _unstable(reasons: Sequence[str], then: str = "") -> Iterator[str]:
    """The first reason for which the figures cannot be trusted, and how many more there are."""
    if reasons:
        more = f" (and {_plural(len(reasons) - 1, 'more reason')}: --json)" if len(reasons) > 1 else ""
        yield from _wrapped(f"UNSTABLE: {reasons[0]}{more}.{then}")


def _conditions(document: dict[str, Any]) -> str:
    """Where and how it was measured, in one line."""
    found = document["conditions"]
    runtime = " ".join([document["runtime"], *filter(None, [document.get("runtime_version")])])
    parts = [found["device"], runtime, f"batch {document['batch']}", _plural(document["threads"], "thread")]
    parts += [f"power mode {found['power_mode']}"] if found["power_mode"] else []
    parts += [f"governor {found['governor']}"] if found["governor"] else []
    return ", ".join([*parts, f"load {found['load'][0]:.1f}", f"{document['duration_s']:g} s each, in turn"])


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ms(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _ms_interval(timing: dict[str, Any]) -> str:
    return " to ".join(map(_ms, timing["p50_ci95_ms"]))


def _mb(timing: dict[str, Any]) -> str:
    return f"{timing['peak_memory_mb']:.0f}" if timing["peak_memory_mb"] else "?"


def _sentence(manifest: dict[str, Any]) -> str:
    if manifest["reasons"]:
        return "; ".join(manifest["reasons"])
    return _accuracy_sentence(manifest["accuracy"])


def _accuracy_sentence(accuracy: dict[str, Any]) -> str:
    gate = accuracy["gate"]
    if gate["verdict"] == "off":
        return f"the recipe sets no accuracy gate; {accuracy['images']} hold-out images"
    proof = f"proven at {gate['confidence']:.0%}" if gate["proven"] else f"not proven at {gate['confidence']:.0%}"
    more = (
        f" (about {gate['images_to_prove']} images would prove it)"
        if not gate["proven"] and gate["images_to_prove"]
        else ""
    )
    limit = f"{gate['max_drop_pp']:g} point{'' if gate['max_drop_pp'] == 1 else 's'}"
    return f"the drop is within {limit} on {accuracy['images']} hold-out images, {proof}{more}"
