"""trtexec's and tegrastats' output: every figure as it stands in the file, or a clear error; never a wrong figure.

The expected figures were written down from the files by eye. The real logs lie beside a checkout, not in it; the synthetic ones,
whose numbers are invented, are in tests/facts/logs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from cswap_deploy.device import exports, tegrastats, trtexec
from cswap_deploy.errors import DeviceError

OURS = Path(__file__).parent / "facts" / "logs"
THEIRS = SHARED / "trtexec-logs"
P = "passed version queries throughput_qps walltime_s compute_s variance_percent"
LATENCY = "Latency"
EXPECTED: dict[str, tuple[bool, tuple[Any, ...], dict[str, tuple[float, ...]]]] = {
    # whole?, the fields of P, and of each row min, max, mean, median and percentiles in the file's order
    "SYNTHETIC-v10.3.0-orin-fp16": (
        True, (True, "10.3.0", 429, 431.73, 0.993676, 0.991108, None),
        {
            "Latency": (2.29004, 2.3291, 2.31027, 2.31055, 2.31836, 2.3208, 2.3252),
            "Enqueue Time": (0.0209961, 0.0273438, 0.0227626, 0.0224609, 0.0244141, 0.0249023, 0.0268555),
            "GPU Compute Time": (2.29004, 2.3291, 2.31027, 2.31055, 2.31836, 2.3208, 2.3252),
        },
    ),
    "SYNTHETIC-v10.13.3-thor-stronglytyped": (
        True, (True, "10.13.3", 1481, 1507.22, 0.982605, 0.973679, 4.19488),
        {
            "Latency": (0.660156, 0.955078, 0.703519, 0.701172, 0.71875, 0.724609, 0.911133),
            "H2D Latency": (0.0400391, 0.0424805, 0.0411894, 0.0410156, 0.0415039, 0.0419922, 0.0419922),
            "GPU Compute Time": (0.614258, 0.908691, 0.657447, 0.654785, 0.672852, 0.678711, 0.864258),
            "D2H Latency": (0.00488281,) * 7,
        },
    ),
    "SYNTHETIC-v11.1.0-orin-percentile99only": (
        True, (True, "11.1.0", 763, 767.86, 0.993671, 0.989099, 6.12479),
        {"Latency": (1.07715, 1.82373, 1.29633, 1.29297, 1.6582), "H2D Latency": (0, 0, 0, 0, 0)},
    ),
    "v10.10.0-windows-unstable": (
        False, (True, "10.10.0", None, 120.031, 3.00755, 2.43749, 5.58977),
        {
            "Latency": (7.55737, 9.15381, 8.18562, 8.22565, 8.668, 8.9481, 9.1152),
            "GPU Compute Time": (6.12354, 7.72314, 6.75204, 6.78809, 7.2366, 7.51614, 7.68307),
        },
    ),
    "v10.13.0-x86-bf16-enqueue-bound": (
        False, (True, "10.13.0", None, 0.562059, 17.7917, 16.662, None),
        {
            "Latency": (1656.22, 1674.64, 1666.9, 1667.89, 1673.26, 1674.64, 1674.64),
            "Enqueue Time": (1650.99, 1672.49, 1663.95, 1663.63, 1672.08, 1672.49, 1672.49),
        },
    ),
    "v10.3.0-jetson-resnet50-fp16-summary": (
        False, (True, "10.3.0", None, 318.007, 3.00622, 3.00249, None),
        {"Latency": (3.12671, 3.15479, 3.14068, 3.14062, 3.14587, 3.14771, 3.15039)},
    ),
    "v8.2.5-x86-fp32-end-to-end-host-latency": (
        True, (True, "8.2.5", 501, 166.041, 3.01732, 3.00965, None),
        {
            "Latency": (8.90146, 9.52582, 9.04623, 8.99896, 9.50714),
            "End-to-End Host Latency": (10.1021, 12.6202, 11.6584, 11.5563, 12.5932),
            "GPU Compute Time": (5.87982, 6.47681, 6.00728, 5.94946, 6.47375),
        },
    ),
    "v8.2.5-x86-int8-qat-end-to-end-host-latency": (True, (True, "8.2.5", 976, 324.544, 3.0073, 1.57787, None), {}),
    "v8.5.10-orin-best-cudagraph-profile": (
        True, (True, "8.5.10", 158298, 52765.3, 3.00004, 2.84043, 1.45766),
        {"Latency": (0.0175781, 0.0403442, 0.0179435, 0.0179443, 0.0181274, 0.0181885, 0.0183105)},
    ),
    "v8.5.10-x86-qat-int8-cudagraph-unstable": (
        True, (True, "8.5.10", 21990, 7329.45, 3.00022, 2.96537, 7.69863),
        {"GPU Compute Time": (0.133057, 0.690186, 0.134851, 0.134155, 0.135132, 0.135193, 0.135254)},
    ),
    "v8.5.10-x86-transfer-bound": (
        True, (True, "8.5.10", 225, 74.8273, 3.00693, 0.103204, 3.08398),
        {
            "Latency": (12.8588, 12.9963, 12.9076, 12.908, 12.9387, 12.9518, 12.9889),
            "D2H Latency": (6.21265, 6.25146, 6.21916, 6.21509, 6.23511, 6.24438, 6.24841),
        },
    ),
    "v8.4.10-orin-aborted-build": (True, (None, "8.4.10", None, None, None, None, None), {}),
    "v10.3.0-jetson-unknown-options-failed": (False, (False, "10.3.0", None, None, None, None, None), {}),
    "v8.4-orin-dla-many-fallbacks": (False, (None, None, None, None, None, None, None), {}),
    "v8.4-orin-dla-two-foreignnodes": (False, (None, None, None, 649.723, None, None, None), {}),
}  # fmt: skip
FACTS = {  # what else was written down
    "SYNTHETIC-v10.3.0-orin-fp16": {"device": "Orin", "capability": "8.7", "built_s": 27.8143, "size_mib": 4.37109, "loaded_s": 0.0117302},
    "SYNTHETIC-v10.13.3-thor-stronglytyped": {"device": "NVIDIA Thor", "capability": "11.0", "bound_by": ("Enqueue Time",)},
    "v8.5.10-orin-best-cudagraph-profile": {"built_s": 12.3251, "loaded_s": 0.00508637, "capability": "8.7", "bound_by": ()},
    "v8.5.10-x86-transfer-bound": {"bound_by": ("host-to-device transfers", "device-to-host transfers")},
    "v8.2.5-x86-fp32-end-to-end-host-latency": {"built_s": 59.1433, "size_mib": None},
    "v10.13.0-x86-bf16-enqueue-bound": {"bound_by": ("Enqueue Time",), "device": None},
}  # fmt: skip


def percentile(ordered: Sequence[float], p: float) -> float:
    """trtexec's own rule, of ascending values: index max(n - 1 - int((1 - p/100) * n), 0)."""
    return ordered[max(len(ordered) - 1 - int((1 - p / 100) * len(ordered)), 0)]


def log(name: str) -> str:
    path = OURS / f"{name}.txt"
    path = path if path.is_file() else THEIRS / f"{name}.txt"
    if not path.is_file():
        pytest.skip("the collected logs are not beside this checkout")
    return path.read_text("utf-8")


def exported(name: str) -> str:
    path = THEIRS / f"{name}.json"
    if not path.is_file():
        pytest.skip("the collected logs are not beside this checkout")
    return path.read_text("utf-8")


def parsed(name: str) -> trtexec.Run:
    [run] = trtexec.runs(log(name), whole=EXPECTED[name][0])
    return run


# --- the figures


@pytest.mark.parametrize("name", EXPECTED)
def test_log_gives_the_figures_that_stand_in_it(name: str) -> None:
    run, (_, figures, rows) = parsed(name), EXPECTED[name]
    assert tuple(getattr(run, key) for key in P.split()) == figures
    for row, values in rows.items():
        found = run.rows[row]
        assert (found.min, found.max, found.mean, found.median, *found.percentiles.values()) == values
    for key, value in FACTS.get(name, {}).items():
        found = getattr(run, key)
        assert found == value, key


def test_every_collected_log_is_among_them() -> None:
    if not THEIRS.is_dir():
        pytest.skip("the collected logs are not beside this checkout")
    assert {path.stem for path in THEIRS.glob("*.txt")} == set(EXPECTED)


def test_layers_on_dla_and_gpu_are_counted() -> None:
    many, two = parsed("v8.4-orin-dla-many-fallbacks"), parsed("v8.4-orin-dla-two-foreignnodes")
    assert (len(many.dla), len(many.gpu), len(two.dla), len(two.gpu)) == (5, 6, 2, 2)
    assert many.dla[1] == "{ForeignNode[Relu_10...Conv_11]}" and two.gpu[0] == "REDUCE: GlobalAveragePool_8"


def test_profile_table_is_read() -> None:
    layers = parsed("v8.5.10-orin-best-cudagraph-profile").profile
    assert [(layer.name[:9], layer.total_ms, layer.mean_ms, layer.median_ms, layer.percent) for layer in layers] == [
        ("Convoluti", 442.05, 0.0102, 0.0102, 26.1), ("Pooling66", 221.68, 0.0051, 0.0051, 13.1),
        ("Convoluti", 478.72, 0.0110, 0.0110, 28.2), ("Pooling16", 222.65, 0.0051, 0.0052, 13.1),
        ("Times212", 331.21, 0.0076, 0.0079, 19.5),
    ]  # fmt: skip
    assert len(parsed("v8.5.10-x86-qat-int8-cudagraph-unstable").profile) == 24


def test_words_of_a_failed_run_are_kept() -> None:
    assert parsed("v10.3.0-jetson-unknown-options-failed").errors == (
        "Unknown option: --workspace 2048", "Unknown option: --buildOnly", "Unknown option: --explicitBatch"
    )  # fmt: skip
    with pytest.raises(DeviceError, match="ended without its last line: it gives no reason"):
        trtexec.require_passed(log("v8.4.10-orin-aborted-build"))


def test_passed_without_an_engine_is_not_believed() -> None:
    """trtexec --loadEngine X --skipInference ends with PASSED whatever X is."""
    lines = log("SYNTHETIC-v10.3.0-orin-fp16").splitlines(keepends=True)
    nothing = lines[0] + lines[-1]
    with pytest.raises(DeviceError, match="neither built nor loaded an engine"):
        trtexec.require_passed(nothing)
    loaded = "[09/14/2026-10:03:49] [I] Engine deserialized in 0.0117302 sec.\n"
    assert trtexec.require_passed(lines[0] + loaded + lines[-1])[0].loaded_s == 0.0117302
    error = "[09/14/2026-10:03:49] [E] Error[1]: magic tag does not match\n"
    with pytest.raises(DeviceError, match=r"reports errors: Error\[1\]: magic tag"):
        trtexec.require_passed(lines[0] + error + loaded + lines[-1])


@pytest.mark.parametrize(
    ("tag", "version"),
    [("8205", "8.2.5"), ("8510", "8.5.10"), ("8601", "8.6.1"), ("100300", "10.3.0"), ("101303", "10.13.3")],
)
def test_version_of_a_tag(tag: str, version: str) -> None:
    assert trtexec.version_of(tag) == version
    assert trtexec.banner_version(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{tag}] [b3] # x") == version


def test_runs_one_after_the_other_are_kept_apart() -> None:
    names = ("SYNTHETIC-v10.3.0-orin-fp16", "SYNTHETIC-v11.1.0-orin-percentile99only")
    found = trtexec.runs("noise before\n" + "some words between\n".join(map(log, names)))
    assert [run.version for run in found] == ["10.3.0", "11.1.0"]


# --- exports


def test_times_are_those_of_the_file() -> None:
    found = exports.times(exported("v8.x-a100-resnet18-fp16.exportTimes"))
    assert len(found.latency_ms) == 200 and found.latency_ms[:2] == (0.873472, 0.8448) == found.compute_ms[:2]


def test_text_and_times_of_one_run_agree() -> None:
    found, run = (
        exports.times(exported("SYNTHETIC-v10.3.0-orin-fp16.exportTimes")),
        parsed("SYNTHETIC-v10.3.0-orin-fp16"),
    )
    row, ordered = run.rows[LATENCY], sorted(found.latency_ms)
    assert len(ordered) == run.queries and (ordered[0], ordered[-1]) == (row.min, row.max)
    assert (mean(ordered), median(ordered)) == (pytest.approx(row.mean, rel=1e-5), pytest.approx(row.median, rel=1e-5))
    for p, value in row.percentiles.items():
        assert percentile(ordered, p) == value


@pytest.mark.parametrize(
    ("name", "count", "second", "total"),
    [("v8.x-a100-resnet18-fp16", 36, ("Conv_0 + Relu_1", 0.111616, 10.9768), 1.016832),
     ("v8.x-a100-resnet18-qat", 37, ("conv1.weight + QuantizeLinear_7 + Conv_9", 0.201728, 18.4112), 1.095680),
     ("vUNKNOWN-2025-detr-int8", 58, ("/model/model/Transpose_1_output_0_clone_1", 0, 0), 387.4573)],
)  # fmt: skip
def test_profiles_are_read(name: str, count: int, second: tuple[str, float, float], total: float) -> None:
    layers = exports.profile(exported(f"{name}.exportProfile"))
    assert len(layers) == count
    assert (layers[1].name, layers[1].total_ms, layers[1].percent) == second
    if count < 58:  # the last one was cut short on purpose
        assert sum(layer.percent for layer in layers) == pytest.approx(100, abs=0.01)
        assert sum(layer.total_ms for layer in layers) == pytest.approx(total, rel=1e-3)


def test_layer_information_has_names_kinds_and_nodes() -> None:
    layers = exports.layer_info(exported("v8.x-a100-resnet18-fp16.exportLayerInfo"))
    assert len(layers) == 36 and layers[0].kind == "Reformat" and layers[1].name == "Conv_0 + Relu_1"
    names = exports.layer_info(exported("vUNKNOWN-2025-detr-int8.exportLayerInfo-names-only"))
    assert len(names) == 40 and not names[0].kind and names[0].nodes is None
    noted = {"Name": "a", "LayerType": "b", "Metadata": "[ONNX Layer: /x/[y]/Conv]\x1e[ONNX Layer: /relu]"}
    assert exports.layer_info(json.dumps({"Layers": [noted]}))[0].nodes == ("/x/[y]/Conv", "/relu")


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (exports.times, "[]", "exported no times"),
        (exports.times, '[{"latencyMs": 1}]', "query 1 has other keys"),
        (exports.times, "[NaN]", "cannot be read"),
        (exports.times, "[" * 100_000, "cannot be read"),
        (exports.profile, "[\n", "cut off"),
        (exports.profile, '[\n  { "count" : 0 }\n]', "cut off"),
        (exports.layer_info, "{}", "no list of layers"),
        (exports.layer_info, '{"Layers": [3]}', "layer 1 has no name"),
    ],
)
def test_exports_that_are_none_are_refused(read: Callable[[str], Any], text: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        read(text)


# --- tegrastats


def stats() -> str:
    path = SHARED / "tegrastats" / "orin-nano-8gb-L4T36.4.7.txt"
    if not path.is_file():
        pytest.skip("the collected tegrastats lines are not beside this checkout")
    return path.read_text("utf-8")


def test_tegrastats_lines_are_read() -> None:
    moments = tegrastats.read(stats())
    first, last = moments[0], moments[-1]
    assert len(moments) == 40 and (first.ram_mb, first.ram_total_mb, first.gpu_percent, first.gpu_mhz) == (
        519,
        7607,
        0,
        1018,
    )
    assert first.rails_mw == {"VDD_IN": 5971, "VDD_CPU_GPU_CV": 1669, "VDD_SOC": 2308}
    assert first.temperature_c["tj"] == 49.593 and len(first.temperature_c) == 6
    assert (last.ram_mb, last.rails_mw["VDD_IN"]) == (2978, 6608)


@pytest.mark.parametrize(
    ("field", "percent", "mhz"),
    [("10%", 10, None), ("10%@1300", 10, 1300), ("12%@[1300,1298]", 12, 1298), ("@[1000,1000,1000]", None, 1000), ("99%@[1018]", 99, 1018)],
)  # fmt: skip
def test_gpu_field_in_all_its_forms(field: str, percent: int | None, mhz: int | None) -> None:
    line = f"RAM 5/10MB (lfb 1x4MB) GR3D_FREQ {field} CV0@-256C tj@50C VDD_GPU 10mW/10mW/12mW\n"
    [moment] = tegrastats.read(line + "RAM 5/1")
    assert (moment.gpu_percent, moment.gpu_mhz) == (percent, mhz)
    assert moment.temperature_c == {"tj": 50.0} and moment.rails_mw == {"VDD_GPU": 10}


@pytest.mark.parametrize("field", ["101%@[5]", "7%@[1,]", "7%@[]", "%@5", "7"])
def test_gpu_field_that_is_damaged_is_refused(field: str) -> None:
    with pytest.raises(DeviceError, match="tegrastats: line 1"):
        tegrastats.read(f"RAM 5/10MB (lfb 1x4MB) GR3D_FREQ {field} tj@50C\n")


# --- damaged output: the right figure or an error

FIGURES = [
    item.name
    for item in fields(trtexec.Run)
    if item.name not in ("errors", "warnings", "command", "dla", "gpu", "bound_by")
]


def told(run: trtexec.Run) -> dict[str, Any]:
    """The figures that a run gives; a row and its percentiles each for themselves. Names are none: a damaged one is seen to be."""
    found = {key: getattr(run, key) for key in FIGURES if key not in ("rows", "profile", "passed", "device")}
    found |= {
        f"{name} {key}": getattr(row, key) for name, row in run.rows.items() for key in ("min", "max", "mean", "median")
    }
    found |= {f"{name} p{p}": ms for name, row in run.rows.items() for p, ms in row.percentiles.items()}
    found |= {"layers": frozenset(replace(layer, name="") for layer in run.profile)} if run.profile else {}
    return {key: value for key, value in found.items() if value is not None}


def truncated(text: str, random: Random) -> str:
    return text[: random.randrange(len(text))]


def without_lines(text: str, random: Random) -> str:
    lines = text.splitlines(keepends=True)
    start = random.randrange(len(lines))
    del lines[start : start + random.choice((1, 1, 2, 5, 20))]
    return "".join(lines)


def repeated(text: str, random: Random) -> str:
    lines = text.splitlines(keepends=True)
    line = random.choice(lines)
    lines.insert(random.randrange(len(lines)), line)
    return "".join(lines)


def swapped(text: str, random: Random) -> str:
    lines = text.splitlines(keepends=True)
    first, second = random.randrange(len(lines)), random.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines)


def interleaved(text: str, random: Random) -> str:
    other = log(random.choice([name for name in EXPECTED if EXPECTED[name][0]])).splitlines(keepends=True)
    lines = text.splitlines(keepends=True)
    mixed = []
    while lines or other:
        source = lines if lines and (not other or random.random() < 0.5) else other
        mixed.append(source.pop(0))
    return "".join(mixed)


def spoilt(text: str, random: Random) -> str:
    """A few characters become others, none of them digits."""
    characters = list(text)
    for _ in range(random.choice((1, 1, 1, 3, 10))):
        characters[random.randrange(len(characters))] = random.choice("x ,.%\n\x00-e:é=")
    return "".join(characters)


def joined(text: str, random: Random) -> str:
    """Two processes write to one file: a line begins within another."""
    lines = text.splitlines(keepends=True)
    place = random.randrange(len(lines) - 1)
    cut = random.randrange(1, max(2, len(lines[place])))
    lines[place] = lines[place][:cut] + lines[place + 1]
    return "".join(lines)


DAMAGES = (truncated, without_lines, repeated, swapped, interleaved, spoilt, joined)


def test_a_thousand_damaged_logs_give_no_wrong_figure(request: pytest.FixtureRequest) -> None:
    wrong, outcomes = [], {"error": 0, "fewer": 0, "all": 0}
    names = [name for name in EXPECTED if EXPECTED[name][0]]
    right = {name: told(parsed(name)) for name in names}
    every = {
        key: {value for found in right.values() if key in found for value in [found[key]]}
        for found in right.values()
        for key in found
    }
    for seed in range(1000):
        random = Random(seed)
        name, damage = random.choice(names), DAMAGES[seed % len(DAMAGES)]
        text = damage(log(name), random)
        try:
            found = [told(run) for run in trtexec.runs(text)]
        except DeviceError as error:
            assert re.search(r"trtexec's output: line \d+", str(error))
            outcomes["error"] += 1
            continue
        for one in found:
            allowed = every if damage is interleaved else {key: {value} for key, value in right[name].items()}
            wrong += [
                f"{seed} {damage.__name__} {name}: {k} = {v}" for k, v in one.items() if v not in allowed.get(k, set())
            ]
        outcomes["all" if found and found[0] == right[name] else "fewer"] += 1
    print(outcomes)
    assert wrong == [], "\n".join(wrong[:20])
    assert min(outcomes.values()) > 50, outcomes


def damaged_digit(text: str, start: int, end: int, random: Random) -> str:
    """Another digit in place of one between two positions."""
    places = [place for place in range(start, end) if text[place].isdigit()]
    place = random.choice(places)
    return text[:place] + random.choice([digit for digit in "0123456789" if digit != text[place]]) + text[place + 1 :]


@pytest.mark.parametrize("name", ["SYNTHETIC-v10.3.0-orin-fp16", "SYNTHETIC-v11.1.0-orin-percentile99only"])
def test_a_changed_digit_is_noticed_where_a_figure_stands_twice(name: str) -> None:
    """Without transfers the latency is the compute time. With them, and for the enqueueing, nothing can tell."""
    text = log(name)
    for seed, start in enumerate([m.start() for m in re.finditer("Latency: min|GPU Compute Time: min", text)] * 25):
        if text[:start].endswith("Enqueue "):
            continue
        changed = damaged_digit(text, start, text.index("\n", start), Random(seed))
        with pytest.raises(DeviceError, match="trtexec's output: line"):
            trtexec.runs(changed)


@cache
def _times() -> str:
    return exported("SYNTHETIC-v10.3.0-orin-fp16.exportTimes")


@pytest.mark.parametrize("seed", range(5))
def test_damaged_exports_give_no_wrong_figure(seed: int) -> None:
    documents = [(exports.times, _times()), (exports.profile, exported("v8.x-a100-resnet18-qat.exportProfile"))]
    for number in range(20):
        random = Random(1000 * seed + number)
        read, text = documents[number % 2]
        right: Any = read(text)
        damaged = random.choice([truncated, without_lines, repeated, swapped, spoilt, joined])(text, random)
        try:
            found: Any = read(damaged)
        except DeviceError:
            continue
        values = right.latency_ms if read is exports.times else right
        given = found.latency_ms if read is exports.times else found
        names = {layer.name for layer in values} if read is exports.profile else set()
        for value in given:  # a damaged name is still the time of that place
            same_name = read is exports.times or value.name in names
            assert not same_name or value in values


@pytest.mark.parametrize("key", ["latencyMs", "computeMs", "endComputeMs"])
def test_a_changed_digit_of_an_export_is_noticed(key: str) -> None:
    rows = json.loads(_times())
    rows[7][key] *= 1.01
    with pytest.raises(DeviceError, match="query 8"):
        exports.times(json.dumps(rows))


@given(
    st.lists(st.floats(0.001, 5000), min_size=2, max_size=60),
    st.sets(st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9]), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_what_trtexec_would_print_is_read_back(values: list[float], percents: set[float]) -> None:
    """A summary printed by trtexec's own rules, from any latencies."""
    text = [float(f"{value:g}") for value in values]
    ordered = sorted(text)
    tail = "".join(f", percentile({p:g}%) = {percentile(ordered, p):g} ms" for p in sorted(percents))
    row = f"min = {ordered[0]:g} ms, max = {ordered[-1]:g} ms, mean = {mean(text):g} ms, median = {median(text):g} ms{tail}"
    nothing = "min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms" + "".join(
        f", percentile({p:g}%) = 0 ms" for p in sorted(percents)
    )
    seconds = float(f"{sum(text) / 1000 * 1.01:g}")
    body = [
        "=== Performance summary ===", f"Throughput: {len(text) / seconds:g} qps", f"Latency: {row}", f"Enqueue Time: {nothing}",
        f"H2D Latency: {nothing}", f"GPU Compute Time: {row}", f"D2H Latency: {nothing}", f"Total Host Walltime: {seconds:g} s",
        f"Total GPU Compute Time: {sum(text) / 1000:g} s", "Explanations of the performance metrics are printed in the verbose logs.",
    ]  # fmt: skip
    banner = "&&&& {} TensorRT.trtexec [TensorRT v100300] # trtexec"
    trace = f"Timing trace has {len(text)} queries over {seconds:g} s"
    lines = [f"[01/02/2026-03:04:05] [I] {line}" for line in ["Engine deserialized in 0.01 sec.", trace, *body]]
    [run] = trtexec.require_passed("\n".join([banner.format("RUNNING"), *lines, banner.format("PASSED")]))
    found = run.rows[LATENCY]
    assert (found.min, found.max, found.median) == (ordered[0], ordered[-1], float(f"{median(text):g}"))
    assert set(found.percentiles) == percents and run.queries == len(text)
