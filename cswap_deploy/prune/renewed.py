"""Curves of the present network from earlier ones and one new measurement per group.

From step to step a curve keeps its shape and grows: what narrowing costs depends on what the consumers still have. So each group is
measured at one width that is about to matter, and its whole earlier curve is scaled to that point.
"""

from __future__ import annotations

from collections.abc import Sequence

from cswap_deploy.artifacts import Curve, Group
from cswap_deploy.prune.allocate import between
from cswap_deploy.prune.curves import Gauge
from cswap_deploy.prune.select import floor_of, step_of

SHARE = 0.3
"""Part of a group's present units that the new measurement is about."""
SMALLEST = 1e-5
"""Nats: smaller damages count as this much where two are compared."""
LEAST_GROWTH, MOST_GROWTH = 0.5, 5.0
"""Of a curve in one step: a point that is all but 0, before or now, says little about the far end."""


def renewed(gauge: Gauge, earlier: Sequence[Curve], round_to: int) -> tuple[Curve, ...]:
    """`earlier`: a curve of each of the gauge's groups, of the same network when it was wider or as wide."""
    probes = {group.name: probe(group, len(gauge.orders[group.name]), round_to) for group in gauge.groups}
    losses = gauge.losses({name: (width,) for name, width in probes.items() if width < len(gauge.orders[name])})
    found = []
    for curve in earlier:
        order, width = tuple(gauge.orders[curve.group]), probes[curve.group]
        measured = {width: losses[curve.group][0]} if curve.group in losses else {}
        found.append(_grown(curve, order, measured))
    return tuple(found)


def probe(group: Group, now: int, round_to: int) -> int:
    """The width to measure at; `now` where the group is as narrow as it may be."""
    step, least = step_of(group, round_to), floor_of(group, round_to)
    width = min(now - 1, round(now * (1 - SHARE)))
    return min(now, max(least, width - width % step))


def _grown(earlier: Curve, order: tuple[int, ...], measured: dict[int, float]) -> Curve:
    """The part of a curve that is still ahead, counted from the present width, times what the measured point says of it."""
    now, before = len(order), len(earlier.order)
    widths = tuple(width for width in sorted({*earlier.widths, *measured}, reverse=True) if width < now)
    *promised, spent = between(earlier, before, (*widths, now))
    ahead = dict(zip(widths, (damage - spent for damage in promised), strict=True))
    growth = 1.0
    for width, damage in measured.items():
        growth = max(damage, SMALLEST) / max(ahead[width], SMALLEST)
        growth = min(MOST_GROWTH, max(LEAST_GROWTH, growth))
    return Curve(earlier.group, order, widths, tuple(measured.get(width, growth * ahead[width]) for width in widths))
