"""Why a unit left or stayed, for `show --unit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

from cswap_deploy.console.text import table, wrapped
from cswap_deploy.wording import percent, plural, printable

ATTRIBUTION = "it calls no unit critical or detrimental"


def unit_lines(unit: dict[str, Any]) -> Iterator[str]:
    """Whether a unit left, when, and what its scores were on the dense network and at that moment."""
    step, name = unit["step"], f"{printable(unit['group'])}:{unit['index']}"
    if step:
        yield from wrapped(f"{name} left in step {step['number']} of {unit['steps']}")
    else:
        yield from wrapped(
            f"{name} stayed: it is unit {unit['kept_as']} of the {unit['kept']} that are kept, counted from 0"
        )
    found = {"dense network": unit["dense"]} if unit["dense"] else {}
    first = (step["number"] if step else unit["steps"]) == 1  # the first step goes by the dense network's scores
    later = unit["last"] if step is None else step["scores"]
    if later and not (first and found):
        those = " that left" if step and unit["by_elimination"] else ""
        found["when it left" if step else "before the last step"] = {**later, "among": f"{later['among']}{those}"}
    hidden = ("estimator", "intervention") if unit["rotated"] else ()
    rows = [[label, *map(show, found.values())] for label, show in UNIT_ROWS.items() if label not in hidden]
    yield from table(["", *found], [row for row in rows if any(row[1:])], "") if found else [""]
    yield from wrapped(_widths(unit))
    if unit["turn"]:
        yield from wrapped(f"On the dense network its turn to leave was {unit['turn']} of {unit['units']}.")
    if not found:
        yield from wrapped("Its scores were not kept.")
    others = [layer for layer in unit["layers"] if layer != unit["group"]]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    yield from wrapped(printable(f"Coupled to it: its parts of {', '.join(others[:8]) or 'no other layer'}{more}."))
    yield ""
    for text in _explained(unit, [*found.values()]):
        yield from wrapped(text)


def _widths(unit: dict[str, Any]) -> str:
    """What became of the unit's group."""
    step, kind = unit["step"], unit["kind"]
    if not step:
        share = "all" if unit["units"] == unit["kept"] else f"{unit['kept']} of"
        return printable(f"Its group keeps {share} {unit['units']} {kind}.")
    return printable(
        f"Its group went from {unit['units']} to {unit['kept']} {kind}, in step {step['number']} from {step['width_before']} to "
        f"{step['width_after']}. Of all groups {plural(step['gone_before'], 'unit')} had left before that step, which kept "
        f"{percent(step['macs'], 1)} of the MACs at a drop of {step['drop_pp']:+.1f} points on the selection images."
    )


def _explained(unit: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures mean and how they decided, as far as they did."""
    if unit["rotated"]:
        yield (
            "The heads were rotated before anything left, so that the first dimensions of queries and keys carry most of the logits; "
            "the last leave first, in all heads of the attention."
        )
        yield "Keep value: the mean square of what a dimension adds to a logit, before the softmax's scale; no effect is measured."
    elif unit["by_elimination"]:
        yield (
            "Of a group those units leave first that the layers behind can best do without, one after the other; the keep value "
            "is not that order, and verdicts do not decide."
        )
    else:
        yield "Of a group the units with the lowest keep values leave first; verdicts do not decide."
    if unit["allocation"] == "curves":
        yield "How many leave follows from the damage that narrowing does, measured group by group."
    if unit["rotated"]:
        return
    if found and found[0]["effect"] is None:
        yield printable(f"Criterion {found[0]['criterion']} gives no effect, error or verdict.")
    elif found:
        yield from _verdicts_explained(found)


def _verdicts_explained(found: list[dict[str, Any]]) -> Iterator[str]:
    from cswap_deploy.prune.verdicts import NEUTRAL_MARGIN

    yield (
        "Effect: mean change of log p(true class) when the unit leaves, in nats; negative: it helps, positive: it harms. "
        "Keep value: the mean size of that change."
    )
    yield (
        f"Neutral: the interval lies within {NEUTRAL_MARGIN:g} nats of zero; critical, detrimental: it does not, and the effect is "
        "significantly negative, positive; unresolved: neither."
    )
    if (alpha := found[0]["alpha"]) is not None:
        held = "held" if all(facts["estimator"] == "exact" for facts in found) else "aimed"
        yield (
            f"The false discovery rate over all units is {held} at {100 * alpha:g} % (Benjamini-Hochberg); the interval, at "
            f"{100 * (1 - alpha):g} %, is of this unit alone."
        )
    if any(facts["estimator"] == "attribution" for facts in found):
        yield f"Attribution is of first order, and {ATTRIBUTION}."


def _ablated(facts: dict[str, Any]) -> str:
    """On how many of the images the unit really was taken out."""
    if facts["verified"] is None or facts["estimator"] is None:
        return ""
    images = facts["images"]
    if facts["verified"]:
        return f"all {images}"
    if facts["estimator"] == "attribution":
        return f"none of {images}"
    from cswap_deploy.prune.screened import IMAGES

    return f"at most {ceil(IMAGES * images)} of {images}"


def _effect(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


UNIT_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "verdict": lambda facts: facts["verdict"] or "",
    "effect": lambda facts: _effect(facts["effect"]),
    "  interval": lambda facts: " to ".join(map(_effect, facts["interval"] or ())),
    "  standard error": lambda facts: "" if facts["error"] is None else f"{facts['error']:.3g}",
    "keep value": lambda facts: f"{facts['keep_value']:.3g}",
    "  rank, lowest first": lambda facts: f"{facts['rank']} of {facts['among']}",
    "estimator": lambda facts: printable(facts["estimator"] or facts["criterion"]),
    "intervention": lambda facts: printable(facts["intervention"] or ""),
    "images": lambda facts: str(facts["images"] or ""),
    "ablated on": _ablated,
}
"""What is shown of a unit's scores."""
