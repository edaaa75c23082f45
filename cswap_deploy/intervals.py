"""Statistics of a comparison on the same images: pure functions, no library needed.

Of top-1: `n` images, `b` of them only the dense model gets right, `c` only the shipped one; the drop is
`(b - c) / n`, dense minus shipped, positive when accuracy was lost. Drops and bounds are fractions in -1..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import cos, pi, sin, sqrt, tan
from statistics import NormalDist
from typing import Literal

NORMAL_FROM = 2000
"""Degrees of freedom from which Student's distribution is taken to be the same."""


@dataclass(frozen=True)
class Gate:
    max_drop_pp: float | None
    rule: Literal["point", "bound"]
    confidence: float
    verdict: Literal["pass", "fail", "off"]
    proven: bool
    images_to_prove: int | None


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, JASA 22:209-212)."""
    assert 0 <= hits <= n > 0, f"{hits} hits of {n}"
    z = _two_sided(confidence)
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half) if hits else 0.0, min(1.0, centre + half) if hits < n else 1.0


def paired_drop(b: int, c: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of the drop (Tango 1998, Statistics in Medicine 17:891-908); wide even if b = c = 0."""
    _require_counts(b, c, n)
    z = _two_sided(confidence)
    return -_upper(c, b, n, z), _upper(b, c, n, z)


def upper_bound(b: int, c: int, n: int, confidence: float) -> float:
    """One-sided: the drop is below this with `confidence`; the same method as `paired_drop`."""
    _require_counts(b, c, n)
    return _upper(b, c, n, _one_sided(confidence))


def images_to_prove(b: int, c: int, n: int, limit: float, confidence: float) -> int | None:
    """Fewest images on which the same rates of discordant pairs would put the upper bound at or below `limit`.

    None: the observed drop is not below `limit` (a fraction), so that no number of images would do.
    """
    _require_counts(b, c, n)
    if Fraction(b - c, n) >= _exact(limit):
        return None
    z = _one_sided(confidence)

    def proves(images: int) -> bool:
        return _upper(b * images / n, c * images / n, images, z) <= limit

    enough = 1
    while not proves(enough):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if proves(middle) else (middle, enough)
    return enough


def gate(b: int, c: int, n: int, max_drop_pp: float | None, rule: Literal["point", "bound"], confidence: float) -> Gate:
    """`point`: the observed drop decides, exactly at the limit passes; `bound`: the upper bound does.

    `proven`, under either rule: the upper bound at `confidence` is within the limit. Limit in percentage points.
    """
    _require_counts(b, c, n)
    if max_drop_pp is None:
        return Gate(None, rule, confidence, "off", proven=False, images_to_prove=None)
    limit = float(_exact(max_drop_pp) / 100)
    proven = upper_bound(b, c, n, confidence) <= limit
    passed = proven if rule == "bound" else Fraction(100 * (b - c), n) <= _exact(max_drop_pp)
    needed = images_to_prove(b, c, n, limit, confidence)
    return Gate(max_drop_pp, rule, confidence, "pass" if passed else "fail", proven, needed)


def discordant(labels: Sequence[int], dense: Sequence[int], shipped: Sequence[int]) -> tuple[int, int]:
    """(b, c) of predicted classes: images that only the dense model gets right, that only the shipped one gets right."""
    outcomes = [(a == y, b == y) for y, a, b in zip(labels, dense, shipped, strict=True)]
    return outcomes.count((True, False)), outcomes.count((False, True))


def mean_interval(mean: float, error: float, n: int, confidence: float) -> tuple[float, float]:
    """Student's interval of a mean over n >= 2 images whose standard error this is."""
    half = error * student(confidence, min(n - 1, NORMAL_FROM))
    return mean - half, mean + half


def student(confidence: float, freedom: int) -> float:
    """The t within which `confidence` of Student's distribution lies: bisection of its series, for want of scipy."""
    low, high = 0.0, pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < confidence else (low, middle)
    return sqrt(freedom) * tan(low)


def _student_within(angle: float, freedom: int) -> float:
    """Probability that |t| < sqrt(freedom) tan(angle) (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term = total = cos(angle) if odd else 1.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * cos(angle) ** 2
        total += term
    if not odd:
        return sin(angle) * total
    return 2 / pi * (angle + (sin(angle) * total if freedom > 1 else 0))


# --- Tango's score ---------------------------------------------------------------------------------------------------


def _upper(b: float, c: float, n: float, z: float) -> float:
    """The drop above the observed one at which the score statistic is -z.

    Bisection, not scipy: the gate is also computed on devices, where scipy need not be.
    """
    low, high = (b - c) / n, 1.0
    if b == c == 0:
        return z * z / (n + z * z)
    while low < (middle := (low + high) / 2) < high:
        if b - c - n * middle + z * sqrt(n * _variance(b, c, n, middle)) > 0:
            low = middle
        else:
            high = middle
    return high


def _variance(b: float, c: float, n: float, drop: float) -> float:
    """Of one image's difference, under the likeliest rates that have this drop (Tango 1998, section 3)."""
    p = 2 * n
    q = -b - c + (2 * n - b + c) * drop
    r = -c * drop * (1 - drop)
    root = sqrt(max(0.0, q * q - 4 * p * r))
    only_shipped = -2 * r / (q + root) if q > 0 else (root - q) / (2 * p)  # the form that does not cancel
    return max(0.0, 2 * only_shipped + drop * (1 - drop))


def _two_sided(confidence: float) -> float:
    return _one_sided((1 + confidence) / 2)


def _one_sided(confidence: float) -> float:
    assert 0.5 < confidence < 1, f"confidence {confidence}"
    return NormalDist().inv_cdf(confidence)


def _exact(limit: float) -> Fraction:
    """The decimal number that was written: 0.3 is 3/10, so that a drop of 3 in 1000 images is not above 0.3 points."""
    return Fraction(str(limit))


def _require_counts(b: int, c: int, n: int) -> None:
    assert b >= 0 <= c and b + c <= n > 0, f"b = {b}, c = {c}, n = {n}"
