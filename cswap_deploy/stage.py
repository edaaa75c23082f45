"""Stages and the work folder that keeps their results: keyed by content, committed atomically, one run at a time.

    <work>/work.json                    format of this folder
    <work>/lock                         held while a run lives
    <work>/digests.json                 file digests, remembered by path, size and mtime
    <work>/history.json                 which results the last runs used; others are removed
    <work>/stages/<stage>/<key>/        stage.json and the files of one result
    <work>/tmp/                         unfinished results; emptied at the start of a run
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from pydantic import BaseModel, ValidationError

from cswap_deploy import progress
from cswap_deploy.artifacts import File, canonical, decode, encode, sha256_of
from cswap_deploy.errors import WorkdirError
from cswap_deploy.sources import source_digests

P = ParamSpec("P")
T = TypeVar("T")

FORMAT = 1
RUNS_KEPT = 4
"""Results that none of this many last runs used are removed."""
RACY_NS = 2_000_000_000
"""A file younger than this may change again within one tick of its mtime; its digest is not remembered."""


@dataclass(frozen=True)
class Stage(Generic[P, T]):
    """A function `(out, inputs...) -> artefact` that writes only under `out` and depends on its arguments alone."""

    name: str
    returns: type[T]
    function: Callable[Concatenate[Path, P], T]
    libraries: tuple[str, ...]
    """Distributions whose version changes the result."""
    reads_holdout: bool

    def __call__(self, out: Path, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.function(out, *args, **kwargs)


def stage(
    name: str, *, returns: type[T], libraries: tuple[str, ...] = (), reads_holdout: bool = False
) -> Callable[[Callable[Concatenate[Path, P], T]], Stage[P, T]]:
    """Make a function a stage; its result becomes an artefact of the work folder."""

    def wrap(function: Callable[Concatenate[Path, P], T]) -> Stage[P, T]:
        return Stage(name, returns, function, libraries, reads_holdout)

    return wrap


class WouldRun(Exception):
    """Raised in place of running when a work folder is only asked what is up to date."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Workdir:
    """Results of stages on disk. `force`: stages that rerun whatever is stored. `dry`: never run, raise `WouldRun`."""

    def __init__(self, root: Path, force: Sequence[str] = (), *, dry: bool = False) -> None:
        self.root = root.absolute()
        self._force = frozenset(force)
        self._dry = dry
        self._digests = _Digests(self.root / "digests.json")
        self._used: list[str] = []

    @contextmanager
    def open(self) -> Iterator[Workdir]:
        """Create or check the folder, hold its lock, and tidy up after the run."""
        if self._dry:
            if self.root.exists():
                self._check_format()
            yield self
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("a+")
        except OSError as error:
            raise WorkdirError(f"cannot use work folder {self.root}: {error.strerror}", "choose another with --work") from error
        with lock:
            self._acquire(lock)
            self._check_format()
            shutil.rmtree(self.root / "tmp", ignore_errors=True)
            (self.root / "tmp").mkdir()
            try:
                yield self
            finally:
                self._digests.save()
            self._sweep()

    def run(self, stage: Stage[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The stage's artefact: the stored one when everything it depends on is unchanged, else a new one."""
        parts = self._ingredients(stage, args, kwargs)
        entry = self.root / "stages" / stage.name / _digest(parts)[:20]
        reference = f"{stage.name}/{entry.name}"
        reason = self._reason_to_run(stage, parts, entry)
        if reason is None:
            value, size = self._read(stage, entry)
            progress.current().stage_finished(stage.name, None, str(entry), size)
        elif self._dry:
            raise WouldRun(stage.name, reason)
        else:
            progress.current().stage_started(stage.name, reason)
            if stage.reads_holdout:
                self._count_holdout_read()
            value = self._execute(stage, parts, entry, args, kwargs)
        self._used.append(reference)
        return value

    def publish(self, files: Sequence[File], root: Path, folder: str) -> Path:
        """Copy files of a result to `<work>/<folder>`, replacing it as a whole; nothing happens when it is already equal."""
        target = self.root / folder
        wanted = {file.path.relative_to(root).as_posix(): file for file in files}
        present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        if present == set(wanted) and all(self.digest(target / name) == file.sha256 for name, file in wanted.items()):
            return target
        fresh = self._scratch("publish")
        for name, file in wanted.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, fresh / name)
        if target.exists():
            target.replace(self._scratch("replaced") / folder)
        fresh.replace(target)
        return target

    def digest(self, path: Path) -> str:
        """sha256 of a file, or of a folder's tree of files (links followed), remembered between runs."""
        return self._digests.of(path)

    @property
    def holdout_reads(self) -> int:
        """How often stages of this work folder have read the hold-out images."""
        path = self.root / "holdout_reads"
        return int(path.read_text()) if path.exists() else 0

    # --- keys and reasons

    def _ingredients(self, stage: Stage[P, T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
        bound = inspect.signature(stage.function).bind(None, *args, **kwargs)
        bound.apply_defaults()
        given = list(bound.arguments.items())[1:]
        parts = {"stage": f"{stage.name} {FORMAT}"}
        for name, value in given:
            parts |= self._flat(name, value)
        parts |= {f"version of {library}": _version(library) for library in stage.libraries}
        parts |= {f"source {file}": f"sha256:{digest}" for file, digest in source_digests(stage.function.__module__).items()}
        return parts

    def _flat(self, name: str, value: object) -> dict[str, str]:
        """Settings key by key, so that a reason can name the one that changed; artefacts and files by content."""
        match value:
            case BaseModel():
                nested = [(key, getattr(value, key)) for key in type(value).model_fields]
                flat = {f"{name}.kind": type(value).__name__}
                for key, item in nested:
                    flat |= self._flat(f"{name}.{key}", item)
                return flat
            case Path():
                return {name: f"sha256:{self.digest(value)}"}
            case None | bool() | int() | float() | str():
                return {name: json.dumps(value)}
            case _:
                return {name: f"sha256:{_digest(self._plain(value))}"}

    def _plain(self, value: object) -> Any:
        """JSON data of an artefact for its digest: files by content, machine paths left out."""
        if isinstance(value, File):
            return value.sha256
        if is_dataclass(value) and not isinstance(value, type):
            counted = [field for field in fields(value) if field.metadata.get("key", True)]
            return {field.name: self._plain(getattr(value, field.name)) for field in counted}
        if isinstance(value, Mapping):
            return {str(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        if isinstance(value, Path):
            return self.digest(value)
        return value

    def _reason_to_run(self, stage: Stage[P, T], parts: dict[str, str], entry: Path) -> str | None:
        if stage.name in self._force and f"{stage.name}/{entry.name}" not in self._used:
            return "forced"
        if not entry.exists():
            return self._difference(stage.name, parts)
        return self._damage(entry)

    def _difference(self, name: str, parts: dict[str, str]) -> str:
        """What changed against the stored result of this stage that is most like the wanted one."""
        closest: list[str] | None = None
        for path in sorted((self.root / "stages" / name).glob("*/stage.json")):
            try:
                old = json.loads(path.read_text())["ingredients"]
            except (OSError, ValueError, KeyError):
                continue
            changes = [_change(key, old.get(key), parts.get(key)) for key in {**old, **parts} if old.get(key) != parts.get(key)]
            if closest is None or len(changes) < len(closest):
                closest = changes
        if closest is None:
            return "not run yet"
        more = f" and {len(closest) - 3} more" if len(closest) > 3 else ""
        return ", ".join(closest[:3]) + more

    def _damage(self, entry: Path) -> str | None:
        try:
            stored = json.loads((entry / "stage.json").read_text())
            files: dict[str, str] = stored["files"]
            for name, digest in files.items():
                if not (entry / name).is_file():
                    return f"stored file {name} is missing"
                if self.digest(entry / name) != digest:
                    return f"stored file {name} is damaged"
            if _digest(stored["value"]) != stored["value_sha256"]:
                return "stored result is damaged"
        except (OSError, ValueError, KeyError, TypeError):
            return "stored result is damaged"
        return None

    # --- reading and committing

    def _read(self, stage: Stage[P, T], entry: Path) -> tuple[T, int]:
        stored = json.loads((entry / "stage.json").read_text())
        try:
            value = decode(stage.returns, stored["value"], entry)
        except ValidationError as error:
            raise WorkdirError(
                f"the stored result of stage {stage.name!r} cannot be read", f"run with --force {stage.name}"
            ) from error
        return value, sum((entry / name).stat().st_size for name in stored["files"])

    def _execute(self, stage: Stage[P, T], parts: dict[str, str], entry: Path, args: Any, kwargs: Any) -> T:
        start = time.monotonic()
        out = self._scratch(stage.name)
        value = stage.function(out, *args, **kwargs)
        seconds = time.monotonic() - start
        data = encode(value, out)
        files = {path.relative_to(out).as_posix(): sha256_of(path) for path in sorted(out.rglob("*")) if path.is_file()}
        record = {"ingredients": parts, "files": files, "value": data, "value_sha256": _digest(data), "seconds": seconds}
        (out / "stage.json").write_text(json.dumps(record, indent=1))
        for path in [*(out / name for name in files), out / "stage.json"]:
            _sync(path)
        if entry.exists():
            entry.replace(self._scratch("old") / entry.name)
        entry.parent.mkdir(parents=True, exist_ok=True)
        out.replace(entry)
        _sync(entry.parent)
        value, size = self._read(stage, entry)
        progress.current().stage_finished(stage.name, seconds, str(entry), size)
        return value

    def _scratch(self, name: str) -> Path:
        for number in range(1_000_000):
            path = self.root / "tmp" / f"{name}-{number}"
            if not path.exists():
                path.mkdir(parents=True)
                return path
        raise AssertionError("a million scratch folders")

    # --- the folder

    def _acquire(self, lock: Any) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise WorkdirError(
                f"work folder {self.root} is in use by process {lock.read().strip() or 'unknown'}",
                "wait until that run has ended, or choose another folder with --work",
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

    def _check_format(self) -> None:
        marker = self.root / "work.json"
        if marker.exists():
            try:
                found = json.loads(marker.read_text())["format"]
            except (ValueError, KeyError, TypeError):
                found = "unreadable"
            if found != FORMAT:
                raise WorkdirError(
                    f"work folder {self.root} has format {found}; this version of cswap-deploy reads format {FORMAT}",
                    "choose another folder with --work, or delete this one",
                )
        elif not self._dry:
            foreign = [path.name for path in self.root.iterdir() if path.name != "lock"]
            if foreign:
                raise WorkdirError(
                    f"{self.root} is not a work folder: it holds {foreign[0]!r} and no work.json",
                    "choose an empty or a new folder with --work",
                )
            marker.write_text(json.dumps({"format": FORMAT}))

    def _count_holdout_read(self) -> None:
        _write_atomically(self.root / "holdout_reads", str(self.holdout_reads + 1))

    def _sweep(self) -> None:
        """Remove results that none of the last runs used. Called only after a run that succeeded."""
        path = self.root / "history.json"
        try:
            history: list[list[str]] = json.loads(path.read_text())
        except (OSError, ValueError):
            history = []
        history = [*[run for run in history if run != self._used], self._used][-RUNS_KEPT:]
        _write_atomically(path, json.dumps(history))
        wanted = {reference for run in history for reference in run}
        for entry in (self.root / "stages").glob("*/*"):
            if f"{entry.parent.name}/{entry.name}" not in wanted:
                shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(self.root / "tmp", ignore_errors=True)


class _Digests:
    """sha256 of files by path, size and mtime."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        if path.is_dir():
            tree = sorted(child for child in _walk(path) if child.is_file())
            return _digest([[child.relative_to(path).as_posix(), self.of(child)] for child in tree])
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns]
        known = self._known.get(str(path))
        if known and known[:2] == mark:
            return str(known[2])
        digest = sha256_of(path)
        if abs(time.time_ns() - status.st_mtime_ns) > RACY_NS:
            self._known[str(path)] = [*mark, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        if self._changed:
            known = {path: mark for path, mark in self._known.items() if Path(path).exists()}
            _write_atomically(self._path, json.dumps(known))


def _walk(folder: Path) -> Iterator[Path]:
    """All paths below a folder, links followed, each real folder once; hidden ones left out."""
    seen: set[Path] = set()
    for base, names, files in os.walk(folder, followlinks=True):
        real = Path(base).resolve()
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(base) / name for name in files if not name.startswith("."))


def _change(key: str, old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{key} is {'new' if old is None else 'gone'}"
    if old.startswith("sha256:") or new.startswith("sha256:"):
        return f"{key} changed"
    return f"{key}: {old} -> {new}"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "absent"


def _digest(data: Any) -> str:
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
