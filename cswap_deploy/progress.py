"""What a run tells the one who waits. Libraries speak through `note`, `warn` and `advance`; only the command line prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol


class Reporter(Protocol):
    """Receives the events of a run, in order; must not raise."""

    def stage_started(self, name: str, reason: str) -> None:
        """A stage begins; `name` tells its part too, `reason` why it cannot be taken from the work folder."""

    def stage_finished(self, name: str, seconds: float | None, path: str, size: int) -> None:
        """A stage ended; `seconds` is None when its stored result was up to date; `size` in bytes."""

    def note(self, message: str) -> None:
        """One line worth reading, numbers with units."""

    def warn(self, message: str) -> None:
        """Something the user should know although the run goes on."""

    def advance(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of `what`."""


class Silent:
    """Swallows everything; what library users get by default."""

    def stage_started(self, name: str, reason: str) -> None:
        pass

    def stage_finished(self, name: str, seconds: float | None, path: str, size: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    def advance(self, what: str, done: int, total: int) -> None:
        pass


@dataclass
class Recording:
    """Keeps every event as a tuple; for tests and for those who drive a run from their own program."""

    events: list[tuple[str, ...]] = field(default_factory=list)

    def stage_started(self, name: str, reason: str) -> None:
        self.events.append(("started", name, reason))

    def stage_finished(self, name: str, seconds: float | None, path: str, size: int) -> None:
        self.events.append(("up to date" if seconds is None else "finished", name, path))

    def note(self, message: str) -> None:
        self.events.append(("note", message))

    def warn(self, message: str) -> None:
        self.events.append(("warn", message))

    def advance(self, what: str, done: int, total: int) -> None:
        self.events.append(("advance", what, f"{done}/{total}"))

    def of(self, kind: str) -> list[str]:
        """The second field of all events of one kind."""
        return [event[1] for event in self.events if event[0] == kind]


_current: ContextVar[Reporter] = ContextVar("reporter", default=Silent())  # noqa: B039 - Silent has no state
_parts: ContextVar[tuple[str, ...]] = ContextVar("parts", default=())


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send the events of everything inside the block to `reporter`."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """A stage that runs inside the block is one of several of its name: it is reported as `exported (dense)`."""
    token = _parts.set((name, *_parts.get()))
    try:
        yield
    finally:
        _parts.reset(token)


def named(stage: str) -> str:
    """The stage with the part of it that runs."""
    return spelt(stage, *_parts.get())


def spelt(stage: str, *parts: str) -> str:
    """`exported`, `exported (dense)`, `variants (int8, dense)`."""
    return f"{stage} ({', '.join(parts)})" if parts else stage


def current() -> Reporter:
    return _current.get()


def note(message: str) -> None:
    current().note(message)


def warn(message: str) -> None:
    current().warn(message)


def advance(what: str, done: int, total: int) -> None:
    current().advance(what, done, total)
