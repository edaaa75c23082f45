"""The files and folders that a recipe names: all that are wrong are told at once, each with the nearest name that is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from stat import S_ISDIR
from typing import Literal

from cswap_deploy.errors import CswapError, DataError, ModelError
from cswap_deploy.recipe import Recipe
from cswap_deploy.wording import printable

Kind = Literal["file", "folder"]


@dataclass(frozen=True)
class _Named:
    key: str
    path: Path
    kind: Kind
    error: type[CswapError]
    """Of a build that meets this fault alone."""


def require_paths(recipe: Recipe) -> None:
    """Errors: DataError where the images or their labels are among what is wrong, else ModelError; a line for every path."""
    found = [(named, fault) for named in _named(recipe) if (fault := _fault(named.path, named.kind))]
    if not found:
        return
    lines = [f"{recipe.where(named.key)}: {named.key}: {printable(str(named.path))} {fault}" for named, fault in found]
    keys = " and ".join(named.key for named, _ in found)
    start = "relative paths start at the recipe's folder, those of --set at the current one"
    raise min((named.error for named, _ in found), key=lambda error: error.exit_code)(
        "\n".join(lines), f"correct {keys}; {start}"
    )


def _named(recipe: Recipe) -> Iterator[_Named]:
    model, calibration = recipe.model, recipe.calibration
    if model.factory_file is not None:
        yield _Named("model.factory", model.factory_file, "file", ModelError)
    if model.checkpoint is not None:
        yield _Named("model.checkpoint", model.checkpoint, "file", ModelError)
    yield _Named("calibration.images", calibration.images, "folder", DataError)
    if calibration.labels is not None:
        yield _Named("calibration.labels", calibration.labels, "file", DataError)


def _fault(path: Path, kind: Kind) -> str:
    """What is wrong with it, or nothing."""
    try:
        found = "folder" if S_ISDIR(path.stat().st_mode) else "file"
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {printable(str(path.readlink()))}, which does not exist"
        near = _nearest(path, kind)
        return f"does not exist; did you mean {near!r}?" if near else "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if found == kind else f"is a {found}, expected a {kind}"


def _nearest(path: Path, kind: Kind) -> str:
    """A similar name beside the first part of the path that is not there; as a path unless it is the last part."""
    above = next(parent for parent in path.parents if parent.is_dir())
    wrong, *rest = path.relative_to(above).parts
    try:
        names = [entry.name for entry in above.iterdir() if entry.is_dir() == (kind == "folder" or bool(rest))]
    except OSError:
        return ""
    near = [above.joinpath(name, *rest) for name in get_close_matches(wrong, sorted(names), n=3)]
    whole = next((candidate for candidate in near if candidate.exists()), None)
    return "" if whole is None else str(whole) if rest else whole.name
