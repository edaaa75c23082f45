"""The page in a real browser: Debian's Chromium, driven by Playwright. Skipped where the program `chromium` is missing."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reports
from conftest import Built

from cswap_deploy.report import render_html, render_sweep

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</style><img src=x onerror=alert(1)>",
    '" onload="alert(1)', "' onmouseover='alert(1)", "\u202egnp.exe\u202c", "`${alert(1)}`", "{{ 7 * 7 }}", "a" * 300,
    "<!--", "]]>", "&lt;script&gt;",
]  # fmt: skip
SECTIONS = ["before", "accuracy", "latency", "where", "layers", "files", "provenance", "reproduce"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1200, "height": 900}

OLD_LATENCY = set(reports.latency()) - {"distribution", "course", "layers"}

CONTRAST = """() => {
  const parts = (text) => { const found = text.match(/[\\d.]+/g).map(Number); return found.length < 4 ? [...found, 1] : found; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : Math.pow((value + 0.055) / 1.055, 2.4);
  const light = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const behind = (node) => {
    const layers = [];
    for (let each = node; each; each = each.parentElement) layers.unshift(parts(getComputedStyle(each).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || node.closest("script, style, .tip") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), drawn = node.namespaceURI.endsWith("svg");
    const below = behind(node), ink = over(parts(drawn ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text.slice(0, 40), node.className.baseVal ?? node.className]);
  }
  return found;
}"""
"""Contrast ratio (WCAG 2, relative luminance) of every visible text with what is behind it."""

WIDE = """() => [...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !node.closest(".scroll, nav, svg");
}).map((node) => node.outerHTML.slice(0, 100))"""
"""What reaches beyond the right edge, but for what scrolls by itself and marks that a chart cuts off."""


@dataclass
class Opened:
    """A page that was opened, and what happened meanwhile: faults, console messages, dialogs, requests."""

    page: Any
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def visited(told: dict[str, Any] | str, **options: Any) -> Opened:
        """`told`: a manifest, or a page."""
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        opened = Opened(contexts[-1].new_page())
        opened.page.on("console", lambda message: opened.faults.append(message.text))
        opened.page.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.page.on("dialog", lambda dialog: (opened.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        path = reports.written(told if isinstance(told, str) else render_html(told), tmp_path)
        opened.page.goto(path.as_uri())
        assert opened.requests == [path.as_uri()]
        return opened

    yield visited
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def real(quickstart: Built) -> dict[str, Any]:
    """The manifest of a bundle that was really built, without a measurement."""
    return quickstart.manifest


@pytest.fixture(scope="module")
def large(real: dict[str, Any]) -> dict[str, Any]:
    return reports.of(real, "resnet50", reports.resnet50())


def marks(page: Any, section: str) -> list[int]:
    """How many marks of a visible size each chart of a section shows, folded parts opened."""
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    counted = (
        "(charts) => charts.map((chart) => [...chart.querySelectorAll('.mark')].filter((mark) => "
        "{ const box = mark.getBoundingClientRect(); return box.width > 0 && (box.height > 0 || mark.tagName === 'line'); }).length)"
    )
    return list(page.eval_on_selector_all(f"#{section} svg[role=img]", counted))


@pytest.mark.parametrize("size", ["real", "large"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_opens_without_a_fault_and_asks_for_nothing(visit, request, size, viewport):
    opened = visit(request.getfixturevalue(size), viewport=viewport)
    opened.page.mouse.wheel(0, 20000)
    opened.page.wait_for_timeout(100)
    assert opened.faults == [] and len(opened.requests) == 1
    assert opened.page.eval_on_selector_all("section", "(all) => all.map((each) => each.id)") == SECTIONS


def test_the_policy_is_in_force(visit, large):
    """What the page may not do is refused by the browser itself, so no name could do it either."""
    opened = visit(large)
    opened.page.evaluate(
        "() => { const part = document.createElement('script'); part.textContent = 'window.caught = 1';"
        " document.body.append(part); const image = new Image(); image.src = 'https://example.invalid/x.png'; }"
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.caught") is None
    assert len(opened.faults) == 2 and all("Content Security Policy" in fault for fault in opened.faults)


def test_every_chart_is_drawn(visit, large):
    page = visit(large).page
    groups, layers = large["pruned"]["groups"], large["pruned"]["layers"]
    assert marks(page, "before") == [2] * 7
    assert marks(page, "accuracy") == [2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert marks(page, "latency") == [2, 2]
    timed, *bars = marks(page, "where")
    assert timed == 2 * 54 and bars == [2] * (2 + 15) + [2 * len(layers)] + [2] * len(layers)
    drawn = marks(page, "layers")
    assert len(drawn) == 3 * len(groups) + len(large["pruned"]["trace"])
    for row, each in enumerate(groups):
        units, verdicts, effects = drawn[3 * row : 3 * row + 3]
        assert units == 1 + sum(each["left"][verdict] > 0 for verdict in ("critical", "detrimental"))
        assert verdicts == sum(
            each["dense"][verdict] > 0 for verdict in ("critical", "neutral", "detrimental", "unresolved")
        )
        assert effects == (4 if each["left"]["effect"] else 2)
    assert page.locator("#latency .zoom .touch").count() == len(large["latency"]["distribution"]["source"])


def test_bars_are_as_long_as_the_figures_say(visit, large):
    page = visit(large).page
    widths = page.eval_on_selector_all(
        "#layers .groups td:nth-child(2) svg",
        "(all) => all.map((each) => each.querySelector('.kept').getBoundingClientRect().width / each.getBoundingClientRect().width)",
    )
    shares = [group["kept"] / group["units"] for group in large["pruned"]["groups"]]
    assert widths == pytest.approx(shares, abs=0.002)


def test_charts_and_figures_have_words_for_those_who_do_not_see_them(visit, large):
    page = visit(large).page
    unnamed = "(all) => all.filter((each) => !(each.getAttribute('role') === 'img' && each.getAttribute('aria-label')) "
    unnamed += "&& each.getAttribute('aria-hidden') !== 'true' && !each.parentElement.closest('svg')).length"
    assert page.eval_on_selector_all("svg", unnamed) == 0
    label = page.locator("#layers .groups tbody tr").first.locator("svg").first.get_attribute("aria-label")
    assert label == "conv1: {kept} of {units} units kept".format(**large["pruned"]["groups"][0])
    assert page.locator("html").get_attribute("lang") == "en" and page.title() == "resnet50: fail"
    assert page.locator("table").count() == page.locator("table:has(th[scope])").count()


def test_headings_are_in_order(visit, large):
    levels = visit(large).page.eval_on_selector_all(
        "h1, h2, h3, h4, h5, h6", "(all) => all.map((each) => Number(each.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) == len(SECTIONS)
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("width", [390, 320, 768, 1200])
@pytest.mark.parametrize("size", ["real", "large"])
def test_nothing_scrolls_sideways(visit, request, size, width):
    page = visit(request.getfixturevalue(size), viewport={"width": width, "height": 844}).page
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(WIDE) == []


@pytest.mark.parametrize("verdict", ["pass", "fail", "no gate"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(visit, large, scheme, verdict):
    manifest = {**large, "verdict": "fail" if verdict == "fail" else "pass"}
    manifest["reasons"] = large["reasons"] if verdict == "fail" else []
    manifest["latency"] = {**large["latency"], "stable": verdict == "fail", "unstable_because": ["it drifts"]}
    gate = {**large["accuracy"]["gate"], "verdict": "off" if verdict == "no gate" else verdict}
    manifest["accuracy"] = {**large["accuracy"], "gate": gate}
    page = visit(manifest, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 500 and [found for found in ratios if found[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == (scheme == "dark")


def test_without_javascript_everything_is_said(visit, large):
    page = visit(large, java_script_enabled=False).page
    text = page.locator("main").inner_text()
    for words in ("Before and after", "brown bear, Ursus arctos", "8.384 ms", "layer4.2.conv2", "How to reproduce"):
        assert words in text
    assert page.locator("details summary").count() == 4 and page.locator("#latency .zoom .area").count() == 2
    assert page.locator(".tools").count() == 0
    page.locator("#layers summary").click()
    assert page.locator("#layers .narrow tfoot").is_visible()


def test_pointer_zoom_and_sorting(visit, large):
    page = visit(large).page
    page.locator("#latency .zoom .touch").nth(40).hover()
    assert re.fullmatch(r"[\d.]+ to [\d.]+ ms: dense [\d.]+ %, ships [\d.]+ %", page.locator(".tip").inner_text())
    plot = page.locator("#latency .zoom .plot")
    whole, ticks = plot.get_attribute("viewBox"), page.locator("#latency .zoom .tick").all_text_contents()
    page.get_by_role("button", name="zoom in").click()
    assert plot.get_attribute("viewBox") != whole
    assert page.locator("#latency .zoom .tick").all_text_contents() not in ([], ticks)
    page.get_by_role("button", name="show all").click()
    assert plot.get_attribute("viewBox") == whole
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 60)
    page.mouse.up()
    start, _, width, _ = map(float, plot.get_attribute("viewBox").split())
    bins = len(large["latency"]["distribution"]["source"])
    assert (start / bins, width / bins) == pytest.approx((0.1, 0.2), abs=0.01)
    page.locator("#layers summary").click()
    page.get_by_role("button", name="critical", exact=True).click()
    shown = page.eval_on_selector_all(
        "#layers .narrow tbody td:nth-child(4)", "(all) => all.map((each) => Number(each.dataset.value))"
    )
    assert shown == sorted((group["dense"]["critical"] for group in large["pruned"]["groups"]), reverse=True)


def test_print_is_light_and_unfolded(visit, large):
    page = visit(large, color_scheme="dark").page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#layers .narrow").is_visible() and not page.locator("nav").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_hostile_names_are_text(visit, large):
    manifest = {**large, "name": HOSTILE[0], "shipped": HOSTILE[1], "reasons": HOSTILE}
    manifest["model"] = {**large["model"], "name": HOSTILE[2], "license": HOSTILE[3]}
    losers = [{"label": name, "drop_pp": 9.0, "images": 7} for name in HOSTILE]
    manifest["accuracy"] = {**large["accuracy"], "worst_classes": losers}
    groups = [{**group, "name": name} for group, name in zip(large["pruned"]["groups"], HOSTILE)]
    layers = [{**layer, "name": name} for layer, name in zip(large["pruned"]["layers"], HOSTILE)]
    manifest["pruned"] = {**large["pruned"], "groups": groups, "layers": layers}
    manifest["latency"] = {**large["latency"], "conditions": {**reports.CONDITIONS, "device": HOSTILE[1]}}
    opened = visit(manifest, viewport=PHONE)
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert opened.faults == [] and len(opened.requests) == 1
    assert page.locator("script").count() == 1 and page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"] and page.evaluate(WIDE) == []
    assert page.locator(".losers tbody th").all_inner_texts() == HOSTILE
    for row in (0, 1, 3):
        page.locator(".losers tbody tr").nth(row).locator(".mark").hover()
        assert page.locator(".tip").inner_text() == f"{HOSTILE[row]}: +9.00 points"


def test_ten_thousand_labels_are_cut_short(visit, large):
    losers = [{"label": f"class {number}", "drop_pp": 50.0, "images": 2} for number in range(10_000)]
    manifest = {**large, "accuracy": {**large["accuracy"], "worst_classes": losers}}
    page = visit(manifest).page
    assert page.locator(".losers tbody tr").count() == 20
    assert len(render_html(manifest)) < len(render_html(large)) + 20_000


@pytest.mark.parametrize(
    ("name", "groups", "limit"),
    [("ResNet-56", reports.resnet56(), 1_500_000), ("resnet50", reports.resnet50(), 3_000_000)],
)
def test_page_is_small_and_quickly_made(real, name, groups, limit):
    manifest = reports.of(real, name, groups)
    start = time.perf_counter()
    page = render_html(manifest)
    assert time.perf_counter() - start < 3
    assert len(page.encode()) < limit / 3


def test_sections_without_data_say_why(visit, real):
    bare = {
        **real,
        "pruned": {**real["pruned"], "groups": [], "layers": [], "trace": [], "units": 0, "units_removed": 0},
    }
    page = visit(bare).page
    assert "Latency was not measured" in page.locator("#latency").inner_text()
    assert "Nothing was pruned" in page.locator("#layers").inner_text()
    assert "No layer was timed" in page.locator("#where").inner_text()
    assert "not known by layer" in page.locator("#where").inner_text()


def test_a_bundle_of_before_has_a_page(visit, large):
    """Manifests that lack the keys that were added since."""
    old = {key: value for key, value in large.items() if key != "size"}
    old["pruned"] = {key: value for key, value in large["pruned"].items() if key not in ("layers", "trace", "scores")}
    old["pruned"]["groups"] = [
        {key: group[key] for key in ("name", "units", "kept")} for group in large["pruned"]["groups"]
    ]
    old["latency"] = {key: value for key, value in large["latency"].items() if key in OLD_LATENCY}
    opened = visit(old)
    assert opened.faults == [] and marks(opened.page, "latency") == []
    assert "8.384 ms" in opened.page.locator("#latency").inner_text()


# --- the page of a sweep


def front(name: str = "resnet50") -> dict[str, Any]:
    """Four latencies: two met, of which the second is beaten, one missed, one that nothing reaches."""
    verdicts = {6.0: "met", 5.0: "met", 4.0: "missed", 1.0: "infeasible"}
    points = [
        {
            "latency_ms": asked, "verdict": verdict, "achieved_ms": None if verdict == "infeasible" else 0.98 * asked,
            "ratio": None if verdict == "infeasible" else asked / 8, "ratio_low": asked / 8.1, "ratio_high": asked / 7.9,
            "trials": 2, "top1": 0.7 + asked / 100, "drop_pp": 6 - asked, "drop_low_pp": 5 - asked, "drop_high_pp": 7 - asked,
            "macs": int(1e9 * asked), "params": int(1e6 * asked), "bytes": 1, "gate": "pass", "exit_code": 0,
            "bundle": f"bundle-{asked:g}ms", "on_front": asked in (4.0, 6.0), "percentile": 90, "runtime": "onnxruntime",
            "runtime_version": "1.32.0", "precision": "int8", "batch": 4, "threads": 2,
        }
        for asked, verdict in verdicts.items()
    ]  # fmt: skip
    return {
        "name": name,
        "dense": {"latency_ms": 8.0, "top1": 0.8, "top1_precision": "fp32"},
        "points": points,
        "conditions": {"device": HOSTILE[1]},
    }


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_sweep_s_page_can_be_read(visit, viewport, scheme):
    opened = visit(render_sweep(front(HOSTILE[0])), viewport=viewport, color_scheme=scheme)
    page = opened.page
    assert opened.faults == [] and page.locator("h1").inner_text() == HOSTILE[0]
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"] and page.evaluate(WIDE) == []
    assert [found for found in page.evaluate(CONTRAST) if found[0] < 4.5] == []
    assert marks(page, "front") == [
        5
    ]  # the dense network, the three that were measured, and what joins the two on the front
    said = page.locator("#front").inner_text()
    assert (
        "p90 of int8, batch 4, 2 threads, onnxruntime 1.32.0" in said
        and "Top-1 of the dense network is that in fp32" in said
    )


def test_a_sweep_s_points_tell_their_figures_and_lead_to_their_reports(visit):
    page = visit(render_sweep(front())).page
    page.locator("#front svg circle").nth(1).hover()
    assert page.locator(".tip").inner_text() == "asked 5 ms, met: 4.9 ms, 75.00 %"
    links = page.eval_on_selector_all("#front svg a", "(all) => all.map((each) => each.getAttribute('href'))")
    assert sorted(links) == ["bundle-4ms/report.html", "bundle-5ms/report.html", "bundle-6ms/report.html"]
    assert page.locator("#front tbody tr").count() == 4 and "not measured" in page.locator("#front tbody").inner_text()
    page.get_by_role("button", name="top-1", exact=True).click()
    shown = page.eval_on_selector_all(
        "#front tbody td:nth-child(5)", "(all) => all.map((each) => Number(each.dataset.value))"
    )
    assert shown == sorted(shown, reverse=True)
