"""Digests of the package's own source files: a stage's result is stale when the code that made it has changed."""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent
NEUTRAL = frozenset({"errors.py", "progress.py", "sources.py", "stage.py"})
"""Files that say and store things but change no result."""


@lru_cache(maxsize=None)
def source_digests(module: str) -> dict[str, str]:
    """Short sha256 of every package file that `module` (dotted) reaches by its imports, wherever in it they stand."""
    reached: dict[str, str] = {}
    waiting = [_file(module)]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(PACKAGE).as_posix()
        if name in reached or name in NEUTRAL:
            continue
        source = path.read_bytes()
        reached[name] = hashlib.sha256(source).hexdigest()[:16]
        waiting += package_imports(source)
    return dict(sorted(reached.items()))


def package_imports(source: bytes) -> list[Path]:
    """The package's files that a source text imports, at any depth."""
    found: list[Path] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [_file(name) for name in names if _is_module(name)] or [_file(node.module)]
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
