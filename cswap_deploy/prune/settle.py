"""The widths of one step: chosen by what earlier curves promise, measured, chosen again, until all that is chosen is measured.

Most of a curve never decides anything. Earlier curves stay as estimates, scaled by what the measured points say has changed since;
only widths that the knapsack takes are measured on the network as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from cswap_deploy.artifacts import Curve
from cswap_deploy.prune.allocate import Widths, between
from cswap_deploy.prune.curves import Gauge

ROUNDS = 4
"""Times, at most, that what was chosen is measured; what the last choice takes beyond that stays an estimate."""
SMALLEST = 1e-5
"""Nats: smaller damages count as this much where two are compared."""

Choose = Callable[[Sequence[Curve]], Widths]


def settled(gauge: Gauge, earlier: Sequence[Curve], choose: Choose) -> tuple[Widths, tuple[Curve, ...]]:
    """What `choose` finds best in the end, and the curves that it was told.

    `earlier`: a curve of each group, of the same network when it was wider or as wide.
    """
    estimates = [_Estimate(tuple(gauge.orders[curve.group]), curve) for curve in earlier]
    curves = _scaled(estimates)
    widths = choose(curves)
    for _ in range(ROUNDS):
        asked = {item.earlier.group: (widths[item.earlier.group],) for item in estimates if item.asks(widths)}
        if not asked:
            break
        losses = gauge.losses(asked)
        for item in estimates:
            if item.earlier.group in asked:
                item.measured[widths[item.earlier.group]] = losses[item.earlier.group][0]
        curves = _scaled(estimates)
        widths = choose(curves)
    return widths, curves


@dataclass
class _Estimate:
    """`order`: of the group's units that are left, first to leave first; `measured`: damage by width, of the present network."""

    order: tuple[int, ...]
    earlier: Curve
    measured: dict[int, float] = field(default_factory=dict)

    def asks(self, widths: Widths) -> bool:
        width = widths[self.earlier.group]
        return width < len(self.order) and width not in self.measured

    def promised(self, width: int) -> float:
        """What the earlier curve says is lost from the present width to this one."""
        found, so_far = between(self.earlier, len(self.earlier.order), (width, len(self.order)))
        return found - so_far

    def growth(self, width: int) -> float:
        """How much more is lost at a measured width than was promised."""
        return max(self.measured[width], SMALLEST) / max(self.promised(width), SMALLEST)

    def scaled(self, otherwise: float) -> Curve:
        """Measured damages, and between them promised ones times the growth at the nearest measured width."""
        damage = dict(self.measured)
        for width in self.earlier.widths:
            if width < len(self.order) and width not in damage:
                nearest = min(self.measured, key=lambda other: (abs(other - width), other), default=None)  # noqa: B023
                damage[width] = self.promised(width) * (otherwise if nearest is None else self.growth(nearest))
        widths = tuple(sorted(damage, reverse=True))
        return Curve(self.earlier.group, self.order, widths, tuple(damage[width] for width in widths))


def _scaled(estimates: Sequence[_Estimate]) -> tuple[Curve, ...]:
    """Groups with nothing measured are taken to have changed as the others have, in the median."""
    found = [item.growth(width) for item in estimates for width in item.measured]
    return tuple(item.scaled(median(found) if found else 1.0) for item in estimates)
