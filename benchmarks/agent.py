"""What the agent takes of a target: the time of a probe, the part of a measurement in which no model runs, memory.

    python benchmarks/agent.py                                   # over an sshd of its own on loopback, which it starts and ends
    python benchmarks/agent.py --on ssh://jetson@orin.local      # over the network, on a board that has onnxruntime

probe      20 times: connecting and the answer; and the answer on a connection that is open already. Bar: median under 1.5 s.
overhead   share of the sampling in which no inference ran, of a model of about a millisecond, in turn with itself. Bar: under 5 %.
measuring  peak memory of the agent that has measured, beyond that of a process that has only run the model. Bar: under 60 MB.
judging    the same of an agent that judges 1,460 images of 224 x 224 (220 MB), beside the runtime with one batch; on this machine.

Prints a table and writes JSON. The load averages beside the figures say what else ran: the bars are those of a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sshd  # noqa: E402 - the tests' own server

from cswap_deploy.artifacts import File  # noqa: E402
from cswap_deploy.device.target import AGENT, Probe, Target, reach  # noqa: E402

TIMES = 20
IMAGES, SIDE, BATCH = 1460, 224, 4
PEAK = "next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 1024"
"""MB of this program alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", metavar="TARGET", help="default: an sshd of its own on loopback")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    load = [os.getloadavg()[0]]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = asked.on or stack.enter_context(loopback(folder))
        found = {**probes(name), **measuring(name, folder), **judging(folder)}
    load.append(os.getloadavg()[0])
    for key, value in found.items():
        print(f"{key:<28}{value:>10.3f}")
    print(f"on {name}, load average {load[0]:.1f} to {load[1]:.1f}, {os.cpu_count()} cores")
    asked.out.write_text(json.dumps({"target": asked.on or "loopback", "load": load, **found}, indent=1) + "\n")


@contextmanager
def loopback(folder: Path) -> Iterator[str]:
    """An sshd and, in front of everything on PATH, an ssh that knows its key."""
    with sshd.device() as device, device.serving() as server:
        os.environ["PATH"] = f"{device.client(folder / 'client')}:{os.environ['PATH']}"
        yield server.name


def probes(name: str) -> dict[str, float]:
    """Medians in seconds."""
    whole, alone = [], []
    for _ in range(TIMES):
        start = time.perf_counter()
        with reach(name) as target:
            Probe.of(target)
            whole.append(time.perf_counter() - start)
            start = time.perf_counter()
            Probe.of(target)
            alone.append(time.perf_counter() - start)
    return {"probe, connecting (s)": median(whole), "probe, connected (s)": median(alone), "slowest (s)": max(whole)}


def measuring(name: str, folder: Path) -> dict[str, float]:
    """Percent of the sampling, and MB."""
    model = File.of(sshd.classifier(folder / "model.onnx", width=16, side=64))
    with reach(name) as target:
        document = measured(target, model)
    memory = document["memory"]
    beyond = memory["agent_mb"] - max(memory["peak_mb"])
    return {"overhead (%)": 100 * document["overhead"], "memory, measuring (MB)": beyond}


def measured(target: Target, model: File) -> dict[str, Any]:
    models = target.put(model, model)
    return target.ask("measure", 120, runtime="onnxruntime", models=models, warmup_s=1, duration_s=5)


def judging(folder: Path) -> dict[str, float]:
    """MB beyond the runtime's, which has run one batch; the pixels are a file of zeros that takes no room."""
    model = sshd.classifier(folder / "wide.onnx", width=2, side=SIDE)
    np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (IMAGES, 3, SIDE, SIDE)).flush()
    request = {
        "schema": "cswap-deploy/agent/1", "verb": "infer", "runtime": "onnxruntime", "batch": BATCH, "labels": [0] * IMAGES,
        "mean": [0.5] * 3, "std": [0.5] * 3, "model": {"path": str(model)}, "images": {"path": str(folder / "pixels.npy")},
    }  # fmt: skip
    note = (
        f"import atexit, runpy, sys; atexit.register(lambda: open({str(folder / 'peak')!r}, 'w').write(str({PEAK}))); "
    )
    run = f"sys.argv = [{str(AGENT)!r}]; runpy.run_path(sys.argv[0], run_name='__main__')"
    surroundings = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(
        [sys.executable, "-c", note + run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=surroundings
    ) as agent:
        assert agent.stdin and agent.stdout
        agent.stdin.write(json.dumps(request).encode() + b"\n")
        agent.stdin.flush()
        answer = json.loads(agent.stdout.readline())
        agent.wait(60)  # with its standard input open: else it ends at once, without its note
    assert answer.get("images") == IMAGES, answer
    bare = (
        f"import numpy as np, onnxruntime as ort; zeros = np.zeros(({BATCH}, 3, {SIDE}, {SIDE}), 'f4'); "
        f"ort.InferenceSession({str(model)!r}, providers=['CPUExecutionProvider']).run(None, {{'images': zeros}}); print({PEAK})"
    )
    alone = float(subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True).stdout)
    return {"memory, judging (MB)": float((folder / "peak").read_text()) - alone}


if __name__ == "__main__":
    main()
