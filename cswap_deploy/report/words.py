"""Figures and sentences as the page, the Markdown and the README spell them."""

from __future__ import annotations

import re
from math import inf
from typing import Any

from cswap_deploy import wording
from cswap_deploy.wording import answered, busy, percent, plural, printable, removed, sizes, verdict
from cswap_deploy.wording import count_text as count
from cswap_deploy.wording import size_text as size

__all__ = ["answered", "busy", "count", "percent", "plural", "removed", "size", "sizes", "verdict"]

Facts = dict[str, Any]


def share(fraction: float) -> str:
    """Short, for a bar or a headline."""
    return percent(fraction, 1)


def ms(value: float) -> str:
    return f"{wording.ms(value)} ms"


def points(value: float) -> str:
    return f"{value:+.2f}"


def times(value: float) -> str:
    return f"{value:.2f}"


def unbroken(text: str) -> str:
    """A sentence whose lines do not end between a number and its %."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def faster(latency: Facts) -> str:
    """The speed-up in words, with its interval."""
    low, high = latency["speedup_ci95"]
    return f"{times(latency['speedup'])} (95 %: {times(low)} to {times(high)}) times as fast"


FASTER = 0.9
"""Of the time that the budget was set for, below which what ships shows that the device is another now."""


def budget(found: Facts) -> str:
    """What was asked for and what came of it, in one sentence."""
    asked = f"a p{found['percentile']} of {ms(found['latency_ms'])}"
    when = "when the budget was set" if found.get("planned_here", True) else "here, which is not what was planned for"
    dense = f"; the dense network took {ms(found['dense_ms'])}{_within(found)} {when}" if "dense_ms" in found else ""
    if found["verdict"] in ("met", "not needed") and found.get("took_ci95_ms", (0,))[0] > found["latency_ms"]:
        dense += f"; when it was measured last the device was slower: what ships took {ms(found['took_ms'])}"
    elif found["achieved_ms"] and found.get("took_ci95_ms", (0, inf))[1] < FASTER * found["achieved_ms"]:
        dense += (
            f"; when it was measured last the device was faster: what ships took {ms(found['took_ms'])}, "
            "and less may have had to leave (--force staircase sets the budget anew)"
        )
    match found["verdict"]:
        case "not needed":
            return f"No pruning was needed: {asked} is met by the dense network{dense}"
        case "infeasible":
            floor = ""
            if "floor_ms" in found:
                narrowest = f"with every group at its narrowest {ms(found['floor_ms'])} are left"
                nothing = found["floor_ms"] == found.get("dense_ms")
                floor = f"; {'nothing in this network can be pruned' if nothing else narrowest}"
            return f"Infeasible: {asked} cannot be reached{floor}{dense}"
        case "met" | "missed" if found["achieved_ms"] is None:
            return f"Not shown to be met: {asked} was asked for, what ships was not measured{dense}"
        case verdict:
            got = ms(found["achieved_ms"])
            if found.get("ratio") is not None:
                got += f", {share(found['ratio'])} of the dense network's latency in the same run{_asked(found)}"
            trials = plural(found["trials"], "trial")
            if found.get("unbuilt"):
                trials += f"; {plural(found['unbuilt'], 'engine')} could not be built and were left out"
            return f"{verdict.capitalize()}: {asked} was asked for, what ships takes {got}{dense}; {trials}"


def _asked(found: Facts) -> str:
    if found["verdict"] != "met" or "proven" not in found or found.get("ratio_asked") is None:
        return ""
    return f" ({share(found['ratio_asked'])} asked for, {'' if found['proven'] else 'not '}proven at 95 %)"


def _within(found: Facts) -> str:
    if "dense_ci95_ms" not in found:
        return ""
    low, high = found["dense_ci95_ms"]
    return f" (95 %: {ms(low)} to {ms(high)})"


def asked(found: Facts) -> str:
    """The beginning of `budget`: the verdict, what was asked for and what was reached."""
    return budget(found).partition(";")[0]


def fact(value: Any) -> str:
    """A condition of a measurement; of two values, the one before and the one after; of several by name, each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {fact(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "unknown" if None in value else " before, ".join(map(fact, value)) + " after"
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def effects(bounds: list[float] | None) -> str:
    """From the lowest to the highest, nats as thousandths; empty where there is no unit."""
    values = [1000 * value for value in bounds or ()]
    return " to ".join(f"{value:+.0f}" if abs(value) >= 100 else f"{value:+.2g}" for value in values)


def code(text: str) -> str:
    """A Markdown code span, in which no character of a name means anything."""
    plain = printable(str(text))
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def cell(text: str) -> str:
    """A code span in a table of GitHub's Markdown, which looks for | before it looks for code."""
    return code(text).replace("|", "\\|")


def quantised(made: Facts) -> str:
    """How an int8 file was chosen."""
    how = {
        "minmax": "ranges from the extremes",
        "percentile": "ranges from the 99.99th percentile",
        "entropy": "ranges by entropy",
        "weights": "weights alone",
    }.get(made["method"], made["method"])
    kept = f", {len(made['in_float'])} of {made['nodes']} weighted nodes in float" if made["in_float"] else ""
    return (
        f"{how}{kept}; of {plural(made['tried'], 'file')} tried, drop {points(made['drop_pp'])} points from float32 on "
        f"{made['images']} selection images"
    )


def runs(manifest: Facts) -> list[tuple[str, list[Facts]]]:
    """Each ONNX file with what every runtime of the recipe makes of it."""
    onnx = manifest["onnx"]
    files = [("model.onnx", onnx.get("runs_on") or [])]
    return files + [(found["file"], found.get("runs_on") or []) for found in onnx["variants"].values()]


def headline(manifest: Facts) -> str:
    """What came out, in one sentence."""
    accuracy, latency = manifest["accuracy"], manifest["latency"]
    kept = manifest["pruned"]["macs"] / manifest["model"]["macs"]
    low, high = accuracy["drop_ci95_pp"]
    fast = f"{times(latency['speedup'])} times as fast, {share(kept)}" if latency else share(kept)
    return (
        f"{fast} of the multiply-accumulates, top-1 drop {points(accuracy['drop_pp'])} points "
        f"(95 %: {points(low)} to {points(high)}) on {accuracy['images']} hold-out images"
    )


def gate(accuracy: Facts) -> str:
    """The gate's outcome as a sentence of its own."""
    text = wording.gate(accuracy)
    return f"{text[0].upper()}{text[1:]}."


def pace(latency: Facts) -> str:
    """good, bad or even: whether the interval of the speed-up lies above or below 1."""
    low, high = latency["speedup_ci95"]
    return "good" if low > 1 else "bad" if high < 1 else "even"
