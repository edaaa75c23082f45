"""What the stream that is written to can show."""

from __future__ import annotations

import os
import re
from typing import TextIO

GREEN, YELLOW, RED = "32", "33", "31"
WORDS = {
    **dict.fromkeys(("PASS", "passed", "ok"), GREEN),
    **dict.fromkeys(("NO GATE", "UNSTABLE", "BUSY", "SLOWER", "NOT FASTER", "warning", "skipped"), YELLOW),
    **dict.fromkeys(("FAIL", "error", "failed", "missing", "problem"), RED),
}
"""Words that open a line and their colour on a terminal; the colour says nothing that the word does not."""
OPENING = re.compile(rf"({'|'.join(WORDS)})(?=[ :])")


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
