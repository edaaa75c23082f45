"""Ridge regression from summed normal equations: against numpy's least squares on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cswap_deploy.errors import PruningError
from cswap_deploy.prune.least_squares import PLAIN_COLUMNS, RIDGE, SCARCE, WHOLE, NormalEquations, crossed, factorised

COLUMNS, OUTPUTS = 6, 3
NATURAL = torch.arange(COLUMNS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def system(images: int = 40, positions: int = 4) -> tuple[NormalEquations, Tensor, Tensor]:
    """Equations of two unequal blocks, and their rows (rows, columns + 1) with ones and targets (rows, outputs) in float64."""
    scale = torch.tensor([1.0, 0.1, 3.0, 1.0, 0.5, 2.0])[:, None]
    fields = random(images, COLUMNS, positions) * scale + 0.3
    targets = random(images, OUTPUTS, positions, seed=1) + fields[:, :OUTPUTS] * 2
    equations = NormalEquations.empty(COLUMNS, OUTPUTS, "cpu")
    third = images // 3
    equations.add([(fields[:third], targets[:third]), (fields[third:], targets[third:])], NATURAL)
    rows, wanted = (values.movedim(1, -1).flatten(0, 1).double() for values in (fields, targets))
    return equations, torch.cat([rows, rows.new_ones(len(rows), 1)], 1), wanted


def by_numpy(rows: Tensor, wanted: Tensor, ridge: Tensor, start: Tensor, columns: list[int]) -> Tensor:
    """Least squares on the rows with those of the ridge below them; the last column is the bias."""
    left = [*columns, COLUMNS]
    root = ridge.sqrt()[left]
    stacked = np.concatenate([rows[:, left].numpy(), np.diag(root.numpy())])
    below = (root[:, None] * start[left]).numpy()
    found = np.linalg.lstsq(stacked, np.concatenate([wanted.numpy(), below]), rcond=None)[0]
    whole = torch.zeros_like(start)
    whole[left] = torch.from_numpy(found)
    return whole


@pytest.mark.parametrize("columns", [list(range(COLUMNS)), [4, 0, 3], [2], []], ids=str)
def test_the_solution_is_that_of_numpy_on_the_rows(columns: list[int]) -> None:
    equations, rows, wanted = system()
    start = random(COLUMNS + 1, OUTPUTS, seed=2).double()
    found = equations.solve(columns, start)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), by_numpy(rows, wanted, equations.ridge(), start, columns), atol=1e-5)
    gone = [column for column in range(COLUMNS) if column not in columns]
    assert not found[gone].any()


def test_sums_count_every_row_once() -> None:
    equations, rows, wanted = system(images=7, positions=3)
    assert equations.rows == 21
    assert torch.allclose(equations.gram, rows.T @ rows, atol=1e-4)
    assert torch.allclose(equations.cross, rows.T @ wanted, atol=1e-4)


def test_the_ridge_costs_almost_nothing_where_rows_are_many() -> None:
    equations, rows, wanted = system(images=200)
    found = equations.solve(range(COLUMNS), torch.zeros(COLUMNS + 1, OUTPUTS)).double()
    best = torch.linalg.lstsq(rows, wanted).solution
    assert (rows @ found - wanted).norm() <= 1.0001 * (rows @ best - wanted).norm()


@pytest.mark.parametrize("count", range(COLUMNS + 1))
def test_leading_columns_are_the_solution_on_them_alone(count: int) -> None:
    equations, rows, wanted = system()
    start = random(COLUMNS + 1, OUTPUTS, seed=2).double()
    order = [3, 0, 5, 1, 4, 2]
    nested = equations.nested(order, start)
    expected = by_numpy(rows, wanted, equations.ridge(), start, order[:count])
    assert torch.allclose(nested.leading(count).double(), expected, atol=1e-5)


def test_other_targets_reuse_the_factor() -> None:
    equations, _, _ = system()
    other, start = random(COLUMNS + 1, OUTPUTS, seed=4).double(), random(COLUMNS + 1, OUTPUTS, seed=2)
    columns = [4, 0, 3]
    found = equations.nested(columns, start).towards(other).leading()
    assert torch.equal(found, NormalEquations(equations.gram, other).solve(columns, start))
    assert not torch.allclose(found, equations.solve(columns, start), atol=1e-3)


def test_without_rows_the_weights_stay_what_they_were() -> None:
    start = random(COLUMNS + 1, OUTPUTS).double()
    found = NormalEquations.empty(COLUMNS, OUTPUTS, "cpu").solve([1, 2, 5], start)
    assert torch.allclose(found[[1, 2, 5, 6]], start[[1, 2, 5, 6]].float())
    assert not found[[0, 3, 4]].any()


def test_an_input_that_is_never_there_keeps_its_weight() -> None:
    equations = NormalEquations.empty(2, 1, "cpu")
    fields = torch.stack([random(50), torch.zeros(50)], 1)[:, :, None]
    equations.add([(fields, 2 * fields[:, :1])], torch.arange(2))
    found = equations.solve([0, 1], torch.tensor([[0.0], [7.0], [0.0]]))
    assert found[:, 0].tolist() == pytest.approx([2, 7, 0], abs=1e-3)


def test_scarce_rows_are_pulled_harder_in_proportion() -> None:
    few, plenty = system(images=5, positions=2)[0], system(images=200)[0]
    power = few.gram.diagonal()
    expected = RIDGE * SCARCE * (COLUMNS / 10) * (power + 1e-3 * power.mean())
    assert torch.allclose(few.ridge(), expected)
    assert torch.allclose(plenty.ridge(), RIDGE * (plenty.gram.diagonal() + 1e-3 * plenty.gram.diagonal().mean()))


def test_another_target_reuses_the_gram_matrix() -> None:
    equations, rows, wanted = system()
    fields = rows[:, :-1].float().T[None]
    again = crossed([(fields, wanted.float().T[None])], NATURAL, equations.cross)
    assert torch.allclose(again, equations.cross, atol=1e-3)


def test_columns_come_in_any_order_and_those_that_do_not_come_are_zero() -> None:
    fields, targets = random(30, COLUMNS, 4), random(30, OUTPUTS, 4, seed=1)
    order = torch.tensor([4, 0, 3])
    found, expected = (NormalEquations.empty(COLUMNS, OUTPUTS, "cpu") for _ in range(2))
    found.add([(fields[:, order], targets)], order)
    thinned = torch.zeros_like(fields)
    thinned[:, order] = fields[:, order]
    expected.add([(thinned, targets)], NATURAL)
    assert torch.allclose(found.gram, expected.gram, atol=1e-4)
    assert torch.allclose(found.cross, expected.cross, atol=1e-4)


@pytest.mark.parametrize("columns", [WHOLE, WHOLE + 1, 2 * WHOLE + 3])
def test_the_square_of_many_columns_is_that_of_one_product(columns: int) -> None:
    rows = random(50, columns)
    equations = NormalEquations.empty(columns, 1, "cpu")
    equations.add([(rows.T[None], rows[:, :1].T[None])], torch.arange(columns))
    assert torch.allclose(equations.gram[:-1, :-1], (rows.T @ rows).double(), atol=1e-4)


def test_rounding_of_many_alike_columns_is_of_what_sets_them_apart() -> None:
    columns = PLAIN_COLUMNS + 6
    rows = 30 + random(1500, columns) / 10
    rows[400:, :30] = 0  # of the first block alone
    targets = rows[:, :2] + random(len(rows), 2, seed=1) / 10
    order = random(columns, seed=2).argsort()
    equations = NormalEquations.empty(columns, 2, "cpu")
    for first, last in ((0, 900), (900, 1500)):  # rows are counted on from one call to the next
        pairs = zip(rows[first:last, order].split(400), targets[first:last].split(400), strict=True)
        equations.add([(fields.T[None], wanted.T[None]) for fields, wanted in pairs], order)
    whole = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    gram, cross = whole.double().T @ whole.double(), whole.double().T @ targets.double()
    plainly = ((whole.T @ whole).double() - gram).abs().max(), ((whole.T @ targets).double() - cross).abs().max()
    assert float((equations.gram - gram).abs().max()) < 0.01 * float(plainly[0])
    assert float((equations.gram - gram)[:30, :30].abs().max()) < 1e-6 * float(gram[0, 0])
    assert float((equations.cross - cross).abs().max()) < 0.01 * float(plainly[1])
    pairs = zip(rows[:, order].split(400), targets.split(400), strict=True)
    again = crossed([(fields.T[None], wanted.T[None]) for fields, wanted in pairs], order, cross)
    assert float((again - cross).abs().max()) < 0.01 * float(plainly[1])


# --- what rounding leaves of the matrix


def test_a_definite_matrix_is_factorised_as_it_is() -> None:
    equations, _, _ = system()
    matrix = equations.regularised(torch.arange(COLUMNS + 1))
    factor, added = factorised(matrix)
    assert torch.equal(factor, torch.linalg.cholesky(matrix)) and not added.any()


@pytest.mark.parametrize("error", [1e-3, 1e-2, 0.3])
def test_a_matrix_that_rounding_left_indefinite_is_made_definite_by_what_it_takes(error: float) -> None:
    """All columns are one; what is wrong with their products is larger than the ridge."""
    matrix = torch.ones(50, 50, dtype=torch.float64)
    matrix.diagonal().mul_(1 - error)
    factor, added = factorised(matrix)
    assert torch.allclose(factor @ factor.T, matrix + torch.diag(added)) and error < float(added[0]) <= 10 * error


def test_alike_columns_with_rounding_errors_are_solved_near_to_where_they_were() -> None:
    equations, start = NormalEquations.empty(40, 2, "cpu"), random(41, 2, seed=3)
    fields = (1 + 1e-4 * random(500, 1, 4)).expand(500, 40, 4)
    targets = (start[:40].T @ fields[:, :40]) + start[40][:, None]
    equations.add([(fields, targets)], torch.arange(40))
    equations.gram[:40, :40].diagonal().mul_(1 - 1e-3)
    assert int(torch.linalg.cholesky_ex(equations.regularised(torch.arange(41))).info)
    found = equations.solve(range(40), start)
    fitted = found[:40].T @ fields + found[40][:, None]
    assert torch.allclose(fitted, targets, rtol=0, atol=0.02 * float(targets.abs().max()))


def test_values_that_are_no_numbers_are_told() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[2, 2] = torch.nan
    with pytest.raises(PruningError, match=r"a layer of 3 inputs .* no finite numbers"):
        factorised(matrix)
