"""The closed loop: choose, measure the whole network, correct the prediction by what was measured, choose again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cswap_deploy.budget.values import Trial
from cswap_deploy.samples import Ratio

Widths = dict[str, int]

MARGIN, FARTHEST = 0.4, 0.02
"""How far below the budget a candidate is aimed, since half of those aimed at it would miss it: of the tolerance, and at most."""
CLOSER = 0.005
"""By how much the prediction is moved on where it leads to a candidate that was measured before."""


@dataclass(frozen=True)
class _Line:
    """What networks take, over what is predicted of them."""

    slope: float
    offset: float = 0.0

    def takes(self, predicted: float) -> float:
        return self.offset + self.slope * predicted

    def predicted(self, takes: float) -> float:
        return (takes - self.offset) / self.slope


@dataclass(frozen=True)
class Loop:
    """Towards `budget`, a ratio to the dense network's latency; at most `trials` candidates are measured in all.

    `choose`: the widths with the least damage whose predicted ratio is at most the given one, or the fastest that there are.
    `measure`: the whole network with these widths on the device; the second argument asks for a longer measurement. None: no
    engine of it can be built, which counts as a trial; a faster one is looked for.
    """

    budget: float
    tolerance: float
    trials: int
    choose: Callable[[float], Widths]
    predict: Callable[[Mapping[str, int]], float]
    measure: Callable[[Widths, bool], Ratio | None]
    scale: float = 1.0
    """What networks take as a part of what is predicted, as far as that is known before the first candidate."""
    failed: list[Widths] = field(default_factory=list)
    """Candidates that count as trials, although no engine of them could be built."""

    def run(self, earlier: tuple[Trial, ...] = (), shift: float = 1.0) -> tuple[Trial, ...]:
        """`earlier` trials and the new ones, in order; ends with one that fits, with no new candidate, or after `trials`.

        `shift`: what a network that ships takes, divided by what its candidate took.
        """
        done = list(earlier)
        while len(done) + len(self.failed) < self.trials:
            line = self._line(done, shift)
            widths = self._fresh(done, line.predicted(self.aim), shift)
            if widths is None:
                break
            found = self.measure(widths, False)
            if found and found.low * shift <= self.budget <= found.high * shift:
                found = self.measure(widths, True)
            if found is None:
                self.failed.append(widths)
                continue
            expected = line.takes(self.predict(widths)) / shift
            done.append(Trial(widths, expected, found.value, found.low, found.high))
            if self.fits(done[-1], shift):
                break
        return tuple(done)

    def _line(self, done: Sequence[Trial], shift: float) -> _Line:
        """Through the slowest that met the budget and the fastest that missed it, by prediction; else from nothing to the last one."""
        if not done:
            return _Line(shift * self.scale)
        known = sorted((self.predict(trial.widths), shift * trial.ratio) for trial in done)
        met, missed = ([pair for pair in known if (pair[1] <= self.budget) == within] for within in (True, False))
        if met and missed and met[-1][0] < missed[0][0]:
            (left, low), (right, high) = met[-1], missed[0]
            slope = (high - low) / (right - left)
            return _Line(slope, low - slope * left)
        return _Line(shift * done[-1].ratio / self.predict(done[-1].widths))

    def _fresh(self, done: Sequence[Trial], target: float, shift: float) -> Widths | None:
        """Widths that were not measured yet: faster than those that missed, less damaged than those that met. None: no such."""
        while True:
            widths = self.choose(target)
            known = next((trial for trial in done if trial.widths == widths), None)
            if known is None and widths not in self.failed:
                return widths
            if known is None or known.ratio * shift > self.budget:
                faster = self.predict(widths) * (1 - CLOSER)
                if faster >= target * (1 - CLOSER / 2):  # these are the fastest that there are
                    return None
                target = faster
            else:
                missed = [self.predict(trial.widths) for trial in done if trial.ratio * shift > self.budget]
                missed += map(self.predict, self.failed)
                target *= 1 + CLOSER
                if target >= min([1.0, *missed]) or widths == self.choose(1.0):  # these are the slowest that there are
                    return None

    @property
    def aim(self) -> float:
        return self.budget * (1 - min(MARGIN * self.tolerance, FARTHEST))

    def fits(self, trial: Trial, shift: float = 1.0) -> bool:
        """Within the budget, and no more room is left than the tolerance."""
        return (1 - self.tolerance) * self.budget <= trial.ratio * shift <= self.budget

    def best(
        self, trials: tuple[Trial, ...], damage: Callable[[Mapping[str, int]], float], shift: float = 1.0
    ) -> Trial:
        """Of those within the budget the least damaged one; where none is, the fastest."""
        met = [trial for trial in trials if trial.ratio * shift <= self.budget]
        if not met:
            return min(trials, key=lambda trial: trial.ratio)
        return min(met, key=lambda trial: damage(trial.widths))
