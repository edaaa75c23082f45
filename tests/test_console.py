"""What people read: plain lines in a pipe, a live line on a terminal that is taken away again, 80 columns."""

from __future__ import annotations

import errno
import html
import io
import os
import pty
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from cswap_deploy import console, doctor, report, terminal, wording
from cswap_deploy.artifacts import Group, Groups, Refusal
from cswap_deploy.bundle import Bundle
from cswap_deploy.console import WIDTH, Console, answers, live, program
from cswap_deploy.console import text as words
from cswap_deploy.device.target import SCHEMA

STAGES = ("source", "plan", "bundle")


def on_a_terminal(speak: Callable[[Console], None]) -> str:
    """All that a console sends to a terminal, escape codes and all."""
    reader, writer = pty.openpty()
    received: list[bytes] = []

    def listen() -> None:
        try:
            while block := os.read(reader, 1024):
                received.append(block)
        except OSError as error:
            assert error.errno == errno.EIO  # how Linux says that the other side has closed

    listener = threading.Thread(target=listen)
    listener.start()
    with os.fdopen(writer, "w") as stream:
        speak(Console(STAGES, stream=stream))
    listener.join()
    os.close(reader)
    return b"".join(received).decode()


def screen(sent: str) -> list[str]:
    """What a terminal shows in the end: it obeys carriage returns and `erase line`."""
    lines = []
    for line in sent.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            erased = part.removeprefix("\x1b[2K")
            shown = erased if erased != part else part + shown[len(part) :]
        lines.append(shown)
    return lines


def in_a_pipe(speak: Callable[[Console], None], *, silent: bool = False) -> str:
    stream = io.StringIO()
    speak(Console(STAGES, stream=stream, silent=silent))
    return stream.getvalue()


def a_run(talk: Console) -> None:
    talk.stage_started("source", "not run yet")
    talk.advance("images", 1, 3)
    talk._shown_at = 0.0  # as if a second had passed
    talk.advance("images", 2, 3)
    talk.warn("2 exact copies")
    talk.advance("images", 3, 3)
    talk.stage_finished("source", 1.25, "runs/x/stages/source/1", 2048)
    talk.stage_started("plan", "seed: 0 -> 1")
    talk.note("59.8 % of the MACs")
    talk.stage_finished("plan", 0.5, "runs/x/stages/plan/1", 0)
    talk.stage_finished("bundle", None, "runs/x/stages/bundle/1", 2048)
    talk.close()


LINES = [
    "[ 1/3] source     not run yet",
    "warning: 2 exact copies",
    "        1.2 s, 2.0 KiB, runs/x/stages/source/1",
    "[ 2/3] plan       seed: 0 -> 1",
    "        59.8 % of the MACs",
    "        0.5 s, 0 B, runs/x/stages/plan/1",
    "[ 3/3] bundle     up to date",
    "",
]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever terminal the tests run in: one that can, whose user wants no colour."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(live, "monotonic", lambda: self.now)


def test_a_pipe_gets_plain_lines():
    text = in_a_pipe(a_run)
    assert text.split("\n") == LINES
    assert "\x1b" not in text and "\r" not in text


def test_a_terminal_shows_progress_and_is_left_with_the_same_lines():
    sent = on_a_terminal(a_run)
    for progress in ("source     images 1/3", "images 2/3", "images 3/3"):
        assert progress in sent
    assert screen(sent) == LINES


def test_a_dumb_terminal_gets_the_lines_of_a_pipe(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert on_a_terminal(a_run).replace("\r\n", "\n") == in_a_pipe(a_run)


def test_the_live_line_tells_for_how_long_still(monkeypatch):
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("plan", "not run yet")
        clock.now += 30
        talk.note("found 9 groups")  # what came before does not count for what is counted now
        for _ in range(3):
            clock.now += 10
            talk.advance("curves", 1 + _, 9)
        clock.now += 1
        talk.advance("curves", 1, 4)  # begins anew
        talk.close()

    sent = on_a_terminal(speak)
    assert "plan       curves 1/9, 40 s so far" in sent, "the first is no evidence: it may have read a model"
    assert "plan       curves 2/9 (about 1 min 10 s left), 50 s so far" in sent
    assert "plan       curves 3/9 (about 1 min 0 s left), 1 min 0 s so far" in sent
    assert "plan       round 2, curves 1/4, 1 min 1 s so far" in sent


def test_a_pipe_is_told_now_and_then_what_a_long_stage_is_at(monkeypatch):
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("curves", "not run yet")
        for number in range(1, 10):
            clock.now += 10
            talk.advance("curves", number, 9)
        talk.stage_finished("curves", 90.0, "runs/x", 10)
        talk.stage_started("plan", "not run yet")
        clock.now += 29
        talk.advance("steps", 1, 2)

    assert [line.strip() for line in in_a_pipe(speak).splitlines() if "so far" in line] == [
        "curves 3/9 (about 1 min 0 s left), 30 s so far",
        "curves 6/9 (about 30 s left), 1 min 0 s so far",
        "curves 9/9, 1 min 30 s so far",
    ]


def seconds_left(sent: str) -> list[int]:
    """What the live line announced, in order."""
    found = re.findall(r"\(about (?:(\d+) min )?([\d.]+) s left\)", sent)
    return [60 * int(minutes or 0) + int(float(seconds)) for minutes, seconds in found]


def test_the_time_left_falls_while_the_pace_stays_about_the_same(monkeypatch):
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("plan", "not run yet")
        for number in range(1, 41):
            clock.now += 8 if number % 2 else 12  # uneven, as images are
            talk.advance("images", number, 40)
        talk.close()

    told = seconds_left(on_a_terminal(speak))
    assert len(told) > 30 and told == sorted(told, reverse=True)


def test_the_time_left_follows_a_pace_that_changes(monkeypatch):
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("plan", "not run yet")
        for number in range(1, 21):
            clock.now += 2 if number < 10 else 20
            talk.advance("images", number, 20)
        talk.close()

    told = seconds_left(on_a_terminal(speak))
    assert told[7] == 22 and told[8] > 30, "at first 2 s each, then far more: what was announced is taken back"
    assert told[-1] >= 8


def test_of_nested_counts_the_time_left_is_that_of_the_whole(monkeypatch):
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("plan", "not run yet")
        for step in range(1, 4):
            for curve in range(1, 6):
                clock.now += 10
                talk.advance("curves", curve, 5)
            talk.advance("steps", step, 8)
        clock.now += 10
        talk.advance("curves", 1, 5)
        talk.close()

    sent = on_a_terminal(speak)
    assert "plan       round 2, curves 5/5, 1 min 40 s so far" in sent
    assert "plan       steps 3/8 (about 4 min 0 s left), curves 1/5\r" in sent, "what does not fit is left out, not cut"


def test_time_between_stages_belongs_to_none(monkeypatch):
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("source", "not run yet")
        clock.now += 500
        talk.stage_finished("source", 500.0, "runs/x", 10)
        for number in range(1, 4):
            clock.now += 1
            talk.advance("images hashed", 64 * number, 256)
        talk.close()

    sent = on_a_terminal(speak)
    assert "images hashed 192/256 (about 1.0 s left), 3.0 s so far" in sent


def test_another_build_begins_with_the_first_number():
    stream = io.StringIO()
    console = Console(STAGES, stream=stream)
    for name in (*STAGES, "plan", *STAGES):
        console.stage_finished(name, None, "", 0)
    console.close()
    assert re.findall(r"\[ *(\d)/3\]", stream.getvalue()) == [*"1233123"]


def test_numbers_only_grow_and_parts_are_named():
    stages = ("source", "exported", "exported (dense)", "bundle")

    def speak(talk: Console) -> None:
        for name in ("source", "exported", "exported", "exported (dense)", "unforeseen", "bundle"):
            talk.stage_finished(name, None, "", 0)

    stream = io.StringIO()
    speak(Console(stages, stream=stream))
    assert stream.getvalue().splitlines() == [
        "[ 1/4] source           up to date",
        "[ 2/4] exported         up to date",
        "[ 2/4] exported         up to date",
        "[ 3/4] exported (dense) up to date",
        "[ 3/4] unforeseen       up to date",
        "[ 4/4] bundle           up to date",
    ]


def test_the_clock_moves_while_a_stage_says_nothing(monkeypatch):
    monkeypatch.setattr(live, "TICK_S", 0.01)
    clock = Clock(monkeypatch)

    def speak(talk: Console) -> None:
        talk.stage_started("source", "not run yet")
        clock.now += 12
        time.sleep(0.2)
        talk.stage_finished("source", 12.0, "runs/x", 10)
        clock.now += 100
        time.sleep(0.1)
        talk.close()

    sent = on_a_terminal(speak)
    assert "source     12 s so far" in sent and "112 s" not in sent and "1 min" not in sent
    assert screen(sent) == ["[ 1/3] source     not run yet", f"{'':8}12 s, 10 B, runs/x", ""]
    assert [thread for thread in threading.enumerate() if thread.name == live.CLOCK] == []


@pytest.mark.parametrize(
    ("no_color", "term", "coloured"), [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]
)
def test_colour_is_for_terminals_whose_user_wants_it(monkeypatch, no_color, term, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    sent = on_a_terminal(lambda talk: talk.warn("error: of somebody"))
    assert sent == ("\x1b[1;33mwarning\x1b[0m" if coloured else "warning") + ": error: of somebody\r\n"


def test_a_colour_says_nothing_that_the_word_does_not():
    for line in ("PASS: x", "FAIL: x", "NO GATE: x", "UNSTABLE: x", "BUSY: x", "passed   sha256", "missing  x"):
        assert re.sub(r"\x1b\[[0-9;]*m", "", terminal.painted(line)) == line != terminal.painted(line)
    for line in ("PASSED", "the verdict is PASS: x", "okay", "source       not run yet"):
        assert terminal.painted(line) == line


def test_long_lines_are_folded_on_a_terminal_and_whole_in_a_pipe(monkeypatch):
    reason = ", ".join(f"settings.key{number}: 0 -> 1" for number in range(6))

    def speak(talk: Console) -> None:
        talk.stage_started("plan", reason)
        talk.stage_finished("plan", 75.0, "runs/" + "n" * 60, 1 << 20)
        talk.close()

    shown = screen(on_a_terminal(speak))
    assert max(map(len, shown)) <= WIDTH and all(line.startswith(" " * 18) for line in shown[1:3])
    assert shown[-3:] == [f"{'':8}1 min 15 s, 1.0 MiB", f"{'':8}runs/{'n' * 60}", ""]
    assert in_a_pipe(speak).split("\n")[:2] == [
        f"[ 2/3] plan       {reason}",
        f"{'':8}1 min 15 s, 1.0 MiB, runs/{'n' * 60}",
    ]
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, screen(on_a_terminal(speak))[:-3])) <= 50


def test_letters_of_two_columns_count_twice():
    lines = words.wrapped("名前 " * 40, rest="  ")
    assert max(map(cell_len, lines)) <= WIDTH and "".join("".join(lines).split()) == "名前" * 40
    assert cell_len(words.cut_to(9, "a" + "名" * 20)) == 9


def test_wrapping_keeps_words_whole_and_loses_none():
    path = "/x" * 60
    assert words.wrapped(f"in {path} and more", first="ok       ", rest=" " * 9) == [
        "ok       in",
        f"{'':9}{path}",
        f"{'':9}and more",
    ]
    assert words.wrapped("a 95 %, b", width=4) == ["a", "  95 %,", "  b"]
    assert words.wrapped("") == [""] and words.wrapped("a\nb") == ["a b"]


def test_a_result_without_files_has_the_size_of_its_record(tmp_path):
    (tmp_path / "stage.json").write_text("x" * 300)
    assert "0.5 s, 300 B, " in in_a_pipe(lambda talk: talk.stage_finished("plan", 0.5, str(tmp_path), 0))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min")],
)
def test_durations(seconds, expected):
    assert wording.duration_text(seconds) == expected


def test_live_lines_come_at_most_every_tenth_of_a_second_but_the_last_always():
    def hurry(talk: Console) -> None:
        for number in range(1, 1001):
            talk.advance("images", number, 1000)

    sent = on_a_terminal(hurry)
    assert sent.count("images") < 50 and sent.endswith("images 1000/1000")


def test_a_live_line_is_taken_away_when_the_run_ends_in_its_midst():
    def stop(talk: Console) -> None:
        talk.advance("images", 1, 3)
        talk.close()
        talk.close()

    assert screen(on_a_terminal(stop)) == [""]


def test_a_live_line_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    sent = on_a_terminal(lambda talk: talk.advance("a very long name of something", 1, 3))
    assert len(sent) == 29


def test_silence_lets_only_warnings_through():
    assert in_a_pipe(a_run, silent=True) == "warning: 2 exact copies\n"


def test_control_characters_in_names_do_not_reach_the_terminal():
    def speak(talk: Console) -> None:
        talk.stage_started("source", "\x1b[2J\x1b]0;title\x07")
        talk.warn("a\rb\nc")
        talk.note("\x9b31m")

    text = in_a_pipe(speak)
    assert text.count("\n") == 3 and not set(text) & set("\x1b\x07\r\x9b")
    assert "\\x1b[2J" in text and "a\\rb\\nc" in text


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_reader_that_has_gone_does_not_end_the_run(error):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    a_run(Console(STAGES, stream=Gone()))


# --- results


def is_command_or_path(line: str) -> bool:
    return line.split()[0] in ("bundle", "report", "next", "python") if line.split() else False


def test_a_bundle_is_shown_within_80_columns(quickstart, colours):
    for built in (quickstart, colours):
        for line in [*console.bundle_lines(built.bundle), *console.file_lines(built.bundle)]:
            assert len(line) <= WIDTH, line


def test_the_table_holds_the_manifest_s_figures(quickstart):
    text = "\n".join(console.bundle_lines(quickstart.bundle))
    manifest = quickstart.manifest
    assert f"{100 * manifest['accuracy']['source']['top1']:.2f} %" in text
    assert f"drop {manifest['accuracy']['drop_pp']:+.2f} points" in text
    sizes = manifest["size"]
    assert (
        sizes["source_bytes"] is None
        and sizes["shipped_bytes"] == (quickstart.bundle.folder / "model.onnx").stat().st_size
    )
    assert f"{100 * sizes['pruned_weights_bytes'] / sizes['source_weights_bytes']:.1f} % kept" in text
    for key in ("params", "macs"):
        assert f"{100 * manifest['pruned'][key] / manifest['model'][key]:.1f} % kept" in text
        assert wording.count_text(manifest["pruned"][key]) in text
    assert f"PASS: the drop is within 1 point on {manifest['accuracy']['images']} hold-out images" in text


def changed(bundle: Bundle, **gate: object) -> Bundle:
    accuracy = {**bundle.manifest["accuracy"], "gate": {**bundle.manifest["accuracy"]["gate"], **gate}}
    return replace(bundle, manifest={**bundle.manifest, "accuracy": accuracy})


def test_the_verdict_comes_with_one_sentence_of_why(quickstart):
    def sentence(bundle: Bundle) -> str:
        text = " ".join(" ".join(console.bundle_lines(bundle)).split())
        return text[text.index(next(word for word in ("NO GATE", "PASS", "FAIL") if word in text)) :]

    off = changed(quickstart.bundle, verdict="off", max_drop_pp=None)
    assert sentence(off) == "NO GATE: no gate was set; 100 hold-out images"
    proven = changed(quickstart.bundle, proven=True, images_to_prove=90)
    assert sentence(proven).endswith("hold-out images, proven at 95 % (one-sided)")
    failed = replace(off, manifest={**off.manifest, "verdict": "fail", "reasons": ["one " * 30, "two"]})
    assert sentence(failed) == "FAIL: " + "one " * 29 + "one ; two"
    assert max(map(len, console.bundle_lines(failed))) <= WIDTH


def test_page_and_terminal_say_the_same_of_the_gate_and_of_what_left(quickstart):
    page = words_of_html(report.render_html(quickstart.manifest))
    for text in (wording.gate(quickstart.manifest["accuracy"])[1:], wording.removed(quickstart.manifest["pruned"])):
        assert text in page
        terminal_text = [*console.bundle_lines(quickstart.bundle), *console.left_lines(quickstart.bundle)]
        assert text in " ".join(" ".join(terminal_text).split())


def words_of_html(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({"verdict": "pass", "proven": True, "images_to_prove": 9},
         "the drop is within 0.5 points on 80 hold-out images, proven at 95 % (one-sided)"),
        ({"verdict": "pass", "proven": False, "images_to_prove": 900},
         "the drop is within 0.5 points on 80 hold-out images, not proven at 95 % (one-sided); about 900 images would prove it"),
        ({"verdict": "fail", "proven": False, "images_to_prove": None, "rule": "bound"},
         "the upper bound of the drop at 95 % is beyond 0.5 points on 80 hold-out images, not proven at 95 % (one-sided)"),
    ],
)  # fmt: skip
def test_the_gate_in_words(gate, expected):
    asked = {"max_drop_pp": 0.5, "rule": "point", "confidence": 0.95, **gate}
    assert wording.level(0.975) == "97.5 %"
    assert wording.gate({"images": 80, "gate": asked, "drop_ci95_pp": [-0.5, 3.0]}) == expected


def test_a_drop_that_is_beyond_for_certain_is_not_called_unproven():
    asked = {
        "max_drop_pp": 0.5,
        "rule": "point",
        "confidence": 0.95,
        "verdict": "fail",
        "proven": False,
        "images_to_prove": None,
    }
    told = wording.gate({"images": 80, "gate": asked, "drop_ci95_pp": [0.6, 3.0]})
    assert told == "the drop is beyond 0.5 points on 80 hold-out images, and so is the whole 95 % interval"


def test_every_reason_of_an_unstable_measurement_is_told():
    reasons = ["dense: " + "it drifts " * 9, "ships: rounds differ by 60.0 %"]
    lines = list(answers.unstable_lines(reasons, "measure again"))
    assert max(map(len, lines)) <= WIDTH and lines[-1] == "measure again"
    text = " ".join(" ".join(lines).split())
    assert all(f"UNSTABLE: {' '.join(reason.split())}" in text for reason in reasons)
    assert list(answers.unstable_lines([], "measure again")) == []


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(1.0, 2, False), (1.1, 2, True), (2.0, 4, False), (1.1, None, True)]
)
def test_doctor_and_build_judge_a_load_alike(load, cores, busy):
    probe = {
        "schema": SCHEMA,
        "python": "3.11.2",
        "machine": "x86_64",
        "load": [load, 0.0, 0.0],
        "cpu": {"cores": cores},
    }
    (found,) = [finding for finding in doctor.target("local", probe) if finding.topic == "load"]
    lines = list(answers.busy_lines({"load": [load, 9.0], "cores": cores}))
    assert (found.state == "problem") is busy is bool(lines)
    assert all(wording.BUSY in " ".join(said.split()) for said in ([found.text, " ".join(lines)] if busy else []))


@pytest.mark.parametrize("name", ["plain", "with space", "it's", '"$HOME"; rm x', "a`b`"])
def test_next_commands_can_be_pasted(quickstart, tmp_path, name):
    folder = tmp_path / name
    _, _, show, verify, code = console.next_commands(Bundle(folder, quickstart.manifest))
    assert shlex.split(show)[1:] == ["cswap-deploy", "show", str(folder)]
    assert shlex.split(verify) == ["cswap-deploy", "verify", str(folder)]
    program, option, text = shlex.split(code)
    names: list[object] = []
    exec(text, {"__builtins__": {"print": lambda _: None, "__import__": lambda *_: _Loader(names)}})
    assert Path(shutil.which(program) or program).absolute() == Path(sys.executable)
    assert (option, names) == ("-c", [str(folder)])


def test_advice_names_the_program_as_it_was_started(monkeypatch, tmp_path):
    script, package = tmp_path / "bin" / "cswap-deploy", tmp_path / "cswap_deploy" / "__main__.py"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    for argument, expected in (
        (str(script), ["bin/cswap-deploy"]),
        (str(package), [program.python(), "-m", "cswap_deploy"]),
        ("/usr/bin/pytest", ["cswap-deploy"]),
        ("/opt/cswap-deploy", ["/opt/cswap-deploy"]),
    ):
        monkeypatch.setattr(sys, "argv", [argument])
        assert program.program() == expected
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert program.program() == ["cswap-deploy"]


class _Loader:
    def __init__(self, names: list[object]) -> None:
        self.load_pruned = names.append


def test_no_next_command_would_fail_for_want_of_a_factory(colours):
    assert "load_pruned" not in "\n".join(console.next_commands(colours.bundle))


def test_groups_are_listed_with_what_stays_whole_and_why():
    groups = Groups((Group("a.:smile:[red]", "channels", 8, ()),), (Refusal("norm", "its units are " * 9),), ())
    lines = list(console.group_lines(groups))
    assert max(map(len, lines)) <= WIDTH
    assert any("a.:smile:[red]" in line and "8" in line for line in lines)
    assert any(line.startswith("not pruned: norm: its units") for line in lines)


def test_long_names_fold_within_the_table():
    lines = list(words.table(("name", "n"), [("layer." * 40, "1")], "title " * 30))
    assert max(map(len, lines)) <= WIDTH
    assert "".join(line.split("  ")[0].strip() for line in lines).count("layer.") >= 39


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB"), (859_000, "839 KiB")],
)
def test_sizes(size, text):
    assert wording.size_text(size) == text


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1000, "1.00 k"), (2.5e6, "2.50 M"), (1.23e9, "1.23 G"), (999_999, "1.00 M")]
)
def test_counts(number, text):
    assert wording.count_text(number) == text


def test_the_path_of_a_result_is_not_folded(tmp_path: Path):
    long = str(tmp_path / ("x" * 120))
    assert long in in_a_pipe(lambda talk: talk.stage_finished("plan", 1.0, long, 10)).splitlines()[0]
