"""Ridge regression of a layer onto wanted outputs: normal equations summed in one pass, solved in float64.

W = argmin |U W - Y|^2 + ridge |W - W_start|^2 with U the layer's receptive fields and a column of ones for the bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cswap_deploy.errors import PruningError

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-4
"""Ridge relative to each input's own power; it pulls towards the weights that the layer had."""
SCARCE = 8
"""With fewer rows than this per unknown the ridge is stronger in proportion."""
PLAIN_COLUMNS = 1024
"""Columns up to which products are summed as they are. Rounding grows with what nearly alike columns have in common, and that with
their number; of more columns each block's mean is taken out first, and what it adds is computed in float64."""
WHOLE = 256
"""Columns up to which the square is one product; beyond it what is symmetric is not computed twice."""


@dataclass
class NormalEquations:
    """`gram` = U'U (columns + 1, columns + 1) and `cross` = U'Y (columns + 1, outputs); the last column of U is ones.

    float32 products of a block, float64 sums of blocks.
    """

    gram: Tensor
    cross: Tensor

    @staticmethod
    def empty(columns: int, outputs: int, device: str) -> NormalEquations:
        import torch

        gram = torch.zeros(columns + 1, columns + 1, dtype=torch.float64, device=device)
        return NormalEquations(gram, torch.zeros(columns + 1, outputs, dtype=torch.float64, device=device))

    def add(self, blocks: Iterable[tuple[Tensor, Tensor]], order: Tensor) -> None:
        """Blocks of (images, n, positions) fields and (images, outputs, positions) targets; `order` (n,): the column that each is.

        Columns that are not in `order` are never there.
        """
        import torch

        gram = self.gram.new_zeros(len(order), len(order))
        sums = self.gram.new_zeros(len(order))
        means: list[Tensor] = []
        halves: list[Tensor] = []
        for fields, targets in blocks:
            flat, mean = _about_mean(_rows(fields))
            gram += _square(flat)
            _add_cross(self.cross, flat, mean, _rows(targets), order)
            self.gram[-1, -1] += len(flat)
            left = flat.sum(0).double()
            sums += left + len(flat) * mean
            means.append(mean)
            halves.append(left + len(flat) / 2 * mean)
        if len(order) > PLAIN_COLUMNS and means:
            out, half = torch.stack(means), torch.stack(halves)
            gram.addmm_(half.T, out).addmm_(out.T, half)
        self.gram[order[:, None], order] += gram
        self.gram[order, -1] += sums
        self.gram[-1, order] += sums

    @property
    def rows(self) -> float:
        return float(self.gram[-1, -1])

    def ridge(self) -> Tensor:
        """(columns + 1,) what is added to the diagonal."""
        return ridge_of(self.gram.diagonal(), len(self.gram) - 1, self.rows)

    def regularised(self, index: Tensor) -> Tensor:
        """(n, n): the Gram matrix of the n columns of `index`, the ridge on its diagonal."""
        gram = self.gram[index[:, None], index]
        gram.diagonal().add_(self.ridge()[index])
        return gram

    def solve(self, columns: Sequence[int], start: Tensor) -> Tensor:
        """Weights (columns + 1, outputs) that use these columns and the bias alone; `start` (columns + 1, outputs)."""
        return self.nested(columns, start).leading()

    def nested(self, columns: Sequence[int], start: Tensor) -> Nested:
        """One factorisation for all leading parts of `columns`: the solutions without the last ones come almost free."""
        import torch

        index = torch.tensor([len(self.gram) - 1, *columns], device=self.gram.device)
        ridge = self.ridge()[index]
        factor, added = factorised(self.regularised(index))
        pull = (ridge + added)[:, None] * start.double()[index]
        half = torch.linalg.solve_triangular(factor, self.cross[index] + pull, upper=False)
        return Nested(index, factor, pull, half, len(self.gram))


@dataclass(frozen=True)
class Nested:
    """Cholesky factor L of the regularised normal equations in the order of `index`, and L^-1 of their right-hand side, in which the
    ridge has the part `pull`."""

    index: Tensor
    factor: Tensor
    pull: Tensor
    half: Tensor
    size: int

    def towards(self, cross: Tensor) -> Nested:
        """The same inputs with other targets."""
        import torch

        half = torch.linalg.solve_triangular(self.factor, cross[self.index] + self.pull, upper=False)
        return replace(self, half=half)

    def leading(self, count: int | None = None) -> Tensor:
        """Weights (columns + 1, outputs) in float32 that use the bias and the first `count` columns, or all; the others are 0."""
        import torch

        count = len(self.index) if count is None else count + 1
        found = torch.linalg.solve_triangular(self.factor[:count, :count].T, self.half[:count], upper=True)
        weights = torch.zeros(self.size, self.half.shape[1], dtype=torch.float32, device=self.half.device)
        weights[self.index[:count]] = found.float()
        return weights


def crossed(blocks: Iterable[tuple[Tensor, Tensor]], order: Tensor, like: Tensor) -> Tensor:
    """U'Y of blocks as in `NormalEquations.add`, with the shape of `like` (columns + 1, outputs)."""
    import torch

    found = torch.zeros_like(like)
    for fields, targets in blocks:
        _add_cross(found, *_about_mean(_rows(fields)), _rows(targets), order)
    return found


def factorised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a Gram matrix with its ridge, and what was added to its diagonal for that: nothing as a rule.

    Sums of float32 products leave a matrix of many nearly alike columns indefinite where rounding is larger than the ridge; ten,
    a hundred, ... times as much is added then. Errors: PruningError where that does not help.
    """
    import torch

    factor, failed = torch.linalg.cholesky_ex(matrix)
    added, more = torch.zeros_like(matrix.diagonal()), RIDGE
    while int(failed) and more < 1:
        more *= 10
        added = more * matrix.diagonal()
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag(added))
    if int(failed):
        raise PruningError(
            f"the normal equations of a layer of {len(matrix) - 1} inputs cannot be solved: its values are no finite numbers",
            "check the network's outputs on these images, or set prune.compensate: none",
        )
    return factor, added


def ridge_of(power: Tensor, columns: int, rows: float) -> Tensor:
    """What is added to the diagonal `power`, of any shape, of the normal equations of so many columns and rows."""
    live = power[power > 0]
    scarcity = max(1.0, SCARCE * columns / max(1.0, rows))
    return RIDGE * scarcity * (power + 1e-3 * (live.mean() if len(live) else 1.0))


def _about_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, columns) without their mean where the columns are many, and what was taken out (columns,), in float64."""
    if rows.shape[1] <= PLAIN_COLUMNS:
        return rows, rows.new_zeros(rows.shape[1]).double()
    mean = rows.mean(0)
    return rows - mean, mean.double()


def _add_cross(cross: Tensor, rows: Tensor, mean: Tensor, wanted: Tensor, order: Tensor) -> None:
    """Rows (n, columns) that are without their `mean`; `wanted` (n, outputs)."""
    total = wanted.sum(0, dtype=cross.dtype)
    cross[order] += (rows.T @ wanted).double().addr_(mean, total)
    cross[-1] += total


def _rows(values: Tensor) -> Tensor:
    """(images, n, positions) as (rows, n)."""
    return values.transpose(1, 2).reshape(values.shape[0] * values.shape[2], values.shape[1])


def _square(rows: Tensor) -> Tensor:
    """(n, n): U'U of (rows, n), whose halves are computed once."""
    columns = rows.shape[1]
    if columns <= WHOLE:
        return rows.T @ rows
    left, right = rows[:, : columns // 2], rows[:, columns // 2 :]
    found = rows.new_empty(columns, columns)
    half = left.shape[1]
    found[:half, :half], found[half:, half:] = _square(left), _square(right)
    found[:half, half:] = left.T @ right
    found[half:, :half] = found[:half, half:].T
    return found
