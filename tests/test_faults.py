"""What the world does to a run: disks, images, artefacts, clocks, other runs. Each ends with one message and its exit code, and
the run after it with the bytes of an undisturbed one.

Disks are real file systems where this process may mount them (root with CAP_SYS_ADMIN), else those tests are skipped; a limit on
the size of files, which every user may set, stands in for a full disk everywhere.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Built, Project, build, events, start_build, tree, wait_until
from typer.testing import CliRunner, Result

from cswap_deploy.artifacts import sha256_of
from cswap_deploy.cli import app
from cswap_deploy.digests import load_json

SAME = ("plan.json", "weights.safetensors", "labels.txt", "test_vectors/input.npy", "test_vectors/output.npy")
"""What two builds of one recipe have in common, byte for byte; the rest holds a date."""
TOOK = re.compile(r"\n {4,}(-?[0-9.]+) s, ")
"""What a stage that ran says at its end."""


def call(command: str, recipe: Path, work: Path, *arguments: str) -> Result:
    """A command of a recipe inside this process, its progress left out."""
    quiet = () if command == "check" else ("--quiet",)
    return CliRunner().invoke(app, [command, str(recipe), "--work", str(work), *quiet, *arguments])


def require_refused(code: int, stderr: str, expected: int, *said: str) -> None:
    """One error and one hint, which hold these words."""
    assert code == expected, stderr
    lines = [line for line in stderr.splitlines() if line.startswith(("error: ", "  hint: "))]
    assert [line[:6] for line in lines] == ["error:", "  hint"] and "Traceback" not in stderr, stderr
    for words in said:
        assert words in "\n".join(lines), stderr


def require_same(built: Built, wanted: Built, *more: str) -> None:
    for name in (*SAME, *more):
        assert (built.bundle.folder / name).read_bytes() == (wanted.bundle.folder / name).read_bytes(), name


def require_whole(work: Path) -> set[str]:
    """Names of the stages whose results are stored, all files of them as recorded."""
    names = set()
    for record in work.glob("stages/*/*/stage.json"):
        files = (load_json(record, dict) or {})["files"]
        assert {name: sha256_of(record.parent / name) for name in files} == files
        names.add(record.parent.parent.name)
    return names


@pytest.fixture
def own(colours: Built, tmp_path: Path) -> Built:
    """A copy of the built colours project, images and work folder included."""
    folder = shutil.copytree(colours.recipe.parent, tmp_path / "own")
    return Built(folder / "recipe.yaml", (), folder / "work", colours.bundle)


# --- disks


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount file systems: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_wherever_it_fills_up_and_a_run_with_room_goes_on(
    project: Project, colours: Built, cheap_export: None, tmp_path: Path
) -> None:
    """A real file system that grows run by run, so that it fills up in one writer after the other: records, weights, graphs."""
    disk, kilobytes, kept = tmp_path / "disk", 4, set[str]()
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"):
        while (result := call("build", project.recipe, disk / "work")).exit_code:
            require_refused(
                result.exit_code, result.stderr, 2, f"{disk / 'work'}: No space left on device", "make room"
            )
            assert kept <= (kept := require_whole(disk / "work"))
            assert not (disk / "work" / "bundle").exists()
            kilobytes += 12 if kilobytes < 100 else 60
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
        assert {"source", "split", "scores", "pruned"} <= kept
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        require_same(build(project.recipe, (), disk / "work"), colours)


def test_a_limit_on_the_size_of_files_is_named_as_a_full_disk_is(own: Built) -> None:
    """What any user can set and any system has: files of more than 4 KiB cannot be written."""
    shutil.rmtree(own.work / "stages" / "pruned")
    before = tree(own.work / "stages")
    done = subprocess.run(
        [sys.executable, "-m", "cswap_deploy", "build", str(own.recipe), "--work", str(own.work), "--quiet"],
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},  # it writes a file at the end
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    require_refused(done.returncode, done.stderr, 2, f"cannot go on in work folder {own.work}: File too large")
    assert tree(own.work / "stages") == before
    require_same(build(own.recipe, (), own.work), own)


def test_a_read_only_folder_is_refused_and_can_still_be_looked_at(own: Built, tmp_path: Path) -> None:
    before = tree(own.work)
    with mounted(own.work, "--bind", str(own.work)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(own.work)], check=True)
        result = call("build", own.recipe, own.work)
        require_refused(result.exit_code, result.stderr, 2, f"{own.work}: Read-only file system", "--work")
        result = call("deploy", own.work, own.work)
        assert result.exit_code == 2
        result = call("check", own.recipe, own.work)
        assert result.exit_code == 0 and "up to date" in result.stdout, result.output
        for command in ("show", "verify"):
            assert CliRunner().invoke(app, [command, str(own.work / "bundle")]).exit_code == 0
    assert tree(own.work) == before


def test_a_folder_without_permission_is_refused(own: Built) -> None:
    """Permission bits bind everybody but root, who first gives up the capability that makes it so."""
    line = [sys.executable, "-m", "cswap_deploy", "build", str(own.recipe), "--work", str(own.work)]
    if os.geteuid() == 0:
        powerless = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        if shutil.which("setpriv") is None or subprocess.run([*powerless, "true"], check=False).returncode:
            pytest.skip("this process is root and setpriv cannot take its capabilities away")
        line = [*powerless, *line]
    own.work.chmod(0o500)
    (own.work / "lock").chmod(0o400)
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    finally:
        own.work.chmod(0o755)
        (own.work / "lock").chmod(0o644)
    require_refused(done.returncode, done.stderr, 2, f"cannot use work folder {own.work}: Permission denied", "--work")


@pytest.mark.parametrize("command", ["show", "--help"])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_output_that_cannot_be_written_ends_with_2_and_a_message(colours: Built, command: str, as_json: bool) -> None:
    line = [
        sys.executable,
        "-m",
        "cswap_deploy",
        *([command, str(colours.bundle.folder)] if command == "show" else [command]),
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*line, *(["--json"] if as_json and command == "show" else [])], stdout=full,
                              stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    require_refused(done.returncode, done.stderr, 2, "cannot write to standard output: No space left on device")


def test_closed_streams_change_nothing(colours: Built) -> None:
    for redirect, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("2>/dev/full", 0)):
        line = f'"$0" -m cswap_deploy show "$1" {redirect}'
        done = subprocess.run(["sh", "-c", line, sys.executable, str(colours.bundle.folder)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
        assert (done.returncode, done.stderr) == (code, ""), redirect


# --- images


def test_images_that_vanish_while_a_build_runs_are_named_and_nothing_is_lost(project: Project, colours: Built) -> None:
    """The folder of a whole split is gone between two stages, as when a network disk goes."""
    work, images = project.folder / "work", project.folder / "images" / "scoring"
    process = start_build(project.recipe, work)
    wait_until(lambda: any((work / "stages").glob("split/*")), process)
    images.rename(project.folder / "away")
    _, stderr = process.communicate(timeout=120)
    require_refused(process.returncode, stderr, 3, f"cannot read {images}", ".png")
    kept = tree(work / "stages")
    assert {"source", "split"} <= require_whole(work)
    result = call("build", project.recipe, work)
    require_refused(result.exit_code, result.stderr, 3, "scoring")
    (project.folder / "away").rename(images)
    built = build(project.recipe, (), work)
    assert kept.items() <= tree(work / "stages").items()
    require_same(built, colours, "model.onnx")


def ran(found: dict[str, str]) -> set[str]:
    return {stage for stage, event in found.items() if event == "finished"}


@pytest.mark.parametrize(
    ("image", "stages"),
    [
        ("scoring", {"split", "scores", "curves", "plan", "pruned"}),
        ("holdout", {"split", "accuracy", "bundle"}),
    ],
)
def test_a_changed_image_reruns_what_has_seen_it(own: Built, cheap_export: None, image: str, stages: set[str]) -> None:
    """Same name and same time as before; an image of `fit` is found by changing all that could be in it."""
    folder = own.recipe.parent / "images" / image / "red"
    for path in sorted(folder.iterdir()):
        status, content = path.stat(), path.with_name("0.png").read_bytes()
        path.write_bytes(content + path.name.encode())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = ran(events(own.recipe, (), own.work))
    assert stages <= found and {"source", "groups"}.isdisjoint(found)
    assert ("scores" in found) == (image == "scoring")


# --- artefacts


@pytest.mark.parametrize(
    ("artefact", "harm"),
    [
        ("source/*/weights.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
        ("pruned/*/weights.safetensors", lambda path: os.truncate(path, 0)),
        ("simplified/*/model.onnx", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("bundle/*/report.html", lambda path: path.unlink()),
        ("scores/*/stage.json", lambda path: os.truncate(path, path.stat().st_size // 2)),
        ("plan/*/stage.json", lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))),
    ],
)  # fmt: skip
def test_a_truncated_artefact_is_made_again_and_never_used(
    own: Built, cheap_export: None, artefact: str, harm: Callable[[Path], object]
) -> None:
    (path,) = (own.work / "stages").glob(artefact)
    harm(path)
    stage = artefact.partition("/")[0]
    result = call("check", own.recipe, own.work)
    assert result.exit_code == 0 and f"{stage}" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [stage]]
    assert "damaged" in line or "missing" in line
    assert stage in ran(events(own.recipe, (), own.work))
    assert ran(events(own.recipe, (), own.work)) == set()
    require_same(build(own.recipe, (), own.work), own)


# --- clocks


CLOCK = """
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_SHIFT"), O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, text, sizeof text - 1) < 0) abort();
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int fault = syscall(SYS_clock_gettime, clock, now);
    if (!fault && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return fault;
}

time_t time(time_t *kept) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (kept) *kept = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
"""
"""The wall clock, moved by as many seconds as a file says, also when it changes meanwhile. What waits and what measures a
duration goes by other clocks, as on a machine whose clock is set; libfaketime breaks clock_nanosleep there."""
DAY = 86400


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, which makes the library that moves the clock")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", folder / "clock.so", folder / "clock.c"], check=True)
    set_clock(folder / "clock.so", 0)
    return folder / "clock.so"


def set_clock(clock: Path, days: int) -> None:
    clock.with_name("next").write_text(str(days * DAY))
    clock.with_name("next").rename(clock.with_name("shift"))


def start_under(clock: Path, *line: str) -> subprocess.Popen[str]:
    surroundings = {**os.environ, "LD_PRELOAD": str(clock), "CLOCK_SHIFT": str(clock.with_name("shift"))}
    return subprocess.Popen(
        [sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings
    )


def build_under(clock: Path, recipe: Path, work: Path) -> subprocess.Popen[str]:
    return start_under(clock, "-m", "cswap_deploy", "build", str(recipe), "--work", str(work))


def test_the_clock_of_these_tests_moves(clock: Path) -> None:
    set_clock(clock, -3650)
    said, _ = start_under(clock, "-c", "import time; print(time.time())").communicate()
    assert abs(float(said) - time.time() + 3650 * DAY) < 60


def test_a_clock_that_was_set_makes_nothing_stale_and_nothing_fresh(own: Built, clock: Path) -> None:
    """Ten years back nothing is to be done; ten years ahead a changed image is still found."""
    set_clock(clock, -3650)
    process = build_under(clock, own.recipe, own.work)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stderr.count("up to date") == 12 and not TOOK.search(stderr), stderr
    image = own.recipe.parent / "images" / "holdout" / "red" / "0.png"
    shutil.copy(image.with_name("1.png"), image)
    set_clock(clock, 3650)
    process = build_under(clock, own.recipe, own.work)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and re.search(r"accuracy .*changed\n +[0-9.]+ s, ", stderr), stderr


def test_a_clock_that_goes_back_while_a_build_runs_changes_nothing(
    project: Project, colours: Built, clock: Path
) -> None:
    work = project.folder / "work"
    set_clock(clock, 10)
    process = build_under(clock, project.recipe, work)
    for stage, days in (("source", 0), ("scores", -100), ("pruned", -9000)):
        wait_until(lambda: any((work / "stages").glob(f"{stage}/*")), process)  # noqa: B023
        set_clock(clock, days)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert all(seconds >= 0 for seconds in map(float, TOOK.findall(stderr))), "no stage took negative time"
    built = build(project.recipe, (), work)
    assert ran(events(project.recipe, (), work)) == set()
    require_same(built, colours, "model.onnx")


# --- other runs


def test_a_second_run_is_refused_while_the_first_lives_and_a_killed_one_leaves_nobody_behind(
    project: Project, colours: Built
) -> None:
    """onnxsim, in a process of its own, would go on writing into the folder that the next run works in."""
    work = project.folder / "work"
    first = start_build(project.recipe, work)
    try:
        wait_until(lambda: bool(children(first.pid)), first)
        others = children(first.pid)
        for other in others:
            os.kill(int(other), signal.SIGSTOP)  # it is still there, and unfinished, when its parent is killed
        second = start_build(project.recipe, work, "--json")
        _, stderr = second.communicate(timeout=60)
        owner = f"is in use by process {first.pid} on {os.uname().nodename}"
        require_refused(second.returncode, stderr, 2, owner, "wait until that run has ended")
        assert first.poll() is None
        assert children(first.pid) == others != []
    finally:
        first.kill()
        first.communicate()
    deadline = time.monotonic() + 5
    while left := [other for other in others if "onnx" in told(other, "maps")]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)
    require_same(build(project.recipe, (), work), colours, "model.onnx")


def children(pid: int) -> list[str]:
    """Processes that onnxsim runs in, once they have begun to import it: a fork has its parent's maps until it executes."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in found if "onnxsim" in told(child, "cmdline") and "onnx" in told(child, "maps")]


def told(pid: str, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_text()
    except OSError:
        return ""
