"""The questions of `init`: each has a default that can be taken; an answer that cannot be used is asked for again."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import typer

from cswap_deploy import data, starter
from cswap_deploy.errors import CswapError, UsageError
from cswap_deploy.recipe import TARGET, PruneSettings
from cswap_deploy.starter import Wishes
from cswap_deploy.wording import printable

T = TypeVar("T")
NOWHERE = "no"


def on_a_terminal() -> bool:
    """Somebody can read the questions and answer them."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(wishes: Wishes) -> Wishes:
    """The wishes with what was answered; questions go to standard error."""
    wishes = replace(wishes, model=_ask("Model (timm name, or file.py:function)", wishes.model, _model))
    near = starter.find_images(wishes.path)
    images = _ask("Images (one folder per class)", str(near) if near else None, _images)
    wishes = replace(wishes, images=images)
    if why := starter.look(wishes).untrained:
        typer.echo(printable(f"  {why}"), err=True)
        wishes = replace(wishes, checkpoint=_ask("Your weights (.safetensors or .pth; empty: none yet)", "", _file))
    target = _ask("Prune to (macs=, params=, max_drop=; none: export only)", wishes.target, _target)
    on = _ask(f"Measure on (local, ssh://user@host, {NOWHERE})", "local", _on)
    return replace(wishes, target=target, on=on)


def _ask(question: str, default: str | None, read: Callable[[str], T]) -> T:
    def checked(text: str) -> T:
        try:
            return read(text)
        except CswapError as error:
            raise typer.BadParameter(printable(str(error))) from error

    answer: T = typer.prompt(question, default=default, value_proc=checked, err=True)
    return answer


def _model(text: str) -> str:
    if not starter.is_factory(text):
        starter.outputs_of(text)
    return text


def _images(text: str) -> Path:
    folder = Path(text).expanduser()
    listing = data.survey(folder)
    typer.echo(printable(f"  {starter.described(listing)}"), err=True)
    return folder


def _file(text: str) -> Path | None:
    if text and not Path(text).expanduser().is_file():
        raise UsageError(f"{text} is not a file", "give a file, or nothing")
    return Path(text).expanduser() if text else None


def _target(text: str) -> str:
    key, equals, value = text.partition("=")
    starter.target_block(text)
    try:
        PruneSettings.model_validate({"target": {key: float(value)} if equals else None})
    except ValueError as error:
        choices = "macs or params (above 0, at most 1), max_drop (points) or none"
        raise UsageError(f"{text} is no target", f"give {choices}") from error
    return text


def _on(text: str) -> str | None:
    if text == NOWHERE:
        return None
    if not re.fullmatch(TARGET, text):
        raise UsageError(f"{text!r} is no target", f"give local, ssh://[user@]host[:port] or {NOWHERE}")
    return text
