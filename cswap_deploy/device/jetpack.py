"""Which JetPack a release of L4T belongs to, from NVIDIA's package indexes; what is not among them is not guessed."""

from __future__ import annotations

import re

JETPACKS = {
    "35.1": "5.0.2", "35.2": "5.1", "35.3": "5.1", "35.4": "5.1", "35.5": "5.1", "35.6": "5.1",
    "36.3": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5": "6.2.2",
    "38.2": "7.0", "38.4": "7.1", "39.2": "7.2",
}  # fmt: skip
"""L4T, or how it begins → JetPack."""


def jetpack_of(l4t: str | None) -> str | None:
    parts = re.findall(r"\d+", l4t or "")
    for prefix, name in JETPACKS.items():
        if parts[: prefix.count(".") + 1] == prefix.split("."):
            return name
    return None
