"""Stages and the work folder that keeps their results: keyed by content, committed atomically, one run at a time.

<work>/work.json                    format of this folder
<work>/lock                         held while a run lives
<work>/digests.json                 file digests, remembered by path, size and times
<work>/history.json                 which results the last runs used; others are removed
<work>/holdout_reads                how often something new was compared on the hold-out images
<work>/stages/<stage>/<key>/        stage.json and the files of one result
<work>/tmp/                         unfinished results; emptied at the start of a run
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import IO, Any, Concatenate, Generic, ParamSpec, TypeVar

from pydantic import ValidationError

from cswap_deploy import interrupts, progress
from cswap_deploy.artifacts import File, sha256_of
from cswap_deploy.codec import decode, encode
from cswap_deploy.digests import Digests, digest_of, is_sealed, load_json, sealed, write_atomically
from cswap_deploy.errors import CswapError, WorkdirError
from cswap_deploy.keys import arguments_of, changes, ingredients

P = ParamSpec("P")
T = TypeVar("T")

FORMAT = 2
RUNS_KEPT = 4
"""Results that none of this many last runs used are removed."""
MANIFEST = "manifest.json"
"""Of a published folder: it lists, under `files`, what was published with it."""
EMPTY = sha256(b"").hexdigest()
"""Of a file that there is no use in keeping."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


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


def disk_fault(text: str) -> str | None:
    """What an error's text says of a disk that takes no more; native writers raise it under types of their own."""
    return next((os.strerror(code) for code in DISK if os.strerror(code) in text), None)


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
        self._digests = Digests(self.root / "digests.json")
        self._used: dict[str, None] = {}
        self._earlier: list[list[str]] = []

    @contextmanager
    def open(self) -> Iterator[Workdir]:
        """Create or check the folder, hold its lock, and tidy up after the run. A dry one is only checked."""
        with self._full_disk_named(), self._unshared():
            self._used = {}
            self._earlier = load_json(self.root / "history.json", list[list[str]]) or []
            try:
                yield self
            finally:
                if not self._dry:
                    with suppress(OSError):  # neither is worth hiding why the run ended
                        self._digests.save()
                        self._remember()
            if not self._dry:
                self._sweep()

    def run(self, stage: Stage[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The stage's artefact: the stored one when everything it depends on is unchanged, else a new one."""
        parts = ingredients(stage.function, stage.libraries, args, kwargs, self.digest) | {
            "stage": f"{stage.name} {FORMAT}"
        }
        entry = self.root / "stages" / stage.name / digest_of(parts)[:20]
        reference = f"{stage.name}/{entry.name}"
        reason = self._reason_to_run(stage, parts, entry)
        if reason is None:
            value, size = self._read(stage, entry)
            progress.current().stage_finished(progress.named(stage.name), None, str(entry), size)
        elif self._dry:
            raise WouldRun(stage.name, reason)
        else:
            progress.current().stage_started(progress.named(stage.name), reason)
            if stage.reads_holdout:
                self._count_holdout_read()
            value = self._execute(stage, parts, entry, args, kwargs)
        self._used[reference] = None
        if reason is not None:
            self._remember()
        return value

    def publish(self, files: Sequence[File], root: Path, folder: str) -> Path:
        """Copy files of a result to `<work>/<folder>`, replacing it as a whole; nothing happens when it is already equal.

        What lies there and was not made here is kept, in `<folder>.replaced/<time>`.
        """
        target = self.root / folder
        wanted = {file.path.relative_to(root).as_posix(): file for file in files}
        present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        if present == set(wanted) and all(self.digest(target / name) == file.sha256 for name, file in wanted.items()):
            return target
        if self._dry:
            raise WouldRun(folder, "it differs from its result")
        fresh = self._scratch("publish")
        for name, file in wanted.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, fresh / name)
        self._keep_foreign(target, present, {file.sha256 for file in wanted.values()})
        if target.exists():
            target.replace(self._scratch("replaced") / folder)
        fresh.replace(target)
        return target

    def _keep_foreign(self, target: Path, present: Iterable[str], wanted: set[str]) -> None:
        """Move out of a published folder what somebody has added or changed there: no stage and no earlier bundle has made it."""
        known = wanted | _listed(target / MANIFEST)
        for entry in self.root.glob("stages/*/*"):
            known.update(record.files.values() if (record := _record(entry)) else ())
        foreign = [name for name in sorted(present) if self.digest(target / name) not in known | {EMPTY}]
        if not foreign:
            return
        kept = target.with_name(f"{target.name}.replaced") / time.strftime("%Y%m%d-%H%M%S")
        for name in foreign:
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).replace(kept / name)
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        progress.warn(f"{target.name} is made anew; what was added or changed in it is now in {kept}: {shown}")

    def digest(self, path: Path) -> str:
        """sha256 of a file, or of a folder's tree of files (links followed), remembered between runs."""
        return self._digests.of(path)

    @property
    def holdout_reads(self) -> int:
        """How often something new was compared with the dense network on the hold-out images; that network alone does not count."""
        path = self.root / "holdout_reads"
        text = path.read_bytes() if path.exists() else b"0"
        if not text.strip().isdigit() or len(text) > 20:
            raise WorkdirError(
                f"{path} does not hold a number, so how often something was compared on the hold-out images is lost",
                "write the number that the last bundle's manifest gives as holdout_reads into it",
            )
        return int(text)

    @property
    def dry(self) -> bool:
        return self._dry

    @property
    def used(self) -> tuple[str, ...]:
        """The results that this run has made or found up to date."""
        return tuple(self._used)

    def reuse(self, references: Sequence[str]) -> None:
        """Count results of another run as used, so that they stay. Errors: WorkdirError when one is gone or damaged."""
        for reference in dict.fromkeys(references):
            entry = self.root / "stages" / reference
            if fault := self._damage(entry):
                raise WorkdirError(f"{entry}: {fault}", "copy the whole work folder again, or run prepare again")
            self._used[reference] = None

    # --- reasons

    def _reason_to_run(self, stage: Stage[P, T], parts: dict[str, str], entry: Path) -> str | None:
        if stage.name in self._force and f"{stage.name}/{entry.name}" not in self._used:
            return "forced"
        if not entry.exists():
            return self._difference(stage, parts)
        return self._damage(entry)

    def _difference(self, stage: Stage[P, T], parts: dict[str, str]) -> str:
        """What changed against the stored result of this stage that is most like the wanted one, then most recent.

        Results of this very run are others' (the dense twin has the stages of the pruned network), not earlier ones, and those of
        other arguments are another function's: measurements of several kinds are one stage.
        """
        name = stage.name
        age = {reference: -run for run, used in enumerate(self._earlier) for reference in used}
        others = [e for e in (self.root / "stages" / name).glob("*") if f"{name}/{e.name}" not in self._used]
        entries = sorted(others, key=lambda entry: age.get(f"{name}/{entry.name}", 1))
        stored = [record.ingredients for entry in entries if (record := _record(entry))]
        stored = [found for found in stored if arguments_of(found) <= {*signature(stage.function).parameters}]
        if not stored:
            return "not run yet"
        closest = min((changes(old, parts) for old in stored), key=len)
        more = f" and {len(closest) - 3} more" if len(closest) > 3 else ""
        return ", ".join(closest[:3]) + more

    def _damage(self, entry: Path) -> str | None:
        record = _record(entry)
        if record is None:
            return "stored result is damaged"
        for name, digest in record.files.items():
            if not (entry / name).is_file():
                return f"stored file {name} is missing"
            if self.digest(entry / name) != digest:
                return f"stored file {name} is damaged"
        return None

    # --- reading and committing

    def _read(self, stage: Stage[P, T], entry: Path) -> tuple[T, int]:
        record = _record(entry)
        assert record is not None, "just written or just checked"
        try:
            value = decode(stage.returns, record.value, entry)
        except ValidationError as error:
            raise WorkdirError(
                f"the stored result of stage {stage.name!r} cannot be read", f"run with --force {stage.name}"
            ) from error
        return value, sum((entry / name).stat().st_size for name in record.files)

    def _execute(self, stage: Stage[P, T], parts: dict[str, str], entry: Path, args: Any, kwargs: Any) -> T:
        start = time.monotonic()
        out = self._scratch(stage.name)
        value = stage.function(out, *args, **kwargs)
        interrupts.require_none()  # a library may have swallowed it and returned something else
        seconds = time.monotonic() - start
        data = encode(value, out)
        files = {path.relative_to(out).as_posix(): sha256_of(path) for path in sorted(out.rglob("*")) if path.is_file()}
        record = _Record(parts, files, data, seconds)
        (out / "stage.json").write_text(json.dumps(sealed(asdict(record)), indent=1))
        for path in [*(out / name for name in files), out / "stage.json"]:
            _sync(path)
        if entry.exists():
            entry.replace(self._scratch("old") / entry.name)
        entry.parent.mkdir(parents=True, exist_ok=True)
        out.replace(entry)
        _sync(entry.parent)
        value, size = self._read(stage, entry)
        progress.current().stage_finished(progress.named(stage.name), seconds, str(entry), size)
        return value

    def _scratch(self, name: str) -> Path:
        for number in range(1_000_000):
            path = self.root / "tmp" / f"{name}-{number}"
            if not path.exists():
                path.mkdir(parents=True)
                return path
        raise AssertionError("a million scratch folders")

    # --- the folder

    @contextmanager
    def _unshared(self) -> Iterator[None]:
        """The folder, created or checked, with its lock held; a dry one is only checked."""
        self._check()
        if self._dry:
            yield
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("a+")
        except OSError as error:
            raise WorkdirError(
                f"cannot use work folder {self.root}: {error.strerror}", "choose another with --work"
            ) from error
        with lock:
            self._acquire(lock)
            if not (self.root / "work.json").exists():
                write_atomically(self.root / "work.json", json.dumps({"format": FORMAT}))
            shutil.rmtree(self.root / "tmp", ignore_errors=True)
            (self.root / "tmp").mkdir(exist_ok=True)
            yield

    def _acquire(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise WorkdirError(
                f"work folder {self.root} is in use by process {lock.read().strip() or 'unknown'}",
                "wait until that run has ended, or choose another folder with --work",
            ) from None
        except OSError as error:
            raise WorkdirError(
                f"cannot lock work folder {self.root}: {error.strerror}", "choose one on a local disk with --work"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}\n")
        lock.flush()

    def _check(self) -> None:
        """Refuse a folder of something else or of another version; writes nothing."""
        if self.root.exists() and not self.root.is_dir():
            raise WorkdirError(f"work folder {self.root} is a file", "choose another with --work")
        marker = self.root / "work.json"
        if marker.exists():
            try:
                found = json.loads(marker.read_text())["format"]
            except (ValueError, KeyError, TypeError, RecursionError):
                found = "unreadable"
            if found != FORMAT:
                raise WorkdirError(
                    f"work folder {self.root} has format {found}; this version of cswap-deploy reads format {FORMAT}",
                    "choose another folder with --work, or delete this one",
                )
        elif self.root.exists():
            begun = {"lock", "work.json.new"}
            foreign = sorted(path.name for path in self.root.iterdir() if path.name not in begun)
            if foreign:
                raise WorkdirError(
                    f"{self.root} is not a work folder: it holds {foreign[0]!r} and no work.json",
                    "choose an empty or a new folder with --work",
                )

    @contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        """A full or read-only disk ends the run with a message; as a bare error it would name no place."""
        try:
            yield
        except CswapError:
            raise
        except Exception as error:
            fault = disk_fault(str(error))
            if fault is None:
                raise
            raise WorkdirError(
                f"cannot go on in work folder {self.root}: {fault}",
                "make room, or choose another folder with --work; the stages that have ended are kept",
            ) from error

    def _count_holdout_read(self) -> None:
        write_atomically(self.root / "holdout_reads", str(self.holdout_reads + 1))

    def _runs(self) -> list[list[str]]:
        """What the last runs used, this one included, ended or not; it takes the place of runs that it contains."""
        others = [run for run in self._earlier if not set(run) <= set(self._used)]
        return [*others, *([[*self._used]] if self._used else [])][-RUNS_KEPT:]

    def _remember(self) -> None:
        write_atomically(self.root / "history.json", json.dumps(self._runs()))

    def _sweep(self) -> None:
        """Remove results that none of the last runs used. Called only after a run that succeeded."""
        wanted = {reference for run in self._runs() for reference in run}
        for entry in (self.root / "stages").glob("*/*"):
            if f"{entry.parent.name}/{entry.name}" not in wanted:
                shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(self.root / "tmp", ignore_errors=True)


@dataclass(frozen=True)
class _Record:
    """stage.json: one result of a stage and what it was made from."""

    ingredients: dict[str, str]
    files: dict[str, str]
    """sha256 by path below the result's folder."""
    value: Any
    seconds: float


def _listed(manifest: Path) -> set[str]:
    """Digests of the files of a published folder, as its manifest has them, and its own; none where it is not as it was written."""
    document = load_json(manifest, dict[str, Any])
    if document is None or not is_sealed(document):
        return set()
    return {sha256_of(manifest), *(entry["sha256"] for entry in document["files"])}


def _record(entry: Path) -> _Record | None:
    """The record of a stored result; None when it is absent or not as it was written."""
    path = entry / "stage.json"
    document = load_json(path, dict[str, Any])
    return load_json(path, _Record) if document is not None and is_sealed(document) else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
