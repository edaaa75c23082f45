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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from cswap_deploy.artifacts import Groups
    from cswap_deploy.bundle import Bundle
    from cswap_deploy.checks import CheckReport
    from cswap_deploy.pipeline import Prepared

WIDTH = 80
REFRESH_S = 0.1


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
    yield from table(("", "dense", "shipped", ""), rows, f"{manifest['name']}: {model['name']}")
    word = (
        "NO GATE"
        if accuracy["gate"]["verdict"] == "off" and manifest["verdict"] == "pass"
        else manifest["verdict"].upper()
    )
    yield from _wrapped(f"{word}: {_sentence(manifest)}")


def next_commands(bundle: Bundle) -> Iterator[str]:
    """Where things are and what to try, ready to paste into the shell that this program was started from."""
    folder = _from_here(bundle.folder)
    yield f"bundle   {folder}"
    yield f"report   {folder / 'report.html'}"
    program = _from_here(Path(sys.argv[0])) if os.sep in sys.argv[0] else Path("cswap-deploy")
    if program.name != "cswap-deploy":
        program = Path("cswap-deploy")
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


def prepared_lines(ready: Prepared) -> Iterator[str]:
    share = ready.pruned.macs / ready.source.macs
    yield f"pruned to {share:.1%} of the MACs: {ready.shipped.graph.path} ({size_text(ready.shipped.graph.bytes)})"


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


def _sentence(manifest: dict[str, Any]) -> str:
    if manifest["reasons"]:
        return "; ".join(manifest["reasons"])
    accuracy = manifest["accuracy"]
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
