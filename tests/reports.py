"""Manifests as large as those of known networks, for the tests of the page: facts of a real bundle, more of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cswap_deploy import details
from cswap_deploy.samples import Samples

CONDITIONS = {
    "device": "NVIDIA Jetson Orin Nano Developer Kit", "cpu": "ARM Cortex-A78AE", "cores": 6, "governor": "schedutil",
    "mhz": [1510.4, 1510.4], "max_mhz": 1510.4, "power_mode": "15W", "gpu_clocks_locked": None, "l4t": "36.4.3",
    "load": [0.1, 1.2], "temperature_c": [46.2, 51.9], "system": "Linux 5.15 aarch64", "python": "3.10.12",
}  # fmt: skip


def resnet56() -> list[tuple[str, int]]:
    """Groups of a CIFAR ResNet-56 and their units."""
    return [(f"layer{stage}.{block}.conv1", 8 << stage) for stage in (1, 2, 3) for block in range(9)]


def resnet50() -> list[tuple[str, int]]:
    """Groups of a ResNet-50 and their units, the residual streams among them."""
    inner = [
        (f"layer{stage}.{block}.conv{number}", 32 << stage)
        for stage, blocks in enumerate((3, 4, 6, 3), 1)
        for block in range(blocks)
        for number in (1, 2)
    ]
    return [("conv1", 64), *inner, *((f"layer{stage}.0.downsample.0", 128 << stage) for stage in (1, 2, 3, 4))]


def of(manifest: dict[str, Any], name: str, groups: list[tuple[str, int]], seed: int = 0) -> dict[str, Any]:
    """The manifest with these groups, all verdicts among them, a failed gate, variants and a latency on a board."""
    made, chance = copy.deepcopy(manifest), random.Random(seed)
    made |= {"name": name.lower(), "verdict": "fail", "exit_code": 7, "shipped": "model.int8.onnx"}
    made["reasons"] = ["accuracy: the drop exceeds 1 points (observed +1.83 points on 600 images)"]
    made["model"] |= {"name": name, "params": 25_557_032, "macs": 4_089_184_256, "license": "apache-2.0"}
    made["pruned"] |= {"params": 17_003_112, "macs": 2_453_510_553, "steps": 8}
    made["pruned"]["groups"] = [group(*each, chance) for each in groups]
    made["pruned"]["units"] = sum(units for _, units in groups)
    made["pruned"]["units_removed"] = sum(each["units"] - each["kept"] for each in made["pruned"]["groups"])
    made["pruned"]["layers"] = [layer(*each, chance) for each in groups for _ in (0, 1)]
    made["pruned"]["trace"] = [
        {"params": 1 - 0.04 * step, "macs": 1 - 0.05 * step, "units_removed": 70 + step, "drop_pp": 0.02 * step**2}
        for step in range(1, 9)
    ]
    accuracy = made["accuracy"]
    parity = {"images": 16, "max_abs": 0.31, "sqnr_db": 27.4}
    variant = {"file": "model.int8.onnx", "opset": 18, "parity": parity, "nodes": 240, "note": "3 nodes kept in float"}
    made["onnx"]["variants"] = {"int8": variant}
    accuracy["shipped"] |= {"top1": 0.9733, "top1_ci95": [0.957, 0.9835], "correct": 584}
    accuracy["variants"] = {"int8": accuracy["shipped"]}
    accuracy |= {"drop_pp": 1.83, "drop_ci95_pp": [0.71, 3.32], "only_dense_right": 13, "only_shipped_right": 2}
    accuracy["gate"] |= {"max_drop_pp": 1.0, "verdict": "fail", "proven": False, "images_to_prove": None}
    accuracy["worst_classes"] = [
        {"label": label, "drop_pp": drop, "images": 60}
        for label, drop in (("brown bear, Ursus arctos", 8.33), ("seven", 5.0), ("nine", 3.33), ("one", 1.67))
    ]
    made["latency"] = latency(seed)
    made["size"] |= {"source_bytes": 102_546_000, "shipped_bytes": 17_600_500}
    return made


def group(name: str, units: int, chance: random.Random) -> dict[str, Any]:
    """Units of all verdicts and an effect for each."""
    effects = [chance.gauss(-0.004, 0.002) * chance.choice((0.1, 1, 1, 9)) for _ in range(units - 2)] + [0.03, -0.2]
    kept = round(units * chance.uniform(0.3, 0.95))
    left = sorted(effects, key=abs)[: units - kept]
    return {"name": name, "units": units, "kept": kept, "dense": judged(effects), "left": judged(left)}


def judged(effects: list[float]) -> dict[str, Any]:
    counts = {
        "critical": sum(effect < -0.012 for effect in effects),
        "neutral": sum(abs(effect) < 0.005 for effect in effects),
        "detrimental": sum(effect > 0.012 for effect in effects),
    }
    counts["unresolved"] = len(effects) - sum(counts.values())
    bounds = [min(effects), max(effects)] if effects else None
    return {**counts, "effect": bounds, "quantiles": details.quantiles(tuple(effects))}


def layer(name: str, units: int, chance: random.Random) -> dict[str, Any]:
    macs = round(4e9 / units * chance.uniform(0.4, 1))
    kept = chance.uniform(0.3, 1)
    return {
        "name": name, "params": units * 900, "params_kept": round(units * 900 * kept), "macs": macs,
        "macs_kept": round(macs * kept),
    }  # fmt: skip


def latency(seed: int = 0) -> dict[str, Any]:
    """Of two models with log-normal durations, the shipped one 1.6 times as fast; made as a build makes it."""
    noise = np.random.default_rng(seed)
    rounds = [[(1e6 * each * noise.lognormal(0, 0.03, 40)).astype(int) for each in (8.4, 5.2)] for _ in range(60)]
    samples = Samples.of([[block.tolist() for block in blocks] for blocks in rounds])
    timings = [
        {
            **{f"p{p}_ms": samples.percentile_ms(model, p) for p in (50, 90, 99)},
            "p50_ci95_ms": list(samples.percentile_ci95_ms(model, 50)),
            "samples": samples.count(model),
            "rounds": 60,
            "peak_memory_mb": memory,
        }
        for model, memory in ((0, 310.2), (1, 190.7))
    ]
    faster = samples.speedup(1, against=0)
    return {
        "target": "ssh", "runtime": "onnxruntime", "runtime_version": "1.23.0", "precision": "int8", "batch": 1,
        "threads": 4, "warmup_s": 1.0, "duration_s": 5.0, "source": timings[0], "pruned": timings[1],
        "speedup": faster.value, "speedup_ci95": [faster.low, faster.high], "stable": True, "unstable_because": [],
        "peak_memory_mb": 190.7, "overhead": 0.01, "conditions": CONDITIONS,
        "distribution": details.distribution(samples), "course": details.course(samples),
        "layers": {key: [*timed(speed)] for key, speed in (("source", 1.0), ("pruned", 1.6))},
    }  # fmt: skip


def timed(speed: float) -> Iterator[dict[str, Any]]:
    """54 layers, as a runtime calls them."""
    for number in range(54):
        op = "Conv" if number % 9 else "ReorderOutput"
        yield {"name": f"/layer{number // 14 + 1}/conv_{number}", "op": op, "ms": (0.3 - 0.004 * number) / speed}


def written(page: str, folder: Path, name: str = "report.html") -> Path:
    path = folder / name
    path.write_text(page, encoding="utf-8")
    return path
