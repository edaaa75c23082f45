"""How wide each group is: against every combination of widths tried, on networks so small that this is possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_select import network

from cswap_deploy.artifacts import Axis, CostTerm, Curve, Group, Groups
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.allocate import Widths, choose_widths
from cswap_deploy.prune.curves import tried_widths
from cswap_deploy.prune.select import CostKind, floor_of, step_of

many = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def side_by_side(costs: Sequence[tuple[int, int]], fixed: int = 3) -> Groups:
    """Groups of (units, cost of a unit) that share no layer, so that costs add up."""
    groups = tuple(Group(f"g{number}", "channels", units, ()) for number, (units, _) in enumerate(costs))
    terms = [
        CostTerm(group.name, units * each, units * each, (Axis(units, ((group.name, 1),)),))
        for group, (units, each) in zip(groups, costs, strict=True)
    ]
    return Groups(groups, (), (*terms, CostTerm("fixed", fixed, fixed, ())))


def measured(groups: Groups, random: Random, round_to: int = 1) -> tuple[Curve, ...]:
    """Damage at every width that the group may have; it grows by any amount from one to the next."""
    curves = []
    for group in groups.groups:
        step, floor = step_of(group, round_to), floor_of(group, round_to)
        widths = tuple(sorted({floor, *range(floor, group.units, step)}, reverse=True))
        damage = itertools.accumulate(0.001 + random.random() ** 3 for _ in widths)
        curves.append(Curve(group.name, tuple(range(group.units)), widths, tuple(damage)))
    return tuple(curves)


def whole(groups: Groups) -> Widths:
    return {group.name: group.units for group in groups.groups}


def share(groups: Groups, widths: Widths, kind: CostKind = "macs") -> float:
    index = int(kind == "macs")
    return groups.cost({name: tuple(range(width)) for name, width in widths.items()})[index] / groups.cost({})[index]


def damage(groups: Groups, curves: Sequence[Curve], widths: Widths) -> float:
    known = {
        curve.group: {groups.by_name[curve.group].units: 0.0, **dict(zip(curve.widths, curve.damage, strict=True))}
        for curve in curves
    }
    return sum(known[name][width] for name, width in widths.items())


def least_damage(groups: Groups, curves: Sequence[Curve], fraction: float) -> float:
    names = [curve.group for curve in curves]
    choices = itertools.product(*((groups.by_name[curve.group].units, *curve.widths) for curve in curves))
    all_widths = (dict(zip(names, widths, strict=True)) for widths in choices)
    return min(
        damage(groups, curves, widths) for widths in all_widths if share(groups, widths) <= fraction * (1 + 1e-9)
    )


@many
@given(
    costs=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=4),
    fraction=st.floats(0.2, 1),
    seed=st.integers(0, 999),
)
def test_of_groups_that_share_no_layer_the_choice_is_the_best(
    costs: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    groups = side_by_side(costs)
    curves = measured(groups, Random(seed))
    assume(share(groups, dict.fromkeys(whole(groups), 1)) <= fraction)
    found = choose_widths(groups, curves, whole(groups), "macs", fraction, 1)
    assert share(groups, found) <= fraction * (1 + 1e-9)
    assert damage(groups, curves, found) == pytest.approx(least_damage(groups, curves, fraction), abs=1e-9)


def test_of_a_chain_the_choice_is_nearly_always_the_best() -> None:
    """Costs are products there, and only sums can be solved for: seldom another combination is a little better."""
    excess = []
    for seed in range(130):
        random = Random(seed)
        groups = network([(f"g{number}", "channels", random.randint(2, 7)) for number in range(random.randint(2, 4))])
        curves, fraction = measured(groups, random), random.uniform(0.3, 0.95)
        if share(groups, dict.fromkeys(whole(groups), 1)) > fraction:
            continue
        best = least_damage(groups, curves, fraction)
        found = choose_widths(groups, curves, whole(groups), "macs", fraction, 1)
        excess.append(damage(groups, curves, found) / best - 1)
    assert len(excess) > 60
    assert sum(value < 1e-6 for value in excess) >= 0.95 * len(excess)
    assert sum(excess) / len(excess) < 0.01


@st.composite
def cases(draw: st.DrawFn) -> tuple[Groups, tuple[Curve, ...], Widths, int]:
    """A chain of groups of both kinds, some of which are narrower than they were, with curves at the usual widths."""
    sizes = draw(
        st.lists(st.tuples(st.sampled_from(["channels", "heads"]), st.integers(1, 40)), min_size=1, max_size=5)
    )
    groups = network([(f"g{number}", kind, units) for number, (kind, units) in enumerate(sizes)])  # type: ignore[misc]
    round_to = draw(st.sampled_from([1, 4, 8]))
    now, curves = {}, []
    for group in groups.groups:
        step, floor = step_of(group, round_to), floor_of(group, round_to)
        now[group.name] = draw(st.sampled_from([group.units, *range(floor, group.units, step)]))
        widths = tried_widths(group, now[group.name], round_to)
        losses = draw(st.lists(st.floats(-0.1, 1), min_size=len(widths), max_size=len(widths)))
        curves.append(Curve(group.name, tuple(range(now[group.name])), widths, tuple(losses)))
    return groups, tuple(curves), now, round_to


@many
@given(case=cases(), fraction=st.floats(0.05, 1), kind=st.sampled_from(["macs", "params"]))
def test_what_every_choice_keeps_to(
    case: tuple[Groups, tuple[Curve, ...], Widths, int], fraction: float, kind: CostKind
) -> None:
    groups, curves, now, round_to = case
    least = {group.name: min(now[group.name], floor_of(group, round_to)) for group in groups.groups}
    if share(groups, least, kind) > fraction * (1 + 1e-9):
        with pytest.raises(PruningError, match=r"cannot be reached in this step: .* is left"):
            choose_widths(groups, curves, now, kind, fraction, round_to)
        return
    found = choose_widths(groups, curves, now, kind, fraction, round_to)
    assert found == choose_widths(groups, curves, now, kind, fraction, round_to)
    assert share(groups, found, kind) <= fraction * (1 + 1e-8)
    for group in groups.groups:
        width = found[group.name]
        assert least[group.name] <= width <= now[group.name]
        assert width == now[group.name] or width == floor_of(group, round_to) or width % step_of(group, round_to) == 0
        wider = min(now[group.name], width + step_of(group, round_to) - width % step_of(group, round_to))
        assert wider == width or share(groups, {**found, group.name: wider}, kind) > fraction * (1 - 1e-8), (
            "there was room for more"
        )


def test_nothing_leaves_where_nothing_has_to() -> None:
    groups = network([("a", "channels", 8), ("b", "channels", 8)])
    curves = [Curve(name, tuple(range(8)), (4, 1), (-0.5, -1.0)) for name in "ab"]
    assert choose_widths(groups, curves, whole(groups), "macs", 1.0, 1) == {"a": 8, "b": 8}


def test_the_group_that_is_missed_least_gets_narrow() -> None:
    groups = side_by_side([(10, 5), (10, 5), (10, 5)])
    flat, steep = (0.0, 0.001, 0.01), (1.0, 2.0, 3.0)
    curves = [
        Curve(name, tuple(range(10)), (8, 5, 1), found) for name, found in (("g0", steep), ("g1", flat), ("g2", steep))
    ]
    assert choose_widths(groups, curves, whole(groups), "params", 0.72, 1) == {"g0": 10, "g1": 1, "g2": 10}


def test_copies_of_a_unit_in_both_groups_of_a_layer_leave_to_the_target_and_no_further() -> None:
    """Two equal groups narrow one large layer between them: what both save is far from the sum of what each would."""
    layer = CostTerm("layer", 24 * 24 * 9, 24 * 24 * 9, (Axis(24, (("a", 1),)), Axis(24, (("b", 1),))))
    groups = Groups(tuple(Group(name, "channels", 24, ()) for name in "ab"), (), (layer,))
    widths, losses = (23, 22, 19, 16, 12, 6, 1), (0.03, 0.06, 0.13, 0.28, 0.54, 1.2, 1.9)
    curves = [Curve(name, tuple(range(24)), widths, losses) for name in "ab"]
    for fraction in (0.9, 0.7, 0.4, 0.1):
        found = choose_widths(groups, curves, whole(groups), "params", fraction, 1)
        assert fraction - 0.05 < share(groups, found, "params") <= fraction


def test_a_target_below_the_narrowest_is_refused_with_what_is_left() -> None:
    groups = side_by_side([(4, 10)], fixed=10)
    curve = Curve("g0", (0, 1, 2, 3), (1,), (0.5,))
    with pytest.raises(
        PruningError, match=r"0\.300 of the macs cannot be reached .* at its narrowest 0\.400 is left"
    ) as caught:
        choose_widths(groups, (curve,), whole(groups), "macs", 0.3, 1)
    assert "lower prune.round_to (1)" in (caught.value.hint or "")
