"""What the model card needs beside the manifest: Hugging Face's name of a licence, the classes that lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cswap_deploy.report.words import code, points

HUGGING_FACE = frozenset(
    (
        "apache-2.0 mit bsd bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 "
        "cc-by-nc-sa-4.0 gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 unlicense openrail"
    ).split()
)
"""Licences that their front matter may name; others are `other` with a name."""
SHOWN = 3


@dataclass(frozen=True)
class Card:
    license: str
    worst: str


def of(manifest: dict[str, Any]) -> Card:
    name = str(manifest["model"].get("license") or "").lower()
    lost = [each for each in manifest["accuracy"]["worst_classes"] if each["drop_pp"] > 0][:SHOWN]
    told = ", ".join(
        f"{code(each['label'])} {points(each['drop_pp'])} points of {each['images']} images" for each in lost
    )
    return Card(
        "unknown" if not name else name if name in HUGGING_FACE else "other",
        f"here most in {told}" if told else "here no class lost top-1",
    )
