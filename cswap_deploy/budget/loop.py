"""The closed loop: choose, measure the whole network, correct the prediction by what was measured, choose again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cswap_deploy.artifacts import Trial
from cswap_deploy.samples import Ratio

Widths = dict[str, int]

MARGIN = 0.4
"""Of the tolerance: how far below the budget a candidate is aimed, since half of those aimed at it would miss it."""


@dataclass(frozen=True)
class Loop:
    """Towards `budget`, a ratio to the dense network's latency; at most `trials` candidates are measured in all.

    `choose`: the widths with the least damage whose predicted ratio is at most the given one, or the fastest that there are.
    `measure`: the whole network with these widths on the device; the second argument asks for a longer measurement.
    """

    budget: float
    tolerance: float
    trials: int
    choose: Callable[[float], Widths]
    predict: Callable[[Mapping[str, int]], float]
    measure: Callable[[Widths, bool], Ratio]

    def run(self, earlier: tuple[Trial, ...] = (), shift: float = 1.0) -> tuple[Trial, ...]:
        """`earlier` trials and the new ones, in order; ends with one that fits, with no new candidate, or after `trials`.

        `shift`: what a network that ships takes, divided by what its candidate took.
        """
        done, scale = list(earlier), shift
        if done:
            scale = shift * done[-1].ratio / self.predict(done[-1].widths)
        while len(done) < self.trials:
            widths = self.choose(self.aim / scale)
            if any(trial.widths == widths for trial in done):
                break
            found = self.measure(widths, False)
            if found.low * shift <= self.budget <= found.high * shift:
                found = self.measure(widths, True)
            done.append(Trial(widths, scale / shift * self.predict(widths), found.value, found.low, found.high))
            if self.fits(done[-1], shift):
                break
            scale = shift * found.value / self.predict(widths)
        return tuple(done)

    @property
    def aim(self) -> float:
        return self.budget * (1 - MARGIN * self.tolerance)

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
