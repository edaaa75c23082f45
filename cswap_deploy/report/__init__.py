"""The manifest for people and for other programs: one self-contained HTML page, Markdown, JUnit XML, the bundle's README."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from cswap_deploy.errors import UsageError, VerifyError
from cswap_deploy.manifest import VERDICTS
from cswap_deploy.report import card, figures, words
from cswap_deploy.report.junit import render_junit
from cswap_deploy.report.snippets import Snippet

__all__ = [
    "FORMATS", "render", "render_card", "render_html", "render_junit", "render_markdown", "render_readme", "render_sweep",
    "web_files",
]  # fmt: skip

FILTERS = (
    "answered",
    "percent",
    "share",
    "count",
    "size",
    "points",
    "code",
    "cell",
    "ms",
    "fact",
    "effects",
    "times",
    "plural",
    "unbroken",
)


def render(manifest: dict[str, Any], form: str) -> str:
    """The manifest of a bundle, which is not trusted, in one of FORMATS; HTML in ASCII, for any locale.

    Errors: UsageError for another format, VerifyError where figures are missing or cannot be.
    """
    if form not in FORMATS:
        raise UsageError(f"--format: {form!r} is not a format", f"choose one of {', '.join(FORMATS)}")
    try:
        text = FORMATS[form](manifest)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise VerifyError(f"the manifest cannot be shown as {form}: {error}", "build the bundle again") from error
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii") if form == "html" else text


def render_html(manifest: dict[str, Any]) -> str:
    """A page that opens offline and may load nothing: its policy allows its own style and script alone, by digest.

    Every name in it is escaped.
    """
    from cswap_deploy.prune.verdicts import NEUTRAL_MARGIN

    page = _environment().get_template("report.html")
    return page.render(m=manifest, verdicts=VERDICTS, margin=NEUTRAL_MARGIN, figures=figures, words=words, **_assets())


def render_sweep(front: dict[str, Any]) -> str:
    """A page of the same kind about several bundles: accuracy over latency."""
    return _environment().get_template("sweep.html").render(s=front, figures=figures, **_assets())


def render_markdown(manifest: dict[str, Any]) -> str:
    """The same facts for a pull request."""
    return _environment().get_template("report.md").render(m=manifest, verdicts=VERDICTS, words=words)


def render_readme(manifest: dict[str, Any]) -> str:
    """How to run the model, in ten lines of code for each of four languages."""
    page = _environment().get_template("bundle_readme.md")
    return page.render(m=manifest, snippet=Snippet.of(manifest))


def render_card(manifest: dict[str, Any]) -> str:
    """A model card with the front matter and the headings of Hugging Face."""
    page = _environment().get_template("model_card.md")
    return page.render(m=manifest, words=words, card=card.of(manifest))


def web_files() -> dict[str, str]:
    """The page that runs the model in a browser, by the bundle's names; it is the same in every bundle."""
    style = _asset("page.css")
    page = _environment().get_template("page.html").render(style=style, digest=Markup(_digest(style)))
    return {"web/index.html": page, "web/page.js": _asset("page.js"), "web/preprocess.js": _asset("preprocess.js")}


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "markdown": render_markdown,
    "junit": render_junit,
    "html": render_html,
}


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cswap_deploy.report", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(words, name) for name in FILTERS}
    return environment


def _assets() -> dict[str, Any]:
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return {"style": style, "script": script, "policy": policy}


@cache
def _asset(name: str) -> Markup:
    """Style or script of the page, which are no templates."""
    environment = _environment()
    assert environment.loader
    return Markup(environment.loader.get_source(environment, name)[0])


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
