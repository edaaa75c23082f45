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
        done, scale = list(earlier), shift * self.scale
        if done:
            scale = shift * done[-1].ratio / self.predict(done[-1].widths)
        while len(done) + len(self.failed) < self.trials and (widths := self._fresh(done, scale, shift)):
            found = self.measure(widths, False)
            if found and found.low * shift <= self.budget <= found.high * shift:
                found = self.measure(widths, True)
            if found is None:
                self.failed.append(widths)
                continue
            done.append(Trial(widths, scale / shift * self.predict(widths), found.value, found.low, found.high))
            if self.fits(done[-1], shift):
                break
            scale = shift * found.value / self.predict(widths)
        return tuple(done)

    def _fresh(self, done: Sequence[Trial], scale: float, shift: float) -> Widths | None:
        """Widths that were not measured yet: faster than those that missed, less damaged than those that met. None: no such."""
        target = self.aim / scale
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
                if target >= min([1.0, *missed]):
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
