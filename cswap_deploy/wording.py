"""Values as text, the same on a terminal, on the page, in Markdown and in a recipe; names made harmless."""

from __future__ import annotations

from typing import Any, get_args

from cswap_deploy.errors import DeviceError

SLOWEST = 15
"""Layers of a timed network that are listed."""
BUSY = "latencies are those of a busy machine"
"""What follows from `is_busy`."""
UNPLANNED = "Nothing was pruned for the latency"
"""Begins what a reason advises where the host's half is to be run again or otherwise: `deploy` does not prune."""


def printable(text: str) -> str:
    """Names come from bundles and folders: control characters, which a terminal would obey, are spelt out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def size_text(size: float) -> str:
    """1023.7 KiB is 1.0 MiB."""
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= limit * (1 - 1 / 2048):
            return f"{size / limit:.{0 if size >= 99.95 * limit else 1}f} {unit}"
    return f"{size:g} B"


def duration_text(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count_text(number: float) -> str:
    """6198016 → 6.20 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.999995 * limit:  # what would round up to 1000.00 of the unit below
            return f"{number / limit:.2f} {unit}"
    return f"{number:.4g}"


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


def level(confidence: float) -> str:
    """As it was asked for: 95 %, 97.5 %."""
    return f"{100 * confidence:g} %"


def plural(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number} {noun}{ending}"


def ms(value: float) -> str:
    """Without the unit."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def sizes(manifest: dict[str, Any]) -> tuple[str, int, int] | None:
    """What, bytes dense, bytes shipped: of the file that ships and its dense twin; where that was not made, the weights' speak
    for both. None in a bundle that was made before sizes were kept."""
    found = manifest.get("size")
    if not found:
        return None
    if found["source_bytes"]:
        return "file size", found["source_bytes"], found["shipped_bytes"]
    return "size of the weights", found["source_weights_bytes"], found["pruned_weights_bytes"]


def verdict(manifest: dict[str, Any]) -> str:
    """pass, fail, or, where nothing was to be passed, no gate."""
    off = manifest["accuracy"]["gate"]["verdict"] == "off"
    return "no gate" if off and manifest["verdict"] == "pass" else str(manifest["verdict"])


def answered(point: dict[str, Any]) -> str:
    """What came of one latency of a sweep; without a verdict, why there is none."""
    lost = "target lost" if point["exit_code"] == DeviceError.exit_code else "not made"
    return str(point["verdict"] or lost)


def gate(accuracy: dict[str, Any]) -> str:
    """Whether the drop is within what the gate allows, and whether that is proven; no capital, no full stop."""
    asked, images = accuracy["gate"], f"{accuracy['images']} hold-out images"
    if asked["verdict"] == "off":
        return f"no gate was set; {images}"
    sure = level(asked["confidence"])
    what = "the drop" if asked["rule"] == "point" else f"the upper bound of the drop at {sure}"
    held = {"pass": "within", "fail": "beyond"}[asked["verdict"]]
    limit = f"{asked['max_drop_pp']:g} point{'' if asked['max_drop_pp'] == 1 else 's'}"
    if asked["verdict"] == "fail" and accuracy["drop_ci95_pp"][0] > asked["max_drop_pp"]:
        return f"{what} is beyond {limit} on {images}, and so is the whole 95 % interval"
    proof = "proven" if asked["proven"] else "not proven"
    more = f"; about {asked['images_to_prove']} images would prove it" if asked["images_to_prove"] else ""
    return f"{what} is {held} {limit} on {images}, {proof} at {sure} (one-sided){'' if asked['proven'] else more}"


def removed(pruned: dict[str, Any]) -> str:
    """How many units and whole branches left and, where they were judged, what the dense network's scores say of units; no full stop."""
    from cswap_deploy.artifacts import Verdict

    text = f"{pruned['units_removed']} of {plural(pruned['units'], 'unit')} removed"
    if whole := sum(group["kept"] == 0 for group in pruned.get("groups", ())):
        text += f", {plural(whole, 'whole branch')} among them"
    judged = [group["left"] for group in pruned.get("groups", ()) if group.get("left")]
    totals = {kind: sum(group[kind] for group in judged) for kind in get_args(Verdict)}
    said = ", ".join(f"{total} {kind}" for kind, total in totals.items() if total)
    return f"{text}; of those, on the dense network, {said}" if said else text


def is_busy(load: float | None, cores: int | None) -> bool:
    """Whether a load, the kernel's average over the last minute, leaves too little of a machine for one that measures there."""
    return load is not None and load > max(1.0, (cores or 0) / 2)


def load_text(conditions: dict[str, Any]) -> str:
    """The load when a measurement began."""
    load, cores = conditions["load"][0], conditions.get("cores")
    return f"load {load:.1f}" + (f" on {plural(cores, 'core')}" if cores else "")


def busy(conditions: dict[str, Any]) -> str:
    """What the load at the beginning of a measurement means for its figures; empty where it means nothing."""
    if not is_busy(conditions["load"][0], conditions.get("cores")):
        return ""
    return f"{load_text(conditions)}: {BUSY}; the ratio is of the same minutes"
