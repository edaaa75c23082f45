"""The manifest for people and for other programs: one self-contained HTML page, Markdown, JUnit XML, the bundle's README."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from cswap_deploy.errors import UsageError
from cswap_deploy.manifest import VERDICTS
from cswap_deploy.report import figures, words
from cswap_deploy.report.junit import render_junit

__all__ = ["FORMATS", "render", "render_html", "render_junit", "render_markdown", "render_readme"]

FILTERS = ("percent", "share", "count", "size", "points", "code", "cell", "ms", "fact", "effects", "times", "plural")


FORMATS = ("markdown", "junit", "html")


def render(manifest: dict[str, Any], form: str) -> str:
    """The manifest in one of FORMATS, HTML in ASCII as the others nearly are. Errors: UsageError for another one."""
    match form:
        case "markdown":
            return render_markdown(manifest)
        case "junit":
            return render_junit(manifest)
        case "html":
            return render_html(manifest).encode("ascii", "xmlcharrefreplace").decode("ascii")
        case _:
            raise UsageError(f"--format: {form!r} is not a format", f"choose one of {', '.join(FORMATS)}")


def render_html(manifest: dict[str, Any]) -> str:
    """A page that opens offline and may load nothing: its policy allows its own style and script alone, by digest.

    Every name in it is escaped.
    """
    from cswap_deploy.prune.verdicts import NEUTRAL_MARGIN

    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _environment().get_template("report.html")
    return page.render(
        m=manifest, verdicts=VERDICTS, margin=NEUTRAL_MARGIN, figures=figures, words=words,
        style=style, script=script, policy=policy,
    )  # fmt: skip


def render_markdown(manifest: dict[str, Any]) -> str:
    """The same facts for a pull request."""
    return _environment().get_template("report.md").render(m=manifest, verdicts=VERDICTS, words=words)


def render_readme(manifest: dict[str, Any]) -> str:
    """How to run the model in ten lines of code."""
    return _environment().get_template("bundle_readme.md").render(m=manifest)


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


@cache
def _asset(name: str) -> Markup:
    """Style or script of the page, which are no templates."""
    environment = _environment()
    assert environment.loader
    return Markup(environment.loader.get_source(environment, name)[0])


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
