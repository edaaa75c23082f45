"""Selection as a pure function: what it promises, on made-up groups and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cswap_deploy.artifacts import Axis, CostTerm, Group, Groups, GroupScores, Slice
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.select import CostKind, Kept, choose_units, narrowest, step_of

many = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
Kind = Literal["channels", "heads"]


def network(widths: Sequence[tuple[str, Kind, int]], fixed: int = 40) -> Groups:
    """A chain: each group is made from the one before it and read by the one after; the last layer has 10 outputs."""
    groups = tuple(Group(name, kind, units, ()) for name, kind, units in widths)
    terms = [CostTerm("fixed", fixed, 3 * fixed, ())]
    before: tuple[Axis, ...] = ()
    size = 3
    for number, group in enumerate(groups):
        own = Axis(group.units, ((group.name, 1),))
        weights = size * group.units
        terms.append(CostTerm(f"{group.name}.weight", weights, weights * (1 + number % 3), (own, *before)))
        terms.append(CostTerm(f"{group.name}.bias", group.units, 0, (own,)))
        before, size = (own,), group.units
    terms.append(CostTerm("head.weight", 10 * size, 10 * size, before))
    return Groups(groups, (), tuple(terms))


def scored(groups: Groups, values: dict[str, Sequence[float]]) -> tuple[GroupScores, ...]:
    return tuple(GroupScores(g.name, tuple(range(g.units)), tuple(values[g.name])) for g in groups.groups)


def everything(groups: Groups) -> Kept:
    return {group.name: tuple(range(group.units)) for group in groups.groups}


def share(groups: Groups, kept: Kept, kind: CostKind) -> float:
    index = int(kind == "macs")
    return groups.cost(kept)[index] / groups.cost({})[index]


def floor(group: Group, round_to: int) -> int:
    return 1 if group.kind == "heads" else min(group.units, round_to)


@dataclass(frozen=True)
class Case:
    groups: Groups
    scores: tuple[GroupScores, ...]
    kind: CostKind
    round_to: int
    fraction: float

    def select(self) -> Kept:
        return choose_units(self.groups, self.scores, everything(self.groups), self.kind, self.fraction, self.round_to)


@st.composite
def cases(draw: st.DrawFn, *, lowest: float = -0.5, round_to: int = 8) -> Case:
    """A target somewhere between the narrowest network and the dense one, both ends included."""
    widths: list[tuple[str, Kind, int]] = [
        (f"g{number}", draw(st.sampled_from(["channels", "channels", "heads"])), draw(st.integers(2, 24)))
        for number in range(draw(st.integers(1, 4)))
    ]
    groups = network(widths)
    value = st.floats(lowest, 3, allow_subnormal=False) | st.sampled_from([0.0, 0.5, 1.0])
    values = {name: draw(st.lists(value, min_size=units, max_size=units)) for name, _, units in widths}
    kind: CostKind = draw(st.sampled_from(["macs", "params"]))
    multiple = draw(st.integers(1, round_to))
    low = narrowest(groups, kind, multiple)
    fraction = low + (1 - low) * draw(st.floats(0, 1))
    return Case(groups, scored(groups, values), kind, multiple, fraction)


@many
@given(cases())
def test_the_target_is_met(case: Case) -> None:
    assert share(case.groups, case.select(), case.kind) <= case.fraction * (1 + 1e-9)


@many
@given(cases())
def test_no_lot_too_many_leaves(case: Case) -> None:
    """Putting back the lot that left last, whichever it was, would miss the target."""
    kept = case.select()
    lots = [
        {**kept, group.name: tuple(range(min(len(kept[group.name]) + step, group.units)))}
        for group in case.groups.groups
        if len(kept[group.name]) < group.units
        for step in [1 if group.kind == "heads" else case.round_to]
    ]
    assert not lots or any(share(case.groups, fuller, case.kind) > case.fraction for fuller in lots)


@many
@given(cases())
def test_widths_are_multiples_or_dense_and_never_below_the_floor(case: Case) -> None:
    kept = case.select()
    for group in case.groups.groups:
        width = len(kept[group.name])
        assert floor(group, case.round_to) <= width <= group.units
        assert group.kind == "heads" or width == group.units or width % case.round_to == 0


@many
@given(cases())
def test_within_a_group_the_least_valuable_leave(case: Case) -> None:
    kept = case.select()
    for item in case.scores:
        stays = [item.keep_value[unit] for unit in kept[item.group]]
        leaves = [item.keep_value[unit] for unit in item.units if unit not in kept[item.group]]
        assert not leaves or max(leaves) <= min(stays)
        assert list(kept[item.group]) == sorted(set(kept[item.group]))


@many
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_scores_does_not_matter(case: Case, random: Random) -> None:
    """Ties fall the same way however the scores are listed."""
    shuffled = []
    for item in case.scores:
        pairs = list(zip(item.units, item.keep_value, strict=True))
        random.shuffle(pairs)
        shuffled.append(GroupScores(item.group, *map(tuple, zip(*pairs, strict=True))))
    random.shuffle(shuffled)
    assert replace(case, scores=tuple(shuffled)).select() == case.select()


@many
@given(cases(lowest=0.01, round_to=1), st.data())
def test_a_unit_that_harms_leaves_before_all_that_help(case: Case, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from(case.groups.groups))
    unit = data.draw(st.integers(0, group.units - 1))
    assume(case.fraction < 1)
    scores = tuple(
        replace(item, keep_value=tuple(-1e-6 if u == unit else max(v, 0.01) for u, v in enumerate(item.keep_value)))
        if item.group == group.name
        else replace(item, keep_value=tuple(max(v, 0.01) for v in item.keep_value))
        for item in case.scores
    )
    assert unit not in replace(case, scores=scores).select()[group.name]


@many
@given(cases(), st.floats(0.01, 0.99))
def test_what_cannot_be_reached_is_refused_with_what_can(case: Case, part: float) -> None:
    low = narrowest(case.groups, case.kind, case.round_to)
    wanted = low * part
    said = (
        f"^{wanted:.3f} of the {case.kind} cannot be reached: with every group at its narrowest {low:.3f} is left \\("
    )
    with pytest.raises(PruningError, match=said) as caught:
        replace(case, fraction=wanted).select()
    assert f"lower prune.round_to ({case.round_to})" in caught.value.hint


@many
@given(cases())
def test_the_narrowest_network_can_be_reached_exactly(case: Case) -> None:
    low = narrowest(case.groups, case.kind, case.round_to)
    kept = replace(case, fraction=low).select()
    assert {name: len(units) for name, units in kept.items()} == {
        group.name: floor(group, case.round_to) for group in case.groups.groups
    }


def test_the_narrowest_of_a_large_network_is_not_lost_to_rounding() -> None:
    groups = network([(f"g{number}", "channels", 400 + number) for number in range(6)])
    values = Random(0)
    scores = scored(groups, {g.name: [values.random() for _ in range(g.units)] for g in groups.groups})
    low = narrowest(groups, "macs", 1)
    assert set(map(len, choose_units(groups, scores, everything(groups), "macs", low, 1).values())) == {1}


@many
@given(cases(), st.floats(0, 1))
def test_what_left_before_stays_away(case: Case, part: float) -> None:
    """A later step starts from what an earlier one kept, with scores of those units alone."""
    first = replace(case, fraction=case.fraction + (1 - case.fraction) * part).select()
    scores = tuple(
        GroupScores(item.group, first[item.group], tuple(item.keep_value[unit] for unit in first[item.group]))
        for item in case.scores
    )
    second = choose_units(case.groups, scores, first, case.kind, case.fraction, case.round_to)
    assert all(set(second[name]) <= set(first[name]) for name in first)
    assert share(case.groups, second, case.kind) <= case.fraction * (1 + 1e-9)


def test_a_dense_target_removes_nothing() -> None:
    groups = network([("a", "channels", 5), ("b", "heads", 3)])
    scores = scored(groups, {"a": [-1.0] * 5, "b": [-1.0] * 3})
    assert choose_units(groups, scores, everything(groups), "macs", 1.0, 1) == everything(groups)


def test_the_first_lot_evens_out_a_width_that_is_no_multiple() -> None:
    groups = network([("a", "channels", 21)])
    scores = scored(groups, {"a": list(range(21))})
    just_below = groups.cost({"a": tuple(range(20))})[1] / groups.cost({})[1]
    assert choose_units(groups, scores, everything(groups), "macs", just_below, 8) == {"a": tuple(range(5, 21))}


@pytest.mark.parametrize(("dims", "multiple", "step"), [(64, 32, 1), (16, 8, 1), (16, 32, 2), (24, 32, 4), (32, 8, 1)])
def test_heads_leave_so_that_layers_keep_the_multiple(dims: int, multiple: int, step: int) -> None:
    """A table with one entry for each head is no width of a layer."""
    parts = (
        *(Slice("qkv", "weight", 0, 8 * dims * part, dims) for part in range(3)),
        Slice("proj", "weight", 1, 0, dims), Slice("", "table", 1, 0, 1),
    )  # fmt: skip
    heads = Group("a", "heads", 8, parts)
    found = step_of(heads, multiple)
    assert found == step
    assert all(found * part.repeat % multiple == 0 for part in parts if part.repeat > 1)


def test_heads_leave_one_by_one_where_each_has_the_multiple() -> None:
    groups = network([("a", "heads", 6)])
    members = tuple(Slice("qkv", "weight", 0, 96 * part, 16) for part in range(3))
    groups = replace(groups, groups=(replace(groups.groups[0], members=members),))
    scores = scored(groups, {"a": [3, 1, 2, 6, 5, 4]})
    one_less = groups.cost({"a": (0, 1, 2, 3, 4)})[1] / groups.cost({})[1]
    assert choose_units(groups, scores, everything(groups), "macs", one_less, 8) == {"a": (0, 2, 3, 4, 5)}


def test_loss_is_weighed_against_what_leaving_saves() -> None:
    """Units of `b` are worth a little more than those of `a`, and cost many times as much."""
    terms = (
        CostTerm("a", 10, 10, (Axis(10, (("a", 1),)),)),
        CostTerm("b", 1000, 1000, (Axis(10, (("b", 1),)),)),
    )
    groups = Groups((Group("a", "channels", 10, ()), Group("b", "channels", 10, ())), (), terms)
    scores = scored(groups, {"a": [1.0] * 10, "b": [2.0] * 10})
    kept = choose_units(groups, scores, everything(groups), "params", 0.85, 1)
    assert (len(kept["a"]), len(kept["b"])) == (10, 8)


def test_a_group_that_saves_nothing_is_left_alone() -> None:
    """Biases have parameters and no MACs."""
    terms = (CostTerm("a", 10, 0, (Axis(10, (("a", 1),)),)), CostTerm("b", 10, 10, (Axis(10, (("b", 1),)),)))
    groups = Groups((Group("a", "channels", 10, ()), Group("b", "channels", 10, ())), (), terms)
    scores = scored(groups, {"a": [-5.0] * 10, "b": [1.0] * 10})
    kept = choose_units(groups, scores, everything(groups), "macs", 0.5, 1)
    assert (len(kept["a"]), len(kept["b"])) == (10, 5)


def test_equal_values_leave_from_the_end_and_in_the_order_of_names() -> None:
    groups = network([("b", "channels", 4), ("a", "channels", 4)], fixed=0)
    terms = tuple(CostTerm(g.name, 8, 8, (Axis(4, ((g.name, 1),)),)) for g in groups.groups)
    equal = Groups(groups.groups, (), terms)
    scores = scored(equal, {"a": [1.0] * 4, "b": [1.0] * 4})
    assert choose_units(equal, scores, everything(equal), "macs", 7 / 8, 1) == {"a": (0, 1, 2), "b": (0, 1, 2, 3)}


def test_a_target_below_what_skip_leaves_is_refused() -> None:
    groups = network([("a", "channels", 4)], fixed=1000)
    scores = scored(groups, {"a": [1.0] * 4})
    with pytest.raises(PruningError, match=r"0\.500 of the params cannot be reached: .* 0\.9\d\d is left") as caught:
        choose_units(groups, scores, everything(groups), "params", 0.5, 2)
    assert caught.value.hint == "raise prune.target, lower prune.round_to (2), or shorten prune.skip"
