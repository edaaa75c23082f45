"""Values as text, the same on a terminal, on the page, in Markdown and in a recipe; names made harmless."""

from __future__ import annotations

from typing import Any


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


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def plural(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
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
