"""Work folders: what reruns and why, what survives a kill, what is refused. Real files, real processes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import pytest
from pydantic import BaseModel, ConfigDict

from cswap_deploy import digests, keys
from cswap_deploy import stage as stage_module
from cswap_deploy.artifacts import File, Image, ImageSet, sha256_of
from cswap_deploy.errors import WorkdirError
from cswap_deploy.progress import Recording, reporting
from cswap_deploy.stage import RUNS_KEPT, Stage, Workdir, WouldRun, stage


@dataclass(frozen=True)
class Note:
    text: File
    letters: int


class Nested(BaseModel):
    model_config = ConfigDict(frozen=True)

    level: int = 1


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    word: str = "a"
    repeat: int = 1
    limit: float | None = None
    skip: tuple[str, ...] = ()
    kwargs: dict[str, Any] = {}
    nested: Nested = Nested()
    file: Path | None = None


def _note(out: Path, text: str) -> Note:
    (out / "text").mkdir()
    (out / "text" / "note.txt").write_text(text)
    return Note(File.of(out / "text" / "note.txt"), len(text))


@stage("write", returns=Note, libraries=("pytest",))
def write(out: Path, settings: Settings = Settings()) -> Note:  # noqa: B008 - frozen
    return _note(out, settings.word * settings.repeat + (settings.file.read_text() if settings.file else ""))


@stage("double", returns=Note)
def double(out: Path, note: Note, times: int = 2) -> Note:
    return _note(out, note.text.path.read_text() * times)


@stage("failing", returns=Note)
def failing(out: Path, note: Note) -> Note:
    (out / "half.txt").write_text("half")
    raise ArithmeticError("in the middle")


@stage("judge", returns=Note, reads_holdout=True)
def judge(out: Path, images: ImageSet) -> Note:
    return _note(out, f"{len(images.images)} images")


Line = Callable[[Workdir], object]


@dataclass(frozen=True)
class Run:
    """What one run said: why each stage ran, or "up to date"."""

    events: list[tuple[str, ...]]
    value: Any

    @property
    def reasons(self) -> dict[str, str]:
        said = {event[1]: event[2] for event in self.events if event[0] == "started"}
        return {event[1]: said.get(event[1], "up to date") for event in self.events if event[0] != "started"}


def run(root: Path, line: Line, *, force: tuple[str, ...] = (), dry: bool = False) -> Run:
    recording = Recording()
    with reporting(recording), Workdir(root, force, dry=dry).open() as work:
        value = line(work)
    return Run(recording.events, value)


def reason(root: Path, line: Line) -> str:
    """Why the first stage of a line would run; nothing is changed."""
    with pytest.raises(WouldRun) as caught:
        run(root, line, dry=True)
    return caught.value.reason


def writing(**settings: Any) -> Line:
    return lambda work: work.run(write, Settings(**settings))


def doubled(**settings: Any) -> Line:
    return lambda work: work.run(double, work.run(write, Settings(**settings)))


def taking(value: Any) -> Line:
    """A line of one stage that depends on `value` alone."""
    return lambda work: work.run(_take, value)


@stage("take", returns=Note)
def _take(out: Path, value: Any) -> Note:
    return _note(out, "taken")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(root: Path, name: str = "*") -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in (root / "stages").glob(f"{name}/*")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "work"


# --- what reruns and why ---------------------------------------------------------------------------------------------


def test_second_run_calls_nothing(root: Path) -> None:
    first = run(root, doubled(word="ab"))
    assert first.reasons == {"write": "not run yet", "double": "not run yet"}
    second = run(root, doubled(word="ab"))
    assert second.reasons == {"write": "up to date", "double": "up to date"}
    assert second.value == first.value
    assert first.value.text.path.read_text() == "abab"
    assert first.value.text.path.is_relative_to(root / "stages" / "double")


def test_a_result_that_is_used_again_and_again_counts_once(root: Path) -> None:
    """Else what a sweep reads of its earlier bundles would double with each."""
    with Workdir(root).open() as work:
        work.run(double, work.run(write))
        used = work.used
        for _ in range(3):
            work.reuse(work.used)
        assert work.used == used and len(used) == 2


def test_result_is_the_stored_one_from_the_start(root: Path) -> None:
    """The first run must not see more precise or other values than the second: both are read back."""
    value = run(root, writing()).value
    assert value == run(root, writing()).value
    assert not (root / "tmp").exists()


def test_stage_called_as_a_function_needs_no_work_folder(tmp_path: Path) -> None:
    assert write(tmp_path, Settings(word="xyz")).letters == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"word": "b"}, 'settings.word: "a" -> "b"'),
        ({"repeat": 3}, "settings.repeat: 1 -> 3"),
        ({"limit": 0.5}, "settings.limit: null -> 0.5"),
        ({"skip": ("head", "x.*")}, 'settings.skip: [] -> ["head","x.*"]'),
        ({"skip": tuple("abcdefghijklmnopqrstuvwxyz")}, "settings.skip changed"),
        ({"nested": Nested(level=2)}, "settings.nested.level: 1 -> 2"),
        ({"kwargs": {"width": 2}}, "settings.kwargs.width is new"),
        ({"word": "b", "repeat": 2}, 'settings.word: "a" -> "b", settings.repeat: 1 -> 2'),
        (
            {"word": "b", "repeat": 2, "limit": 1.0, "nested": Nested(level=0)},
            'settings.word: "a" -> "b", settings.repeat: 1 -> 2, settings.limit: null -> 1.0 and 1 more',
        ),
    ],
)
def test_changed_setting_is_named_old_and_new(root: Path, settings: dict[str, Any], said: str) -> None:
    run(root, writing())
    assert reason(root, writing(**settings)) == said
    assert run(root, writing(**settings)).reasons == {"write": said}


def test_changed_key_of_a_dict_is_named(root: Path) -> None:
    run(root, writing(kwargs={"width": 8, "act": "relu"}))
    assert reason(root, writing(kwargs={"act": "gelu", "width": 8})) == 'settings.kwargs.act: "relu" -> "gelu"'
    assert reason(root, writing(kwargs={"act": "relu"})) == "settings.kwargs.width is gone"
    assert reason(root, writing(kwargs={"width": 8, "act": {"relu": 1}})) == (
        'settings.kwargs.act: "relu" -> {"relu":1}'
    )
    assert run(root, writing(kwargs={"act": "relu", "width": 8})).reasons == {"write": "up to date"}


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", None, "null", "", [], [1], {"a": 1}, {"a": {}}, ["1"]])
def test_no_two_of_these_are_taken_for_each_other(root: Path, value: object) -> None:
    others: list[object] = [1, 1.0, True, "1", "true", None, "null", "", [], [1], {"a": 1}, {"a": {}}, ["1"]]
    others = [other for other in others if repr(other) != repr(value)]
    run(root, taking(value))
    for other in others:
        assert reason(root, taking(other)) != ""
    assert run(root, taking(value)).reasons == {"take": "up to date"}


def test_reason_compares_with_the_closest_result_then_the_latest(root: Path) -> None:
    run(root, writing(word="near", repeat=1))
    run(root, writing(word="far", repeat=7, limit=1.0))
    assert reason(root, writing(word="near", repeat=2)) == "settings.repeat: 1 -> 2"
    for repeat in (5, 6, 5):
        run(root, writing(word="near", repeat=repeat))
    assert reason(root, writing(word="near", repeat=8)) == "settings.repeat: 5 -> 8"


def test_input_file_counts_by_content_alone(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "input.txt"
    file.write_text("one")
    run(root, writing(file=file))
    os.utime(file, (1, 1))
    assert run(root, writing(file=file)).reasons == {"write": "up to date"}
    moved = file.rename(tmp_path / "renamed.txt")
    assert run(root, writing(file=moved)).reasons == {"write": "up to date"}
    moved.write_text("two")
    assert run(root, writing(file=moved)).reasons == {"write": "settings.file changed"}


def test_missing_input_file_is_the_stages_to_refuse(root: Path, tmp_path: Path) -> None:
    @stage("careful", returns=Note)
    def careful(out: Path, file: Path) -> Note:
        raise LookupError(f"there is no {file.name}")

    with pytest.raises(LookupError, match="there is no nowhere"):
        run(root, lambda work: work.run(careful, tmp_path / "nowhere"))
    assert entries(root) == set()


def test_a_result_of_other_arguments_is_no_earlier_one(root: Path) -> None:
    """Measurements of several kinds are one stage, whose results have nothing to do with each other."""

    @stage("write", returns=Note)
    def other(out: Path, words: str, count: int) -> Note:
        return _note(out, words * count)

    run(root, writing())
    assert reason(root, lambda work: work.run(other, "a", 2)) == "not run yet"
    run(root, lambda work: work.run(other, "a", 2))
    assert reason(root, lambda work: work.run(other, "a", 3)) == "count: 2 -> 3"
    assert reason(root, writing(word="b")) == 'settings.word: "a" -> "b"'


def test_changed_artefact_is_named_and_equal_ones_stop_the_rerun(root: Path) -> None:
    run(root, doubled(word="aa"))
    assert run(root, doubled(word="ab")).reasons["double"] == "note.text changed"
    same = run(root, doubled(word="a", repeat=2))
    assert same.reasons["double"] == "up to date", "the same text by another way"


def test_place_of_images_and_of_the_work_folder_do_not_count(root: Path, tmp_path: Path) -> None:
    def judging(folder: str, sha256: str = "ab") -> Line:
        return lambda work: work.run(judge, ImageSet((Image("cat/1.png", sha256, 0),), tmp_path / folder))

    run(root, judging("here"))
    moved = root.rename(tmp_path / "moved")
    again = run(moved, judging("there"))
    assert again.reasons == {"judge": "up to date"}
    assert again.value.text.path.is_relative_to(moved)
    assert reason(moved, judging("here", sha256="cd")) == "images.images changed"


def test_library_version_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version("pytest")
    run(root, doubled())
    monkeypatch.setattr(metadata, "version", lambda name: "99.0")
    after = run(root, doubled())
    assert after.reasons == {"write": f"version of pytest: {version} -> 99.0", "double": "up to date"}


def test_absent_library_has_a_version_of_its_own(root: Path) -> None:
    lacking: Stage[[], Note] = Stage("lacking", Note, lambda out: _note(out, ""), ("no-such-library",), False)
    run(root, lambda work: work.run(lacking))
    (record,) = root.glob("stages/lacking/*/stage.json")
    assert json.loads(record.read_text())["ingredients"]["version of no-such-library"] == "absent"


def test_source_file_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"model.py": "11", "data.py": "22"}
    monkeypatch.setattr(keys, "source_digests", lambda module: sources)
    run(root, writing())
    sources["data.py"] = "33"
    assert reason(root, writing()) == "source data.py changed"
    del sources["data.py"]
    assert reason(root, writing()) == "source data.py is gone"


def test_force_reruns_the_stage_and_only_what_its_result_changes(root: Path) -> None:
    run(root, doubled())
    assert run(root, doubled(), force=("write",)).reasons == {"write": "forced", "double": "up to date"}
    twice: Line = lambda work: (doubled()(work), doubled()(work))  # noqa: E731
    forced = run(root, twice, force=("write",))
    assert [event[:2] for event in forced.events if event[1] == "write"] == [
        ("started", "write"),
        ("finished", "write"),
        ("up to date", "write"),
    ], "once a run is enough"


# --- files remembered by size and times ------------------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are really hashed from now on."""
    hashed: list[str] = []

    def spying(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(digests, "sha256_of", spying)
    return hashed


def test_known_file_is_not_hashed_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "input.txt"
    file.write_text("one")
    monkeypatch.setattr(digests, "RACY_NS", -1)
    run(root, writing(file=file))
    hashed = spy(monkeypatch)
    run(root, writing(file=file))
    assert "input.txt" not in hashed
    file.write_text("another")
    run(root, writing(file=file))
    assert "input.txt" in hashed


def test_file_changed_within_a_tick_of_its_times_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size and same times as before: only the refusal to remember young files can tell."""
    file = tmp_path / "input.txt"
    file.write_text("one")
    status = file.stat()
    monkeypatch.setattr(Path, "stat", lambda path, **_: status)
    work = Workdir(tmp_path)
    before = work.digest(file)
    file.write_text("two")
    assert work.digest(file) != before


def test_file_replaced_under_an_old_mtime_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As unpacking an archive does, which gives every file the same time."""
    file = tmp_path / "input.txt"
    monkeypatch.setattr(digests, "RACY_NS", -1)
    work = Workdir(tmp_path)
    seen = []
    for text in ("one", "two"):
        file.write_text(text)
        os.utime(file, (1, 1))
        seen.append(work.digest(file))
        time.sleep(0.02)
    assert len(set(seen)) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2]}', "\udcff", '{"/x": [1, 2, "3"]}'])
@pytest.mark.parametrize("name", ["digests.json", "history.json"])
def test_memory_that_is_not_as_written_is_done_without(root: Path, name: str, text: str) -> None:
    run(root, doubled())
    (root / name).write_bytes(text.encode(errors="surrogateescape"))
    assert set(run(root, doubled()).reasons.values()) == {"up to date"}


def test_tree_digest_does_not_depend_on_order_links_or_hidden_files(tmp_path: Path) -> None:
    names = ["b/2.png", "a/1.png", "a/3.png", "c.png", "a.b/4.png"]
    for folder, order in ("x", names), ("y", names[::-1]):
        for name in order:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(name)
    (tmp_path / "z").mkdir()
    for child in (tmp_path / "x").iterdir():
        (tmp_path / "z" / child.name).symlink_to(child)
    (tmp_path / "y" / ".hidden").write_text("not seen")
    (tmp_path / "y" / "loop").symlink_to(tmp_path / "y")
    work = Workdir(tmp_path / "work")
    assert work.digest(tmp_path / "x") == work.digest(tmp_path / "y") == work.digest(tmp_path / "z")


def test_tree_digest_sees_content_names_and_folders_linked_twice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.png").write_text("1")
    folder = tmp_path / "x"
    folder.mkdir()
    work = Workdir(tmp_path / "work")
    seen = [work.digest(folder)]
    for name in ("a", "b"):
        (folder / name).symlink_to(tmp_path / "real")
        seen.append(work.digest(folder))
    (tmp_path / "real" / "1.png").write_text("2")
    seen.append(work.digest(folder))
    (tmp_path / "real" / "1.png").rename(tmp_path / "real" / os.fsdecode(b"\xff.png"))
    seen.append(work.digest(folder))
    assert len(set(seen)) == 5


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_value(path: Path) -> None:
    stored = json.loads(path.read_text())
    stored["value"]["letters"] += 1
    path.write_text(json.dumps(stored))


def set_key(key: str, value: object) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return harm


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("text/note.txt", flip, "stored file text/note.txt is damaged"),
        ("text/note.txt", lambda path: os.truncate(path, 1), "stored file text/note.txt is damaged"),
        ("text/note.txt", lambda path: path.unlink(), "stored file text/note.txt is missing"),
        ("stage.json", lambda path: os.truncate(path, path.stat().st_size // 2), "stored result is damaged"),
        ("stage.json", lambda path: path.unlink(), "stored result is damaged"),
        ("stage.json", lambda path: path.write_text("[]"), "stored result is damaged"),
        ("stage.json", lambda path: path.write_bytes(b"\xff\x00"), "stored result is damaged"),
        ("stage.json", change_value, "stored result is damaged"),
        ("stage.json", set_key("value", float("nan")), "stored result is damaged"),
        ("stage.json", set_key("files", None), "stored result is damaged"),
        ("stage.json", set_key("ingredients", [1]), "stored result is damaged"),
    ],
)
def test_damaged_result_is_made_again(root: Path, file: str, harm: Callable[[Path], object], said: str) -> None:
    first = run(root, doubled(word="abcd")).value
    (folder,) = root.glob("stages/double/*")
    harm(folder / file)
    assert reason(root, doubled(word="abcd")) == said
    after = run(root, doubled(word="abcd"))
    assert after.reasons == {"write": "up to date", "double": said}
    assert after.value == first
    assert after.value.text.path.read_text() == "abcdabcd"
    assert set(run(root, doubled(word="abcd")).reasons.values()) == {"up to date"}


def test_damaged_neighbour_does_not_spoil_the_reason(root: Path) -> None:
    run(root, writing())
    (folder,) = root.glob("stages/write/*")
    (folder / "stage.json").write_text("null")
    assert reason(root, writing(word="b")) == "not run yet"


def test_result_of_another_shape_is_refused(root: Path) -> None:
    @dataclass(frozen=True)
    class Wide(Note):
        width: int

    run(root, writing())
    other: Stage[[Settings], Wide] = Stage("write", Wide, write.function, write.libraries, False)  # type: ignore[arg-type]
    with pytest.raises(WorkdirError, match="stored result of stage 'write' cannot be read") as caught:
        run(root, lambda work: work.run(other, Settings()))
    assert caught.value.hint == "run with --force write"


# --- dry, failing and swept ------------------------------------------------------------------------------------------


def test_dry_run_creates_and_changes_nothing(root: Path) -> None:
    assert reason(root, writing()) == "not run yet"
    assert not root.exists()
    run(root, doubled())
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert set(run(root, doubled(), dry=True).reasons.values()) == {"up to date"}
    assert reason(root, writing(word="b")) == 'settings.word: "a" -> "b"'
    with pytest.raises(WouldRun, match="write: forced"):
        run(root, doubled(), force=("write",), dry=True)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_failing_stage_leaves_nothing_behind_and_keeps_what_was_done(root: Path) -> None:
    line: Line = lambda work: work.run(failing, work.run(write, Settings()))  # noqa: E731
    with pytest.raises(ArithmeticError, match="in the middle"):
        run(root, line)
    assert {name.split("/")[0] for name in entries(root)} == {"write"}
    assert run(root, doubled()).reasons == {"write": "up to date", "double": "not run yet"}
    assert not (root / "tmp").exists()


def test_results_of_the_last_runs_are_kept(root: Path) -> None:
    for repeat in range(1, RUNS_KEPT + 2):
        run(root, writing(repeat=repeat))
    assert len(entries(root)) == RUNS_KEPT
    assert run(root, writing(repeat=2)).reasons == {"write": "up to date"}
    assert reason(root, writing(repeat=1)) == "settings.repeat: 2 -> 1"


def test_repeating_a_run_pushes_no_other_out(root: Path) -> None:
    run(root, writing(repeat=9))
    for _ in range(RUNS_KEPT + 1):
        run(root, writing())
        run(root, doubled())
    assert run(root, writing(repeat=9)).reasons == {"write": "up to date"}


def test_results_of_a_failed_run_survive_the_next_good_one(root: Path) -> None:
    with pytest.raises(ArithmeticError):
        run(root, lambda work: work.run(failing, work.run(write, Settings(repeat=9))))
    run(root, writing())
    assert run(root, writing(repeat=9)).reasons == {"write": "up to date"}


def test_failed_run_sweeps_nothing(root: Path) -> None:
    for repeat in range(1, RUNS_KEPT + 1):
        run(root, writing(repeat=repeat))
    kept = entries(root)
    with pytest.raises(ArithmeticError):
        run(root, lambda work: work.run(failing, work.run(write, Settings(repeat=99))))
    assert kept < entries(root)


def test_holdout_reads_count_real_executions(root: Path) -> None:
    def judging(count: int) -> Line:
        images = tuple(Image(f"{number}.png", "ab", 0) for number in range(count))
        return lambda work: (work.run(judge, ImageSet(images, root)), work.holdout_reads)

    assert Workdir(root).holdout_reads == 0
    assert run(root, judging(1)).value[1] == 1
    assert run(root, judging(1)).value[1] == 1
    assert run(root, judging(2)).value[1] == 2
    assert run(root, judging(2), force=("judge",)).value[1] == 3
    with pytest.raises(WouldRun):
        run(root, judging(3), dry=True)
    run(root, writing())
    assert Workdir(root).holdout_reads == 3


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5"])
def test_lost_count_of_holdout_reads_is_refused(root: Path, text: str) -> None:
    run(root, writing())
    (root / "holdout_reads").write_text(text)
    with pytest.raises(WorkdirError, match="holdout_reads does not hold a number"):
        run(root, lambda work: work.run(judge, ImageSet((), root)))
    assert entries(root, "judge") == set()


# --- publishing ------------------------------------------------------------------------------------------------------


def publishing(work: Workdir) -> Path:
    note = work.run(write, Settings(word="shipped"))
    return work.publish([note.text], note.text.path.parent.parent, "bundle")


@pytest.mark.parametrize(
    "harm",
    [
        lambda bundle: flip(bundle / "text/note.txt"),
        lambda bundle: (bundle / "text/note.txt").unlink(),
        lambda bundle: (bundle / "extra.txt").write_text("x"),
        lambda bundle: shutil.rmtree(bundle),
        lambda bundle: bundle.rename(bundle.with_name("away")).with_name("bundle").write_text("a file"),
    ],
    ids=["tampered", "missing", "extra", "gone", "file"],
)
def test_published_folder_is_repaired_as_a_whole(root: Path, harm: Callable[[Path], object]) -> None:
    bundle = run(root, publishing).value
    assert tree(bundle) == {"text/note.txt": b"shipped"}
    harm(bundle)
    with pytest.raises(WouldRun, match="bundle: it differs from its result"):
        run(root, publishing, dry=True)
    assert tree(run(root, publishing).value) == {"text/note.txt": b"shipped"}


def test_what_somebody_added_to_a_published_folder_is_kept_elsewhere(root: Path) -> None:
    bundle = run(root, publishing).value
    (bundle / "notes").mkdir()
    (bundle / "notes" / "field.txt").write_text("seen on the road")
    (bundle / "text" / "note.txt").write_text("shipped, and corrected by hand")
    (bundle / "empty").touch()
    done = run(root, publishing)
    assert tree(done.value) == {"text/note.txt": b"shipped"}
    [kept] = (root / "bundle.replaced").iterdir()
    assert tree(kept) == {"notes/field.txt": b"seen on the road", "text/note.txt": b"shipped, and corrected by hand"}
    [warning] = [event[1] for event in done.events if event[0] == "warn"]
    assert str(kept) in warning and "notes/field.txt, text/note.txt" in warning


def test_what_an_earlier_result_was_is_not_kept(root: Path) -> None:
    """Neither what stages have made, nor what an earlier bundle lists, though its stages are gone."""
    bundle = run(root, publishing).value
    (bundle / "old.txt").write_text("of another setting")
    entry = {"path": "old.txt", "sha256": sha256_of(bundle / "old.txt"), "bytes": 18}
    (bundle / "manifest.json").write_text(json.dumps(digests.sealed({"files": [entry]})))
    made = next((root / "stages" / "write").glob("*/*/note.txt"))
    shutil.copyfile(made, bundle / "copy.txt")
    done = run(root, publishing)
    assert tree(done.value) == {"text/note.txt": b"shipped"}
    assert not (root / "bundle.replaced").exists() and not [event for event in done.events if event[0] == "warn"]


def test_equal_published_folder_is_left_alone(root: Path) -> None:
    bundle = run(root, publishing).value
    before = bundle.stat().st_ino, (bundle / "text/note.txt").stat().st_mtime_ns
    assert run(root, publishing).value == bundle
    assert run(root, publishing, dry=True).value == bundle
    assert before == (bundle.stat().st_ino, (bundle / "text/note.txt").stat().st_mtime_ns)


# --- folders that are refused ----------------------------------------------------------------------------------------


def test_foreign_folder_is_refused_and_left_as_it_was(root: Path) -> None:
    root.mkdir()
    (root / "thesis.tex").write_text("years of work")
    for dry in (False, True):
        with pytest.raises(WorkdirError, match=r"is not a work folder: it holds 'thesis\.tex' and no work\.json"):
            run(root, writing(), dry=dry)
    assert tree(root) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"format": 99}', "99"),
        ('{"format": "1"}', "1"),
        ("", "unreadable"),
        ("[1]", "unreadable"),
        ("{}", "unreadable"),
    ],
)
def test_other_format_is_refused(root: Path, text: str, found: str) -> None:
    run(root, writing())
    (root / "work.json").write_text(text)
    for dry in (False, True):
        with pytest.raises(WorkdirError, match=f"has format {found}; this version of cswap-deploy reads format 2"):
            run(root, writing(), dry=dry)
    assert len(entries(root)) == 1


def test_work_folder_that_is_a_file_is_refused(root: Path) -> None:
    root.write_text("")
    for dry in (False, True):
        with pytest.raises(WorkdirError, match=f"work folder {root} is a file"):
            run(root, writing(), dry=dry)
    with pytest.raises(WorkdirError, match=f"cannot use work folder {root / 'below'}: Not a directory") as caught:
        run(root / "below", writing())
    assert caught.value.exit_code == 2


def test_read_only_folder_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def open_read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        if mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_read_only)
    with pytest.raises(WorkdirError, match=f"cannot use work folder {root}: Permission denied"):
        run(root, writing())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_full_disk_is_named_and_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    run(root, doubled())
    before = tree(root / "stages")
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "_sync", raising(OSError(code, os.strerror(code))))
        with pytest.raises(WorkdirError, match=f"cannot go on in work folder {root}: {os.strerror(code)}") as caught:
            run(root, doubled(word="b"))
    assert "make room" in caught.value.hint
    assert tree(root / "stages") == before
    assert set(run(root, doubled()).reasons.values()) == {"up to date"}
    assert run(root, doubled(word="b")).value.letters == 2


def test_other_system_errors_of_a_stage_pass_unchanged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "_sync", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        run(root, writing())
    assert entries(root) == set()


def test_full_disk_at_the_very_end_does_not_hide_the_fault(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArithmeticError), Workdir(root).open() as work:
        note = work.run(write, Settings())
        monkeypatch.setattr(stage_module, "write_atomically", raising(OSError(errno.ENOSPC, "No space left")))
        work.run(failing, note)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


# --- other processes -------------------------------------------------------------------------------------------------

PROGRAM = """
    import hashlib, signal, sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from cswap_deploy.artifacts import File
    from cswap_deploy.stage import Workdir, stage

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit that it is ignored

    @dataclass(frozen=True)
    class Chunks:
        files: tuple[File, ...]

    @stage("chunks", returns=Chunks)
    def chunks(out: Path, before: Chunks | None, number: int) -> Chunks:
        seed = b"".join(file.path.read_bytes() for file in before.files) if before else b""
        for part in range(6):
            text = hashlib.sha256(seed + bytes([number, part])).hexdigest() * 40
            with (out / f"{part}.txt").open("w") as stream:
                for piece in range(4):
                    stream.write(text[piece::4])
                    stream.flush()
                    time.sleep(0.001)
        return Chunks(tuple(File.of(out / f"{part}.txt") for part in range(6)))

    @stage("wait", returns=Chunks)
    def wait(out: Path, before: Chunks | None) -> Chunks:
        (out / "half.txt").write_text("half")
        print("waiting", flush=True)
        time.sleep(60)
        raise AssertionError

    with Workdir(Path(sys.argv[1])).open() as work:
        print("open", flush=True)
        result = None
        for number in range(int(sys.argv[2])):
            result = work.run(chunks, result, number)
        if sys.argv[3:]:
            work.run(wait, result)
        print(result.files[-1].sha256)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run of `count` stages in a process of its own, and returns when its work folder is open."""
    program = tmp_path / "chain.py"
    program.write_text(textwrap.dedent(PROGRAM))
    started: list[subprocess.Popen[str]] = []

    def start(root: Path, count: int, *wait: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(program), str(root), str(count), *wait]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def results(root: Path) -> Mapping[str, bytes]:
    """All stored files, but the times that the records carry."""
    stored = tree(root / "stages")
    for name in [name for name in stored if name.endswith("stage.json")]:
        record = json.loads(stored[name])
        stored[name] = json.dumps({**record, "seconds": 0, "sha256": ""}).encode()
    return stored


def test_killed_at_any_moment_the_next_run_ends_as_an_undisturbed_one(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    stages = 6
    calm = start(tmp_path / "calm", stages)
    began = time.monotonic()
    expected, errors = calm.communicate()
    duration = time.monotonic() - began
    assert errors == ""
    moments = random.Random(0)
    root = tmp_path / "disturbed"
    killed = 0
    for _ in range(8):
        process = start(root, stages)
        time.sleep(moments.uniform(0, duration))
        process.kill()
        if process.wait() == 0:
            shutil.rmtree(root)
        else:
            killed += 1
        for entry in root.glob("stages/*/*"):
            files = json.loads((entry / "stage.json").read_text())["files"]
            assert {name: sha256_of(entry / name) for name in files} == files
            assert set(tree(entry)) == {*files, "stage.json"}
    assert killed > 0
    for _ in range(2):
        said, errors = start(root, stages).communicate()
        assert (said, errors) == (expected, "")
    assert results(root) == results(tmp_path / "calm")
    assert not (root / "tmp").exists()


def test_second_process_is_refused_until_the_first_is_gone(
    root: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    first = start(root, 1, "wait")
    with pytest.raises(WorkdirError, match=f"is in use by process {first.pid}") as caught:
        run(root, writing())
    assert caught.value.exit_code == 2
    assert "--work" in caught.value.hint
    first.kill()
    first.wait()
    assert run(root, writing()).reasons == {"write": "not run yet"}


def test_interrupted_stage_can_be_resumed(root: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(root, 2, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in errors
    done = entries(root)
    assert {name.split("/")[0] for name in done} == {"chunks"}
    run(root, writing())
    assert done < entries(root), "a run of something else keeps what the interrupted one had done"
    before = results(root)
    start(root, 2).communicate()
    assert results(root) == before


def test_killed_runs_results_survive_a_run_of_something_else(
    root: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(root, 2, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.kill()
    process.wait()
    run(root, writing())
    assert len(entries(root, "chunks")) == 2


def test_same_process_cannot_open_a_folder_twice(root: Path) -> None:
    for _ in range(2):
        with Workdir(root).open(), pytest.raises(WorkdirError, match=f"in use by process {os.getpid()}"):
            run(root, writing())


@pytest.mark.parametrize(("old", "new", "told"), [
    ("0.6318516412346381", "0.5265430343621984", "ratio: 0.631852 -> 0.526543"),
    ("0.63185164123463", "0.63185164123464", "ratio: 0.63185164123463 -> 0.63185164123464"),
    ("1.10.0", "1.11.0", "ratio: 1.10.0 -> 1.11.0"),
    ("3", "4", "ratio: 3 -> 4"),
])  # fmt: skip
def test_what_changed_is_told_with_six_digits(old: str, new: str, told: str) -> None:
    assert keys.changes({"ratio": old}, {"ratio": new}) == [told]
