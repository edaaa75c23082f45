"""`cswap-deploy measure`: latency of one file on a target, or of two in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cswap_deploy import latency
from cswap_deploy.artifacts import File
from cswap_deploy.device import conditions
from cswap_deploy.device.layers import joined
from cswap_deploy.device.target import reach
from cswap_deploy.errors import UsageError
from cswap_deploy.facts import timing_block
from cswap_deploy.recipe import LatencySettings

Runtime: TypeAlias = Literal["onnxruntime", "tensorrt"]
RUNTIMES: dict[str, Runtime] = {".onnx": "onnxruntime", ".engine": "tensorrt"}


def runtime_of(paths: Sequence[Path]) -> Runtime:
    """What runs these files, by their ending. Errors: UsageError when one is missing or they need two runtimes."""
    for path in paths:
        if not path.is_file():
            raise UsageError(
                f"{path} is not a file", "give a .onnx file, or a .engine file that was built on the target"
            )
        if path.suffix not in RUNTIMES:
            raise UsageError(f"{path.name} ends in {path.suffix or 'nothing'}", f"expected {' or '.join(RUNTIMES)}")
    runtimes = {RUNTIMES[path.suffix] for path in paths}
    if len(runtimes) > 1:
        raise UsageError("an ONNX file and an engine cannot be measured in turn", "measure two files of one kind")
    return runtimes.pop()


def measure(paths: Sequence[Path], settings: LatencySettings, trust: Sequence[str], layers: bool) -> dict[str, Any]:
    """Figures, conditions and, for two files, how many times faster the first is. Errors: UsageError, DeviceError."""
    files = [File.of(path) for path in paths]
    names = tuple(path.name for path in paths)
    with reach(settings.target) as target:
        taken = latency.take(target, files, settings, names=names, trust=trust)
        found = None
        if layers:
            found = target.ask(
                "layers",
                latency.LOAD_S,
                runtime=settings.runtime,
                model=target.put(files[0], names=names[:1])[0],
                batch=settings.batch,
                threads=settings.threads,
                trust=list(trust),
            )
    samples, memory = taken.samples, taken.peak_memory_mb or (None,) * len(files)
    around = [*conditions.faults(taken.conditions, settings.runtime)]
    faults = [[*samples.faults(number), *around] for number in range(len(files))]
    faster = samples.speedup(0, against=1) if len(files) == 2 else None
    return {
        "target": settings.target,
        "runtime": taken.runtime,
        **settings.model_dump(include={"batch", "threads", "warmup_s", "duration_s"}),
        "models": [
            {
                "file": str(path),
                "sha256": file.sha256,
                **timing_block(samples, number, memory[number]),
                "stable": not faults[number],
                "unstable_because": faults[number],
            }
            for number, (path, file) in enumerate(zip(paths, files, strict=True))
        ],
        "speedup": faster.value if faster else None,
        "speedup_ci95": [faster.low, faster.high] if faster else None,
        "overhead": taken.document["overhead"],
        "memory": taken.document["memory"],
        "conditions": taken.conditions,
        "cold_p50_ms": list(taken.cold_ms),
        "energy_mj": list(conditions.energy_mj(taken.document)),
        "on_gpu": [{f"p{p}_ms": gpu.percentile_ms(number, p) for p in (50, 90, 99)} for number in range(len(files))]
        if (gpu := taken.on_gpu)
        else None,
        "layers": joined(found, {}, None) if found else None,
    }
