"""The host's half, kept in the work folder so that `deploy` can go on from a copy of it on a machine without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cswap_deploy.artifacts import AccuracyReport, File, Groups, Network, OnnxModel, PruningPlan
from cswap_deploy.budget.values import Budget
from cswap_deploy.codec import decode, encode
from cswap_deploy.digests import is_sealed, sealed, write_atomically
from cswap_deploy.errors import CswapError, UsageError, WorkdirError
from cswap_deploy.recipe import Recipe
from cswap_deploy.stage import Workdir

SCHEMA = "cswap-deploy/prepared/2"
NAME = "prepared.json"


@dataclass(frozen=True)
class Reason:
    """Why a bundle's verdict is not pass, and the exit code that this stands for."""

    exit_code: int
    text: str


@dataclass(frozen=True)
class Prepared:
    """The host's half: everything that the device's half and the bundle are made of."""

    recipe: str
    """The resolved recipe as the bundle shows it."""
    source: Network
    pruned: Network
    groups: Groups
    plan: PruningPlan
    exported: OnnxModel
    models: dict[str, OnnxModel]
    """The pruned network's ONNX files: `fp32` and the variants that could be made."""
    dense: dict[str, OnnxModel]
    """The dense network's, in what ships and what an engine is built from; empty when nothing is built or measured."""
    accuracy: AccuracyReport
    labels: tuple[str, ...]
    pixels: File | None
    """Hold-out images as the target's engine gets them, uint8 (n, C, H, W) in .npy; None when no engine is asked for."""
    reasons: tuple[Reason, ...]
    environment: dict[str, str]
    """Versions of Python and of the libraries that made this half."""
    budget: Budget | None = None
    """Where the recipe asks for a latency."""


def keep(work: Workdir, recipe: Recipe, ready: Prepared) -> None:
    """Write `<work>/prepared.json`; all paths in it are relative to the work folder."""
    document = {
        "schema": SCHEMA,
        "recipe": recipe.model_dump(mode="json"),
        "ready": encode(ready, work.root),
        "results": list(work.used),
    }
    write_atomically(work.root / NAME, json.dumps(sealed(document)))


def require(folder: Path) -> None:
    """Before the folder is opened, which makes a work folder of an empty one. Errors: UsageError."""
    if not (folder / NAME).is_file():
        hint = "give the work folder of a build, or first run: cswap-deploy prepare RECIPE"
        if (folder / "manifest.json").is_file():
            hint = f"this is a bundle; its work folder is {folder.parent}"
        raise UsageError(f"{folder} holds no prepared model", hint)


def find(work: Workdir) -> tuple[Recipe, Prepared]:
    """What `keep` wrote; its results are checked and stay. Errors: UsageError, WorkdirError."""
    recipe, ready, results = _read(work)
    work.reuse(results)
    return recipe, ready


def answer_to(recipe: Recipe, work: Workdir) -> Budget | None:
    """What came of this recipe's latency, where what `keep` wrote is of this very recipe."""
    try:
        stored, ready, _ = _read(work)
    except (CswapError, OSError):
        return None
    return ready.budget if stored == recipe else None


def _read(work: Workdir) -> tuple[Recipe, Prepared, list[str]]:
    """And the names of the results that it is made of."""
    require(work.root)
    path = work.root / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise WorkdirError(f"{path} has schema {document['schema']!r}, expected {SCHEMA!r}", "run prepare again")
        if not is_sealed(document):
            raise ValueError("it is not as it was written")
        recipe = Recipe.model_validate_json(json.dumps(document["recipe"]))
        ready, results = decode(Prepared, document["ready"], work.root), [str(name) for name in document["results"]]
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise WorkdirError(
            f"{path} cannot be read: {error}", "copy the work folder again, or run prepare again"
        ) from error
    return recipe, ready, results
