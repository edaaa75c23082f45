"""Under which conditions something was measured, from the agent's raw readings: board, clocks, temperature, power, energy.

What could not be read is None and shown as unknown. Units: MHz, percent, degrees Celsius, watts, millijoules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from cswap_deploy.device import tegrastats
from cswap_deploy.device.jetpack import jetpack_of

LEAST_ENERGY_S = 10.0
"""The sensors are refreshed every few tens of milliseconds: below this a mean power is not known well enough."""
BUSY_PERCENT = 10.0
"""Load of the GPU before anything of ours runs there, above which somebody else uses it."""
NEVER_MORE_MHZ = 1
"""What a clock that is read may lie below its locked value."""
TOTAL = "VDD_IN"
"""The rail that feeds everything, on Orin Nano and NX; AGX boards have none, there these make the whole."""
PARTS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
Moment = tuple[int, Mapping[str, Any]]


def describe(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader must know to compare the figures of a `measure` answer; of two values, the one before and the one after."""
    before, after = document["before"], document["after"]
    cpu, board, gpu = after["cpu"], after["board"] or {}, after.get("gpu") or {}
    found = {
        "device": board.get("model") or cpu["model"],
        "cpu": cpu["model"],
        "cores": cpu["cores"],
        "governor": cpu["governor"],
        "mhz": [before["cpu"]["mhz"], cpu["mhz"]],
        "max_mhz": cpu["max_mhz"],
        "power_mode": board.get("power_mode"),
        "gpu_clocks_locked": board.get("gpu_clocks_locked"),
        "l4t": board.get("l4t"),
        "jetpack": jetpack_of(board.get("l4t")),
        "cuda": document["models"][0].get("cuda"),
        "load": [before["load"][0], after["load"][0]],
        "temperature_c": [before["temperature_c"], after["temperature_c"]],
        "system": f"{after['system']} {after['machine']}",
        "python": after["python"],
    }
    return found | (_of_a_board(document, gpu) if board or gpu else {})


def _of_a_board(document: Mapping[str, Any], gpu: Mapping[str, Any]) -> dict[str, Any]:
    moments, watch = _moments(document), document.get("watch") or {}
    lines = tegrastats.read(watch["tegrastats"]) if watch.get("tegrastats") else []
    during = _within(moments, *document.get("sampling_ns", (0, 0)))
    clocks = [state["gpu"]["mhz"] for _, state in during if state["gpu"] and state["gpu"]["mhz"] is not None]
    rails = _rails_w(during) or {rail: mw / 1000 for rail, mw in tegrastats.mean_rails_mw(lines).items()}
    hottest = [state["temperature_c"] for _, state in moments if state["temperature_c"] is not None]
    by_lines = _total(tegrastats.mean_rails_mw(lines))
    power = _power_w(during) if during else None if by_lines is None else by_lines / 1000
    clocks = clocks or [line.gpu_mhz for line in lines if line.gpu_mhz is not None]
    return {
        "gpu_mhz_lowest": min(clocks, default=None),
        "gpu_mhz_highest": max(clocks, default=None),
        "gpu_max_mhz": gpu.get("max_mhz"),
        "gpu_governor": gpu.get("governor"),
        "gpu_load_before_percent": _idle_load(document),
        "throttled": _throttled(during),
        "hottest_c": max(hottest, default=None),
        "power_w": power,
        "rails_w": rails or None,
        "idle_power_w": _power_w(_idle(document)),
    }


def faults(conditions: Mapping[str, Any], runtime: str) -> Iterator[str]:
    """Why the figures cannot be taken at face value, one sentence each, beside what the samples themselves say."""
    if runtime == "tensorrt" and conditions.get("gpu_clocks_locked") is False:
        yield "the GPU's clock is not locked, it follows the load: sudo jetson_clocks on the board, then measure again"
    if conditions.get("throttled"):
        low, most = conditions["gpu_mhz_lowest"], conditions["gpu_max_mhz"]
        yield f"the GPU was throttled: its clock fell to {low} of {most} MHz although it is locked; let the board cool down"
    if (load := conditions.get("gpu_load_before_percent")) is not None and load > BUSY_PERCENT:
        yield f"something else used the GPU before ({load:.0f} % load, {BUSY_PERCENT:.0f} % is the limit): stop it"


def energy_mj(document: Mapping[str, Any]) -> tuple[float, ...]:
    """Of one inference of each model, everything on the board included: mean power times time, over its own run without a break.

    Empty where power could not be read, or not for long enough.
    """
    found = []
    for window in document.get("energy") or ():
        seconds = (window["end_ns"] - window["start_ns"]) / 1e9
        power = _power_w(_within(_moments(document), window["start_ns"], window["end_ns"]))
        if power is None or seconds < LEAST_ENERGY_S:
            return ()
        found.append(1000 * power * seconds / window["runs"])
    return tuple(found)


def _moments(document: Mapping[str, Any]) -> Sequence[Moment]:
    return [(ns, state) for ns, state in (document.get("watch") or {}).get("moments", ())]


def _within(moments: Sequence[Moment], start: int, end: int) -> Sequence[Moment]:
    return [moment for moment in moments if start <= moment[0] <= end]


def _idle(document: Mapping[str, Any]) -> Sequence[Moment]:
    return _within(_moments(document), 0, document.get("idle_until_ns", 0))


def _idle_load(document: Mapping[str, Any]) -> float | None:
    loads = [state["gpu"]["load"] for _, state in _idle(document) if state["gpu"] and state["gpu"]["load"] is not None]
    return mean(loads) if loads else None


def _throttled(moments: Sequence[Moment]) -> bool | None:
    """Below its maximum while it is locked. None: the clock is not locked, or cannot be read."""
    clocks = [state["gpu"] for _, state in moments if state["gpu"]]
    if not clocks or not all(clock["locked"] and clock["mhz"] is not None for clock in clocks):
        return None
    return any(clock["mhz"] < clock["max_mhz"] - NEVER_MORE_MHZ for clock in clocks)


def _power_w(moments: Sequence[Moment]) -> float | None:
    totals = [_total(state["rails_mw"]) for _, state in moments]
    known = [total for total in totals if total is not None]
    return mean(known) / 1000 if known and len(known) == len(totals) else None


def _rails_w(moments: Sequence[Moment]) -> dict[str, float]:
    """Of each rail that could be read all the time, the mean."""
    if not moments:
        return {}
    shared = set.intersection(*(set(state["rails_mw"]) for _, state in moments))
    return {rail: mean(state["rails_mw"][rail] for _, state in moments) / 1000 for rail in sorted(shared)}


def _total(rails_mw: Mapping[str, float]) -> float | None:
    """Milliwatts of the whole board; None where its rails are not those of a board that is known."""
    if TOTAL in rails_mw:
        return rails_mw[TOTAL]
    return sum(rails_mw[part] for part in PARTS) if set(PARTS) <= set(rails_mw) else None
