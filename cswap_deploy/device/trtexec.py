"""What trtexec prints, read on the host: runs, summaries, errors, layers. TensorRT 8.2 to 11.1 (NVIDIA/TensorRT, sampleReporting.cpp).

Numbers are printed with six significant digits, each with its unit. Whatever in them can be checked against each other is; a
line that begins like a figure and is none, or a summary that lacks a line, is an error, never a figure that is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose

from cswap_deploy.errors import DeviceError

NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]\d+)?)"
LINE = re.compile(r"\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] (?:\[TRT\] )?\[([IWEVF])\] ?(.*)")
"""trtexec's own form; the Python module's logger writes [TRT] before the letter."""
BANNER = re.compile(r"&&&& (RUNNING|PASSED|FAILED) TensorRT\.trtexec \[TensorRT v(\d+)\](?: \[b\d+\])? # (.*)")
ROWS = ("Latency", "End-to-End Host Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")
NEEDED = ("Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")
ROW = re.compile(
    rf"({'|'.join(ROWS)}): min = {NUMBER} ms, max = {NUMBER} ms, mean = {NUMBER} ms, median = {NUMBER} ms(.*)"
)
PERCENTILE = re.compile(rf", percentile\({NUMBER}%\) = {NUMBER} ms")
FIGURES = {
    "throughput_qps": rf"Throughput: {NUMBER} qps",
    "walltime_s": rf"Total Host Walltime: {NUMBER} s",
    "compute_s": rf"Total GPU Compute Time: {NUMBER} s",
}
SINGLE = {
    "built_s": ("Engine built in ", rf"Engine built in {NUMBER} sec\."),
    "size_mib": ("Created engine with size", rf"Created engine with size: {NUMBER} MiB"),
    "loaded_s": ("Engine (deserialized|loaded) in ", rf"Engine (?:deserialized|loaded) in {NUMBER} sec\."),
    "trace": ("Timing trace has ", rf"Timing trace has (\d+) queries over {NUMBER} s"),
    "device": ("Selected Device: ", r"Selected Device: ([^\[\]]+)"),
    "capability": ("Compute Capability: ", r"Compute Capability: (\d+\.\d+)"),
    "version": ("TensorRT version: ", r"TensorRT version: (\d+\.\d+\.\d+)"),
}
"""Lines that a run has once at most: how they begin, and all of them."""
ROUNDED = 2e-5
"""Relative; what six significant digits on each side of an equation may differ by."""
AGAIN = "measure again; if it stays, report trtexec's output"
Figures = dict[str, float | str]


@dataclass(frozen=True)
class Row:
    """Milliseconds; `percentiles` by percent."""

    min: float
    max: float
    mean: float
    median: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True)
class Layer:
    """Of the profile: milliseconds of all iterations together, their mean and median, and percent of the whole."""

    name: str
    total_ms: float
    mean_ms: float
    median_ms: float
    percent: float


@dataclass(frozen=True)
class Run:
    """One run, or the part of one that was kept. What it does not say is None or empty."""

    passed: bool | None
    """None: it did not get to its last line."""
    version: str | None
    command: str | None
    device: str | None
    capability: str | None
    built_s: float | None
    size_mib: float | None
    loaded_s: float | None
    queries: int | None
    throughput_qps: float | None
    walltime_s: float | None
    compute_s: float | None
    rows: Mapping[str, Row]
    variance_percent: float | None
    """Coefficient of variance that trtexec warns of."""
    bound_by: tuple[str, ...]
    """What the throughput may be bound by, in trtexec's words, where it is not the GPU."""
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    profile: tuple[Layer, ...]
    dla: tuple[str, ...]
    gpu: tuple[str, ...]
    """Layers that the builder has put on the DLA and on the GPU, where it says so."""


def version_of(tag: str) -> str:
    """`100300` → 10.3.0 (major * 10000 + minor * 100 + patch, from 10), `8510` → 8.5.10 (major * 1000 + minor * 100 + patch)."""
    number = int(tag)
    major, rest = divmod(number, 10000) if number >= 100000 else divmod(number, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def banner_version(text: str) -> str | None:
    """TensorRT's version from the first line of any trtexec, or None."""
    found = re.search(r"\[TensorRT v(\d+)\]", text)
    return version_of(found[1]) if found else None


def runs(text: str, *, whole: bool = True) -> list[Run]:
    """The runs of a log, one after the other. `whole`: each begins and ends with its banner, as far as it got.

    Errors: DeviceError for lines of two runs among each other, malformed figures, and figures that contradict each other.
    """
    return [_run(lines, whole) for lines in _parts(text, whole)]


def require_passed(text: str) -> list[Run]:
    """Errors: DeviceError with trtexec's own words when a run has failed, or has loaded no engine and built none.

    trtexec ends with PASSED also where the engine could not be loaded, as long as nothing was to be run.
    """
    found = runs(text)
    for run in found:
        if not run.passed or run.errors:
            end = "failed" if run.passed is False else "reports errors" if run.errors else "ended without its last line"
            raise DeviceError(f"trtexec {end}: {'; '.join(run.errors[-3:]) or 'it gives no reason'}", "see its log")
        if run.loaded_s is None and run.built_s is None:
            raise DeviceError("trtexec says PASSED, but neither built nor loaded an engine", "see its log")
    return found


# --- a run


Line = tuple[int, str, str]
"""Number, severity (empty: a line without prefix; small: a line of the library, not of trtexec), text."""


def _parts(text: str, whole: bool) -> Iterator[list[Line]]:
    """Lines of each run. Errors: DeviceError when one begins before the last has ended, or text lies between."""
    lines: list[Line] = []
    running = False
    for number, raw in enumerate(text.splitlines(), 1):
        found = LINE.fullmatch(raw.rstrip())
        line = (number, "", raw.rstrip())
        if found:
            library = "[TRT]" in raw[:40]
            line = (number, found[1].lower() if library else found[1], found[2].removeprefix("[TRT] "))
        word = banner[1] if (banner := BANNER.fullmatch(line[2])) else ""
        if "&&&&" in raw and not word:
            raise _fault(number, f"is a damaged first or last line: {raw[:80]!r}")
        if word == "RUNNING":
            if running and whole and any(severity for _, severity, _ in lines):
                yield lines  # it crashed
            lines, running = [], True
        lines.append(line)
        if word in ("PASSED", "FAILED"):
            if whole and not running:
                raise _fault(number, "ends a run that has not begun")
            yield lines
            lines, running = [], False
    if running or (lines and not whole):
        yield lines
    elif any(_looks_like_a_figure(text) for _, _, text in lines):
        raise _fault(lines[0][0], "belongs to no run: the log is damaged, or two runs are mixed")


def _run(lines: list[Line], whole: bool) -> Run:
    banners = [found for _, _, text in lines if (found := BANNER.fullmatch(text))]
    if len({(found[2], found[3]) for found in banners}) > 1:
        raise _fault(lines[-1][0], "ends another run than the one that began: two runs are mixed")
    single = _single(lines)
    summary = _summary(lines, whole=whole and bool(banners) and banners[-1][1] == "PASSED" and "trace" in single)
    version = version_of(banners[0][2]) if banners else None
    if version and single.get("version", version) != version:
        raise _fault(lines[0][0], f"says TensorRT {version}, a later line {single['version']}")
    queries = single.get("queries")
    rows, figures = summary.rows, summary.figures
    _require_consistent(lines[-1][0], rows, figures, queries, single.get("trace_s"))
    return Run(
        passed=None if not banners or banners[-1][1] == "RUNNING" else banners[-1][1] == "PASSED",
        version=version or _text(single.get("version")),
        command=banners[0][3] if banners else None,
        device=_text(single.get("device")),
        capability=_text(single.get("capability")),
        built_s=_float(single.get("built_s")),
        size_mib=_float(single.get("size_mib")),
        loaded_s=_float(single.get("loaded_s")),
        queries=None if queries is None else int(queries),
        throughput_qps=figures.get("throughput_qps"),
        walltime_s=figures.get("walltime_s"),
        compute_s=figures.get("compute_s"),
        rows=rows,
        variance_percent=summary.variance,
        bound_by=summary.bound_by,
        errors=tuple(text for _, severity, text in lines if severity in ("E", "F", "e", "f")),
        warnings=tuple(text for _, severity, text in lines if severity in ("W", "w")),
        profile=_profile(lines),
        dla=tuple(text.removeprefix("[DlaLayer] ") for _, _, text in lines if text.startswith("[DlaLayer] ")),
        gpu=tuple(text.removeprefix("[GpuLayer] ") for _, _, text in lines if text.startswith("[GpuLayer] ")),
    )


def _single(lines: list[Line]) -> Figures:
    found: Figures = {}
    for number, severity, text in lines:
        for key, (start, pattern) in SINGLE.items():
            if not severity or not re.match(start, text):
                continue
            value = re.fullmatch(pattern, text)
            if not value:
                raise _fault(number, f"is damaged: {text[:80]!r}")
            values: Figures = {key: value[1]}
            if key == "trace":
                values = {"trace": "", "queries": int(value[1]), "trace_s": _number(value[2], number)}
            elif key.endswith(("_s", "_mib")):
                values = {key: _number(value[1], number)}
            if any(found.get(name, given) != given for name, given in values.items()):
                raise _fault(number, f"says {text!r}, an earlier line of the run something else: two runs are mixed")
            found |= values
    return found


# --- the summary


@dataclass
class _Summary:
    rows: dict[str, Row]
    figures: dict[str, float]
    variance: float | None
    bound_by: tuple[str, ...]


def _summary(lines: list[Line], whole: bool) -> _Summary:
    """`whole`: a run that passed and has measured has all lines of it. The last of several counts, as in a fragment of two runs."""
    found, inside, begun, ended = _Summary({}, {}, None, ()), False, 0, False
    for number, severity, text in lines:
        if text == "=== Performance summary ===":
            if whole and begun:
                raise _fault(number, "begins a second summary: two runs are mixed")
            found, inside, begun, ended = _Summary({}, {}, None, ()), True, number, False
        elif inside and text.startswith("Explanations of the performance metrics"):
            inside, ended = False, True
        elif _looks_like_a_figure(text):
            if not inside:
                raise _fault(number, f"is a figure outside of a summary: {text[:60]!r}")
            _figure(found, number, text)
        elif severity == "W" and text.startswith("* "):
            _warning(found, number, text)
        elif inside and severity == "I" and text and not text.startswith("["):
            raise _fault(number, f"is no line of a summary: {text[:80]!r}")
    missing = [name for name in NEEDED if name not in found.rows] + [key for key in FIGURES if key not in found.figures]
    if whole and (missing or not ended):
        what = f"lacks {', '.join(missing)}" if missing else "has no end"
        raise _fault(
            begun or lines[-1][0], f"begins a summary that {what}" if begun else "ends a run without a summary"
        )
    return found


def _looks_like_a_figure(text: str) -> bool:
    start = text.strip().partition(":")[0]
    return start in ROWS or start in ("Throughput", "Total Host Walltime", "Total GPU Compute Time")


def _figure(found: _Summary, number: int, text: str) -> None:
    for key, pattern in FIGURES.items():
        if value := re.fullmatch(pattern, text):
            _once(found.figures, key, _number(value[1], number), number)
            return
    row = ROW.fullmatch(text)
    if not row or PERCENTILE.sub("", row[6]):
        raise _fault(number, f"is a damaged figure: {text[:80]!r}")
    percentiles = [(_number(p, number), _number(ms, number)) for p, ms in PERCENTILE.findall(row[6])]
    low, high, mean, median = (_number(row[place], number) for place in (2, 3, 4, 5))
    ordered = [ms for _, ms in sorted(percentiles)]
    fits = low <= median <= high and low <= mean <= high and (mean > 0) == (high > 0)
    fits &= ordered == sorted(ordered) and len(dict(percentiles)) == len(ordered)
    fits &= not ordered or (low <= ordered[0] and ordered[-1] <= high)
    if not fits or any(ms < median for p, ms in percentiles if p > 50):
        raise _fault(number, f"contradicts itself: {text[:120]!r}")
    _once(found.rows, row[1], Row(low, high, mean, median, dict(percentiles)), number)


def _once(into: dict, key: str, value: object, number: int) -> None:  # type: ignore[type-arg]
    if key in into:
        raise _fault(number, f"gives {key} a second time: two runs are mixed")
    into[key] = value


def _warning(found: _Summary, number: int, text: str) -> None:
    if text.startswith("* Throughput may be bound by "):
        what = text.removeprefix("* Throughput may be bound by ").partition(" rather than")[0]
        found.bound_by = (*found.bound_by, what.removesuffix(" for the inputs").removesuffix(" for the outputs"))
    if "coefficient of variance" in text or text.startswith("* GPU compute time is unstable"):
        value = re.fullmatch(rf"\* GPU compute time is unstable, with coefficient of variance = {NUMBER}%\.", text)
        if not value:
            raise _fault(number, f"is a damaged figure: {text[:80]!r}")
        if found.variance is not None:
            raise _fault(number, "gives a second coefficient of variance: two runs are mixed")
        found.variance = _number(value[1], number)


def _require_consistent(
    number: int,
    rows: Mapping[str, Row],
    figures: Mapping[str, float],
    queries: float | str | None,
    trace_s: float | str | None,
) -> None:
    """Latency is the sum of its parts, throughput and total times fit the number of queries."""
    if len({tuple(row.percentiles) for row in rows.values()}) > 1:
        raise _fault(number, "ends a run whose figures have different percentiles: two runs are mixed")
    latency, compute = rows.get("Latency"), rows.get("GPU Compute Time")
    if latency and compute and (h2d := rows.get("H2D Latency")) and (d2h := rows.get("D2H Latency")):
        parts = h2d.mean + compute.mean + d2h.mean
        alone = h2d.max == d2h.max == 0
        if not isclose(latency.mean, parts, rel_tol=ROUNDED) or (alone and latency != compute):
            raise _fault(number, "ends a run whose latency is not the sum of its parts")
    walltime, total = figures.get("walltime_s"), figures.get("compute_s")
    if trace_s is not None and walltime is not None and trace_s != walltime:
        raise _fault(number, f"ends a run of {walltime:g} s whose trace is over {trace_s} s")
    if walltime and (rate := figures.get("throughput_qps")):
        count = float(queries) if queries is not None else round(rate * walltime)
        if not isclose(rate * walltime, count, rel_tol=ROUNDED):
            raise _fault(number, f"ends a run whose {rate:g} qps in {walltime:g} s are not {count:g} queries")
        if compute and total and not isclose(total * 1000, compute.mean * count, rel_tol=ROUNDED):
            raise _fault(number, "ends a run whose total GPU compute time is not its mean times its queries")


# --- the profile


def _profile(lines: list[Line]) -> tuple[Layer, ...]:
    """The table of --dumpProfile. Errors: DeviceError when it is cut off or does not add up."""
    start = next((n for n, (_, _, text) in enumerate(lines) if text.startswith("=== Profile (")), None)
    if start is None:
        return ()
    iterations = re.fullmatch(r"=== Profile \((\d+) iterations \) ===", lines[start][2])
    median = "Median Time (ms)" in (lines[start + 1][2] if start + 1 < len(lines) else "")
    cells = rf"\s*(.*?)\s{{2,}}{NUMBER}" + rf"\s+{NUMBER}" * (3 if median else 2)
    found: list[Layer] = []
    for number, severity, text in lines[start + 2 :]:
        row = re.fullmatch(cells, text) if severity == "I" else None
        if not row or not iterations:
            raise _fault(number, f"is no line of the profile: {text.strip()[:80]!r}")
        times = [float(value) for value in row.groups()[1:]]
        layer = Layer(row[1], times[0], times[1], times[2] if median else times[1], times[-1])
        if row[1] == "Total":
            whole, percent = sum(each.total_ms for each in found), sum(each.percent for each in found)
            near = (
                abs(whole - layer.total_ms) <= 0.006 * (len(found) + 1),
                abs(percent - 100) <= 0.06 * (len(found) + 1),
            )
            if not all(near) or not all(_fits(each, int(iterations[1]), layer.total_ms) for each in found):
                raise _fault(number, "ends a profile that does not add up")
            return tuple(found)
        found.append(layer)
    raise _fault(lines[-1][0], "ends the log within the profile")


def _fits(layer: Layer, iterations: int, whole: float) -> bool:
    """The mean and the share are those of the total time; printed with 2, 4 and 1 decimals."""
    mean = layer.total_ms / iterations
    return (
        abs(mean - layer.mean_ms) <= 6e-5 + 0.006 / iterations
        and abs(100 * layer.total_ms / whole - layer.percent) <= 0.06
    )


# --- numbers


def _number(text: str, line: int) -> float:
    """As C++ prints it: six significant digits, nothing behind the last that counts."""
    value = float(text)
    if f"{value:g}" != text:
        raise _fault(line, f"holds {text!r}, which is no number of trtexec's")
    return value


def _float(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _text(value: float | str | None) -> str | None:
    return None if value is None else str(value)


def _fault(line: int, what: str) -> DeviceError:
    return DeviceError(f"trtexec's output: line {line} {what}", AGAIN)
