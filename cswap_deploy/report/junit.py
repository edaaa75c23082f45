"""JUnit XML, which CI systems read: one test case for each check, a failing one for each reason of a failed verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from cswap_deploy.report import words

CHECKS = ("accuracy", "engine", "target", "budget")
"""What the text of a reason may begin with; a reason of another kind is one of `build`."""
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


@dataclass(frozen=True)
class Case:
    """A check: `failures` make it fail; with none it has passed, or was `skipped`."""

    name: str
    said: str
    failures: tuple[str, ...] = ()
    skipped: str = ""


def render_junit(manifest: dict[str, Any]) -> str:
    """As many failures as the manifest has reasons; in ASCII, for any locale."""
    cases = [*_cases(manifest)]
    failed = sum(len(case.failures) for case in cases)
    skipped = sum(bool(case.skipped) for case in cases)
    tests = sum(max(len(case.failures), 1) for case in cases)
    counts = {"tests": str(tests), "failures": str(failed), "errors": "0", "skipped": str(skipped)}
    name = _legal(manifest["name"])
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"cswap-deploy {name}", **counts})
    suite.set("timestamp", _legal(manifest["created"]))
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(manifest):
        ElementTree.SubElement(properties, "property", {"name": key, "value": _legal(value)})
    for case in cases:
        for failure in case.failures or ("",):
            found = ElementTree.SubElement(suite, "testcase", {"classname": name, "name": case.name})
            if failure:
                ElementTree.SubElement(found, "failure", {"message": _legal(failure)})
            elif case.skipped:
                ElementTree.SubElement(found, "skipped", {"message": _legal(case.skipped)})
            if case.said:
                ElementTree.SubElement(found, "system-out").text = _legal(case.said)
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, "us-ascii")
    return f'<?xml version="1.0" encoding="US-ASCII"?>\n{written.decode("ascii")}\n'


def _cases(m: dict[str, Any]) -> Iterator[Case]:
    failures: dict[str, list[str]] = {}
    for reason in m["reasons"]:
        kind = reason.partition(":")[0]
        failures.setdefault(kind if kind in CHECKS else "build", []).append(reason)

    def case(name: str, said: str, skipped: str = "") -> Case:
        found = tuple(failures.pop(name, ()))
        return Case(name, said, found, "" if found else skipped)

    accuracy, onnx, latency, engine = m["accuracy"], m["onnx"], m["latency"], m["engine"]
    off = "no gate was set" if accuracy["gate"]["verdict"] == "off" else ""
    yield case("accuracy", f"{words.headline(m)}. {words.gate(accuracy)}", off)
    yield case("parity", f"largest difference {onnx['parity']['max_abs']:.2e}, SQNR {onnx['parity']['sqnr_db']:.1f} dB")
    yield case("latency", _latency(latency) if latency else "", "" if latency else "not measured")
    if engine:
        yield case("engine", f"TensorRT {engine['tensorrt']}, {engine['gpu']}" if engine["built"] else engine["reason"])
    if m["budget"]:
        yield case("budget", words.budget(m["budget"]))
    yield from (Case(name, "", tuple(found)) for name, found in failures.items())


def _latency(latency: dict[str, Any]) -> str:
    unstable = f"; not stable: {'; '.join(latency['unstable_because'])}" if not latency["stable"] else ""
    return (
        f"p50 {words.ms(latency['pruned']['p50_ms'])}, dense {words.ms(latency['source']['p50_ms'])}, "
        f"{words.faster(latency)}{unstable}"
    )


def _properties(m: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from (("verdict", m["verdict"]), ("shipped", m["shipped"]), ("model", m["model"]["name"]))
    yield from (("recipe_sha256", m["recipe_sha256"]), ("tool", m["tool"]["version"]))
    for key in ("top1", "top5"):
        yield from ((f"{name}.{key}", f"{m['accuracy'][name][key]:.6f}") for name in ("source", "shipped"))
    yield "drop_pp", f"{m['accuracy']['drop_pp']:.4f}"
    for key in ("macs", "params"):
        yield from ((f"{name}.{key}", str(m[name][key])) for name in ("model", "pruned"))
    if latency := m["latency"]:
        yield from (
            (f"{name}.p{p}_ms", f"{latency[name][f'p{p}_ms']:.6g}")
            for name in ("source", "pruned")
            for p in (50, 90, 99)
        )
        yield "speedup", f"{latency['speedup']:.4f}"


def _legal(text: str) -> str:
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
