"""What all commands share: an answer at the end, or an error with its exit code. The only file that prints."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer

from cswap_deploy.errors import CswapError, UsageError

INTERRUPTED = 130
STOPPED = ("Interrupted", "interrupted", "run the same command again; a build goes on where it stopped", INTERRUPTED)
_interrupted: list[bool] = []
"""Not empty once a signal asked this process to stop."""


class Answer:
    """What a command has to say at its end: lines for people, or the document for --json."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.document: dict[str, Any] = {}
        self.code = 0
        self.fault: CswapError | None = None
        """What is wrong although there is something to say."""


@contextmanager
def session(command: str, as_json: bool) -> Iterator[Answer]:
    """Run a command's body, then print its answer, or its error with the documented exit code."""
    answer = Answer()
    try:
        yield answer
    except CswapError as error:
        _refuse(command, as_json, error)
    except (KeyboardInterrupt, typer.Abort):  # the latter: end of input where a question was asked
        _fail(command, as_json, *STOPPED)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = "check space and permissions of the work folder; what was committed is kept"
        _fail(command, as_json, "OSError", f"{error.strerror or error}{where}", hint, UsageError.exit_code)
    except Exception as error:
        if _interrupted:  # native code turns the interrupt into an error of its own
            _fail(command, as_json, *STOPPED)
        traceback.print_exc(file=sys.stderr)
        _fail(command, as_json, type(error).__name__, f"internal error: {error}", "please report the lines above", 1)
    if not as_json:
        _print(answer.lines)
    elif not answer.fault:
        _print_json(command, answer.document)
    if answer.fault:
        _refuse(command, as_json, answer.fault)
    if answer.code:
        raise typer.Exit(answer.code)


def _refuse(command: str, as_json: bool, error: CswapError) -> NoReturn:
    _fail(command, as_json, type(error).__name__, error.message, error.hint, error.exit_code)


def _fail(command: str, as_json: bool, kind: str, message: str, hint: str, code: int) -> NoReturn:
    if as_json:
        error = {"type": kind, "message": message, "hint": hint, "exit_code": code}
        _print_json(command, {"error": error})
    _print([f"error: {message}", *([f"  hint: {hint}"] if hint else ())], sys.stderr)
    raise typer.Exit(code)


def _print_json(command: str, body: dict[str, Any]) -> None:
    """One line of ASCII: every terminal and every locale can carry it."""
    _print([json.dumps({"schema": f"cswap-deploy/{command}/1", **body})])


def _print(lines: Sequence[str], stream: TextIO | None = None) -> None:
    """A reader that has gone, as in `show | head`, changes nothing about how the command ended."""
    from cswap_deploy.console.text import painted, printable, takes_colour

    stream = stream or sys.stdout
    shown = painted if takes_colour(stream) else str
    try:
        for line in lines:
            print(*(shown(printable(part)) for part in _written(line, stream).split("\n")), sep="\n", file=stream)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _written(line: str, stream: TextIO) -> str:
    """The rule of a table in letters that the stream has."""
    try:
        "─".encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return line.replace("─", "-")
    return line


def interrupt(_signal: int, _frame: object) -> NoReturn:
    """A signal's handler."""
    _interrupted.append(True)
    raise KeyboardInterrupt


def refuse_arguments(error: Any) -> NoReturn:
    """What the parser of the command line refuses; asked for --json, it is answered in JSON as well."""
    if "--json" in sys.argv[1:]:
        command = error.ctx.info_name if error.ctx else "cswap-deploy"
        fault = {"type": "UsageError", "message": error.format_message(), "hint": "", "exit_code": error.exit_code}
        _print_json(command, {"error": fault})
    error.show()
    sys.exit(error.exit_code)
