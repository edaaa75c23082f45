"""How text becomes lines: columns, wrapping. Readable at 80 columns, whatever a name holds."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cswap_deploy.wording import ms

WIDTH = 80


# --- lines


def wrapped(text: str, width: int = WIDTH, first: str = "", rest: str = "  ") -> list[str]:
    """Lines of at most `width` columns, but for words that are longer, such as paths: those are to be copied whole."""
    lines, current = list[str](), first
    for word in re.findall(r" *[^ ]+(?: %[^ ]*)?", re.sub(r"\s", " ", text)):  # a number and its % stay together
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


def ms_interval(timing: dict[str, Any], percentile: int = 50) -> str:
    """The 95 % interval of a percentile; a bundle made before it was kept has none of p99."""
    return " to ".join(map(ms, timing.get(f"p{percentile}_ci95_ms", ())))


def mb(timing: dict[str, Any]) -> str:
    return f"{timing['peak_memory_mb']:.0f}" if timing["peak_memory_mb"] else "?"


def from_here(path: Path) -> Path:
    """The path as one would type it: relative where it lies below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
