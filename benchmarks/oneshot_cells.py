"""The results file of the one-shot benchmark: one JSON line for each network that was pruned and judged.

Lines are appended as cells finish, so that a run goes on where it was stopped and may be split over several. What was made by
other code, or judged on other images, does not count as done and is not shown.
"""

from __future__ import annotations

import ast
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cswap_deploy.digests import digest_of
from cswap_deploy.recipe import PruneSettings

Bools = npt.NDArray[np.bool_]
HERE = Path(__file__).parent
BARE = tuple(
    f"prune/{name}.py"
    for name in "batches cut groups dims rules arranging tracing attributes proposals proof costs".split()
)
"""All of the package that torch-pruning's own pruner meets here."""


class Key(NamedTuple):
    """Which cell: `seed` None stands for every seed, `stride` is the fraction of the cost that leaves in a step, 1 all at once."""

    net: str
    judge: str
    target: str
    cut: float
    method: str
    column: str
    seed: int | None
    stride: float


@dataclass(frozen=True)
class Cell:
    """`correct` and `keep` are packed bits: images that are right, in the order of their paths; units that stay, by group.

    `agree` counts images whose class is the dense network's, `kl` is summed over the images (nats, softened, paired.divergence);
    `macs` and `params` are fractions of the dense network's; `seconds` are all it took to prune, from the dense network on.
    `refused`: why there is no such network; the rest is then empty.
    """

    key: Key
    code: str
    judged: str
    images: int
    correct: str = ""
    agree: int = 0
    kl: float = 0.0
    macs: float = 0.0
    params: float = 0.0
    seconds: float = 0.0
    keep: str = ""
    refused: str = ""
    conditions: dict[str, Any] | None = None

    @property
    def right(self) -> Bools:
        """(images,)"""
        return unpacked(self.correct, self.images)

    @property
    def units(self) -> Bools:
        """Of all groups in turn, which stay."""
        bits = base64.b64decode(self.keep)
        return unpacked(self.keep, 8 * len(bits))


def packed(bits: Bools) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpacked(text: str, count: int) -> Bools:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(np.bool_)


@dataclass
class Results:
    """The cells of a file; of several with one key and code the last counts."""

    path: Path
    cells: dict[tuple[Key, str, str], Cell]

    @staticmethod
    def read(path: Path) -> Results:
        """A last line that an interruption cut short is passed over."""
        cells: dict[tuple[Key, str, str], Cell] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                document = json.loads(line)
            except ValueError:
                continue
            cell = Cell(**{**document, "key": Key(**document["key"])})
            cells[_place(cell)] = cell
        return Results(path, cells)

    def add(self, cell: Cell) -> None:
        self.cells[_place(cell)] = cell
        document = {field.name: getattr(cell, field.name) for field in fields(cell)} | {"key": cell.key._asdict()}
        ended = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(("" if ended else "\n") + json.dumps(document) + "\n")

    def find(self, key: Key, code: str, judged: str) -> Cell | None:
        return self.cells.get((key, code, judged))

    def of(self, judge: str) -> tuple[list[Cell], list[Cell]]:
        """Those of the present code, and all others, judged on this part of the images."""
        parts: tuple[list[Cell], list[Cell]] = ([], [])
        for cell in self.cells.values():
            if cell.key.judge == judge:
                parts[cell.code != code_of(cell.key.method, cell.key.column)].append(cell)
        return parts


def _place(cell: Cell) -> tuple[Key, str, str]:
    return cell.key, cell.code, cell.judged


# --- what a cell was made by


def code_of(method: str, column: str) -> str:
    """Digest of the code and the default settings that a cell depends on, as they were when it was first asked for.

    Comments, docstrings and layout do not count.
    """
    return "dense" if method == "dense" else _code(method == "ours", column == "bare")


@cache
def _code(ours: bool, bare: bool) -> str:
    package = HERE.parent / "cswap_deploy"
    own = [] if ours else [HERE / "peers.py"]
    if bare:
        return _digest([*(package / name for name in BARE), *own], "")
    settings = PruneSettings().model_dump_json(include={"criterion", "compensate", "allocation"})
    path = [HERE / "oneshot_paths.py", HERE / "oneshot_nets.py", package / "data.py", package / "images.py"]
    return _digest([*sorted((package / "prune").rglob("*.py")), *path, *own], settings)


def _digest(files: Sequence[Path], settings: str) -> str:
    return digest_of([settings, *(_plain(_stripped(path)) for path in files)])[:16]


def _plain(node: Any) -> Any:
    """A syntax tree as lists, without empty fields, of which Pythons have different ones."""
    if isinstance(node, ast.AST):
        return [
            type(node).__name__,
            *([name, _plain(value)] for name, value in ast.iter_fields(node) if value not in (None, [])),
        ]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)


def _stripped(path: Path) -> ast.Module:
    """The syntax tree without docstrings and other expressions that are only text."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return tree


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
