"""Which way to quantise: the method and the nodes that stay in float, by accuracy on the selection images, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy import progress
from cswap_deploy.int8 import METHODS, Way
from cswap_deploy.recipe import Int8Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

SCREENED = 64
"""Images on which each node's own damage is measured; choices are made on all."""


@dataclass(frozen=True)
class Judged:
    """A way against the float32 graph: top-1 lost in percentage points, and divergence in nats per image."""

    way: Way
    drop_pp: float
    divergence: float


@dataclass(frozen=True)
class Chosen:
    """What was chosen, how many files were tried for it, and whether it loses no more than was allowed."""

    best: Judged
    tried: int
    met: bool


def choose(nodes: Sequence[str], judge: Callable[[Way, int | None], Judged], settings: Int8Settings) -> Chosen:
    """`judge` runs a way on the selection images, or on the first so many.

    All methods are tried with every node in 8 bits; where none keeps the accuracy, the nodes whose own quantisation costs
    most stay in float, one, two, four, ... of them; last, weights alone are rounded. The first step that keeps it is taken;
    where none does, the least divergent of all.
    """
    tried: list[Judged] = []
    screened = 0
    for step in _steps(nodes, judge, settings, tried):
        found = [judge(way, None) for way in step.ways]
        tried += found
        screened += step.screened
        progress.advance("int8 files", len(tried) + screened, len(tried) + screened)
        if good := [each for each in found if each.drop_pp <= settings.max_drop]:
            return Chosen(min(good, key=lambda each: each.divergence), len(tried) + screened, True)
    return Chosen(min(tried, key=lambda each: (each.divergence, len(each.way.in_float))), len(tried) + screened, False)


@dataclass(frozen=True)
class _Step:
    ways: tuple[Way, ...]
    screened: int = 0
    """Files that were run to find these ways."""


def _steps(
    nodes: Sequence[str], judge: Callable[[Way, int | None], Judged], settings: Int8Settings, tried: Sequence[Judged]
) -> Iterator[_Step]:
    yield _Step(tuple(Way(method) for method in METHODS))
    method = min(tried, key=lambda each: each.divergence).way.method
    most = int(settings.max_float * len(nodes))
    if most:
        own = {node: judge(Way(method, only=node), SCREENED).divergence for node in nodes}
        worst = sorted(nodes, key=lambda node: -own[node])
        cost, count = len(nodes), 1
        while count <= most:
            yield _Step((Way(method, in_float=tuple(worst[:count])),), cost)
            cost, count = 0, most if count < most < 2 * count else 2 * count
    yield _Step((Way("weights"),))


def judged(way: Way, found: Logits, wanted: Logits, labels: Sequence[int]) -> Judged:
    """Logits of a way beside those of the float32 graph; `labels` are the true classes."""
    import numpy as np

    truth = np.asarray(labels)
    lost = int((wanted.argmax(1) == truth).sum()) - int((found.argmax(1) == truth).sum())
    if not np.isfinite(found).all():
        return Judged(way, 100.0, float("inf"))
    return Judged(way, 100 * lost / len(truth), divergence(wanted, found))


def divergence(wanted: Logits, found: Logits) -> float:
    """Mean Kullback-Leibler divergence of the class probabilities, in nats per image."""
    import numpy as np

    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (wanted, found))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    shifted = logits - logits.max(1, keepdims=True)
    log: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return log
