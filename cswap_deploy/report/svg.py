"""Charts as inline SVG: x in percent of the width, y in pixels, so that they fit any screen and their text keeps its size.

Every text passes through `markup`, which escapes it. Colours come from classes; nothing carries a style.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import asinh, ceil, floor, log, log10
from typing import Any

from markupsafe import Markup, escape

from cswap_deploy.report.words import count, percent

Part = tuple[str, float, str]
"""Class, share of the width in 0..1, what a pointer is told."""
WITH_UNIT = 0.18
"""Of the width, between texts below an axis that bear a unit: so that those of 340 pixels do not touch."""


def markup(name: str, *children: str, **attributes: Any) -> Markup:
    """An element; `class_` stands for class, `view_box` for viewBox, other underscores for hyphens; None leaves one out."""
    names = {"class_": "class", "view_box": "viewBox", "aspect": "preserveAspectRatio"}
    given = [(names.get(key, key.replace("_", "-")), value) for key, value in attributes.items() if value is not None]
    written = "".join(f' {key}="{escape(_text(value))}"' for key, value in given)
    return Markup(f"<{name}{written}>{Markup().join(children)}</{name}>")


def bar(label: str, parts: Sequence[Part], height: int = 12) -> Markup:
    """Parts side by side on a track as wide as the cell."""
    marks = [markup("rect", class_="track", x="0", width="100%", height=height, rx=2)]
    start = 0.0
    for kind, share, tip in parts:
        if share > 0:
            size = _percent(share)
            marks.append(
                markup("rect", class_=f"mark {kind}", x=_percent(start), width=size, height=height, data_tip=tip)
            )
            start += share
    return _chart(label, height, *marks)


def pair(label: str, dense: tuple[float, str], shipped: tuple[float, str]) -> Markup:
    """Two thin bars, dense above shipped; shares of the width in 0..1."""
    marks = [
        markup("rect", class_=f"mark {kind}", x="0", y=y, width=_percent(share), height=6, rx=1, data_tip=tip)
        for kind, y, (share, tip) in (("dense", 0, dense), ("ship", 8, shipped))
    ]
    return _chart(label, 14, *marks)


def whisker(label: str, axis: Axis, low: float, value: float, high: float, tip: str, kind: str) -> Markup:
    """A value with its interval."""
    ends = {"x1": axis.at(low), "x2": axis.at(high), "y1": 9, "y2": 9}
    return _chart(
        label,
        18,
        *(markup("line", class_="grid", x1=axis.at(tick), x2=axis.at(tick), y1=0, y2=18) for tick in axis.ticks),
        markup("line", class_=f"mark stroke {kind}", **ends, data_tip=tip),
        markup("circle", class_=f"mark {kind}", cx=axis.at(value), cy=9, r=4.5, data_tip=tip),
    )


def stairs(label: str, points: Sequence[tuple[float, float]], height: int = 26) -> Markup:
    """Constant between neighbouring points; both coordinates in 0..1, the values from the bottom."""
    marks = [markup("line", class_="grid", x1="0", x2="100%", y1=height - 1, y2=height - 1)]
    start, before = 0.0, None
    for end, value in points:
        y = round(1 + (height - 3) * (1 - value), 1)
        if before is not None:
            marks.append(
                markup("line", class_="mark stroke ship", x1=_percent(start), x2=_percent(start), y1=before, y2=y)
            )
        marks.append(markup("line", class_="mark stroke ship", x1=_percent(start), x2=_percent(end), y1=y, y2=y))
        start, before = end, y
    return _chart(label, height, *marks)


def scatter(label: str, points: Sequence[tuple[float, float, str, str, str]], height: int = 260) -> Markup:
    """Points of (milliseconds, percent, class, link or "", tip); those of the class `ship` alone, the front, are joined, fastest first."""
    across = Axis.around(min(x for x, *_ in points), max(x for x, *_ in points), 0.08)
    up = Axis.around(min(y for _, y, *_ in points), max(y for _, y, *_ in points), 0.15)
    placed = sorted((across.place(x), height * (1 - up.place(y)), kind, link, tip) for x, y, kind, link, tip in points)
    marks = []
    for tick in up.ticks:
        y = height * (1 - up.place(tick))
        marks.append(markup("line", class_="grid", x1="0%", x2="100%", y1=y, y2=y))
        marks.append(markup("text", f"{tick:g} %", class_="tick", x="0", y=y - 3))
    for (x1, y1, *_), (x2, y2, *_) in pairwise([point for point in placed if point[2] == "ship"]):
        marks.append(markup("line", class_="mark stroke ship", x1=_percent(x1), x2=_percent(x2), y1=y1, y2=y2))
    for x, y, kind, link, tip in placed:
        point = markup("circle", class_=f"mark {kind}", cx=_percent(x), cy=y, r=7, data_tip=tip)
        marks.append(markup("a", point, href=link) if link else point)
    marks.append(markup("line", class_="zero", x1="0%", x2="100%", y1=height, y2=height))
    return _chart(label, height + 24, *marks, *_ticks(across, height, "{:g}", suffix=" ms", gap=WITH_UNIT))


def drop(label: str, low: float, value: float, high: float, limit: float | None, tip: str) -> Markup:
    """The drop with its interval before what the gate allows."""
    axis = Axis.around(min(low, 0.0, *([-limit / 2] if limit else ())), max(high, limit or 0.0, 0.0), 0.16)
    marks = []
    if limit is not None:
        marks.append(markup("rect", class_="zone good", x="0", y=18, width=axis.at(limit), height=52))
        marks.append(
            markup("rect", class_="zone bad", x=axis.at(limit), y=18, width=_percent(1 - axis.place(limit)), height=52)
        )
        marks.append(markup("line", class_="limit", x1=axis.at(limit), x2=axis.at(limit), y1=14, y2=70))
        marks.append(_words(axis.place(limit), 10, f"allowed: {limit:g}", "limit-text"))
    marks += _ticks(axis, 70, "{:+g}")
    marks.append(markup("line", class_="zero", x1=axis.at(0), x2=axis.at(0), y1=18, y2=70))
    marks.append(
        markup("line", class_="mark stroke wide ship", x1=axis.at(low), x2=axis.at(high), y1=44, y2=44, data_tip=tip)
    )
    for end in (low, high):
        marks.append(markup("line", class_="stroke ship", x1=axis.at(end), x2=axis.at(end), y1=38, y2=50))
    marks.append(markup("circle", class_="mark ship", cx=axis.at(value), cy=44, r=7, data_tip=tip))
    return _chart(label, 90, *marks)


def spread(
    label: str, axis: Axis, dense: dict[str, Any], left: dict[str, Any] | None, margin: float, tip: str
) -> Markup:
    """Effects of a group's units: all above, those that left below; thick: the middle half, where it is known."""
    marks = [
        markup("rect", class_="zone neutral", x=axis.at(-margin), y=0, width=axis.span(-margin, margin), height=20),
        markup("line", class_="zero", x1=axis.at(0), x2=axis.at(0), y1=0, y2=20),
    ]
    for kind, y, found in (("dense", 6, dense), ("ship", 14, left)):
        if not found or not found["effect"]:
            continue
        low, high = found["effect"]
        marks.append(
            markup("line", class_=f"mark stroke {kind}", x1=axis.at(low), x2=axis.at(high), y1=y, y2=y, data_tip=tip)
        )
        if middle := found.get("quantiles"):
            box = {"x": axis.at(middle[1]), "width": axis.span(middle[1], middle[3])}
            marks.append(markup("rect", class_=f"mark box {kind}", **box, y=y - 3, height=6, data_tip=tip))
    return _chart(label, 20, *marks)


def scale(axis: Axis, form: str) -> Markup:
    """An axis of its own, for the head of a column."""
    return markup(
        "svg",
        *_ticks(axis, 2, form, length=4, gap=0.27),
        class_="chart",
        width="100%",
        height=18,
        aria_hidden="true",
    )


def columns(label: str, rows: Sequence[tuple[str, float, float, str]], unit: str = "") -> Markup:
    """Per row (name, before, after, tip) a column before and one after, the lower in front."""
    top = max(max(before, after) for _, before, after, _ in rows) or 1.0
    width = 100 / len(rows)
    marks = [markup("line", class_="grid", x1="0%", x2="100%", y1=y, y2=y) for y in (0.5, 80, 159.5)]
    marks.append(markup("text", f"{count(top)} {unit}".strip(), class_="tick", x="100%", y=12, text_anchor="end"))
    for place, (_, before, after, tip) in enumerate(rows):
        x, gap = place * width, min(0.4, width / 5)
        for kind, value in sorted((("dense", before), ("ship", after)), key=lambda each: -each[1]):
            tall = 160 * value / top
            box = {"x": f"{x + gap / 2:.3f}%", "width": f"{width - gap:.3f}%", "y": 160 - tall, "height": tall}
            marks.append(markup("rect", class_=f"mark {kind}", **box, data_tip=tip))
        marks.append(markup("rect", class_="touch", x=f"{x:.3f}%", width=f"{width:.3f}%", height=160, data_tip=tip))
    return _chart(label, 160, *marks)


def histogram(label: str, spreads: dict[str, Any], timings: dict[str, dict[str, Any]], names: dict[str, str]) -> Markup:
    """Shares of the samples in bins that grow by one factor; `data-from` and `data-to` let the page zoom."""
    low, high = spreads["from_ms"], spreads["to_ms"]
    bins = len(spreads["source"])
    axis = Axis(low, high, logarithmic=True)
    shares = {key: [count / timings[key]["samples"] for count in spreads[key]] for key in names}
    top = max(max(values) for values in shares.values()) or 1.0
    marks = []
    for kind, (key, values) in zip(("dense", "ship"), shares.items(), strict=True):
        tops = [100 - 96 * value / top for value in values]
        steps = "".join(f"V{y:.2f}H{place + 1}" for place, y in enumerate(tops))
        marks.append(markup("path", class_=f"mark area {kind}", d=f"M0 100{steps}V100Z"))
        for p in (50, 90, 99):
            if low <= (value := timings[key][f"p{p}_ms"]) <= high:
                x = bins * axis.place(value)
                marks.append(markup("line", class_=f"quantile {kind}", x1=x, x2=x, y1=0 if p == 50 else 60, y2=100))
    edges = [low * (high / low) ** (place / bins) for place in range(bins + 1)]
    for place, (start, end) in enumerate(pairwise(edges)):
        said = ", ".join(f"{names[key]} {percent(shares[key][place], 1)}" for key in names)
        tip = f"{start:.4g} to {end:.4g} ms: {said}"
        marks.append(markup("rect", class_="touch", x=place, y=0, width=1, height=100, data_tip=tip))
    peaks = [
        markup(
            "text",
            f"{names[key]} p50",
            class_=f"peak {kind}",
            x=axis.at(value),
            y=11,
            data_at=value,
            text_anchor="middle",
        )
        for kind, key in zip(("dense", "ship"), names, strict=True)
        if low <= (value := timings[key]["p50_ms"]) <= high
    ]
    plot = markup(
        "svg", *marks, class_="plot", x="0", y=18, width="100%", height=180, view_box=f"0 0 {bins} 100", aspect="none",
        data_from=low, data_to=high,
    )  # fmt: skip
    return _chart(
        label, 222, plot, *peaks, *_ticks(axis, 198, "{:g}", suffix=" ms", gap=WITH_UNIT), class_="chart zoom"
    )


def course(label: str, values: dict[str, list[float]], names: dict[str, str]) -> Markup:
    """Medians in the order of the rounds, from zero."""
    top = 1.25 * max(max(found) for found in values.values())
    marks, count = [], len(values["source"])
    for kind, key in (("dense", "source"), ("ship", "pruned")):
        points = " ".join(f"{place + 0.5:g},{100 - 100 * value / top:.2f}" for place, value in enumerate(values[key]))
        marks.append(markup("polyline", class_=f"mark curve {kind}", points=points))
    for place in range(count):
        said = ", ".join(f"{names[key]} {values[key][place]:.4g} ms" for key in names)
        tip = f"part {place + 1} of {count}: {said}"
        marks.append(markup("rect", class_="touch", x=place, y=0, width=1, height=100, data_tip=tip))
    axis = Axis(0, top)
    lines = [
        piece
        for tick in axis.ticks[1:]
        for piece in (
            markup("line", class_="grid", x1="0%", x2="100%", y1=_down(axis, tick), y2=_down(axis, tick)),
            markup("text", f"{tick:g} ms", class_="tick", x="0", y=_down(axis, tick) - 3),
        )
    ]
    plot = markup("svg", *marks, x="0", y=0, width="100%", height=140, view_box=f"0 0 {count} 100", aspect="none")
    base = markup("line", class_="zero", x1="0%", x2="100%", y1=140, y2=140)
    return _chart(label, 142, plot, base, *lines)


class Axis:
    """Where values lie between 0 and 1: linear, logarithmic, or, with `bend`, linear around zero and logarithmic beyond."""

    def __init__(self, low: float, high: float, *, logarithmic: bool = False, bend: float | None = None) -> None:
        self._logarithmic, self._bend = logarithmic, bend
        self.low, self.high = low, high if high > low else low + (abs(low) or 1.0) * 0.01

    @staticmethod
    def around(low: float, high: float, room: float, bend: float | None = None) -> Axis:
        """With `room` left free on both sides, as a share of the range."""
        free = room * ((high - low) or 1.0)
        return Axis(low - free, high + free, bend=bend)

    @property
    def bent(self) -> bool:
        return self._bend is not None

    def place(self, value: float) -> float:
        return (self._along(value) - self._along(self.low)) / (self._along(self.high) - self._along(self.low))

    def at(self, value: float) -> str:
        return _percent(self.place(value))

    def span(self, low: float, high: float) -> str:
        return _percent(max(self.place(high) - self.place(low), 0.003))

    @property
    def ticks(self) -> list[float]:
        """Round values, some three to nine of them."""
        if self._bend is not None:
            powers = [10.0**power for power in range(floor(log10(self._bend)), ceil(log10(max(-self.low, self.high))))]
            both = [-power for power in reversed(powers)] + [0.0] + powers
            return [value for value in both if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / (8 if self._logarithmic else 6))
        first = ceil(self.low / step - 1e-9)
        return [round(number * step, 12) for number in range(first, floor(self.high / step + 1e-9) + 1)]

    def _along(self, value: float) -> float:
        if self._bend is not None:
            return asinh(value / self._bend)
        return log(value) if self._logarithmic else value


def _round_step(least: float) -> float:
    size: float = 10.0 ** floor(log10(least))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= least * (1 - 1e-9))


def _chart(label: str, height: int, *marks: str, class_: str = "chart") -> Markup:
    return markup("svg", *marks, class_=class_, role="img", aria_label=label, width="100%", height=height)


def _ticks(axis: Axis, top: int, form: str, suffix: str = "", length: int = 5, gap: float = 0.11) -> Iterator[Markup]:
    """Marks below a plot; where texts would stand on each other, zero and then the outer ones have theirs."""
    taken: list[float] = []
    for tick in sorted(axis.ticks, key=lambda tick: (tick != 0, -abs(tick)) if axis.bent else (False, tick)):
        place = axis.place(tick)
        yield markup("line", class_="tick-mark", x1=axis.at(tick), x2=axis.at(tick), y1=top, y2=top + length)
        if all(abs(place - other) > gap for other in taken):
            taken.append(place)
            yield _words(place, top + length + 11, form.format(tick) + suffix, "tick")


def _words(place: float, y: int, text: str, kind: str) -> Markup:
    """A text at a place in 0..1, which stays inside at the edges."""
    anchor = "start" if place < 0.06 else "end" if place > 0.94 else "middle"
    return markup("text", text, class_=kind, x=_percent(place), y=y, text_anchor=anchor)


def _down(axis: Axis, value: float) -> float:
    return 140 * (1 - axis.place(value))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
