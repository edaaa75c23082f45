"""What all commands share: an answer at the end, or an error with its exit code. The only file that prints."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import typer

from cswap_deploy import interrupts
from cswap_deploy.errors import CswapError, UsageError
from cswap_deploy.terminal import painted, takes_colour
from cswap_deploy.wording import printable

STOPPED = ("Interrupted", "interrupted", "run the same command again; a build goes on where it stopped")
UNHEARD = "run the command again, its output to where there is room; what was built is kept"
_telling, _told, _answering = threading.Lock(), threading.Event(), threading.Event()
"""Held while an error is printed; set once one was; set before the first byte of an answer in JSON."""


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
    _answering.clear()
    try:
        yield answer
        if not as_json:
            _print(answer.lines)
        elif not answer.fault:
            _answering.set()
            _print_json(command, answer.document)
        if answer.fault:
            raise answer.fault
    except CswapError as error:
        _fail(command, as_json, type(error).__name__, error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # the latter: end of input where a question was asked
        _fail(command, as_json, *STOPPED, interrupts.EXIT_CODE)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = "check space and permissions of the work folder; what was committed is kept"
        _fail(command, as_json, "OSError", f"{error.strerror or error}{where}", hint, UsageError.exit_code)
    except Exception as error:
        if not interrupts.asked():
            traceback.print_exc(file=sys.stderr)
        _fail(command, as_json, type(error).__name__, f"internal error: {error}", "please report the lines above", 1)
    if answer.code:
        raise typer.Exit(answer.code)


def say_interrupted() -> None:
    """Unless an error, this or another, was told before. The command ends here, and may be where its streams were turned elsewhere."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    with _telling:
        if not _told.is_set():
            command = next((word for word in sys.argv[1:] if not word.startswith("-")), "cswap-deploy")
            _tell(command, "--json" in sys.argv[1:], *STOPPED, interrupts.EXIT_CODE)


def refuse_output(error: OSError) -> NoReturn:
    """Standard output takes nothing, and Python would try again at exit."""
    _print([f"error: cannot write to standard output: {error.strerror}", f"  hint: {UNHEARD}"], sys.stderr)
    os._exit(UsageError.exit_code)


def _fail(command: str, as_json: bool, kind: str, message: str, hint: str, code: int) -> NoReturn:
    """Print an error and end; after an interrupt that is the reason, since native code makes errors of its own of it."""
    if interrupts.asked():
        kind, message, hint, code = *STOPPED, interrupts.EXIT_CODE
    with _telling:
        _tell(command, as_json, kind, message, hint, code)
    raise typer.Exit(code)


def _tell(command: str, as_json: bool, kind: str, message: str, hint: str, code: int) -> None:
    _told.set()
    if as_json and not _answering.is_set():  # one document, or the beginning of one
        error = {"type": kind, "message": message, "hint": hint, "exit_code": code}
        with suppress(UsageError):  # the error itself is the news
            _print_json(command, {"error": error})
    _print([f"error: {message}", *([f"  hint: {hint}"] if hint else ())], sys.stderr)


def _print_json(command: str, body: dict[str, Any]) -> None:
    """One line of ASCII: every terminal and every locale can carry it."""
    _print([json.dumps({"schema": f"cswap-deploy/{command}/1", **body})])


def _print(lines: Sequence[str], stream: TextIO | None = None) -> None:
    """A reader that has gone, as in `show | head`, changes nothing about how the command ended; a full disk does.

    Errors: UsageError where standard output cannot be written.
    """
    stream = stream or sys.stdout
    if stream is None:  # closed by the caller
        return
    shown = painted if takes_colour(stream) else str
    try:
        for line in lines:
            print(*(shown(printable(part)) for part in _written(line, stream).split("\n")), sep="\n", file=stream)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise UsageError(f"cannot write to standard output: {error.strerror}", UNHEARD) from error


def _written(line: str, stream: TextIO) -> str:
    """The rule of a table in letters that the stream has."""
    try:
        "─".encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return line.replace("─", "-")
    return line


def refuse_arguments(error: Any) -> NoReturn:
    """What the parser of the command line refuses; asked for --json, it is answered in JSON as well."""
    if "--json" in sys.argv[1:]:
        command = error.ctx.info_name if error.ctx else "cswap-deploy"
        fault = {"type": "UsageError", "message": error.format_message(), "hint": "", "exit_code": error.exit_code}
        _print_json(command, {"error": fault})
    error.show()
    sys.exit(error.exit_code)
