"""A board that was asked without a network: what `errand.py` has written down there, answered again here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cswap_deploy.artifacts import File, sha256_of
from cswap_deploy.device.errand import ANSWERS, ERRAND
from cswap_deploy.device.target import AGENT, SCHEMA, UNKEYED, Target, refusal
from cswap_deploy.errors import DeviceError

FOLDER = "device"
"""Of the work folder: what goes to the board and comes back."""
ERRAND_SCHEMA = "cswap-deploy/errand/1"
PROGRAM = AGENT.with_name("errand.py")
AGAIN = "run prepare again, copy the work folder to the board, and there: python3 device/agent.py"
UNANSWERED = "the board was not asked this"


@dataclass(frozen=True)
class Recorded(Target):
    """`answers`: by request, the agent's document and its log; `files`: where engines and outcomes lie, by digest."""

    answers: Mapping[str, tuple[dict[str, Any], str]] = field(metadata=UNKEYED)
    files: Path = field(metadata=UNKEYED)

    def ask_with_log(self, verb: str, seconds: float, **request: Any) -> tuple[dict[str, Any], str]:
        """Errors: DeviceError, the one that came there, or when the board was asked something else."""
        found = self.answers.get(key_of({"verb": verb, **request}))
        if found is None:
            raise DeviceError(f"{self.name}: {verb}: {UNANSWERED}", AGAIN, public=UNANSWERED)
        document, log = found
        if error := document.get("error"):
            raise refusal(self.name, error, log)
        return document, log

    def put(self, *files: File, names: tuple[str, ...] = ()) -> list[dict[str, str]]:
        shown = names or tuple(file.path.name for file in files)
        return [{"sha256": file.sha256, "name": name} for file, name in zip(files, shown, strict=True)]

    def get(self, file: dict[str, Any], path: Path) -> File:
        source = self.files / Path(file["sha256"]).name
        if not source.is_file() or sha256_of(source) != file["sha256"]:
            text = f"{source} is missing or changed"
            raise DeviceError(
                text, f"copy {FOLDER}/ from the board again", public="a file of the board is missing or changed"
            )
        shutil.copyfile(source, path)
        return File.of(path)


def lay(root: Path, steps: Iterable[Mapping[str, Any]]) -> Path:
    """Write `<root>/device/`: the agent, the program that runs it, and the requests. Answers to other requests are removed."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    listed = list(steps)
    errand = {"schema": ERRAND_SCHEMA, "id": _identity(listed), "steps": listed}
    for program in (AGENT, PROGRAM):
        shutil.copyfile(program, folder / program.name)
    (folder / ERRAND).write_text(json.dumps(errand, indent=1), encoding="utf-8")
    if (folder / ANSWERS).exists() and _read(folder / ANSWERS).get("errand") != errand["id"]:
        (folder / ANSWERS).unlink()
    return folder


def has_answers(root: Path) -> bool:
    return (root / FOLDER / ANSWERS).is_file()


def recorded(root: Path, name: str) -> Recorded:
    """The board as its answers have it. Errors: DeviceError where they are damaged, or are those of another errand."""
    document, errand = (_read(root / FOLDER / file) for file in (ANSWERS, ERRAND))
    if not document.get("errand") == errand.get("id") == _identity(errand.get("steps")):
        text = "answers another errand, or one of another version of cswap-deploy"
        raise DeviceError(f"{root / FOLDER / ANSWERS} {text}", AGAIN, public=UNANSWERED)
    try:
        found = {key_of(entry["request"]): (dict(entry["answer"]), str(entry["log"])) for entry in document["answers"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(root / FOLDER / ANSWERS, error) from error
    return Recorded(f"{name}, asked without a network", (), found, root / FOLDER / "files")


def _identity(steps: Any) -> str:
    parts = (AGENT.read_bytes(), PROGRAM.read_bytes(), json.dumps(steps).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DeviceError:
    text = f"{path} cannot be read: {type(error).__name__}: {error}"
    return DeviceError(text, f"copy {FOLDER}/ from the board again", public="the board's answers cannot be read")


def key_of(request: Mapping[str, Any]) -> str:
    """Files count by content, wherever they lie and whatever they are called."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return value.get("sha256") or {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps({"schema": SCHEMA, **plain(request)}, sort_keys=True)
