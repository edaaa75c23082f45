"""Digests of the package's own source files: a stage's result is stale when the code that made it has changed."""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
NEUTRAL = frozenset({"digests.py", "errors.py", "keys.py", "progress.py", "sources.py", "stage.py"})
"""Files that say and store things but change no result."""


@cache
def source_digests(module: str) -> dict[str, str]:
    """Short sha256 of every package file that `module` (dotted) reaches by its imports, wherever in it they stand.

    A module from outside the package, such as a user's own stage, counts by its file.
    """
    reached: dict[str, str] = {}
    waiting = [_file(module) if module.split(".")[0] == PACKAGE.name else Path(str(sys.modules[module].__file__))]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        if name in reached or name in NEUTRAL:
            continue
        source = path.read_bytes()
        reached[name] = hashlib.sha256(source).hexdigest()[:16]
        if path.suffix == ".py":
            waiting += [*package_imports(source), *sorted(path.parent.glob("templates/*"))]
    return dict(sorted(reached.items()))


def package_imports(source: bytes) -> list[Path]:
    """The package's files that a source text imports, at any depth."""
    found: list[Path] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [_file(name if _is_module(name) else node.module) for name in names]
        elif isinstance(node, ast.Import):
            found += [_file(alias.name) for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
    return found


def _is_module(name: str) -> bool:
    return _path(name).with_suffix(".py").exists() or (_path(name) / "__init__.py").exists()


def _file(module: str) -> Path:
    path = _path(module)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:])
