"""Progress of a run on standard error: numbered stages, a live line on a terminal, in a pipe plain lines."""

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
PIPE_S = 30.0
"""How often at most a pipe is told what a stage is at."""
TICK_S = 1.0
"""How often the live line's clock moves while a stage says nothing."""
MARGIN = " " * 8
CLOCK = "cswap-deploy clock"
"""Name of the thread."""


EVIDENCE_S = 1.0
"""Counting for less than this says nothing of how long the rest takes."""
PATIENCE = 0.25
"""An announced end stays while what is counted speaks for another one by less than this share of the time that is left."""


@dataclass
class _Activity:
    """One countable part of a stage: `done` of `total`; `begun` of them at `since`, when the first were told (monotonic clock)."""

    what: str
    total: int
    begun: int
    since: float
    round: int = 1
    """A stage may count the same thing several times."""
    done: int = 0
    end: float | None = None
    """When it is expected to be done; None before there is evidence."""

    def __post_init__(self) -> None:
        self.done = self.begun

    def continues(self, done: int, total: int) -> bool:
        return total == self.total and self.done < done

    def advance(self, done: int, now: float) -> None:
        """What was done before the first call, such as reading a model, is no measure of the rest."""
        self.done = done
        if now - self.since < EVIDENCE_S:
            return
        end = now + (now - self.since) / (done - self.begun) * (self.total - done)
        if self.end is None or abs(end - self.end) > PATIENCE * max(self.end - now, 0):
            self.end = end

    def left(self, now: float) -> float:
        """Seconds; 0 where there is nothing to say."""
        return max(0.0, self.end - now) if self.end is not None and self.done < self.total else 0.0

    @property
    def count(self) -> str:
        return f"{self.what} {self.done}/{self.total}"

    def forecast(self, now: float) -> str:
        again = f"round {self.round}, " if self.round > 1 else ""
        left = self.left(now)
        return f"{again}{self.count}" + (f" (about {duration_text(left)} left)" if left >= 1 else "")


class Console:
    """A reporter. A stage begins with its number and reason and ends with time, size and path.

    `stages` are the lines of a build to expect, in order: numbers only grow within one, and a stage that is not among them has that
    of the last.

    On a terminal a live line tells what the stage is at, for how long still, and how long it has run; a thread moves
    its clock. Where one thing is counted within another, the time left is that of the whole. A stream that nobody reads
    any more does not end the run: what it would have shown is dropped.
    """

    def __init__(self, stages: Sequence[str], *, silent: bool = False, stream: TextIO | None = None) -> None:
        self._stages = list(stages)
        self._reached = 0
        self._width = max(10, *(min(len(name), 20) for name in stages), 0)
        self._silent = silent
        self._stream = stream or sys.stderr
        self._live = is_screen(self._stream) and not silent
        self._colour = takes_colour(self._stream)
        self._pending = False
        self._shown_at = 0.0
        self._stage = ""
        self._began = monotonic()
        self._activities: dict[str, _Activity] = {}
        self._activity: _Activity | None = None
        self._lock = RLock()
        self._closed = Event()
        self._clock: Thread | None = None

    def stage_started(self, name: str, reason: str) -> None:
        with self._lock:
            self._line(f"{self._number(name)} {name:<{self._width}} ", reason)
            self._enter(name)
            if self._live and self._clock is None:
                self._clock = Thread(target=self._tick, name=CLOCK, daemon=True)
                self._clock.start()

    def stage_finished(self, name: str, seconds: float | None, path: str, size: int) -> None:
        with self._lock:
            self._enter("")
            if seconds is None:
                self._line(f"{self._number(name)} {name:<{self._width}} ", "up to date")
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

    def warn(self, message: str) -> None:
        with self._lock:
            self._write("\n".join(self._folded("warning: ", message)) + "\n")

    def advance(self, what: str, done: int, total: int) -> None:
        with self._lock:
            now = monotonic()
            current = self._activities.get(what)
            if current is None or not current.continues(done, total):
                current = _Activity(what, total, done, now, current.round + 1 if current else 1)
                self._activities[what] = current
            else:
                current.advance(done, now)
            self._activity = current
            if self._live and (now - self._shown_at >= REFRESH_S or done >= total):
                self._show()
            elif not self._live and now - max(self._shown_at, self._began) >= PIPE_S:
                self._shown_at = now
                self._line(MARGIN, ", ".join(self._at(now)))

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
        now = self._shown_at = monotonic()
        parts = self._at(now)
        columns, line = self._columns() - 1, f"{MARGIN}{self._stage:<{self._width}} {', '.join(parts[:1])}"
        for part in parts[1:]:
            line += f", {part}" if len(line) + len(part) + 2 <= columns else ""
        self._write(cut_to(columns, line))
        self._pending = True

    def _at(self, now: float) -> list[str]:
        """What the stage is at, for how long still, and how long it has run, the most important first."""
        parts = []
        if self._activity:
            whole = max(self._activities.values(), key=lambda activity: activity.left(now))
            own = whole is self._activity or not whole.left(now)
            parts = [self._activity.forecast(now)] if own else [whole.forecast(now), self._activity.count]
        spent = now - self._began
        return parts + ([f"{duration_text(spent)} so far"] if spent >= 1 else [])

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

    def _enter(self, stage: str) -> None:
        self._stage, self._began = stage, monotonic()
        self._activities, self._activity = {}, None

    def _number(self, name: str) -> str:
        """Of the next line of this name; where the first comes again, another build begins."""
        if [name] == self._stages[:1]:
            self._reached = 0
        if name in self._stages[self._reached :]:
            self._reached = self._stages.index(name, self._reached) + 1
        return f"[{self._reached:>2}/{len(self._stages)}]"


def _record_size(path: str) -> int:
    """A result without files is all in its record."""
    with suppress(OSError):
        return (Path(path) / "stage.json").stat().st_size
    return 0
