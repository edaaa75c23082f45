"""The questions of `init`: each has a default that can be taken; an answer that cannot be used is asked for again."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import typer

from cswap_deploy import data, starter
from cswap_deploy.console.text import wrapped
from cswap_deploy.errors import CswapError, UsageError
from cswap_deploy.recipe import TARGET, PruneSettings
from cswap_deploy.starter import Wishes
from cswap_deploy.wording import printable

T = TypeVar("T")
NOTHING, NOWHERE = "none", "no"
TARGETS = (
    "What is pruned for, one of:",
    "macs=0.7      keep this fraction of the multiply-accumulates",
    "params=0.7    keep this fraction of the parameters",
    "max_drop=0.5  lose at most so many percentage points of top-1",
    "none          prune nothing, export only",
)
REFUSED = "Error: "
"""What typer puts before the reason for which an answer is not taken."""


def on_a_terminal() -> bool:
    """Somebody can read the questions and answer them."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(wishes: Wishes) -> Wishes:
    """The wishes with what was answered; questions go to standard error, none wider than a screen."""
    wishes = replace(wishes, model=_ask("Model: a timm name, or file.py:function", wishes.model, _model))
    near = starter.find_images(wishes.path)
    images = _ask("Images: a folder with one folder per class", str(near) if near else None, _images)
    wishes = replace(wishes, images=images)
    if why := starter.look(wishes).untrained:
        _say(why)
        weights = _ask(f"Your weights: a .safetensors or .pth file, or {NOTHING}", NOTHING, _file)
        wishes = replace(wishes, checkpoint=weights)
    _say(*TARGETS)
    target = _ask("Prune to", wishes.target, _target)
    where = f"Measure latency on: local (this machine), ssh://user@host, or {NOWHERE}"
    on = _ask(where, "local", partial(_on, target))
    return replace(wishes, target=target, on=on)


def _ask(question: str, default: str | None, read: Callable[[str], T]) -> T:
    def checked(text: str) -> T:
        try:
            return read(text)
        except CswapError as error:
            lines = wrapped(printable(str(error)), first=REFUSED)
            raise typer.BadParameter("\n".join(lines).removeprefix(REFUSED)) from error

    shown = question if default is not None else f"{question} (no default)"
    answer: T = typer.prompt(shown, default=default, value_proc=checked, err=True)
    return answer


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo("\n".join(wrapped(printable(line), first="  ")), err=True)


def _model(text: str) -> str:
    if not starter.is_factory(text):
        starter.outputs_of(text)
    return text


def _images(text: str) -> Path:
    folder = Path(text).expanduser()
    listing = data.survey(folder)
    _say(starter.described(listing))
    return folder


def _file(text: str) -> Path | None:
    if text == NOTHING:
        return None
    if not Path(text).expanduser().is_file():
        raise UsageError(f"{text} is not a file", f"give a file, or {NOTHING}")
    return Path(text).expanduser()


def _target(text: str) -> str:
    key, equals, value = text.partition("=")
    starter.target_block(text)
    try:
        PruneSettings.model_validate({"target": {key: float(value)} if equals else None})
    except ValueError as error:
        choices = "macs or params (above 0, at most 1), max_drop (points) or none"
        raise UsageError(f"{text} is no target", f"give {choices}") from error
    return text


def _on(target: str, text: str) -> str | None:
    if text == NOWHERE and starter.is_speed(target):
        raise UsageError(f"{target} has to be measured", "give local or ssh://[user@]host[:port]")
    if text == NOWHERE:
        return None
    if not re.fullmatch(TARGET, text):
        raise UsageError(f"{text!r} is no target", f"give local, ssh://[user@]host[:port] or {NOWHERE}")
    return text
