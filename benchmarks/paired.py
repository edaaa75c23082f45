"""Statistics of models that are judged on the same images, by several seeds: pure functions on arrays.

Correctness is an array of bool, (seeds, images), or (images,) for a model that no seed touches: it stands for all seeds.
Drops are first minus second, as fractions, as in `cswap_deploy.intervals`: positive when the second model is worse.

Seeds share the hold-out images, so that their outcomes are no independent draws: five seeds on 846 images are 846 images.
The image is the unit here, its value the mean over the seeds; tests and intervals speak about other images of the same kind
under these very seeds. What a seed changes is shown beside them (`by_seed`) and goes into no p-value: five are too few.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax
from scipy.stats import binom, binomtest

from cswap_deploy.intervals import paired_drop

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Seed:
    """One seed's comparison: images that only the first model gets right, only the second; McNemar's exact p."""

    lost: int
    won: int
    drop: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """First minus second over all seeds, with a two-sided interval and p-value over images."""

    images: int
    drop: float
    low: float
    high: float
    p: float
    by_seed: tuple[Seed, ...]


def compare(first: Bools, second: Bools, confidence: float = 0.95) -> Comparison:
    """All that is said about two models on the same images."""
    a, b = _seeds(first, second)
    low, high = drop_interval(a, b, confidence)
    seeds = tuple(_seed(*pair) for pair in zip(a, b, strict=True))
    return Comparison(a.shape[1], float(_differences(a, b).mean() / len(a)), low, high, sign_flip(a, b), seeds)


def mcnemar(first: Bools, second: Bools) -> float:
    """Exact two-sided p of McNemar's test, one seed: a fair coin decides each image that only one model gets right."""
    assert first.ndim == second.ndim == 1, "one seed at a time; `sign_flip` takes several"
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def sign_flip(first: Bools, second: Bools) -> float:
    """Exact two-sided p over images, all seeds together; with one seed it is McNemar's.

    Null hypothesis: on any image the two models could have changed places, with all their seeds at once. An image's
    difference summed over the seeds then keeps its size and has either sign. Sizes are whole numbers up to the number of
    seeds, so the distribution of the total is a convolution of binomial ones: no sampling, no normal approximation.
    """
    differences = _differences(*_seeds(first, second))
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    distribution = np.ones(1)  # of the sum of sizes with positive sign
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        positive = np.zeros(size * count + 1)
        positive[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, positive)
    total = len(distribution) - 1
    distances = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(distribution[distances >= abs(int(differences.sum()))].sum()))


def drop_interval(first: Bools, second: Bools, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the mean drop over images; with one seed it is `intervals.paired_drop`, Tango's.

    With several, an image's mean over seeds varies less than one seed's outcome: Tango's score interval is taken at the
    number of images at which one seed would have the same standard error (the effective sample size of survey statistics).
    It stays sound where hardly an image differs, as a t interval does not.
    """
    a, b = _seeds(first, second)
    differences = _differences(a, b) / len(a)
    images = len(differences)
    lost, won = (float((x & ~y).mean(0).sum()) for x, y in ((a, b), (b, a)))
    single = (lost + won) / images - differences.mean() ** 2
    effect = float(differences.var() / single) if single > 0 else 1.0
    scale = 1 / max(effect, 1 / len(a))  # seeds are worth as many times the images as there are seeds, at the most
    # Counts of this scale are no whole numbers; the score statistic needs none.
    return paired_drop(lost * scale, won * scale, images * scale, confidence)  # type: ignore[arg-type]


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down adjusted p-values (1979, Scandinavian Journal of Statistics 6:65-70), in the order of the cells.

    Below alpha: significant with the chance of any false finding among all cells at most alpha, however they depend.
    """
    adjusted: dict[Key, float] = {}
    worst = 0.0
    for rank, cell in enumerate(sorted(p, key=lambda cell: p[cell])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[cell]))
        adjusted[cell] = worst
    return {cell: adjusted[cell] for cell in p}


def agreement(dense: Floats, other: Floats) -> Floats:
    """Per image, 1 where both logits (..., images, classes) have the same largest class; the mean over seeds."""
    same: Floats = np.atleast_2d(dense.argmax(-1) == other.argmax(-1)).mean(0)
    return same


def divergence(dense: Floats, other: Floats, temperature: float = 4.0) -> Floats:
    """KL(dense || other) per image of logits (..., images, classes), softened and times temperature squared; in nats."""
    a, b = (log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1) for logits in (dense, other))
    per_image: Floats = np.atleast_2d((np.exp(a) * (a - b)).sum(-1) * temperature**2).mean(0)
    return per_image


# --- seeds and images


def _seeds(first: Bools, second: Bools) -> tuple[Bools, Bools]:
    """Both as (seeds, images)."""
    assert first.shape[-1] == second.shape[-1] > 0, f"{first.shape[-1]} and {second.shape[-1]} images"
    assert first.dtype == second.dtype == np.bool_, f"correctness is bool, not {first.dtype} and {second.dtype}"
    a, b = np.broadcast_arrays(np.atleast_2d(first), np.atleast_2d(second))
    return a, b


def _differences(first: Bools, second: Bools) -> npt.NDArray[np.int64]:
    """Per image, in how many more seeds the first model is right than the second."""
    seeds: npt.NDArray[np.int64] = first.sum(0, dtype=np.int64) - second.sum(0, dtype=np.int64)
    return seeds


def _seed(first: Bools, second: Bools) -> Seed:
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    return Seed(lost, won, (lost - won) / len(first), mcnemar(first, second))
