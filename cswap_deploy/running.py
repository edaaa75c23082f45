"""A run as the command line asks for it: the recipe with its overrides, the work folder, the target."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import UsageError

if TYPE_CHECKING:
    from cswap_deploy.recipe import Recipe


def require_target(name: str | None) -> None:
    from cswap_deploy.recipe import TARGET

    if name is not None and not re.fullmatch(TARGET, name):
        raise UsageError(
            f"--on: {name!r} is no target", "give local or ssh://[user@]host[:port]; no user or host starts with '-'"
        )


def load(path: Path, work: Path | None, overrides: list[str] | None, on: str | None) -> tuple[Recipe, Path]:
    from cswap_deploy import recipe as recipes

    require_target(on)
    recipe = recipes.load(path, [*(overrides or ()), *([f"latency.target={json.dumps(on)}"] if on else ())])
    return recipe, work or Path("runs") / recipe.name


def moved(recipe: Recipe, target: str) -> Recipe:
    """The recipe on this target. Errors: UsageError where a measurement with the defaults does not fit it."""
    try:
        return recipe.on(target)
    except ValueError as error:  # pydantic's
        faults = "; ".join(fault["msg"] for fault in getattr(error, "errors", list)()) or str(error)
        raise UsageError(
            f"--on {target}: {faults}", "add a latency block to the recipe and run prepare again"
        ) from error


@contextmanager
def opened(recipe: Recipe, folder: Path, force: list[str] | None, silent: bool) -> Iterator[Any]:
    """An open work folder whose stages are reported on standard error."""
    from cswap_deploy import outline
    from cswap_deploy.console import Console
    from cswap_deploy.progress import reporting
    from cswap_deploy.stage import Workdir

    require_known_stages(force or [], outline.stages(recipe))
    work = Workdir(folder, force or ())
    with closing(Console(outline.lines(recipe), silent=silent)) as console, reporting(console), work.open():
        yield work


def require_known_stages(force: list[str], stages: Sequence[str]) -> None:
    from cswap_deploy.outline import STAGES

    for name in force:
        if name not in stages:
            known = "does not run for this recipe" if name in STAGES else "is not a stage"
            raise UsageError(f"--force: {name!r} {known}", f"this recipe runs {', '.join(stages)}")
