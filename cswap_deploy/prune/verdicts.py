"""Critical, detrimental, neutral or unresolved: what the images say about each unit's mean effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cswap_deploy.artifacts import Verdict

if TYPE_CHECKING:
    from torch import Tensor

NEUTRAL_MARGIN = 0.01
"""A unit is neutral when the interval of its effect lies within this many nats: one percent of the true class's probability."""


def verdicts(
    effects: Sequence[Tensor], alpha: float, *, decisive: bool, spread: Sequence[Tensor] | None = None
) -> list[tuple[Verdict, ...]]:
    """Paired t-test of each unit over the images, false discovery rate alpha over all units (Benjamini-Hochberg).

    effects: (images, units) of each group. spread: standard error of each unit's mean beyond that of the images, added in
    quadrature. Not `decisive`: nothing is called critical or detrimental.
    """
    from scipy import stats

    count = len(effects[0])
    if count < 2:
        return [tuple("unresolved" for _ in range(values.shape[1])) for values in effects]
    means = np.concatenate([values.mean(0).numpy() for values in effects])
    errors = np.concatenate([values.std(0).numpy() for values in effects]) / count**0.5
    if spread is not None:
        errors = np.hypot(errors, np.concatenate([values.numpy() for values in spread]))
    safe = np.maximum(errors, 1e-300)
    p_values = np.where(errors > 0, 2 * stats.t.sf(np.abs(means) / safe, count - 1), np.where(means == 0, 1.0, 0.0))
    significant = stats.false_discovery_control(p_values) <= alpha
    half = errors * stats.t.ppf(1 - alpha / 2, count - 1)
    found = iter(_each(means, half, significant & decisive))
    return [tuple(next(found) for _ in range(values.shape[1])) for values in effects]


def _each(means: NDArray[np.float64], half: NDArray[np.float64], significant: NDArray[np.bool_]) -> list[Verdict]:
    inside = (means - half > -NEUTRAL_MARGIN) & (means + half < NEUTRAL_MARGIN)
    return [
        "neutral" if within else ("critical" if mean < 0 else "detrimental") if sure else "unresolved"
        for mean, sure, within in zip(means, significant, inside, strict=True)
    ]
