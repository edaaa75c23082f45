"""tegrastats' lines, read on the host: memory, GPU load and clock, temperatures, power rails. L4T 35 to 38."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from cswap_deploy.errors import DeviceError

FIELDS = {
    "ram": r"RAM (\d+)/(\d+)MB",
    "gpu": r"GR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+(?:,\d+)*)\]?)?",
    "temperature": r"([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C",
    "rail": r"([A-Z][A-Z0-9_]+) (\d+)mW/(\d+)mW(?:/\d+mW)?",
}
OFF_C = -256.0
"""What a sensor that is off shows."""
ABSENT = {"GR3D_FREQ": "gpu", "RAM": "ram"}


@dataclass(frozen=True)
class Moment:
    """One line. None and absent: the line does not say."""

    ram_mb: int
    ram_total_mb: int
    gpu_percent: int | None
    gpu_mhz: int | None
    """The slowest where there are several."""
    temperature_c: Mapping[str, float]
    rails_mw: Mapping[str, int]
    """Milliwatts now."""


def read(text: str) -> list[Moment]:
    """All lines; the last one may be cut off, since the program is ended while it writes. Errors: DeviceError."""
    lines = text.splitlines()
    whole = lines if text.endswith("\n") else lines[:-1]
    return [_moment(number, line) for number, line in enumerate(whole, 1) if line.strip()]


def _moment(number: int, line: str) -> Moment:
    def one(name: str) -> re.Match[str]:
        found = list(re.finditer(rf"(?<!\S){FIELDS[name]}(?!\S)", line))
        if name == "ram":  # `(lfb 61x4MB)` follows
            found = list(re.finditer(rf"(?<!\S){FIELDS[name]}(?= )", line))
        if len(found) != 1 or not found[0][0].strip():
            raise _fault(number, f"has {len(found)} fields {name}", line)
        return found[0]

    ram, gpu = one("ram"), one("gpu")
    temperatures, rails = [*_all("temperature", line)], [*_all("rail", line)]
    for kind, found, mark in (("temperature", temperatures, "C"), ("rail", rails, "mW/")):
        if len({name for name, *_ in found}) < len(found):
            raise _fault(number, f"names a {kind} twice", line)
        if len(found) != len(re.findall(r"@-?[\d.]+C" if mark == "C" else r"mW/[\d.]*mW", line)):
            raise _fault(number, f"has a damaged {kind}", line)
    if int(ram[1]) > int(ram[2]) or (gpu[1] and int(gpu[1]) > 100):
        raise _fault(number, "contradicts itself", line)
    return Moment(
        ram_mb=int(ram[1]),
        ram_total_mb=int(ram[2]),
        gpu_percent=int(gpu[1]) if gpu[1] else None,
        gpu_mhz=min(map(int, gpu[2].split(","))) if gpu[2] else None,
        temperature_c={name: float(value) for name, value in temperatures if float(value) > OFF_C},
        rails_mw={name: int(now) for name, now, _ in rails},
    )


def _all(name: str, line: str) -> list[tuple[str, ...]]:
    return [found.groups() for found in re.finditer(rf"(?<!\S){FIELDS[name]}(?!\S)", line)]


def mean_rails_mw(moments: Sequence[Moment]) -> dict[str, float]:
    """Of the rails that every line has."""
    shared = set.intersection(*(set(moment.rails_mw) for moment in moments)) if moments else set()
    return {name: mean(moment.rails_mw[name] for moment in moments) for name in sorted(shared)}


def _fault(number: int, what: str, line: str) -> DeviceError:
    return DeviceError(f"tegrastats: line {number} {what}: {line[:100]!r}", "measure again")
