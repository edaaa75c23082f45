"""The manifest as a page for people: one self-contained HTML file, and the README of the bundle."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jinja2

from cswap_deploy.manifest import VERDICTS


def render_html(manifest: dict[str, Any]) -> str:
    """A page that opens offline; every name in it is escaped."""
    from cswap_deploy.prune.verdicts import NEUTRAL_MARGIN

    return _environment().get_template("report.html").render(m=manifest, verdicts=VERDICTS, margin=NEUTRAL_MARGIN)


def render_readme(manifest: dict[str, Any]) -> str:
    """How to run the model in ten lines of code."""
    return _environment().get_template("bundle_readme.md").render(m=manifest)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cswap_deploy.report", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "count": _count,
        "points": _points,
        "code": _code,
        "ms": _ms,
        "fact": _fact,
        "effects": _effects,
    }
    return environment


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _ms(value: float) -> str:
    return f"{value:.4g} ms" if value < 1000 else f"{value:.0f} ms"


def _fact(value: Any) -> str:
    """A condition of a measurement; of two values, the one before and the one after."""
    if isinstance(value, list):
        return "unknown" if None in value else " before, ".join(map(_fact, value)) + " after"
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _effects(bounds: list[float] | None) -> str:
    """From the lowest to the highest, nats as thousandths; empty where there is no unit."""
    values = [1000 * value for value in bounds or ()]
    return " to ".join(f"{value:+.0f}" if abs(value) >= 100 else f"{value:+.2g}" for value in values)


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _code(text: str) -> str:
    """A Markdown code span, in which no character of a name means anything."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def _count(number: float) -> str:
    """1234567 → 1.235 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"
