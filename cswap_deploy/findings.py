"""What `doctor` says about one topic, and how it spells versions and sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "problem", "note"]


@dataclass(frozen=True)
class Finding:
    """`missing`: not installed; `problem`: there, but it will not do; `note`: works, with something to know.

    `fix`: one exact command or sentence; empty exactly where the state is ok.
    """

    topic: str
    state: State
    text: str
    fix: str


def ok(topic: str, text: str) -> Finding:
    return Finding(topic, "ok", text, "")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `10.3.0` → (10, 3, 0); empty where it has none."""
    found = re.match(r"\d{1,9}(?:\.\d{1,9}){0,8}", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def size_text(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


def or_unknown(value: float | str | None) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
