"""Which way to quantise: the first step that keeps the accuracy, and the least damage where none does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cswap_deploy.choice import SCREENED, Judged, choose, divergence, judged
from cswap_deploy.int8 import METHODS, Way
from cswap_deploy.recipe import Int8Settings

NODES = tuple("abcdefgh")
DAMAGE = dict(zip(NODES, (1, 2, 90, 4, 5, 60, 7, 8), strict=True))
"""What each node costs in 8 bits, thousandths of a nat; a point of top-1 is ten of them."""


def world(weights: float = 200) -> tuple[Callable[[Way, int | None], Judged], list[tuple[Way, int | None]]]:
    """Nodes whose damages add up, and what was asked."""
    asked: list[tuple[Way, int | None]] = []

    def judge(way: Way, images: int | None = None) -> Judged:
        asked.append((way, images))
        factor = {"minmax": 1.2, "percentile": 1.0, "entropy": 1.1, "weights": 1.0}[way.method]
        rounded = {way.only} if way.only else set(NODES) - set(way.in_float)
        total = weights if way.method == "weights" else factor * sum(DAMAGE[node] for node in rounded)
        return Judged(way, total / 10, total / 1000)

    return judge, asked


def test_the_best_method_is_taken_where_one_keeps_the_accuracy() -> None:
    judge, asked = world()
    found = choose(NODES, judge, Int8Settings(max_drop=18))
    assert (found.best.way, found.tried, found.met) == (Way("percentile"), 3, True)
    assert [way for way, _ in asked] == [Way(method) for method in METHODS]


def test_else_the_nodes_that_cost_most_stay_in_float_as_few_as_do() -> None:
    judge, asked = world()
    found = choose(NODES, judge, Int8Settings(max_drop=3, max_float=0.5))
    assert found.best.way == Way("percentile", in_float=("c", "f")) and found.met
    assert found.tried == len(asked) == 3 + len(NODES) + 2
    assert {images for way, images in asked if way.only} == {SCREENED}
    assert {images for way, images in asked if not way.only} == {None}


@pytest.mark.parametrize(
    ("share", "counts"), [(0.0, []), (0.1, []), (0.25, [1, 2]), (0.5, [1, 2, 4]), (0.9, [1, 2, 4, 7])]
)
def test_no_more_nodes_stay_in_float_than_allowed(share: float, counts: list[int]) -> None:
    judge, asked = world()
    found = choose(NODES, judge, Int8Settings(max_drop=0, max_float=share))
    assert [len(way.in_float) for way, _ in asked if way.in_float] == counts
    assert not found.met and asked[-1][0] == Way("weights")


def test_weights_alone_are_the_last_resort() -> None:
    judge, _ = world(weights=1)
    found = choose(NODES, judge, Int8Settings(max_drop=0.5))
    assert found.best.way == Way("weights") and found.met


def test_where_nothing_keeps_it_the_least_divergent_is_taken_and_it_is_said() -> None:
    judge, _ = world(weights=500)
    found = choose(NODES, judge, Int8Settings(max_drop=0, max_float=0.25))
    assert found.best.way == Way("percentile", in_float=("c", "f")) and not found.met


def test_judged_counts_what_was_lost_in_points_of_these_images() -> None:
    wanted = np.array([[2, 0], [2, 0], [0, 2], [0, 2]], np.float32)
    found = np.array([[0, 2], [2, 0], [0, 2], [2, 0]], np.float32)
    truth = [0, 0, 1, 0]  # right before: three; after: 2nd, 3rd, 4th
    assert judged(Way("minmax"), found, wanted, truth).drop_pp == 0
    assert judged(Way("minmax"), found, wanted, [0, 0, 1, 1]).drop_pp == 50
    assert judged(Way("minmax"), wanted, wanted, truth) == Judged(Way("minmax"), 0.0, 0.0)
    broken = judged(Way("minmax"), wanted * np.float32("nan"), wanted, truth)
    assert (broken.drop_pp, broken.divergence) == (100.0, float("inf"))


def test_divergence_is_that_of_the_probabilities() -> None:
    p, q = np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]])
    expected = float((p * np.log(p / q)).sum())
    shifted = (np.log(p) + 7).astype(np.float32)
    assert divergence(shifted, np.log(q).astype(np.float32)) == pytest.approx(expected, abs=1e-6)
    huge = np.array([[1e4, 0.0]], np.float32)
    assert divergence(huge, huge) == 0
