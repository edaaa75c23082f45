"""What a board without a network does with its errand; the agent is a stub. test_engine.py has the real one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cswap_deploy.device import recorded
from cswap_deploy.errors import DeviceError

STUB = """
import hashlib, json, pathlib, sys
assert sys.argv[1:] == ["-"], "else it would ask itself for ever"
here, request = pathlib.Path(__file__).parent, json.loads(sys.stdin.readline())
with (here / "asked").open("a") as notes:
    notes.write(json.dumps(request) + "\\n")
answer = {}
if request["verb"] == "probe":
    answer = {"tensorrt": {"precision": PRECISION, "reason": "No module named 'tensorrt'"}, "store": {"folder": str(here / "store")}}
elif request["verb"] == "build" and "bad" in request["model"]["path"]:
    answer = {"error": {"kind": "engine", "message": "it cannot be built", "hint": "see its log"}}
elif request["verb"] == "build":
    content = request["model"]["path"].encode()
    digest = hashlib.sha256(content).hexdigest()
    (here / "store/files").mkdir(parents=True, exist_ok=True)
    (here / "store/files" / digest).write_bytes(content)
    answer = {"engine": {"sha256": digest, "bytes": len(content)}}
elif request["verb"] == "crash":
    sys.exit("Segmentation fault")
print(json.dumps(answer))
"""


def step(verb: str, makes: str = "", precision: str = "", **request: Any) -> dict[str, Any]:
    return {"what": f"{verb} {makes}", "makes": makes, "precision": precision, "request": {"verb": verb, **request}}


def build(path: str, makes: str, precision: str = "flags") -> dict[str, Any]:
    return step("build", makes, precision, model={"path": path, "sha256": path * 8})


def layers(makes: str) -> dict[str, Any]:
    return step("layers", model={"made": makes, "name": f"the {makes} engine"})


def carried_out(root: Path, *steps: dict[str, Any], precision: str | None = "flags") -> tuple[int, str, list[Any]]:
    """Exit code, what was said, and what the agent was asked."""
    folder = recorded.lay(root, [step("probe"), *steps])
    (folder / "stub.py").write_text(STUB.replace("PRECISION", repr(precision)))
    shutil.move(folder / "stub.py", folder / "agent.py")
    done = subprocess.run([sys.executable, folder / "errand.py"], capture_output=True, text=True, check=False)
    asked = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, asked


def test_an_engine_takes_its_place_in_later_requests(tmp_path: Path) -> None:
    code, text, asked = carried_out(tmp_path, build("a", "shipped"), build("t", "shipped", "typed"), layers("shipped"))
    assert code == 0, text
    assert [request["verb"] for request in asked] == ["probe", "build", "layers"], (
        "of two files the one for this TensorRT"
    )
    assert asked[1]["model"]["path"] == str(tmp_path.resolve() / "a")
    [kept] = (tmp_path / "device/files").iterdir()
    assert asked[2]["model"] == {"sha256": kept.name, "name": "the shipped engine"}
    assert kept.read_bytes().decode() == asked[1]["model"]["path"]


def test_what_was_asked_already_is_not_asked_again(tmp_path: Path) -> None:
    """Where nothing was pruned the dense engine is the one that ships."""
    both = step("measure", models=[{"made": "dense", "name": "a"}, {"made": "shipped", "name": "b"}])
    code, text, asked = carried_out(tmp_path, build("a", "shipped"), build("a", "dense"), both)
    assert code == 0, text
    assert [request["verb"] for request in asked] == ["probe", "build", "measure"]
    assert len({model["sha256"] for model in asked[2]["models"]}) == 1


def test_what_needs_an_engine_that_was_not_built_is_left_out(tmp_path: Path) -> None:
    code, text, asked = carried_out(
        tmp_path, build("bad", "shipped"), layers("shipped"), build("a", "dense"), layers("dense")
    )
    assert code == 1 and "it cannot be built (see its log)" in text
    assert [request["verb"] for request in asked] == ["probe", "build", "build", "layers"]


def test_a_board_without_tensorrt_says_so(tmp_path: Path) -> None:
    code, text, asked = carried_out(tmp_path, build("a", "shipped"), layers("shipped"), precision=None)
    assert code == 1 and "no engine can be built: No module named 'tensorrt'" in text
    assert [request["verb"] for request in asked] == ["probe"]


def test_a_crash_is_an_answer_with_its_log(tmp_path: Path) -> None:
    code, text, _ = carried_out(tmp_path, step("crash"), step("layers"))
    assert code == 1 and "the agent ended with 1" in text
    *_, crash, _ = json.loads((tmp_path / "device/answers.json").read_text())["answers"]
    assert crash["answer"]["error"]["kind"] == "internal" and "Segmentation fault" in crash["log"]
    with pytest.raises(DeviceError, match="the agent ended with 1"):
        recorded.recorded(tmp_path, "a board").ask("crash", 1)


def test_only_what_was_asked_is_answered(tmp_path: Path) -> None:
    carried_out(tmp_path, step("layers", batch=1))
    board = recorded.recorded(tmp_path, "a board")
    assert board.ask("layers", 1, batch=1) == {}
    with pytest.raises(DeviceError, match="a board, asked without a network: layers: the board was not asked this"):
        board.ask("layers", 1, batch=2)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"errand": "ERRAND"}', '{"errand": "ERRAND", "answers": [{}]}', '{"errand": "0"}']
)
def test_damaged_answers_are_refused(tmp_path: Path, text: str) -> None:
    recorded.lay(tmp_path, [step("probe")])
    identity = json.loads((tmp_path / "device/errand.json").read_text())["id"]
    (tmp_path / "device/answers.json").write_text(text.replace("ERRAND", identity))
    with pytest.raises(DeviceError, match=r"answers\.json (cannot be read|answers another errand)"):
        recorded.recorded(tmp_path, "a board")
