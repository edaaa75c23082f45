"""Is a latency of `cswap-deploy measure` to be believed? A model against itself, and the agent against a plain loop.

    python benchmarks/measuring.py model.onnx                       # 10 measurements of 5 s, 10 pairs of 1 s
    python benchmarks/measuring.py model.onnx --seconds 2 --times 20 --threads 2

itself    the model is measured against itself: how many intervals hold 1.00, and how wide they are. Files are loaded anew
          each time.
loop      p50 of the agent against that of `session.run` in a for loop: short runs of both, each a process of its own,
          order alternating. The median of the ratios, with the interval that a speed-up gets.
overhead  share of the agent's sampling time in which no inference ran.
memory    peak resident memory of the agent with the model, in MB beyond that of the loop's process.

Prints a table and writes JSON. The load averages beside the figures say what else ran; this program alone makes one of 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path
from statistics import mean, median
from typing import Any

from cswap_deploy import latency
from cswap_deploy.artifacts import File
from cswap_deploy.device.target import BOOTSTRAP, Target
from cswap_deploy.recipe import LatencySettings
from cswap_deploy.samples import Samples

PLAIN = """
import json, re, sys, time
import numpy as np
import onnxruntime as ort
path, batch, threads, warmup, seconds = sys.argv[1], *map(int, sys.argv[2:4]), *map(float, sys.argv[4:])
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
kinds = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(uint8)": "u1"}
feeds = {i.name: (np.random.rand(batch, *i.shape[1:]) * 2).astype(kinds[i.type]) for i in session.get_inputs()}
end = time.perf_counter() + warmup
while time.perf_counter() < end:
    session.run(None, feeds)
ns = []
end = time.perf_counter() + seconds
while time.perf_counter() < end or not ns:
    start = time.perf_counter_ns()
    session.run(None, feeds)
    ns.append(time.perf_counter_ns() - start)
print(json.dumps({"p50_ms": sorted(ns)[(len(ns) - 1) // 2] / 1e6,
                  "peak_mb": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024}))
"""
"""What one writes by hand to time a model."""

LOCAL = Target("local", (sys.executable, "-c", BOOTSTRAP))


@dataclass(frozen=True)
class Bench:
    file: File
    settings: LatencySettings

    def itself(self) -> dict[str, Any]:
        """The model against itself, once."""
        before = os.getloadavg()[0]
        taken = latency.take(LOCAL, (self.file, self.file), self.settings)
        found, samples = taken.samples.speedup(0, against=1), taken.samples
        return {
            "speedup": found.value,
            "low": found.low,
            "high": found.high,
            "half_width": sqrt(found.high / found.low) - 1,
            "holds": found.low <= 1 <= found.high,
            "p50_ms": [samples.percentile_ms(model, 50) for model in (0, 1)],
            "rounds": len(samples.rounds),
            "stable": not (samples.faults(0) or samples.faults(1)),
            "overhead": taken.document["overhead"],
            "memory": taken.document["memory"],
            "load": [before, os.getloadavg()[0]],
        }

    def pair(self, number: int, seconds: float) -> dict[str, Any]:
        """The agent and the loop, one after the other, the loop first every other time."""
        before = os.getloadavg()[0]
        sides = {"agent": self._agent, "loop": self._loop}
        found = {side: sides[side](seconds) for side in (sorted(sides), sorted(sides, reverse=True))[number % 2]}
        ratio = found["agent"]["p50_ms"] / found["loop"]["p50_ms"]
        return {**found, "ratio": ratio, "load": [before, os.getloadavg()[0]]}

    def _agent(self, seconds: float) -> dict[str, Any]:
        settings = self.settings.model_copy(update={"duration_s": seconds})
        taken = latency.take(LOCAL, (self.file,), settings)
        memory = taken.document["memory"]
        return {"p50_ms": taken.samples.percentile_ms(0, 50), "overhead": taken.document["overhead"], **memory}

    def _loop(self, seconds: float) -> dict[str, Any]:
        given = (self.settings.batch, self.settings.threads, self.settings.warmup_s, seconds)
        command = [sys.executable, "-c", PLAIN, str(self.file.path), *map(str, given)]
        return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def summary(itself: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    p50s = Samples.of([[[round(1e6 * pair[side]["p50_ms"])] for side in ("agent", "loop")] for pair in pairs])
    ratio = p50s.speedup(1, against=0)
    loads = [load for row in (*itself, *pairs) for load in row["load"]]
    return {
        "itself": len(itself),
        "holds_one": sum(row["holds"] for row in itself),
        "half_width_median": median(row["half_width"] for row in itself),
        "error_rms": sqrt(mean(log(row["speedup"]) ** 2 for row in itself)),
        "error_rms_p50": sqrt(mean(log(row["p50_ms"][0] / row["p50_ms"][1]) ** 2 for row in itself)),
        "stable": sum(row["stable"] for row in itself),
        "pairs": len(pairs),
        "agent_to_loop": ratio.value,
        "agent_to_loop_ci95": [ratio.low, ratio.high],
        "overhead_median": median(row["overhead"] for row in itself),
        "agent_mb_beside_loop": median(pair["agent"]["agent_mb"] - pair["loop"]["peak_mb"] for pair in pairs),
        "load": [min(loads), max(loads)],
    }


def row(name: str, p50_ms: float, found: dict[str, Any]) -> str:
    low, high = found["agent_to_loop_ci95"]
    return (
        f"{name[:24]:<26}{p50_ms:8.3f}{found['holds_one']:6d}/{found['itself']}{found['half_width_median']:9.2%}"
        f"{found['agent_to_loop']:8.3f} ({low:.3f} to {high:.3f}){found['overhead_median']:10.2%}"
        f"{found['agent_mb_beside_loop']:+9.1f}{found['load'][0]:7.1f} to {found['load'][1]:.1f}"
    )


def main() -> None:
    here = Path(__file__).parent
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    cli.add_argument("--seconds", type=float, default=5.0, help="of sampling, each model, against itself")
    cli.add_argument("--times", type=int, default=10, help="measurements against itself")
    cli.add_argument("--pairs", type=int, default=10, help="runs of the agent and of the loop")
    cli.add_argument("--pair-seconds", type=float, default=1.0, help="of sampling in each of them")
    cli.add_argument("--threads", type=int, default=1)
    cli.add_argument("--batch", type=int, default=1)
    cli.add_argument("--json", type=Path, default=here / "measuring.json")
    args = cli.parse_args()
    if args.pairs < 2 or args.times < 1:
        cli.error("--pairs must be at least 2 and --times at least 1")
    print(
        f"{'model':<26}{'p50 ms':>8}{'1.00 in':>8}{'half':>9}{'agent / loop, p50 (95 %)':>25}{'overhead':>13}{'MB':>9}{'load':>8}"
    )
    results = []
    for path in args.models:
        settings = LatencySettings(duration_s=args.seconds, warmup_s=0.5, threads=args.threads, batch=args.batch)
        bench = Bench(File.of(path), settings)
        itself = [bench.itself() for _ in range(args.times)]
        pairs = [bench.pair(number, args.pair_seconds) for number in range(args.pairs)]
        found = summary(itself, pairs)
        print(row(path.stem, median(each["p50_ms"][0] for each in itself), found), flush=True)
        results.append({"model": path.name, "bytes": bench.file.bytes, **found, "runs": itself, "runs_of_pairs": pairs})
    probe = LOCAL.ask("probe", 60)
    conditions = {key: probe[key] for key in ("cpu", "memory_mb", "system", "python", "onnxruntime")}
    asked = {key: getattr(args, key) for key in ("seconds", "times", "pairs", "pair_seconds", "threads", "batch")}
    args.json.write_text(json.dumps({"conditions": conditions | asked, "models": results}, indent=1))
    print(f"written to {args.json.name}")


if __name__ == "__main__":
    main()
