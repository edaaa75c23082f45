"""What the manifest says for and against each ONNX file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cswap_deploy import artifacts, onnx_facts
from cswap_deploy.artifacts import (
    AccuracyReport,
    Evaluation,
    File,
    FileLatency,
    OnnxModel,
    Parity,
    Quantised,
)
from cswap_deploy.handoff import FILES
from cswap_deploy.intervals import Gate
from cswap_deploy.samples import Samples

FILE = File(Path("model.onnx"), "0" * 64, 100)
MODEL = OnnxModel(
    FILE, 18, 10, 9, Parity(16, 1e-6, 120.0), artifacts.TestVectors(FILE, FILE, FILE), "", operators=("Conv",)
)
MADE = Quantised("percentile", ("node_3",), 20, 256, 2.5, 0.1, 31, met=False)
ASKED = Gate(1.0, "point", 0.95, "pass", True, None)
TRUTH = (0, 1) * 100


def report(**wrong: int) -> AccuracyReport:
    """200 images, of which each file gets so many wrong; the dense network none."""
    found = {
        name: Evaluation(tuple(1 - y if i < count else y for i, y in enumerate(TRUTH)), (True,) * 200)
        for name, count in wrong.items()
    }
    right = Evaluation(TRUTH, (True,) * 200)
    return AccuracyReport(TRUTH, right, right, found)


def measured(folder: Path, **pace: float) -> FileLatency:
    """Milliseconds of each file, in 20 rounds of 50."""
    random = np.random.default_rng(0)
    rounds = tuple(
        tuple(np.round(1e6 * ms * np.exp(0.01 * random.random(50))).astype(np.int64) for ms in pace.values())
        for _ in range(20)
    )
    Samples(rounds).save(folder / "samples.npz")
    return FileLatency(tuple(pace), File.of(folder / "samples.npz"))


def block(
    models: dict[str, OnnxModel], found: AccuracyReport, speed: FileLatency | None = None, asked: Gate = ASKED
) -> Any:
    return onnx_facts.onnx_block(MODEL, models, FILES, found, asked, ("onnxruntime>=1.18",), speed)


def test_a_sound_file_has_no_marks(tmp_path: Path) -> None:
    speed = measured(tmp_path, fp32=2.0, int8=1.0)
    made = block(
        {"fp32": MODEL, "int8": replace(MODEL, quantised=replace(MADE, met=True))}, report(fp32=0, int8=2), speed
    )
    assert made["variants"]["int8"]["marks"] == []
    assert made["variants"]["int8"]["latency"]["speedup"] == pytest.approx(2, rel=0.02)
    assert made["latency"]["p50_ms"] == pytest.approx(2, rel=0.02) and made["latency"]["speedup"] == 1


def test_a_file_that_is_slower_misses_its_gate_or_its_budget_says_so(tmp_path: Path) -> None:
    speed = measured(tmp_path, fp32=1.0, int8=1.5)
    made = block({"fp32": MODEL, "int8": replace(MODEL, quantised=MADE)}, report(fp32=0, int8=5), speed)
    gate, budget, slow = made["variants"]["int8"]["marks"]
    assert gate == "misses the accuracy gate: top-1 drop +2.50 points"
    assert budget == "misses int8.max_drop: +2.50 points on 256 selection images, the best of 31 that were tried"
    assert slow.startswith("slower than model.onnx on the target: 0.67 (0.66 to 0.6")


def test_as_fast_is_not_slower(tmp_path: Path) -> None:
    made = block({"fp32": MODEL, "fp16": MODEL}, report(fp32=0, fp16=0), measured(tmp_path, fp32=1.0, fp16=1.0))
    assert made["variants"]["fp16"]["marks"] == []


def test_without_a_gate_none_is_missed() -> None:
    off = Gate(None, "point", 0.95, "off", False, None)
    assert block({"fp32": MODEL, "fp16": MODEL}, report(fp32=0, fp16=50), asked=off)["variants"]["fp16"]["marks"] == []


def test_each_file_s_own_outcome() -> None:
    found = report(fp32=4, int8=7)
    outcome = onnx_facts.variant_outcome(found, found.models["int8"], ASKED)
    assert (outcome["drop_pp"], outcome["drop_from_fp32_pp"], outcome["agreeing"], outcome["gate"]) == (
        3.5,
        1.5,
        197,
        "fail",
    )
    low, high = outcome["drop_ci95_pp"]
    assert low < 3.5 < high
