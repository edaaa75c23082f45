"""Statistics of interleaved latency samples, against written-out resamples, closed forms and simulated measurements."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from math import ceil, exp, log, sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from cswap_deploy.errors import DataError
from cswap_deploy.intervals import student
from cswap_deploy.samples import RELOAD, Samples, _medians, _resampled, _weights

RNG = np.random.default_rng


def measured(*models: Sequence[Sequence[int]]) -> Samples:
    """Per model its blocks, in nanoseconds."""
    return Samples.of(list(zip(*models)))


def simulated(
    seed: int,
    rounds: int,
    count: int,
    *,
    ratio: float = 1.0,
    between: float = 0.01,
    drift: float = 0.0,
    jump: float = 0.0,
    modes: float = 0.0,
) -> Samples:
    """Two models in turn, model 1 `ratio` times as slow; every block has its own pace, as on a machine that is not alone.

    `drift`: log growth over the measurement; `jump`: log growth of the second half; `modes`: log distance of two paces
    that mix within each block, nine to one, the rarer one changing every third round.
    """
    rng = RNG(seed)

    def block(base: float, r: int) -> np.ndarray:
        pace = between * rng.normal() + drift * r / rounds + jump * (r >= rounds / 2)
        noise = 0.01 * rng.exponential(size=count)
        slow = rng.random(count) < (0.9 if r // 3 % 2 else 0.1) if modes else False
        return np.round(base * np.exp(pace + noise + modes * slow)).astype(np.int64)

    return Samples(tuple((block(1e6, r), block(ratio * 1e6, r)) for r in range(rounds)))


# --- percentiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "expected"), [(50, 3), (60, 3), (60.1, 4), (20, 1), (0.1, 1), (99, 5)])
def test_percentile_is_the_sample_that_so_many_do_not_exceed(p: float, expected: int) -> None:
    samples = measured([[5_000_000, 1_000_000], [3_000_000, 2_000_000, 4_000_000]])
    assert samples.percentile_ms(0, p) == expected


@pytest.mark.parametrize("p", [1, 50, 90, 99.9])
def test_percentile_agrees_with_numpy_on_pooled_samples(p: float) -> None:
    samples = simulated(1, 7, 143)
    pooled = np.concatenate([blocks[1] for blocks in samples.rounds])
    assert samples.percentile_ms(1, p) == np.percentile(pooled, p, method="inverted_cdf") / 1e6


def test_percentile_rank_is_exact() -> None:
    """In binary floating point, 99.9 % of 1000 is a little more than 999."""
    assert measured([range(1, 501), range(501, 1001)]).percentile_ms(0, 99.9) == 999 / 1e6


@pytest.mark.parametrize("p", [50, 90])
def test_resampling_by_bisection_equals_resamples_written_out(p: float) -> None:
    rng = RNG(3)
    blocks = [rng.integers(1, 40, size=rng.integers(1, 9)) for _ in range(5)]
    weights = _weights(5)[:100]
    for row, found in zip(weights, _resampled(blocks, weights, p)):
        drawn = np.sort(np.concatenate([np.tile(block, times) for block, times in zip(blocks, row)]))
        assert found == drawn[ceil(p * len(drawn) / 100) - 1]


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 49, 1000])
def test_student_agrees_with_scipy(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


# --- intervals -------------------------------------------------------------------------------------------------------


def test_speedup_is_the_median_of_the_rounds_ratios() -> None:
    """Rounds say 2, 3 and 4; pooled, the p50s say 9 / 2."""
    samples = measured([[1, 1, 5], [2, 4], [2]], [[2], [9, 9, 9, 9], [8, 2, 14]])
    assert samples.speedup(0, against=1).value == pytest.approx(3, rel=1e-15)
    assert samples.percentile_ms(1, 50) / samples.percentile_ms(0, 50) == 9 / 2
    assert measured([[1], [1]], [[2], [8]]).speedup(0, against=1).value == pytest.approx(4, rel=1e-15)


def test_speedup_of_a_steady_measurement_is_the_ratio_of_the_p50s() -> None:
    samples = simulated(4, 60, 30, ratio=1.7, between=0.002)
    found = samples.speedup(0, against=1)
    assert found.value == pytest.approx(samples.percentile_ms(1, 50) / samples.percentile_ms(0, 50), rel=1e-3)
    assert 1.68 < found.low < 1.7 < found.high < 1.72


@pytest.mark.parametrize("rounds", [2, 3, 12, 47])
def test_speedup_the_other_way_round_is_the_reciprocal(rounds: int) -> None:
    samples = simulated(5, rounds, 9, ratio=0.6, between=0.05)
    one, other = samples.speedup(0, against=1), samples.speedup(1, against=0)
    assert one.value * other.value == pytest.approx(1, rel=1e-15)
    assert (1 / other.high, 1 / other.low) == pytest.approx((one.low, one.high), rel=1e-12)
    assert samples.speedup(1, against=1).value == 1


def test_medians_of_resamples_equal_resamples_written_out() -> None:
    rng = RNG(3)
    blocks = [rng.normal(size=rng.integers(1, 4)) for _ in range(6)]
    weights = _weights(6)[:100]
    for row, found in zip(weights, _medians(blocks, weights)):
        assert found == np.median(np.concatenate([np.tile(block, times) for block, times in zip(blocks, row)]))


def test_speedup_of_two_rounds_has_a_closed_form() -> None:
    """Of the four resamples two have the median between: deviation of the logs half their distance over the root of 2."""
    samples = measured([[1_000_000]] * 2, [[2_000_000], [2_100_000]])
    found = samples.speedup(0, against=1)
    expected = 12.706 * sqrt(2) * log(1.05) / 2 / sqrt(2)
    assert log(found.high / found.value) == pytest.approx(expected, rel=0.03)
    assert log(found.low / found.value) == pytest.approx(-expected, rel=0.03)


def test_interval_of_two_rounds_has_a_closed_form() -> None:
    """Of the four resamples of two equal blocks three have the faster one's p50: deviation ln(ratio) sqrt(3) / 4."""
    samples = measured([[1_000_000] * 3, [1_010_000] * 3])
    low, high = samples.percentile_ci95_ms(0, 50)
    expected = 12.706 * sqrt(2) * log(1.01) * sqrt(3) / 4
    assert log(high) == pytest.approx(expected, rel=0.03)
    assert log(low) == pytest.approx(-expected, rel=0.03)


def test_what_slows_down_both_models_cancels() -> None:
    paces = [1000 + 37 * r for r in range(16)]
    samples = measured([[pace * 100] * 5 for pace in paces], [[pace * 250] * 5 for pace in paces])
    found = samples.speedup(0, against=1)
    assert found.value == 2.5
    assert (found.low, found.high) == pytest.approx((2.5 * exp(-RELOAD), 2.5 * exp(RELOAD)), rel=1e-12)
    low, high = samples.percentile_ci95_ms(0, 50)
    assert high / low > 1.2


def test_interval_counts_rounds_and_not_samples() -> None:
    """Ten times the samples in the same rounds prove nothing more; four times the rounds halve the interval."""

    def width(rounds: int, count: int) -> float:
        found = [simulated(seed, rounds, count, between=0.2).speedup(0, 1) for seed in range(16)]
        return float(np.median([log(each.high / each.low) for each in found]))

    assert width(20, 200) == pytest.approx(width(20, 20), rel=0.25)
    assert width(80, 20) == pytest.approx(width(20, 20) / 2, rel=0.3)


@pytest.mark.parametrize(
    ("rounds", "count", "circumstances"),
    [
        (2, 20, {}),
        (3, 20, {}),
        (4, 2, {}),
        (5, 20, {"jump": 0.3}),
        (6, 2, {"drift": 0.3}),
        (12, 2, {"modes": 0.26}),
        (40, 20, {"modes": 0.26}),
    ],
)
def test_interval_covers_the_truth(
    rounds: int, count: int, circumstances: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the rounds say, without what is added for loading anew."""
    monkeypatch.setattr("cswap_deploy.samples.RELOAD", 0.0)
    found = [simulated(seed, rounds, count, ratio=1.25, **circumstances).speedup(0, against=1) for seed in range(250)]
    assert np.mean([each.low <= 1.25 <= each.high for each in found]) >= 0.92


def test_two_inferences_a_block_lean_to_the_slower_model_by_less_than_is_added() -> None:
    """The median of two is their mean, that of many is less where times have a tail: here 0.2 % of the ratio."""
    found = []
    for seed in range(60):
        many, few = simulated(seed, 50, 100), simulated(1000 + seed, 50, 2)
        rounds = tuple((a[0], 30 * b[0]) for a, b in zip(many.rounds, few.rounds))
        found.append(Samples(rounds).speedup(0, against=1))
    assert 0 < np.median([log(each.value / 30) for each in found]) < 0.4 * RELOAD
    assert np.mean([each.low <= 30 <= each.high for each in found]) >= 0.95


def test_interval_covers_the_truth_under_drift_and_disturbed_rounds() -> None:
    covered, widths = 0, []
    for seed in range(100):
        samples = simulated(seed, 30, 2, ratio=1.25, drift=0.2)
        rng = RNG(seed)
        rounds = tuple(tuple(b * (3 if rng.random() < 0.08 else 1) for b in blocks) for blocks in samples.rounds)
        found = Samples(rounds).speedup(0, against=1)
        widths.append(log(found.high / found.low))
        covered += found.low <= 1.25 <= found.high
    assert covered >= 92
    assert np.median(widths) < 0.04


def test_percentile_interval_covers_the_truth() -> None:
    truth = {50: 1e6 * exp(0.01 * log(2)), 90: 1e6 * exp(0.01 * log(10))}
    for p, expected in truth.items():
        found = [simulated(seed, 10, 40, between=0).percentile_ci95_ms(0, p) for seed in range(120)]
        assert np.mean([low <= expected / 1e6 <= high for low, high in found]) >= 0.9


def test_same_samples_same_interval() -> None:
    assert simulated(6, 9, 9).speedup(0, 1) == simulated(6, 9, 9).speedup(0, 1)


def test_a_long_measurement_takes_no_time() -> None:
    samples = simulated(7, 50, 1000)
    start = perf_counter()
    samples.speedup(0, against=1)
    assert perf_counter() - start < 2  # 0.1 s alone; machines that run tests are not alone


# --- stability -------------------------------------------------------------------------------------------------------


def test_steady_measurement_has_no_fault() -> None:
    samples = simulated(8, 50, 20, between=0.05)
    assert samples.faults(0) == samples.faults(1) == ()


def test_short_calls_that_scatter_around_a_steady_pace_have_no_fault() -> None:
    block = [150_000] * 6 + [205_000] * 4
    assert measured([block] * 20).faults(0) == ()


@pytest.mark.parametrize(("rounds", "count"), [(5, 100), (10, 1)])
def test_too_few_samples_are_a_fault(rounds: int, count: int) -> None:
    (fault,) = simulated(9, rounds, count).faults(0)
    assert fault.startswith(f"{rounds * count} samples in {rounds} rounds, 20 samples and 6 rounds are needed")
    assert fault.endswith("raise latency.duration_s")


def test_a_neighbour_that_starts_in_the_middle_is_a_fault() -> None:
    faults = simulated(10, 50, 20, jump=log(1.3)).faults(0)
    assert [fault.split(" in the last")[0] for fault in faults[-1:]] == [
        "mean latency went from 1 ms in the first third of the rounds to 1.31 ms"
    ]


def test_pauses_that_the_median_does_not_see_are_a_fault() -> None:
    """Another process takes the core for half of the second half; most short calls run between its turns."""
    quiet, paused = [100_000] * 50, [100_000] * 48 + [2_600_000] * 2
    samples = measured([quiet] * 20 + [paused] * 20)
    assert samples.percentile_ms(0, 50) == 0.1
    assert [fault.split(" latency")[0] for fault in samples.faults(0)] == ["rounds differ by 66.7 % (mean", "mean"]


def test_an_uncertain_p50_is_a_fault() -> None:
    """Two paces, half of the rounds each: the p50 may fall on either."""
    fast, slow = [1_000_000] * 10, [1_400_000] * 10
    faults = measured([fast, slow] * 10).faults(0)
    assert any(fault.startswith("p50 is known within") and "raise latency.duration_s" in fault for fault in faults)


def test_one_disturbed_round_is_no_fault() -> None:
    blocks = [[1_000_000] * 10] * 29 + [[30_000_000] * 10]
    assert measured(blocks).faults(0) == ()


# --- plain lists ------------------------------------------------------------------------------------------------------


def test_samples_of_plain_lists() -> None:
    samples = Samples.of([[[3, 1], [7]], [[2], [9, 8, 5]]])
    assert [[block.tolist() for block in blocks] for blocks in samples.rounds] == [[[3, 1], [7]], [[2], [9, 8, 5]]]
    assert {block.dtype for blocks in samples.rounds for block in blocks} == {np.dtype(np.int64)}


MALFORMED = {
    "no rounds": [],
    "one round": [[[1]]],
    "no models": [[], []],
    "a model that is missing": [[[1], [2]], [[1]]],
    "an empty block": [[[1], [2]], [[1], []]],
    "zero": [[[1]], [[0]]],
    "a negative value": [[[1]], [[2, -1]]],
    "a fraction": [[[1]], [[1.5]]],
    "text": [[[1]], ["1"]],
    "a number that does not fit": [[[1]], [[2**63]]],
    "a number that fits nowhere": [[[1]], [[2**70]]],
    "a value that is none": [[[1]], [[None]]],
    "a block that is nested": [[[1]], [[[1]]]],
    "a block that is ragged": [[[1]], [[[1], [1, 2]]]],
    "a number for a block": [[[1]], [1]],
    "a number for a round": [[[1]], 1],
    "nothing": None,
    "names": {"a": [[1]], "b": [[1]]},
}


@pytest.mark.parametrize("rounds", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_lists_are_refused(rounds: Any) -> None:
    with pytest.raises(DataError, match=r"malformed latency samples: .+ \(measure again"):
        Samples.of(rounds)


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_samples_come_back(tmp_path: Path) -> None:
    samples = measured([[3, 1], [2]], [[7], [9, 8, 5]])
    samples.save(tmp_path / "samples.npz")
    loaded = Samples.load(tmp_path / "samples.npz")
    assert [[block.tolist() for block in blocks] for blocks in loaded.rounds] == [[[3, 1], [7]], [[2], [9, 8, 5]]]
    assert (loaded.models, loaded.count(0), loaded.count(1)) == (2, 3, 4)


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    samples = simulated(11, 4, 6)
    for name in ("one.npz", "other.npz"):
        samples.save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def stored(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def bare() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(3))
    return stream.getvalue()


NS, COUNTS = np.array([1, 2, 3]), np.array([2, 1])
GOOD = stored(ns_0=NS, counts_0=COUNTS)
DAMAGED = {
    "empty": b"",
    "text": b"p50: 3.2 ms",
    "one array": bare(),
    "cut": GOOD[:-30],
    "flipped": GOOD.replace(NS.tobytes(), NS.tobytes()[::-1]),
    "pickle": stored(ns_0=np.array([{}]), counts_0=COUNTS),
    "no arrays": stored(),
    "other names": stored(a=NS, b=COUNTS),
    "no counts": stored(ns_0=NS, ns_1=NS),
    "floats": stored(ns_0=NS * 1.5, counts_0=COUNTS),
    "a table": stored(ns_0=NS[:, None], counts_0=COUNTS),
    "float counts": stored(ns_0=NS, counts_0=COUNTS * 1.0),
    "a negative count": stored(ns_0=NS, counts_0=np.array([4, -1])),
    "an empty round": stored(ns_0=NS, counts_0=np.array([3, 0])),
    "too many counted": stored(ns_0=NS, counts_0=np.array([2, 2])),
    "counts that overflow": stored(ns_0=NS, counts_0=np.array([2**62] * 4 + [3])),
    "one round": stored(ns_0=NS, counts_0=np.array([3])),
    "different rounds": stored(ns_0=NS, counts_0=COUNTS, ns_1=NS, counts_1=np.array([1, 1, 1])),
    "a latency of zero": stored(ns_0=NS - 1, counts_0=COUNTS),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_samples_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"samples\.npz does not hold latency samples: .+ \(measure again"):
        Samples.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Samples.load(tmp_path / "samples.npz")


def test_impossible_values_are_refused() -> None:
    with pytest.raises(AssertionError, match="1 rounds, at least 2"):
        Samples(((NS,),))
    with pytest.raises(AssertionError, match="different numbers of models"):
        Samples(((NS, NS), (NS,)))
    with pytest.raises(AssertionError, match="positive int64"):
        Samples(((NS,), (NS.astype(np.int32),)))
    with pytest.raises(AssertionError, match="percentile 100"):
        measured([[5], [6]]).percentile_ms(0, 100)
