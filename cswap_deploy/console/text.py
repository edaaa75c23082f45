"""How facts become text: columns, wrapping, units. Readable at 80 columns, without colour, whatever a name holds."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

WIDTH = 80
GREEN, YELLOW, RED = "32", "33", "31"
WORDS = {
    **dict.fromkeys(("PASS", "passed", "ok"), GREEN),
    **dict.fromkeys(("NO GATE", "UNSTABLE", "SLOWER", "NOT FASTER", "warning", "skipped"), YELLOW),
    **dict.fromkeys(("FAIL", "error", "failed", "missing", "problem"), RED),
}
"""Words that open a line and their colour on a terminal; the colour says nothing that the word does not."""
OPENING = re.compile(rf"({'|'.join(WORDS)})(?=[ :])")


# --- terminals


def is_screen(stream: TextIO) -> bool:
    """A terminal that can take a line away again."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def takes_colour(stream: TextIO) -> bool:
    """A terminal whose user did not set NO_COLOR (https://no-color.org)."""
    return is_screen(stream) and not os.environ.get("NO_COLOR")


def painted(line: str) -> str:
    """The line with the word that opens it in its colour."""
    found = OPENING.match(line)
    return f"\x1b[1;{WORDS[found[1]]}m{found[1]}\x1b[0m{line[found.end() :]}" if found else line


def printable(text: str) -> str:
    """Names come from bundles and folders: control characters, which a terminal would obey, are spelt out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# --- lines


def wrapped(text: str, width: int = WIDTH, first: str = "", rest: str = "  ") -> list[str]:
    """Lines of at most `width` columns, but for words that are longer, such as paths: those are to be copied whole."""
    lines, current = list[str](), first
    for word in re.findall(r" *[^ ]+", re.sub(r"\s", " ", text)):
        if current not in (first, rest) and _columns(current + word) > width:
            lines.append(current)
            current = rest
        current += word.lstrip(" ") if current in (first, rest) else word
    return [*lines, current.rstrip(" ")]


def cut_to(width: int, text: str) -> str:
    from rich.cells import set_cell_size

    return set_cell_size(text, width).rstrip(" ")


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


def _columns(text: str) -> int:
    """What a terminal needs for it: letters of some scripts take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


# --- values


def size_text(size: int) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= limit:
            return f"{size / limit:.{0 if size >= 100 * limit else 1}f} {unit}"
    return f"{size} B"


def duration_text(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count_text(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.999995 * limit:  # what would round up to 1000.00 of the unit below
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ms(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def ms_interval(timing: dict[str, Any], percentile: int = 50) -> str:
    """The 95 % interval of a percentile; a bundle made before it was kept has none of p99."""
    return " to ".join(map(ms, timing.get(f"p{percentile}_ci95_ms", ())))


def mb(timing: dict[str, Any]) -> str:
    return f"{timing['peak_memory_mb']:.0f}" if timing["peak_memory_mb"] else "?"


def from_here(path: Path) -> Path:
    """The path as one would type it: relative where it lies below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
