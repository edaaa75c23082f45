"""The bundle's page in Chromium: ONNX Runtime Web gives PyTorch's top-1, and times the model where the page is open."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Built, benchmark

from cswap_deploy import load_pruned
from cswap_deploy.images import normalise, transform
from cswap_deploy.report import web_files

HOLDOUT = ROOT / "calibration" / "digits" / "holdout"
IMAGES = 60
"""Hold-out images that the page classifies beside its own."""


consumers = benchmark("consumers")
pytestmark = pytest.mark.skipif(
    bool(consumers.missing("chromium")), reason=consumers.missing("chromium") or "it is there"
)


@pytest.fixture(scope="module")
def address(quickstart: Built) -> Iterator[str]:
    with consumers.serving(quickstart.bundle.folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with consumers.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(address: str, browser: Any) -> Any:
    """The page, with the runtime from this machine in place of the network."""
    opened = browser.new_page()
    opened.faults = []
    opened.on("pageerror", lambda fault: opened.faults.append(str(fault)))
    opened.on("console", lambda line: opened.faults.append(line.text) if line.type == "error" else None)
    opened.goto(f"{address}/web/index.html?ort=/node_modules/onnxruntime-web/dist/")
    assert opened.evaluate("window.ready"), opened.text_content("#verdict")
    return opened


def test_its_own_test_images_have_pytorch_s_top1(page: Any) -> None:
    assert page.text_content("#verdict") == "4 of 4 test images have the top-1 that PyTorch gave"
    assert page.locator("#tests td:last-child").all_text_contents() == ["same"] * 4
    assert re.fullmatch(
        r"model\.onnx, ONNX Runtime Web \d+\.\d+\.\d+, WebAssembly, 1 thread", page.text_content("#model")
    )
    assert page.faults == []


def test_other_images_have_it_too(page: Any, quickstart: Built) -> None:
    """Decoded, resized and normalised by the browser; the shares are PyTorch's probabilities."""
    paths = sorted(HOLDOUT.rglob("*.png"))[:: max(1, len(sorted(HOLDOUT.rglob("*.png"))) // IMAGES)][:IMAGES]
    assert len(paths) == IMAGES
    module, spec = load_pruned(quickstart.bundle.folder), spec_of(quickstart)
    from PIL import Image

    for path in paths:
        pixels = np.asarray(transform(Image.open(path).convert("RGB"), spec)).transpose(2, 0, 1)
        with torch.no_grad():
            wanted = module(torch.from_numpy(normalise(pixels[None], spec))).softmax(1).numpy()[0]
        data = base64.b64encode(path.read_bytes()).decode()
        found = page.evaluate(CLASSIFY, data)
        assert found[0]["index"] == wanted.argmax(), path
        assert found[0]["share"] == pytest.approx(float(wanted.max()), abs=1e-4)


CLASSIFY = """(data) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return window.classify(new Blob([bytes], { type: "image/png" }));
}"""


def spec_of(built: Built) -> Any:
    from cswap_deploy.artifacts import InputSpec

    block = built.manifest["model"]["input"]
    return InputSpec(**{key: tuple(value) if isinstance(value, list) else value for key, value in block.items()})


def test_a_button_times_the_model_on_this_device(page: Any) -> None:
    page.click("#time")
    page.locator("#latency", has_text="p50").wait_for(timeout=60_000)
    said = page.text_content("#latency")
    found = re.fullmatch(r"p50 ([\d.]+) ms, p90 ([\d.]+) ms, (\d+) runs, batch 1, on (.*)", said)
    assert found, said
    assert 0 < float(found[1]) <= float(found[2]) and int(found[3]) >= 30 and "Chrome" in found[4]
    assert page.is_enabled("#time")


def test_an_image_of_the_visitor_s_is_classified(page: Any, quickstart: Built) -> None:
    path = next(HOLDOUT.rglob("*.png"))
    page.set_input_files("#file", path)
    page.locator("#answer", has_text="%").wait_for(timeout=30_000)
    assert len(page.text_content("#answer").splitlines()) == 5


@pytest.mark.parametrize("place", ["https://example.org/", "//example.org/x/"])
def test_a_runtime_of_another_origin_is_not_taken(address: str, browser: Any, place: str) -> None:
    opened = browser.new_page()
    opened.goto(f"{address}/web/index.html?ort={place}")
    assert opened.evaluate("window.ready") is False
    assert opened.text_content("#verdict") == "cannot run: ?ort= must lie on this server"
    opened.close()


DIST = consumers.MODULES / "onnxruntime-web" / "dist"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def test_by_itself_it_takes_the_runtime_from_the_cdn(address: str, browser: Any) -> None:
    """Nothing answers there but for the module, which is the npm package's and so has the digest that the page knows."""
    opened, asked = browser.new_page(), []

    def serve(route: Any) -> None:
        asked.append(route.request.url)
        if asked[-1].endswith(".mjs"):
            route.fulfill(path=DIST / FILES[0], headers={"Access-Control-Allow-Origin": "*"})
        else:
            route.abort()

    opened.route(re.compile("^https://"), serve)
    opened.goto(f"{address}/web/index.html")
    assert opened.evaluate("window.ready") is False
    version = json.loads((DIST.parent / "package.json").read_text("utf-8"))["version"]
    place = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{version}/dist/"
    assert sorted(asked) == sorted(f"{place}{name}" for name in FILES)
    said = opened.text_content("#verdict")
    assert said.startswith(f"cannot run: {FILES[1]} of ONNX Runtime Web cannot be had from {place}, or is not the file")
    opened.close()


@pytest.mark.parametrize("changed", ["", *FILES])
def test_a_runtime_beside_the_bundle_is_run_unless_it_was_changed(
    quickstart: Built, browser: Any, tmp_path: Path, changed: str
) -> None:
    (tmp_path / "bundle").symlink_to(quickstart.bundle.folder)
    (tmp_path / "dist").mkdir()
    for name in FILES:
        content = bytearray((DIST / name).read_bytes())
        if name == changed:
            content[-1] ^= 1
        (tmp_path / "dist" / name).write_bytes(content)
    with consumers.serving(tmp_path) as address:
        opened = browser.new_page()
        opened.goto(f"{address}/bundle/web/?ort=/dist/")
        assert opened.evaluate("window.ready") is not bool(changed)
        if changed:
            assert opened.text_content("#verdict").startswith(f"cannot run: {changed} of ONNX Runtime Web cannot")
            assert opened.is_disabled("#time") and opened.is_disabled("#file")
        opened.close()


def test_opened_as_a_file_it_says_what_to_do(quickstart: Built, browser: Any) -> None:
    opened = browser.new_page()
    opened.goto((quickstart.bundle.folder / "web" / "index.html").resolve().as_uri())
    assert "python3 -m http.server" in opened.text_content("#verdict")
    opened.close()


def test_the_readme_s_javascript_runs(address: str, browser: Any, quickstart: Built) -> None:
    """As it stands, with the package's name mapped to the files of this machine."""
    code = re.search(r"```js\n(.*?)```", (quickstart.bundle.folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert code
    opened, said = browser.new_page(), []
    opened.on("console", lambda line: said.append(line.text))
    opened.on("pageerror", lambda fault: said.append(f"error: {fault}"))
    imports = '{"imports": {"onnxruntime-web/wasm": "/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs"}}'
    html = f'<script type="importmap">{imports}</script><script type="module">{code[1]}\nconsole.log("done");</script>'
    opened.route("**/snippet.html", lambda route: route.fulfill(body=html, content_type="text/html"))
    opened.goto(f"{address}/snippet.html")
    for _ in range(300):
        if said and (said[-1] == "done" or said[-1].startswith("error")):
            break
        opened.wait_for_timeout(100)
    labels = (quickstart.bundle.folder / "labels.txt").read_text("utf-8").splitlines()
    wanted = np.load(quickstart.bundle.folder / "test_vectors" / "output.npy").argmax(1)
    assert said == [*(labels[best] for best in wanted), "done"]


def test_the_page_may_load_nothing_but_the_runtime(tmp_path: Path) -> None:
    html = web_files()["web/index.html"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert (
        policy
        and "default-src 'none'" in policy[1]
        and "unsafe-inline" not in policy[1]
        and "unsafe-eval'" not in policy[1].replace("wasm-unsafe-eval'", "")
        and "https:" not in policy[1].partition("script-src")[2].partition(";")[0]
    )
    assert set(re.findall(r"https://[\w.]+", html)) == {"https://cdn.jsdelivr.net"}
