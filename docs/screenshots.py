"""Screenshots of a bundle's report and page for these pages, as Chromium shows them: `python docs/screenshots.py BUNDLE`."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import consumers

SHOTS = {
    "light": {"viewport": {"width": 1200, "height": 1180}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 1180}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "color_scheme": "light"},
}
BEGINS = {"dark": "#latency"}
"""Where a picture begins, if not at the top."""
COLOURS = 200


def main(bundle: Path) -> None:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, options in SHOTS.items():
            page = browser.new_context(**options, reduced_motion="reduce").new_page()
            page.goto((bundle / "report.html").resolve().as_uri())
            if name in BEGINS:
                page.evaluate("(place) => document.querySelector(place).scrollIntoView()", BEGINS[name])
            _save(page, f"report-{name}.png")
        with consumers.serving(bundle) as address:
            page = browser.new_context(viewport={"width": 720, "height": 830}).new_page()
            page.goto(f"{address}/web/index.html?ort=/node_modules/onnxruntime-web/dist/")
            page.evaluate("window.ready")
            page.click("#time")
            page.locator("#latency", has_text="p50").wait_for(timeout=60_000)
            _save(page, "web-page.png")
        browser.close()


def _save(page: Any, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(Path(__file__).with_name(name), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
