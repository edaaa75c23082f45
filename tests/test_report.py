"""The page and the README of a bundle: nothing that a name says is obeyed, every figure is the manifest's."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import jinja2
import numpy as np
import pytest
import reports
from conftest import Built, run

from cswap_deploy import details
from cswap_deploy.digests import sealed
from cswap_deploy.errors import UsageError, VerifyError
from cswap_deploy.report import FORMATS, render, render_card, render_html, render_junit, render_markdown, render_readme
from cswap_deploy.samples import Samples

HOSTILE = "<script>alert(1)</script>\"'`|{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["style"], ["script"]):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def strings(value: Any) -> Any:
    """The same document with every text replaced by a hostile one, where the schema leaves the text free."""
    if isinstance(value, dict):
        return {key: item if key in ("verdict", "source", "rule") else strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strings(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture
def manifest(quickstart: Built) -> dict[str, Any]:
    return copy.deepcopy(quickstart.manifest)


def test_names_are_escaped_wherever_they_stand(manifest):
    manifest |= {"verdict": "fail", "reasons": ["a reason"]}
    hostile = {**strings(manifest), "verdict": "fail", "reasons": [HOSTILE], "name": HOSTILE}
    page = Page(render_html(hostile))
    assert set(page.tags) == set(Page(render_html(manifest)).tags)
    assert page.tags.count("script") == 1 and "alert(1)" in page.text and "{{ 7 * 7 }}" in page.text
    assert page.attributes.keys() == Page(render_html(manifest)).attributes.keys()


def test_a_hostile_class_folder_stays_text_from_the_folder_to_the_page(project, cheap_export):
    for part in ("scoring", "holdout"):
        (project.folder / "images" / part / "blue").rename(project.folder / "images" / part / "<script>alert(1)<")
    built = project.build("prune.target=null")
    assert Page((built.bundle.folder / "report.html").read_text("utf-8")).tags.count("script") == 1
    for item in built.bundle.manifest["accuracy"]["worst_classes"]:
        item["drop_pp"] = 1.0  # only classes that lost are on the page
    page = Page(render_html(built.bundle.manifest))
    assert page.tags.count("script") == 1 and "<script>alert(1)<" in page.text
    assert "<script>alert(1)<" in (built.bundle.folder / "labels.txt").read_text("utf-8").splitlines()


def test_what_is_for_and_against_a_file_is_on_the_page_the_card_and_the_readme(manifest):
    made = reports.of(manifest, "net", reports.resnet56()[:3])
    mark = "slower than model.onnx on the target: 0.67 (0.66 to 0.68) times as fast"
    chosen = {"method": "percentile", "in_float": ["node_7"], "nodes": 20, "images": 256, "drop_pp": 0.39}
    made["onnx"]["variants"]["int8"] |= {
        "note": "in float: node_7",
        "marks": [mark],
        "quantised": {**chosen, "divergence": 0.01, "tried": 24, "met": True},
    }
    text = Page(render_html(made)).text
    assert (
        "in float: node_7 ranges from the 99.99th percentile, 1 of 20 weighted nodes in float; of 24 files tried"
        in text
    )
    assert "drop +0.39 points from float32 on 256 selection images" in text
    assert all(mark in written for written in (text, render_card(made), render_readme(made), render_markdown(made)))
    for coverage in manifest["onnx"]["coverage"]:
        assert f"{coverage['provider']} {coverage['supported']} of {coverage['nodes']}" in text
    assert len(manifest["onnx"]["coverage"]) == 4 and "No phone was measured" in text


def test_a_network_that_was_not_pruned_is_not_called_so(manifest):
    manifest["pruned"] |= {"units_removed": 0, "compensation": "none"}
    card = render_card(manifest)
    assert "not pruned: exported and checked" in card and "- **Pruned:** no\n" in card
    assert "structured" not in card and "fitted" not in card


def test_page_asks_for_nothing_from_elsewhere(quickstart):
    source = (quickstart.bundle.folder / "report.html").read_text("utf-8")
    page = Page(source)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use"} & set(page.tags)
    assert not {"src", "action", "srcset", "style", "onload", "onclick", "xlink:href"} & page.attributes.keys()
    assert all(re.fullmatch("#[a-z]+", place) and f'id="{place[1:]}"' in source for place in page.attributes["href"])
    [policy] = (text for text in page.attributes["content"] if "default-src" in text)
    assert not re.search(r"https?:|//|@import|url\(", source.replace(policy, ""))


def test_policy_allows_the_page_s_own_style_and_script_and_nothing_else(manifest):
    source = render_html(manifest)
    policy = dict(part.split(" ", 1) for part in re.findall(r'content="(default-src[^"]*)"', source)[0].split("; "))
    policy = {name: html.unescape(value) for name, value in policy.items()}
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        text = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", source)
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert len(text) == 1 and policy.pop(name) == f"'sha256-{digest}'"
    assert policy == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


def test_page_is_what_the_manifest_renders(quickstart):
    assert render_html(quickstart.manifest) == (quickstart.bundle.folder / "report.html").read_text("utf-8")
    assert render_readme(quickstart.manifest) == (quickstart.bundle.folder / "README.md").read_text("utf-8")


def test_figures_on_the_page_are_the_manifest_s(manifest):
    """Each number of the manifest is made distinct; the page must then show each, as it is rounded there."""
    accuracy, pruned, onnx = manifest["accuracy"], manifest["pruned"], manifest["onnx"]
    for number, model in enumerate(("source", "pruned", "shipped")):
        accuracy[model] |= {"top1": 0.811 + number / 100, "top5": 0.911 + number / 100}
        accuracy[model]["top1_ci95"] = [0.711 + number / 100, 0.851 + number / 100]
    accuracy |= {"images": 4321, "drop_pp": 1.23, "drop_ci95_pp": [-0.45, 3.21], "agreement": 0.9876}
    accuracy |= {"only_dense_right": 77, "only_shipped_right": 66, "holdout_reads": 9}
    accuracy["worst_classes"] = [{"label": "seven", "drop_pp": 12.34, "images": 56}]
    accuracy["gate"] |= {"max_drop_pp": 2.25, "proven": False, "images_to_prove": 8765, "confidence": 0.97}
    pruned |= {"params": 2_345_000, "macs": 45_670_000, "units": 1000, "units_removed": 123, "steps": 17}
    manifest["model"] |= {"params": 5_432_000, "macs": 98_760_000}
    pruned["groups"] = [{"name": "layer1.conv1", "units": 80, "kept": 30}]
    onnx |= {"opset": 21, "ir_version": 9, "nodes_exported": 543, "nodes_simplified": 432}
    onnx["parity"] = {"images": 13, "max_abs": 2.34e-6, "sqnr_db": 123.4}
    text = Page(render_html(manifest)).text
    shown = [
        "81.10 %", "82.10 %", "83.10 %", "91.10 %", "92.10 %", "93.10 %", "71.10 % to 85.10 %", "73.10 % to 87.10 %",
        "4321 hold-out images", "Drop +1.23 points", "-0.45 to +3.21", "98.76 %", "77 images only the dense", "66 only",
        "compared on them 9 times", "seven +12.34 56", "within 2.25 points on 4321", "not proven at 97 % (one-sided)", "8765 images",
        "2.35 M", "5.43 M", "45.67 M", "98.76 M", "43.17 %", "46.24 %", "1000 877 123 removed", "17 steps",
        "layer1.conv1 30 of 80", "Opset 21", "IR version 9", "432 nodes (543", "13 real images", "2.34e-06", "123.4 dB",
    ]  # fmt: skip
    assert [figure for figure in shown if figure not in text] == []
    assert 'class="mark kept" x="0.00%" width="37.50%"' in render_html(manifest)


def timing(p50: float) -> dict[str, Any]:
    bounds = {"p50_ci95_ms": [p50 - 0.01, p50 + 0.01], "samples": 4321, "rounds": 99, "peak_memory_mb": 77.3}
    return {"p50_ms": p50, "p90_ms": p50 + 1, "p99_ms": p50 + 2, **bounds}


def test_latency_and_its_conditions_are_on_the_page(manifest):
    conditions = {"device": "<b>Board</b>", "power_mode": None, "load": [0.25, 1.5], "cores": 6}
    manifest["latency"] = {
        "target": "ssh", "runtime": "onnxruntime", "runtime_version": "1.99", "precision": "int8", "batch": 3,
        "threads": 2, "duration_s": 5.0, "source": timing(7.125), "pruned": timing(4.75), "speedup": 1.512,
        "speedup_ci95": [1.487, 1.534], "stable": False, "unstable_because": ["dense: it drifts"], "conditions": conditions,
    }  # fmt: skip
    page = render_html(manifest)
    text = Page(page).text
    shown = [
        "7.125 ms", "4.75 ms", "8.125 ms", "9.125 ms", "1.51 (95 %: 1.49 to 1.53) times as fast", "int8, batch 3", "4321", "77 MB",
        "Not stable", "dense: it drifts", "ssh: <b>Board</b>", "onnxruntime 1.99, 2 threads", "power_mode unknown",
        "load 0.25 before, 1.5 after", "cores 6",
    ]  # fmt: skip
    assert [figure for figure in shown if figure not in text] == []
    assert "<b>Board" not in page and "Latency was not measured" not in text
    readme = render_readme(manifest)
    assert "1.51 times as fast" in readme and "not stable" in readme


def test_variants_and_the_engine_are_on_the_page(manifest):
    parity = {"images": 16, "max_abs": 0.5, "sqnr_db": 23.4}
    variant = {"file": "model.int8.onnx", "opset": 18, "parity": parity, "nodes": 9, "note": "Conv only"}
    manifest["onnx"]["variants"] = {"int8": variant}
    manifest["accuracy"]["variants"] = {"int8": manifest["accuracy"]["shipped"] | {"top1": 0.4321}}
    manifest["engine"] = {"built": False, "reason": "TensorRT is <missing>", "precision": "fp16"}
    text = Page(render_html(manifest)).text
    assert [word for word in ("model.int8.onnx Conv only", "43.21 %", "23.4 dB", "Not built", ": TensorRT is <missing>")
            if word not in text] == []  # fmt: skip
    built = {"built": True, "build_seconds": 27.8, "tensorrt": "10.3.0", "gpu": "Orin", "note": "",
             "board": "Orin Nano", "compute_capability": "8.7", "power_mode": "15W", "sha256": "0" * 64, "open_batch": False,
             "dla_core": None, "batch": {"min": 1, "opt": 1, "max": 1}}  # fmt: skip
    manifest["engine"] |= built
    assert "Built in 28 s by TensorRT 10.3.0 for Orin, precision fp16" in Page(render_html(manifest)).text
    assert "is not built" not in render_readme(manifest)


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_verdict_and_every_reason_are_at_the_top(manifest, verdict):
    manifest |= {"verdict": verdict, "reasons": ["first reason", "second reason"] if verdict == "fail" else []}
    top = Page(render_html(manifest).split("<h2>")[0]).text
    assert verdict in top and ("first reason second reason" in top) == (verdict == "fail")


def test_a_gate_that_is_off_is_said_to_be(manifest):
    manifest["accuracy"]["gate"] |= {"verdict": "off", "max_drop_pp": None, "images_to_prove": None}
    assert "No gate was set" in Page(render_html(manifest)).text


def test_a_network_without_groups_has_a_page(manifest):
    manifest["pruned"] |= {"groups": [], "units": 0, "units_removed": 0, "steps": 0}
    assert "Nothing was pruned" in render_html(manifest)


# --- README


@pytest.mark.parametrize("name", ["x`.py:net", "``", "<b>net</b>.py:f", "a_b*c*.py:_f_", "net\n# Run this\n.py:f"])
def test_readme_shows_odd_model_names_as_code(manifest, name):
    manifest["model"] |= {"name": name, "source": "factory"}
    readme = render_readme(manifest)
    plain = name.replace("\n", "\\n")
    spans = [text.strip() for _, text in re.findall(r"(?s)(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", readme)]
    assert plain in spans
    outside = re.sub(r"(?ms)^```.*?^```$", "", readme)
    own = ["## Python", "## Android (Kotlin)", "## iOS (Swift)", "## JavaScript (browser, React Native's WebView)"]
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert headings == ["# quickstart", *own, "## Is my preprocessing right?"]
    assert "# Run this" not in outside.splitlines()


def test_readme_states_the_figures_and_how_to_load(manifest, colours: Built):
    readme = render_readme(manifest)
    accuracy = manifest["accuracy"]
    assert f"{100 * accuracy['shipped']['top1']:.2f} %" in readme and f"{accuracy['drop_pp']:+.2f} points" in readme
    assert f"{accuracy['images']} hold-out images" in readme
    assert 'load_pruned(".")' in readme
    assert 'load_pruned(".", factory=your_function)' in render_readme(colours.manifest)


def test_a_manifest_without_a_key_is_not_rendered_in_silence(manifest):
    del manifest["accuracy"]["agreement"], manifest["onnx"]["opset"]
    with pytest.raises(jinja2.UndefinedError, match=r"agreement|opset"):
        render_html(manifest)


# --- Markdown and JUnit XML


def cells(markdown: str) -> list[list[str]]:
    """Rows of all tables, split where GitHub splits them: at each | that no backslash precedes, code or not."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.fixture
def large(manifest) -> dict[str, Any]:
    return reports.of(manifest, "resnet50", reports.resnet50())


def test_markdown_holds_the_facts_of_the_page(large):
    text = render_markdown(large)
    rows = {row[0]: row[1:] for row in cells(text)}
    assert text.startswith("## ❌ `resnet50`: FAIL\n") and large["reasons"][0] in text
    assert rows["top-1"][:2] == [f"{100 * large['accuracy']['source']['top1']:.2f} %", "97.33 %"]
    assert rows["multiply-accumulates"] == ["4.09 G", "2.45 G", "60.00 % kept"]
    assert rows["file size"] == ["97.8 MiB", "16.8 MiB", "17.16 % kept"]
    assert (
        rows["latency, p50"][1] == f"{large['latency']['pruned']['p50_ms']:.4g} ms"
        and "times as fast" in rows["latency, p50"][2]
    )
    assert rows["`brown bear, Ursus arctos`"] == ["+8.33", "60"] and rows["`int8`"][0] == "`model.int8.onnx`"
    for group in large["pruned"]["groups"]:
        assert rows[f"`{group['name']}`"][:2] == [str(group["units"]), str(group["kept"])]


def test_markdown_of_a_small_bundle_says_what_is_missing(manifest):
    text = render_markdown(manifest)
    assert (
        "Latency was not measured." in text and "| size of the weights |" in text and ": PASS" in text.splitlines()[0]
    )


@pytest.mark.parametrize(
    "name", [HOSTILE, "a | b", "`|`", "[x](y)", "@team", "line\nbreak", "</details><h1>", "\u202egnp"]
)
def test_names_mean_nothing_in_markdown(large, name):
    plain = [len(row) for row in cells(render_markdown(large))]
    hostile = {**strings(large), "verdict": "fail", "reasons": [name], "name": name}
    hostile["accuracy"]["worst_classes"] = [{"label": name, "drop_pp": 3.0, "images": 9} for _ in range(4)]
    hostile["onnx"]["variants"] = {
        key: {**found, "file": name, "marks": [name, name]} for key, found in large["onnx"]["variants"].items()
    }
    hostile["accuracy"]["variants"] = large["accuracy"]["variants"]
    text = render_markdown(hostile)
    assert [len(row) for row in cells(text)] == plain
    outside = re.sub(r"(?s)(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)
    assert outside.count("<") == 4 and not re.search(r"alert|@|\]\(|h1|gnp", outside)  # details, summary and their ends


def test_junit_has_a_failure_for_each_reason(large):
    large["reasons"] = ["accuracy: it drops", "engine: no TensorRT", "int8: no such operator", "accuracy: again"]
    large["engine"] = {"built": False, "reason": "no TensorRT"}
    suite = ElementTree.fromstring(render_junit(large)).find("testsuite")
    failed = [
        (case.get("name"), case.find("failure").get("message")) for case in suite if case.find("failure") is not None
    ]
    assert sorted(failed) == sorted(zip(("accuracy", "engine", "build", "accuracy"), large["reasons"]))
    assert suite.get("failures") == "4" and suite.get("tests") == str(len(suite.findall("testcase"))) == "6"
    values = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert values["verdict"] == "fail" and float(values["drop_pp"]) == 1.83
    assert float(values["pruned.p99_ms"]) == pytest.approx(large["latency"]["pruned"]["p99_ms"], rel=1e-5)


def test_junit_of_a_bundle_that_passed(manifest):
    root = ElementTree.fromstring(render_junit(manifest))
    skipped = {case.get("name"): case.find("skipped") is not None for case in root.iter("testcase")}
    assert skipped == {"accuracy": False, "parity": False, "latency": True} and root.get("failures") == "0"
    manifest["accuracy"]["gate"] |= {"verdict": "off", "max_drop_pp": None}
    root = ElementTree.fromstring(render_junit(manifest))
    assert [case.get("name") for case in root.iter("testcase") if case.find("skipped") is not None] == [
        "accuracy",
        "latency",
    ]


@pytest.mark.parametrize("name", [HOSTILE, "a\x00\x0b\x1b[31m", "\ud800", "]]>", "\u202e\n"])
def test_junit_survives_any_name(large, name):
    large |= {"name": name, "reasons": [f"accuracy: {name}"], "shipped": name}
    text = render_junit(large)
    assert text.isascii() and ElementTree.fromstring(text).get("failures") == "1"


def test_show_prints_each_format(quickstart, copy):
    for form in FORMATS:
        done = run("-m", "cswap_deploy", "show", copy, "--format", form, PYTHONIOENCODING="utf-8")
        assert done.returncode == 0 and done.stdout == render(quickstart.manifest, form)
    page = run("-m", "cswap_deploy", "show", copy, "--format", "html", PYTHONIOENCODING="ascii").stdout
    assert html.unescape(page) == html.unescape(render_html(quickstart.manifest))


@pytest.mark.parametrize(
    ("options", "message"),
    [("pdf", "'pdf' is not a format"), ("html --json", "exclude"), ("html --unit a:1", "exclude")],
)
def test_show_refuses_what_is_no_format(copy, options, message):
    done = run("-m", "cswap_deploy", "show", copy, "--format", *options.split())
    assert done.returncode == 2 and message in done.stderr + done.stdout


def test_a_format_must_be_known(manifest):
    with pytest.raises(UsageError, match="choose one of markdown, junit, html"):
        render(manifest, "yaml")


def test_figures_that_cannot_be_are_the_bundle_s_fault(copy, manifest):
    manifest["pruned"]["groups"][0]["units"] = 0
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)), "utf-8")
    done = run("-m", "cswap_deploy", "show", copy, "--format", "html")
    assert done.returncode == 9 and "cannot be shown as html: " in done.stderr and not done.stdout
    del manifest["accuracy"]["drop_interval"], manifest["pruned"]["groups"]
    with pytest.raises(VerifyError, match=r"cannot be shown as html: .*drop_interval"):
        render(manifest, "html")


# --- what the charts are drawn from


def test_layers_add_up_to_the_network(quickstart):
    model, pruned = quickstart.manifest["model"], quickstart.manifest["pruned"]
    for key in ("macs", "params"):
        whole = sum(layer[key] for layer in pruned["layers"]), sum(layer[f"{key}_kept"] for layer in pruned["layers"])
        assert whole == pytest.approx((model[key], pruned[key]), rel=0 if key == "macs" else 0.02)
    assert pruned["trace"][-1]["macs"] == pytest.approx(pruned["macs"] / model["macs"])
    assert sum(step["units_removed"] for step in pruned["trace"]) == pruned["units_removed"]


def test_histogram_counts_every_sample_once():
    found = reports.latency()
    spreads = found["distribution"]
    for place, key in enumerate(("source", "pruned")):
        assert sum(spreads[key]) + spreads["above"][place] == found[key]["samples"]
        assert len(spreads[key]) == details.BINS and spreads["max_ms"][place] >= found[key]["p99_ms"]
        edges = np.geomspace(spreads["from_ms"], spreads["to_ms"], details.BINS + 1)
        below = sum(count for count, edge in zip(spreads[key], edges[1:]) if edge <= found[key]["p50_ms"])
        assert 0.4 < below / found[key]["samples"] <= 0.5
    assert len(found["course"]["source"]) == len(found["course"]["pruned"]) == details.POINTS
    assert np.median(found["course"]["pruned"]) == pytest.approx(found["pruned"]["p50_ms"], rel=0.01)


def test_histogram_of_equal_samples_is_a_histogram():
    spreads = details.distribution(Samples.of([[[1000, 1000], [1000]], [[1000], [1000]]]))
    assert sum(spreads["source"]) == 3 and sum(spreads["pruned"]) == 2 and spreads["above"] == [0, 0]


def test_quantiles_are_those_of_the_effects(quickstart):
    for group in quickstart.manifest["pruned"]["groups"]:
        low, high = group["dense"]["effect"]
        values = group["dense"]["quantiles"]
        assert low <= values[0] <= values[2] <= values[4] <= high and values == sorted(values)
