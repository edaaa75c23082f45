"""Statistics of the top-1 comparison, against closed forms, scipy and exact enumeration."""

from __future__ import annotations

from functools import lru_cache
from math import comb
from statistics import NormalDist

import pytest

from cswap_deploy.intervals import gate, images_to_prove, paired_drop, upper_bound, wilson

Z = NormalDist().inv_cdf(0.975)
CASES = [(0, 0, 40), (1, 0, 44), (5, 5, 30), (7, 1, 21), (40, 20, 160), (3, 900, 10_000), (40, 0, 40), (10, 30, 40)]

cached_drop = lru_cache(maxsize=None)(paired_drop)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (981, 1000)])
def test_wilson_agrees_with_scipy(hits: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("b", "c", "n"), CASES)
def test_drop_is_antisymmetric_and_holds_the_observed_one(b: int, c: int, n: int) -> None:
    low, high = paired_drop(b, c, n)
    assert paired_drop(c, b, n) == (-high, -low)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert low < high


@pytest.mark.parametrize(("b", "c", "n"), CASES)
def test_drop_widens_with_confidence(b: int, c: int, n: int) -> None:
    widths = [high - low for low, high in (paired_drop(b, c, n, level) for level in (0.8, 0.9, 0.95, 0.99))]
    assert widths == sorted(set(widths))


@pytest.mark.parametrize("n", [1, 20, 50_000])
def test_drop_without_a_discordant_pair_does_not_collapse(n: int) -> None:
    half = Z**2 / (n + Z**2)
    assert paired_drop(0, 0, n) == pytest.approx((-half, half), rel=1e-12)


def test_drop_published_example() -> None:
    """Airway hyper-responsiveness (Bentur 2009) in Fagerland, Lydersen & Laake, chapter 8."""
    assert paired_drop(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("b", "c", "n"), [case for case in CASES if case[0] != case[2]])
def test_bound_solves_the_score_equation(b: int, c: int, n: int) -> None:
    """The constrained likelihood is maximised numerically here, by its closed form there."""
    optimize = pytest.importorskip("scipy.optimize")
    from scipy.special import xlogy

    drop = upper_bound(b, c, n, 0.975)

    def loss(q: float) -> float:
        return float(-xlogy(b, q + drop) - xlogy(c, q) - xlogy(n - b - c, 1 - 2 * q - drop))

    q = optimize.minimize_scalar(loss, bounds=(0, (1 - drop) / 2), method="bounded", options={"xatol": 1e-12}).x
    score = (b - c - n * drop) / (n * (2 * q + drop * (1 - drop))) ** 0.5
    assert score == pytest.approx(-Z, rel=2e-4)


@pytest.mark.parametrize(("p", "q", "n"), [(0.1, 0.1, 30), (0.05, 0.02, 50), (0.2, 0.1, 40), (0.02, 0.02, 50)])
def test_drop_covers_the_truth(p: float, q: float, n: int) -> None:
    """Every outcome, weighted by its exact probability."""
    covered = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            low, high = cached_drop(b, c, n)
            if low <= p - q <= high:
                covered += comb(n, b) * comb(n - b, c) * p**b * q**c * (1 - p - q) ** (n - b - c)
    assert covered >= 0.93


def test_one_sided_bound_is_the_end_of_the_wider_interval() -> None:
    assert upper_bound(12, 5, 500, 0.95) == pytest.approx(paired_drop(12, 5, 500, 0.90)[1], rel=1e-12)


def test_images_to_prove_is_the_smallest_number() -> None:
    z = NormalDist().inv_cdf(0.95)
    assert images_to_prove(0, 0, 100, 0.01, 0.95) == 268  # the first integer above z^2 * 0.99 / 0.01
    assert 267 < z**2 * 99 < 268
    needed = images_to_prove(2, 1, 100, 0.015, 0.95)
    assert needed is not None
    enough, too_few = needed // 100 + 1, needed // 100
    assert upper_bound(2 * enough, enough, 100 * enough, 0.95) <= 0.015
    assert upper_bound(2 * too_few, too_few, 100 * too_few, 0.95) > 0.015


@pytest.mark.parametrize(("b", "c", "n", "limit"), [(10, 0, 1000, 0.01), (3, 0, 1000, 0.003), (5, 5, 100, 0.0)])
def test_no_number_of_images_proves_what_is_not_observed(b: int, c: int, n: int, limit: float) -> None:
    assert images_to_prove(b, c, n, limit, 0.95) is None


@pytest.mark.parametrize(("b", "n", "limit"), [(10, 1000, 1.0), (3, 1000, 0.3), (7, 1000, 0.7), (1, 3, 100 / 3 + 1e-9)])
def test_a_drop_exactly_at_the_limit_passes(b: int, n: int, limit: float) -> None:
    judged = gate(b, 0, n, limit, "point", 0.95)
    assert (judged.verdict, judged.proven) == ("pass", False)
    assert gate(b + 1, 0, n, limit, "point", 0.95).verdict == "fail"


def test_bound_rule_wants_proof() -> None:
    assert gate(18, 16, 1000, 1.0, "point", 0.95).verdict == "pass"
    few = gate(18, 16, 1000, 1.0, "bound", 0.95)
    assert (few.verdict, few.proven) == ("fail", False)
    assert few.images_to_prove is not None and few.images_to_prove > 1000
    many = gate(90, 80, 5000, 1.0, "bound", 0.95)
    assert (many.verdict, many.proven) == ("pass", True)
    assert many.images_to_prove is not None and many.images_to_prove <= 5000


def test_gate_off() -> None:
    judged = gate(900, 0, 1000, None, "point", 0.95)
    assert (judged.verdict, judged.proven, judged.images_to_prove) == ("off", False, None)


@pytest.mark.parametrize(("b", "c", "n"), [(-1, 0, 10), (6, 5, 10), (0, 0, 0)])
def test_impossible_counts_are_refused(b: int, c: int, n: int) -> None:
    with pytest.raises(AssertionError, match=f"b = {b}, c = {c}, n = {n}"):
        paired_drop(b, c, n)
    with pytest.raises(AssertionError, match=f"b = {b}"):
        gate(b, c, n, 1.0, "point", 0.95)


def test_impossible_hits_and_confidence_are_refused() -> None:
    with pytest.raises(AssertionError, match="11 hits of 10"):
        wilson(11, 10)
    with pytest.raises(AssertionError, match=r"confidence 95"):
        upper_bound(0, 0, 10, 95)
