"""Progress of a run on standard error: numbered stages, a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, RLock, Thread
from time import monotonic
from typing import TextIO

from cswap_deploy.console.text import WIDTH, cut_to, from_here, wrapped
from cswap_deploy.terminal import is_screen, painted, takes_colour
from cswap_deploy.wording import duration_text, printable, size_text

REFRESH_S = 0.1
TICK_S = 1.0
"""How often the live line's clock moves while a stage says nothing."""
MARGIN = " " * 8
CLOCK = "cswap-deploy clock"
"""Name of the thread."""


@dataclass
class _Activity:
    """One countable part of a stage: `done` of `total` since `began`, on the monotonic clock."""

    what: str
    done: int
    total: int
    began: float

    def __str__(self) -> str:
        spent = monotonic() - self.began
        left = spent / self.done * (self.total - self.done) if self.done else 0
        return f"{self.what} {self.done}/{self.total}" + (f", about {duration_text(left)} left" if left >= 1 else "")


class Console:
    """A reporter. A stage begins with its number and reason and ends with time, size and path.

    On a terminal a live line tells what the stage is at, for how long still, and how long it has run; a thread moves
    its clock. A stream that nobody reads any more does not end the run: what it would have shown is dropped.
    """

    def __init__(self, stages: Sequence[str], *, silent: bool = False, stream: TextIO | None = None) -> None:
        self._stages = list(stages)
        self._silent = silent
        self._stream = stream or sys.stderr
        self._live = is_screen(self._stream) and not silent
        self._colour = takes_colour(self._stream)
        self._pending = False
        self._shown_at = 0.0
        self._stage = ""
        self._began = self._event_at = monotonic()
        self._activity: _Activity | None = None
        self._lock = RLock()
        self._closed = Event()
        self._clock: Thread | None = None

    def stage_started(self, name: str, reason: str) -> None:
        with self._lock:
            self._line(f"{self._number(name)} {name:<10} ", reason)
            self._stage, self._activity = name, None
            self._began = self._event_at = monotonic()
            if self._live and self._clock is None:
                self._clock = Thread(target=self._tick, name=CLOCK, daemon=True)
                self._clock.start()

    def stage_finished(self, name: str, seconds: float | None, path: str, size: int) -> None:
        with self._lock:
            self._stage = ""
            if seconds is None:
                self._line(f"{self._number(name)} {name:<10} ", "up to date")
                return
            facts = f"{duration_text(seconds)}, {size_text(size or _record_size(path))},"
            place = str(from_here(Path(path)))
            if self._live and len(f"{MARGIN}{facts} {place}") > self._columns():
                self._line(MARGIN, facts.rstrip(","))
                self._line(MARGIN, place)
            else:
                self._line(MARGIN, f"{facts} {place}")

    def note(self, message: str) -> None:
        with self._lock:
            self._line(MARGIN, message)
            self._event_at = monotonic()

    def warn(self, message: str) -> None:
        with self._lock:
            self._write("\n".join(self._folded("warning: ", message)) + "\n")

    def advance(self, what: str, done: int, total: int) -> None:
        with self._lock:
            now = monotonic()
            current = self._activity
            if current is None or current.what != what or done < current.done:
                current = self._activity = _Activity(what, done, total, self._event_at)
            current.done, current.total = done, total
            self._event_at = now
            if self._live and (now - self._shown_at >= REFRESH_S or done >= total):
                self._show()

    def close(self) -> None:
        """Take the live line away, so that what follows starts on a line of its own; may be called again."""
        self._closed.set()
        if self._clock is not None:
            self._clock.join()
        self._write("")

    def _tick(self) -> None:
        while not self._closed.wait(TICK_S):
            with self._lock:
                if self._stage and not self._closed.is_set():
                    self._show()

    def _show(self) -> None:
        """Draw the live line anew."""
        self._shown_at = monotonic()
        parts = [str(self._activity)] if self._activity else []
        spent = self._shown_at - self._began
        parts += [f"{duration_text(spent)} so far"] if spent >= 1 else []
        self._write(cut_to(self._columns() - 1, f"{MARGIN}{self._stage:<10} {', '.join(parts)}"))
        self._pending = True

    def _line(self, head: str, text: str) -> None:
        if not self._silent:
            self._write("\n".join(self._folded(head, text)) + "\n")

    def _folded(self, head: str, text: str) -> list[str]:
        """Lines of a screen's width, indented like the first; in a pipe one line for each event."""
        text = printable(text)
        lines = wrapped(text, self._columns(), head, " " * len(head)) if self._live else [head + text]
        return list(map(painted, lines)) if self._colour else lines

    def _write(self, text: str) -> None:
        with self._lock, suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
            clear = "\r\x1b[2K" if self._pending else ""
            self._pending = False
            self._stream.write(clear + text)
            self._stream.flush()

    def _columns(self) -> int:
        return min(WIDTH, shutil.get_terminal_size().columns)

    def _number(self, name: str) -> str:
        position = self._stages.index(name) + 1 if name in self._stages else 0
        return f"[{position:>2}/{len(self._stages)}]"


def _record_size(path: str) -> int:
    """A result without files is all in its record."""
    with suppress(OSError):
        return (Path(path) / "stage.json").stat().st_size
    return 0
