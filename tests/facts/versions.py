"""What one version of the Python module `tensorrt` has, read from tensorrt.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FACTS = json.loads(Path(__file__).with_name("tensorrt.json").read_text("utf-8"))


@dataclass(frozen=True)
class Facts:
    """What one version has."""

    version: str

    def has(self, name: str) -> bool:
        return any(name in FACTS[part] and self._in(FACTS[part][name]["in"]) for part in ("classes", "enums"))

    def member(self, owner: str, name: str) -> str | None:
        """Its text as in tensorrt.json; None: the version does not have it."""
        if owner == "":
            return members("module", "", self.version).get(name) or (f"class {name}" if self.has(name) else None)
        if not self.has(owner):
            return None
        if owner in FACTS["enums"]:
            known = dict.fromkeys(members("enums", owner, self.version), f"= {owner}")
            return (known | {"name": "str", "value": "int"}).get(name)
        return self.members(owner).get(name)

    def members(self, owner: str) -> dict[str, str]:
        """All members of a class, inherited ones too."""
        own = dict(members("classes", owner, self.version))
        found: dict[str, str] = {}
        for base in own.pop("__bases__", "").split():
            found |= self.members(base)
        return found | own

    def _in(self, versions: str) -> bool:
        return versions == "*" or self.version in versions.split()


@cache
def members(part: str, name: str, version: str) -> dict[str, str]:
    """The members of a class, of an enum (their texts are empty) or of the module in one version; not to be changed."""
    groups = FACTS[part][name]["members"] if name else FACTS[part]
    found: dict[str, str] = {}
    for versions, group in groups.items():
        if versions == "*" or version in versions.split():
            found |= group if isinstance(group, dict) else dict.fromkeys(group.split(), "")
    return found


def overloads(text: str) -> list[str]:
    """The signatures of a method's text: `(a: int) -> bool`."""
    return ["(" + part for part in re.split(r"(?:^| \| )\(", text) if part]


def parameters(signature: str) -> tuple[list[str], int]:
    """Names, and how many of them have no default."""
    inside = signature.partition(" -> ")[0][1:].rpartition(")")[0]
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", inside) if part.strip()]
    return [part.partition(":")[0].partition("=")[0].strip() for part in parts], sum("=" not in part for part in parts)


def takes(signature: str, positional: int, keywords: set[str]) -> bool:
    names, needed = parameters(signature)
    given = set(names[:positional]) | keywords
    return positional <= len(names) and given <= set(names) and not keywords & set(names[:positional]) \
        and set(names[:needed]) <= given  # fmt: skip
