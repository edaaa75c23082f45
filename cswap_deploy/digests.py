"""Digests of files and of plain data, remembered between runs, and the small JSON files of a work folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from cswap_deploy.artifacts import sha256_of
from cswap_deploy.codec import canonical

T = TypeVar("T")

RACY_NS = 2_000_000_000
"""A file changed less than this ago may change again within one tick of its times; its digest is not remembered."""


class Digests:
    """sha256 of files by path, size, mtime and ctime."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        self._known = load_json(path, dict[str, tuple[int, int, int, str]]) or {}

    def of(self, path: Path) -> str:
        """Hex sha256 of a file, or of a folder's tree of names and contents; links are followed, hidden files left out."""
        if path.is_dir():
            tree = sorted(child for child in _walk(path) if child.is_file())
            return digest_of([[child.relative_to(path).as_posix(), self.of(child)] for child in tree])
        status = path.stat()
        mark = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        name = str(path.absolute())
        known = self._known.get(name)
        if known and known[:3] == mark:
            return known[3]
        digest = sha256_of(path)
        if abs(time.time_ns() - max(mark[1:])) > RACY_NS:
            self._known[name] = (*mark, digest)
            self._changed = True
        return digest

    def save(self) -> None:
        if self._changed:
            known = {path: mark for path, mark in self._known.items() if Path(path).exists()}
            write_atomically(self._path, json.dumps(known))


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files below a folder, links followed but not back to a folder above; hidden ones left out."""
    real = folder.resolve()
    for child in folder.iterdir() if real not in above else ():
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _walk(child, above | {real})
        else:
            yield child


def load_json(path: Path, kind: type[T]) -> T | None:
    """What a JSON file of the work folder holds; None when it is absent or not as we write it."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def digest_of(data: Any) -> str:
    """sha256 of plain JSON data."""
    return hashlib.sha256(canonical(data).encode(errors="surrogatepass")).hexdigest()


SEAL = "sha256"
"""Key under which a JSON object carries the digest of the rest of it."""


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The object with its seal: later damage to any value of it can be told, spelling and order do not count."""
    return {**document, SEAL: digest_of({key: value for key, value in document.items() if key != SEAL})}


def is_sealed(document: dict[str, Any]) -> bool:
    """Whether the object is as it was when it was sealed."""
    try:
        return bool(document.get(SEAL) == sealed(document)[SEAL])
    except (ValueError, RecursionError):  # not a number
        return False


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
