"""How this program was started, so that the commands it advises can be pasted where it was."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from cswap_deploy.console.text import from_here

NAME = "cswap-deploy"


def program() -> list[str]:
    """Its first words: the console script, or `python -m cswap_deploy`; the plain name where another program has called it."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("cswap_deploy", "__main__.py"):
        return [python(), "-m", "cswap_deploy"]
    return [_typed(called)] if called.name == NAME else [NAME]


def python() -> str:
    """The interpreter that runs this program."""
    return _typed(Path(sys.executable))


def _typed(path: Path) -> str:
    """By name where the shell finds it under that name, else by its path."""
    found = shutil.which(path.name)
    return path.name if found and Path(found) == path.absolute() else str(from_here(path))
