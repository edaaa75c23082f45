"""A user's factory: found, imported and called. It is trusted like the recipe; what it does wrong is said in its own terms."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import ModelError, reason

if TYPE_CHECKING:
    from torch import nn


def call_factory(reference: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The module, in eval mode, that `/path/file.py:function` or `package.module:function` returns. Errors: ModelError."""
    from torch import nn

    place, function = reference.rsplit(":", 1)
    is_file = place.endswith(".py")
    with _importable(Path(place).parent) if is_file else nullcontext():
        namespace = _import_file(Path(place)) if is_file else _import_module(place)
        factory = _find_factory(namespace, place, function)
        try:
            inspect.signature(factory).bind(**kwargs)
        except TypeError as error:
            raise ModelError(
                f"factory {reference!r} does not take these arguments: {error}",
                "correct model.kwargs; model.num_classes is given as an argument of that name, so leave it out, or take it",
                key="model.num_classes" if "'num_classes'" in str(error) else "model.kwargs",
            ) from error
        try:
            module = factory(**kwargs)
        except (Exception, SystemExit) as error:
            message = f"factory {reference!r} failed: {_failure(error, getattr(namespace, '__file__', None))}"
            raise ModelError(message, "correct the factory, or model.kwargs") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"factory {reference!r} returned {type(module).__name__}", "it must return a torch.nn.Module")
    return module.eval()


def code_files(reference: str | None) -> tuple[Path, ...]:
    """The user's own files behind a factory: its file and those that it reaches by its imports; a result depends on them.

    Of `file.py:function` what lies in its folder counts, of `package.module:function` what lies in that package.
    """
    place = (reference or "").rpartition(":")[0]
    if place.endswith(".py"):
        start, base, own = Path(place), Path(place).parent, None
    else:
        found = _origin(place) if place else None
        if found is None:
            return ()
        start, base = found
        own = place.split(".")[0]
    reached: set[Path] = set()
    waiting = [start] if start.is_file() else []
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += _imported(file, base, own)
    return tuple(sorted(reached))


def _origin(module: str) -> tuple[Path, Path] | None:
    """A module's file, and the folder in which its top-level package lies."""
    try:
        spec, top = importlib.util.find_spec(module), importlib.util.find_spec(module.split(".")[0])
    except (ImportError, ValueError):
        return None  # calling it will say so
    if spec is None or spec.origin is None or top is None:
        return None
    places = list(top.submodule_search_locations or ())
    base = Path(places[0]).parent if places else Path(spec.origin).parent
    return Path(spec.origin), base


def _imported(source: Path, base: Path, own: str | None) -> Iterator[Path]:
    """Files below `base` that a source text imports; `own` limits them to one top-level package."""
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # importing it will say so
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names = [(base, alias.name) for alias in node.names]
            case ast.ImportFrom():
                folder = base if node.level == 0 else source.parents[node.level - 1]
                parts = [node.module] if node.module else []
                names = [(folder, ".".join([*parts, *last])) for alias in node.names for last in ([], [alias.name])]
            case _:
                continue
        for folder, name in names:
            if own is None or folder != base or name.split(".")[0] == own:
                yield from _module_files(folder, name)


def _module_files(folder: Path, name: str) -> Iterator[Path]:
    """The module's file and the __init__.py of every package on the way to it."""
    for part in filter(None, name.split(".")):
        candidates = (folder / f"{part}.py", folder / part / "__init__.py")
        yield from (path for path in candidates if path.is_file())
        folder = folder / part


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """A factory's file may import what lies beside it; afterwards nothing of it is left in the interpreter or on disk."""
    path, known, unwritten = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, unwritten
        new = set(sys.modules) - known
        beside = {name for name in new if "." not in name and _lies_in(sys.modules[name], folder)}
        for name in new:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Directly: an environment that lies further down in the folder is not the factory's."""
    places = [*getattr(module, "__path__", ()), *filter(None, [getattr(module, "__file__", None)])]
    return any(Path(place).parent == folder for place in places)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(
            f"factory file {path} does not exist", "correct model.factory; its path starts at the recipe's folder"
        )
    name = f"cswap_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    sys.modules[name] = namespace
    try:
        spec.loader.exec_module(namespace)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"factory file {path} cannot be imported: {_failure(error, str(path))}", "correct the file"
        ) from error
    return namespace


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"factory module {name!r} cannot be imported: {reason(error)}", "install it, or correct model.factory"
        ) from error


def _find_factory(namespace: Any, place: str, function: str) -> Callable[..., Any]:
    factory = getattr(namespace, function, None)
    if not callable(factory):
        names = [name for name in dir(namespace) if callable(getattr(namespace, name)) and not name.startswith("_")]
        near = difflib.get_close_matches(function, names, 1)
        raise ModelError(
            f"factory {place!r} has no function {function!r}",
            f"did you mean {near[0]!r}?" if near else "name a function that returns a torch.nn.Module",
        )
    result: Callable[..., Any] = factory
    return result


def _failure(error: BaseException, file: str | None) -> str:
    """What went wrong, and in which line of the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{reason(error)} (line {lines[-1]})" if lines else reason(error)
