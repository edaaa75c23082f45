"""What becomes of a group's curve when one of its points has been measured anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import zoo

from cswap_deploy.artifacts import Curve, Group
from cswap_deploy.prune.renewed import probe, renewed

GROUP = zoo.ZOO["chain"].groups.groups[0]


@dataclass
class Ledger:
    """In the place of a gauge: the true damage at each width, whatever the group."""

    groups: Sequence[Group]
    orders: Mapping[str, Sequence[int]]
    true: Mapping[int, float]

    def losses(self, asked: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
        return {name: tuple(self.true[width] for width in widths) for name, widths in asked.items()}


def curve_after(left: int, earlier: Curve, true: Mapping[int, float]) -> Curve:
    gauge: Any = Ledger([GROUP], {GROUP.name: range(left)}, true)
    (found,) = renewed(gauge, (earlier,), 1)
    return found


def curve(units: int, damage: Mapping[int, float]) -> Curve:
    widths = tuple(sorted(damage, reverse=True))
    return Curve(GROUP.name, tuple(range(units)), widths, tuple(damage[width] for width in widths))


def test_a_curve_is_scaled_to_the_new_point() -> None:
    found = curve_after(10, curve(10, {7: 0.1, 5: 0.4, 1: 2.0}), {7: 0.3})
    assert found.order == tuple(range(10)) and found.widths == (7, 5, 1)
    assert found.damage == pytest.approx((0.3, 1.2, 6.0))


def test_what_has_left_is_paid_for() -> None:
    """The group had 12 units when its curve was measured and has 10 now."""
    found = curve_after(10, curve(12, {10: 0.2, 7: 0.3, 5: 0.6, 1: 2.2}), {7: 0.1})
    assert found.widths == (7, 5, 1) and found.damage == pytest.approx((0.1, 0.4, 2.0))


def test_a_point_that_was_never_measured_is_added() -> None:
    """Between 10 and 2 units the earlier curve is a straight line."""
    found = curve_after(10, curve(10, {6: 0.4, 2: 0.8}), {7: 0.6})
    assert found.widths == (7, 6, 2) and found.damage == pytest.approx((0.6, 0.8, 1.6))


@pytest.mark.parametrize(
    ("before", "now", "growth"), [(0.1, -0.01, 0.5), (0.0, 0.01, 5.0), (0.1, 0.2, 2.0), (0.0, 0.0, 1.0)]
)
def test_a_point_next_to_zero_does_not_turn_the_far_end_round(before: float, now: float, growth: float) -> None:
    """Whether a network seems to gain by losing units, or lost nothing before: the narrowest width stays dear, and affordable."""
    found = curve_after(10, curve(10, {7: before, 1: 2.0}), {7: now})
    assert found.damage == pytest.approx((now, 2.0 * growth))


def test_the_narrowest_group_is_not_measured() -> None:
    found = curve_after(1, curve(10, {8: 0.1, 1: 2.0}), {})
    assert found.widths == () and found.order == (0,)


@pytest.mark.parametrize(
    ("now", "round_to", "width"), [(12, 1, 8), (13, 4, 8), (8, 4, 4), (4, 4, 4), (2, 1, 1), (1, 1, 1)]
)
def test_the_probe_is_a_width_that_the_group_may_have(now: int, round_to: int, width: int) -> None:
    assert probe(GROUP, now, round_to) == width
