"""A board without a network: the agent's requests that `cswap-deploy prepare` has written down, one after the other.

This file, agent.py and errand.json lie in `device/` of a work folder. There `python3 device/agent.py` carries them out with what
the board has, and writes answers.json and files/ beside them, of which `cswap-deploy deploy WORK` makes the bundle on the
workstation. Python 3.8 and the standard library; the agent's own needs are in agent.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict

HERE = Path(__file__).resolve().parent
ERRAND, ANSWERS = "errand.json", "answers.json"
LONGEST_LOG = 4 << 20
Json = Dict[str, Any]


def main() -> int:
    """Exit code 1 when the board could not do all that was asked; what it could is kept."""
    errand = json.loads((HERE / ERRAND).read_text(encoding="utf-8"))
    made: Json = {}
    makes: Json = {}  # by request, what it has made
    precision, store, failed = "", Path(), 0
    kept: list[Json] = []
    (HERE / "files").mkdir(exist_ok=True)
    for step in errand["steps"]:
        request = resolved(step["request"], made)
        if request is None or step["precision"] not in ("", precision):
            continue  # it needs an engine that was not built, or a file for another TensorRT
        key = json.dumps(request, sort_keys=True)
        if key in makes:  # as for the dense engine where nothing was pruned
            made.update({step["makes"]: made[makes[key]]} if makes[key] in made else {})
            continue
        makes[key] = step["makes"]
        start = time.monotonic()
        print(f"{step['what']} ... ", end="", flush=True)
        answer, log = ask(request)
        error = answer.get("error")
        print(f"{error['message']} ({error['hint']})" if error else f"{time.monotonic() - start:.1f} s", flush=True)
        failed += bool(error)
        if request["verb"] == "probe":
            if error:
                return 1
            found = answer["tensorrt"]
            precision, store = found["precision"] or "", Path(answer["store"]["folder"])
            if not precision and any(each["precision"] for each in errand["steps"]):
                print(f"no engine can be built: {found['reason']}", flush=True)
                failed += 1
        for file in (answer[key] for key in ("engine", "outcomes") if key in answer):
            shutil.copyfile(str(store / "files" / file["sha256"]), str(HERE / "files" / file["sha256"]))
            made[step["makes"]] = {"sha256": file["sha256"]}
        kept.append({"request": request, "answer": answer, "log": log})
        write(HERE / ANSWERS, {"schema": errand["schema"], "errand": errand["id"], "answers": kept})
    print(f"done; copy {HERE} back, and there: cswap-deploy deploy WORK")
    return int(failed > 0)


def resolved(value: Any, made: Json) -> Any:
    """A request with paths of this machine and with engines that were made here. None: one of them was not."""
    if isinstance(value, list):
        items = [resolved(item, made) for item in value]
        return None if None in items else items
    if not isinstance(value, dict):
        return value
    if "made" in value:
        return {**made[value["made"]], "name": value["name"]} if value["made"] in made else None
    if "path" in value:
        return {**value, "path": str(HERE.parent / value["path"])}
    found = {key: item if item is None else resolved(item, made) for key, item in value.items()}
    return None if any(found[key] is None for key in value if value[key] is not None) else found


def ask(request: Json) -> tuple[Json, str]:
    """The agent's answer, and what was printed meanwhile. Its standard input stays open as long as it is waited for."""
    command = [sys.executable, str(HERE / "agent.py"), "-"]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        log.seek(max(0, log.seek(0, os.SEEK_END) - LONGEST_LOG))
        text = log.read().decode(errors="replace")
    if not line:
        ended = {"kind": "internal", "message": f"the agent ended with {process.returncode}", "hint": "see its log"}
        return {"error": ended}, text
    return dict(json.loads(line)), text


def write(path: Path, document: Json) -> None:
    """An interrupted run leaves what was answered until then."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(document), encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
