"""Raw samples of an interleaved latency measurement and what they prove; docs/measuring.md has the numbers behind the choices.

Several models are measured in turn, in rounds: per round each model runs one block of consecutive inferences. Samples of
a block share the state of the machine, so every interval resamples rounds, never samples.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import exp, hypot, log, sqrt
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cswap_deploy.errors import DataError
from cswap_deploy.intervals import student

Nanoseconds = NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)

RESAMPLES = 1000
SEED = 0

RUNS = 20
"""Intervals resample at most so many runs of consecutive rounds: a neighbour's work lasts longer than one round."""

RELOAD = 0.01
"""What two loads of one file may differ by however long they run, since memory is laid out anew (docs/measuring.md): with
0.5 % intervals held the truth in 87 % of measurements of a 0.15 ms model, with 1 % in 99 %. Not enough below 0.05 ms."""

MIN_ROUNDS, MIN_SAMPLES = 6, 20
"""With 6 rounds of a shared machine the interval of the speed-up has a half-width of 8 %: honest, and of little use."""

MAX_HALF_WIDTH = 0.05
"""Of the p50's 95 % interval, as a fraction; 2 % is usual after 5 s, 7 % when the neighbours change."""

MAX_SPREAD = 0.5
"""Between rounds, of their mean latency; 0.1 to 0.47 with light neighbours, 0.6 to 2.8 with two that burn CPU."""

MAX_DRIFT = 0.15
"""First to last third; 0.01 to 0.14 in three of four measurements of a shared machine, 0.5 to 1.6 with burners from midway."""


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Samples:
    """`rounds[r][m]`: nanoseconds of each inference that model m ran in round r. At least two rounds, no empty block."""

    rounds: tuple[tuple[Nanoseconds, ...], ...]

    def __post_init__(self) -> None:
        fault = _malformed(self.rounds)
        assert not fault, fault

    @staticmethod
    def of(rounds: Sequence[Sequence[Sequence[int]]]) -> Samples:
        """From plain lists, as an agent answers them. Errors: DataError."""
        try:
            arrays = tuple(tuple(np.array(block) for block in blocks) for blocks in rounds)
        except (TypeError, ValueError) as error:
            raise DataError(f"malformed latency samples: {error}", _AGAIN) from error
        if fault := _malformed(arrays):
            raise DataError(f"malformed latency samples: {fault}", _AGAIN)
        return Samples(arrays)

    @staticmethod
    def load(path: Path) -> Samples:
        """What `save` wrote; nothing in the file is executed. Errors: DataError."""
        try:
            rounds = tuple(zip(*_read(path), strict=True))
        except _UNREADABLE as error:
            raise DataError(f"{path} does not hold latency samples: {error}", _AGAIN) from error
        if fault := _malformed(rounds):
            raise DataError(f"{path} does not hold latency samples: {fault}", _AGAIN)
        return Samples(rounds)

    def save(self, path: Path) -> None:
        """Per model m: `ns_<m>`, all nanoseconds in order, and `counts_<m>`, how many belong to each round.

        The same samples give the same bytes. `path` ends in .npz.
        """
        arrays: dict[str, Nanoseconds] = {}
        for model, blocks in enumerate(zip(*self.rounds, strict=True)):
            arrays[f"ns_{model}"] = np.concatenate(blocks)
            arrays[f"counts_{model}"] = np.array([len(block) for block in blocks], dtype=np.int64)
        with path.open("wb") as stream:
            np.savez(stream, **cast(Any, arrays))

    @property
    def models(self) -> int:
        return len(self.rounds[0])

    def count(self, model: int) -> int:
        return sum(len(block) for block in self._blocks(model))

    def percentile_ms(self, model: int, p: float) -> float:
        """The smallest sample that at least p % of the model's samples do not exceed: always a latency that was seen."""
        return _percentile(self._blocks(model), p) / 1e6

    def percentile_ci95_ms(self, model: int, p: float) -> tuple[float, float]:
        """Where the percentile would lie in other rounds like these; says nothing about another day or another clock."""
        runs = _runs(self._blocks(model))
        factor = exp(_half_width(np.log(_resampled(runs, _weights(len(runs)), p)), len(runs)))
        return self.percentile_ms(model, p) / factor, self.percentile_ms(model, p) * factor

    def speedup(self, model: int, against: int) -> Ratio:
        """How many times faster `model` is than `against`: the median over rounds of the ratio of their block medians.

        What slows down a whole round cancels in its ratio, so this is better known than p50 / p50, from which it differs by
        0.1 % in stable runs. Interval: rounds are resampled; never narrower than 1 % to either side (RELOAD).
        """
        ours, theirs = (np.array([np.median(block) for block in self._blocks(each)]) for each in (model, against))
        logs = np.log(theirs / ours)
        runs = _runs(list(logs[:, None]))
        factor = exp(hypot(_half_width(_medians(runs, _weights(len(runs))), len(runs)), RELOAD))
        value = exp(float(np.median(logs)))
        return Ratio(value, value / factor, value * factor)

    def ratio(self, model: int, against: int, p: float) -> Ratio:
        """What part of `against`'s latency `model` has: the inverse of the speed-up; of other percentiles that of their pooled values.

        Rounds are resampled for both models at once, so that what slows both cancels.
        """
        if p == 50:
            faster = self.speedup(model, against)
            return Ratio(1 / faster.value, 1 / faster.high, 1 / faster.low)
        ours, theirs = (_runs(self._blocks(each)) for each in (model, against))
        weights = _weights(len(ours))
        logs = np.log(_resampled(ours, weights, p)) - np.log(_resampled(theirs, weights, p))
        factor = exp(hypot(_half_width(logs, len(ours)), RELOAD))
        value = self.percentile_ms(model, p) / self.percentile_ms(against, p)
        return Ratio(value, value / factor, value * factor)

    def faults(self, model: int) -> tuple[str, ...]:
        """Why the measurement of this model is not stable, one sentence each; empty: stable."""
        return tuple(_faults(self, model))

    def _blocks(self, model: int) -> list[Nanoseconds]:
        return [blocks[model] for blocks in self.rounds]


# --- stability -------------------------------------------------------------------------------------------------------


def _faults(samples: Samples, model: int) -> Iterator[str]:
    blocks = [blocks[model] for blocks in samples.rounds]
    if len(blocks) < MIN_ROUNDS or samples.count(model) < MIN_SAMPLES:
        yield (
            f"{samples.count(model)} samples in {len(blocks)} rounds, {MIN_SAMPLES} samples and {MIN_ROUNDS} rounds are "
            "needed: raise latency.duration_s"
        )
        return
    means = np.array([block.mean() for block in blocks]) / 1e6
    medians = np.array([np.median(block) for block in blocks]) / 1e6
    yield from _uncertain(*samples.percentile_ci95_ms(model, 50))
    yield from _spread(means)
    yield from _drift(means, medians)


def _uncertain(low: float, high: float) -> Iterator[str]:
    if (half := sqrt(high / low) - 1) > MAX_HALF_WIDTH:
        yield (
            f"p50 is known within {100 * half:.1f} % only ({low:.3g} to {high:.3g} ms, 95 %), {100 * MAX_HALF_WIDTH:.0f} % is the limit: "
            "raise latency.duration_s, or stop what else runs on the target"
        )


def _spread(means: NDArray[np.float64]) -> Iterator[str]:
    """Of block means: a mean also sees the pauses in which another process had the core, a median of short calls does not.

    Not of single samples: calls of 0.1 ms scatter by 40 % on a machine that repeats its p50 within 1 %.
    """
    low, high = np.quantile(means, (0.1, 0.9))
    if (spread := (high - low) / np.median(means)) > MAX_SPREAD:
        yield (
            f"rounds differ by {100 * spread:.1f} % (mean latency {low:.3g} to {high:.3g} ms, 10th to 90th percentile), "
            f"{100 * MAX_SPREAD:.0f} % is the limit: stop what else runs on the target, lock its clocks"
        )


def _drift(means: NDArray[np.float64], medians: NDArray[np.float64]) -> Iterator[str]:
    """The median round of each third counts: one disturbed round is no drift."""
    third = len(means) // 3
    for what, values in (("mean", means), ("median", medians)):
        first, last = float(np.median(values[:third])), float(np.median(values[-third:]))
        if abs(log(last / first)) > log(1 + MAX_DRIFT):
            yield (
                f"{what} latency went from {first:.3g} ms in the first third of the rounds to {last:.3g} ms in the last, "
                f"{100 * MAX_DRIFT:.0f} % is the limit: stop what else runs on the target, let it cool down or lock its clocks"
            )
            return


# --- statistics ------------------------------------------------------------------------------------------------------


def _percentile(blocks: Sequence[Nanoseconds], p: float) -> float:
    pooled = np.sort(np.concatenate(blocks))
    return float(pooled[_rank(np.array([len(pooled)]), p)[0] - 1])


def _rank(samples: Nanoseconds, p: float) -> Nanoseconds:
    """Place, from 1, of the percentile among so many sorted samples; exact: p99.9 of 1000 samples is the 999th."""
    assert 0 < p < 100, f"percentile {p}"
    share = Fraction(str(p)) / 100
    return -(-samples * share.numerator // share.denominator)


def _runs(blocks: Sequence[NDArray[Number]]) -> list[NDArray[Number]]:
    """Rounds joined into RUNS runs of neighbouring ones, as they are when there are fewer."""
    ends = np.linspace(0, len(blocks), min(RUNS, len(blocks)) + 1).astype(int).tolist()
    return [np.concatenate(blocks[start:end]) for start, end in pairwise(ends)]


def _weights(runs: int) -> Nanoseconds:
    """(RESAMPLES, runs): how often each was drawn."""
    return np.random.default_rng(SEED).multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES)


def _medians(blocks: Sequence[NDArray[np.float64]], weights: Nanoseconds) -> NDArray[np.float64]:
    """The median of each resample, between the two middle values where there are two: changes sign with the values."""
    return (_resampled(blocks, weights, 50) - _resampled([-block for block in blocks], weights, 50)) / 2


def _resampled(blocks: Sequence[NDArray[Number]], weights: Nanoseconds, p: float) -> NDArray[Number]:
    """The percentile of each resample, by bisection over the pooled samples: no resample is ever written out."""
    ordered = [np.sort(block) for block in blocks]
    pooled = np.sort(np.concatenate(blocks))
    rank = _rank(weights @ np.array([len(block) for block in blocks]), p)
    low, high = np.zeros(len(weights), dtype=np.int64), np.full(len(weights), len(pooled) - 1)
    while np.any(low < high):
        middle = (low + high) // 2
        at_most = np.zeros(len(weights), dtype=np.int64)
        for block, weight in zip(ordered, weights.T, strict=True):
            at_most += weight * np.searchsorted(block, pooled[middle], side="right")
        enough = at_most >= rank
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return pooled[low]


def _half_width(logs: NDArray[np.float64], runs: int) -> float:
    """Of the 95 % interval, on the log scale.

    Bootstrap standard error, its square made unbiased for few runs by n / (n - 1), times Student's t: the plain percentile interval
    covers the truth 3 times in 4 when there are three (Hesterberg 2015, The American Statistician 69:371-386).
    """
    return student(0.95, runs - 1) * float(np.std(logs, ddof=1)) * sqrt(runs / (runs - 1))


# --- files -----------------------------------------------------------------------------------------------------------

_DAMAGED = (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, ValueError)
_HOSTILE = (TypeError, AttributeError, MemoryError, RuntimeError, OverflowError)
_UNREADABLE = (*_DAMAGED, *_HOSTILE)
"""What numpy and zipfile raise for a file that is damaged, foreign or hostile."""

_AGAIN = "measure again"


def _read(path: Path) -> list[list[Nanoseconds]]:
    """Blocks of each model."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return [_split(arrays[f"ns_{model}"], arrays[f"counts_{model}"]) for model in range(len(arrays.files) // 2)]


def _split(ns: Nanoseconds, counts: Nanoseconds) -> list[Nanoseconds]:
    if ns.ndim != 1 or counts.ndim != 1 or counts.dtype != np.int64 or counts.min(initial=1) < 1:
        raise ValueError("counts per round must be positive integers")
    if sum(counts.tolist()) != len(ns):
        raise ValueError(f"{len(ns)} samples where the rounds count {sum(counts.tolist())}")
    return np.split(ns, np.cumsum(counts)[:-1])


def _malformed(rounds: Sequence[Sequence[Nanoseconds]]) -> str:
    """What is wrong, or nothing."""
    if len(rounds) < 2:
        return f"{len(rounds)} rounds, at least 2 are needed"
    if len({len(blocks) for blocks in rounds}) != 1 or not rounds[0]:
        return "rounds with different numbers of models"
    for block in (block for blocks in rounds for block in blocks):
        if block.ndim != 1 or block.dtype != np.int64 or not len(block) or block.min() < 1:
            return "a block that is empty or holds something else than positive int64 nanoseconds"
    return ""
