"""The order in which units leave: against each candidate's system solved anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cswap_deploy.prune import elimination
from cswap_deploy.prune.elimination import Consumer, leaving_costs


def consumer(rows: Tensor, weight: Tensor, owned: list[list[int]]) -> Consumer:
    """Of the rows (rows, columns) with ones beside them, almost without a ridge."""
    whole = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).double()
    gram = whole.T @ whole
    gram += torch.diag(1e-9 * gram.diagonal().mean() * torch.ones(len(gram)).double())
    weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
    return Consumer(gram, weight, torch.tensor(owned), float(len(rows)))


def made_up(units: int, repeat: int, outputs: int, seed: int, others: int = 2) -> Consumer:
    """Correlated inputs; `others` columns belong to no candidate."""
    generator = torch.Generator().manual_seed(seed)
    columns = units * repeat + others
    rows = torch.randn(80, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    order = torch.randperm(columns, generator=generator)[: units * repeat].reshape(units, repeat)
    return consumer(rows, torch.randn(columns, outputs, generator=generator), order.tolist())


def loss_without(consumer: Consumer, units: list[int]) -> float:
    """Squared error per row of the best weights that do not use these units' columns."""
    gone = consumer.owned[units].flatten().tolist()
    left = [column for column in range(len(consumer.gram)) if column not in gone]
    weight = consumer.weight.double()
    best = torch.zeros_like(weight)
    best[left] = torch.linalg.solve(consumer.gram[left][:, left], (consumer.gram @ weight)[left])
    off = best - weight
    return float((off * (consumer.gram @ off)).sum()) / consumer.rows


def greedy(consumers: list[Consumer]) -> tuple[list[int], list[float]]:
    order: list[int] = []
    costs: list[float] = []
    while len(order) < len(consumers[0].owned):
        left = [unit for unit in range(len(consumers[0].owned)) if unit not in order]
        total = {unit: sum(loss_without(own, [*order, unit]) for own in consumers) for unit in left}
        order.append(min(left, key=lambda unit: total[unit]))
        costs.append(total[order[-1]] - sum(costs))
    return order, costs


@pytest.mark.parametrize(("units", "repeat", "readers"), [(7, 1, 1), (5, 3, 1), (6, 1, 2), (4, 2, 3), (1, 2, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_order_and_costs_are_those_of_solving_anew(units: int, repeat: int, readers: int, seed: int) -> None:
    consumers = [made_up(units, repeat, 3, 10 * seed + number, others=number) for number in range(readers)]
    order, costs = leaving_costs(consumers)
    wanted_order, wanted_costs = greedy(consumers)
    assert order == wanted_order
    assert costs == pytest.approx(wanted_costs, rel=1e-5, abs=1e-6 * sum(wanted_costs))


def test_of_two_copies_the_first_costs_nothing_and_the_second_what_both_did() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator)
    rows[:, 3] = rows[:, 1]
    weight = torch.tensor([[2.0], [0.4], [3.0], [0.4]])
    order, costs = leaving_costs([consumer(rows, weight, [[0], [1], [2], [3]])])
    assert set(order[:2]) == {1, 3} and order[2:] == [0, 2]
    assert costs[0] < 1e-6
    assert costs[1] == pytest.approx(0.8**2 * rows[:, 1].var().item(), rel=0.05)


def test_a_unit_that_nothing_reads_leaves_first_and_for_nothing() -> None:
    own = made_up(5, 2, 3, 0)
    own.weight[own.owned[3].flatten()] = 0
    order, costs = leaving_costs([own])
    assert (order[0], costs[0]) == (3, pytest.approx(0, abs=1e-9))


def test_a_wide_group_loses_several_units_between_two_looks() -> None:
    own = made_up(2 * elimination.ROUNDS + 3, 1, 1, 0)
    own = Consumer(own.gram + torch.eye(len(own.gram)), own.weight, own.owned, own.rows)
    order, costs = leaving_costs([own])
    assert sorted(order) == list(range(2 * elimination.ROUNDS + 3)) and len(costs) == len(order)
    first = [loss_without(own, [unit]) for unit in range(len(order))]
    assert order[0] == min(range(len(order)), key=lambda unit: first[unit])
    both = loss_without(own, order[:2])
    assert costs[:2] == pytest.approx([first[order[0]], both - first[order[0]]], rel=1e-4)


def test_two_copies_in_a_wide_group_do_not_leave_together() -> None:
    units = 4 * elimination.ROUNDS
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * units, units, generator=generator)
    rows[:, 1] = rows[:, 0]
    weight = 1 + torch.rand(units, 1, generator=generator)
    order, costs = leaving_costs([consumer(rows, weight, [[unit] for unit in range(units)])])
    assert order[0] in (0, 1) and costs[0] < 1e-6
    assert order.index(1 - order[0]) > units // 2, "what both did weighs four times as much"


def test_the_consumers_stay_as_they_are() -> None:
    own = made_up(4, 1, 2, 0)
    gram, weight = own.gram.clone(), own.weight.clone()
    assert leaving_costs([own]) == leaving_costs([own])
    assert torch.equal(own.gram, gram) and torch.equal(own.weight, weight)
