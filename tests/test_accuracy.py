"""Outcomes of predictors whose logits are given; what the manifest makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import isclose
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import Project, faults
from hypothesis import given
from hypothesis import strategies as st

from cswap_deploy import facts, manifest, progress
from cswap_deploy.accuracy import BATCH, Shown, evaluate, on_engine
from cswap_deploy.artifacts import (
    AccuracyReport,
    Architecture,
    Engine,
    Evaluation,
    File,
    Image,
    ImageSet,
    InputSpec,
    Network,
    sha256_of,
)
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DeviceError
from cswap_deploy.intervals import Gate, paired_drop, wilson
from cswap_deploy.recipe import AccuracySettings

SPEC = InputSpec((3, 8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
LABELS = ("ant", "bee", "cow")


def network(project: Project, outputs: int) -> Network:
    weights = File.of(project.recipe)
    return Network(Architecture("factory", "none", {}, ""), None, weights, SPEC, outputs, 1, 1, None)


def image_set(project: Project, truth: Sequence[int]) -> ImageSet:
    """As many images as there are true classes, whatever they show."""
    root = project.folder / "images"
    paths = sorted(root.rglob("*.png"))
    cycle = [paths[number % len(paths)] for number in range(len(truth))]
    listed = [Image(p.relative_to(root).as_posix(), sha256_of(p), y) for p, y in zip(cycle, truth, strict=True)]
    return ImageSet(tuple(listed), root)


class Canned:
    """A predictor that says what it was told to, row after row; `batches` are the sizes that it was asked for."""

    def __init__(self, logits: Sequence[Sequence[float]]) -> None:
        self.logits = np.array(logits, np.float32)
        self.batches: list[int] = []

    def __call__(self, shown: Shown) -> np.ndarray:
        inputs = shown.inputs
        assert shown.pixels.shape == inputs.shape and shown.pixels.dtype == np.uint8
        assert inputs.shape[1:] == SPEC.shape and inputs.dtype == np.float32
        start = sum(self.batches)
        self.batches.append(len(inputs))
        return self.logits[start : start + len(inputs)]


def report(truth: Sequence[int], dense: Sequence[int], shipped: Sequence[int]) -> AccuracyReport:
    first, last = (Evaluation(tuple(p), (True,) * len(p)) for p in (dense, shipped))
    return AccuracyReport(tuple(truth), first, last, {"fp32": last})


def block_of(
    made: AccuracyReport,
    labels: tuple[str, ...] = LABELS,
    reads: int = 1,
    ships: str = "fp32",
    **settings: object,
) -> dict[str, Any]:
    shipped = made.models[ships]
    verdict = facts.gate_of(made, shipped, AccuracySettings(**settings))
    return facts.accuracy_block(made, None, shipped, verdict, labels, reads)


def test_first_and_first_five_of_each_predictor(project):
    truth = [0, 1, 5]
    ahead = Canned([[6, 5, 4, 3, 2, 1], [1, 6, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]])
    behind = Canned([[1, 6, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    labels, (one, two) = evaluate({"one": ahead, "two": behind}, network(project, 6), image_set(project, truth))
    assert labels == (0, 1, 5)
    assert one == Evaluation((0, 1, 0), (True, True, False))
    assert two == Evaluation((1, 0, 5), (False, True, True))


def test_with_fewer_than_five_classes_every_class_is_among_the_first_five(project):
    logits = Canned([[0, 1], [0, 1], [0, 1]])
    _, (outcome,) = evaluate({"a": logits}, network(project, 2), image_set(project, [0, 1, 0]))
    assert outcome == Evaluation((1, 1, 1), (True, True, True))


def test_of_equal_logits_the_first_class_counts(project):
    _, (outcome,) = evaluate({"a": Canned([[2.0] * 7] * 2)}, network(project, 7), image_set(project, [0, 6]))
    assert outcome == Evaluation((0, 0), (True, False))


def test_logits_that_are_not_finite_are_never_right(project):
    nan, inf = float("nan"), float("inf")
    recording = progress.Recording()
    with progress.reporting(recording):
        broken = Canned([[nan, nan, nan], [0, inf, 0], [0, 1, 0]])
        _, (outcome,) = evaluate({"broken": broken}, network(project, 3), image_set(project, [0, 1, 1]))
    assert outcome == Evaluation((-1, -1, 1), (False, False, True))
    assert recording.of("warn") == ["broken: logits of 2 images are not finite and count as wrong"]


def test_images_come_in_batches_in_their_order_and_progress_is_told(project):
    truth = [number % 6 for number in range(2 * BATCH + 3)]
    perfect = Canned(np.eye(6)[truth].tolist())
    recording = progress.Recording()
    with progress.reporting(recording):
        labels, (outcome,) = evaluate({"a": perfect}, network(project, 6), image_set(project, truth))
    assert perfect.batches == [BATCH, BATCH, 3]
    assert labels == outcome.predicted == tuple(truth)
    assert recording.events[-1] == ("advance", "hold-out images", f"{len(truth)}/{len(truth)}")


# --- the manifest's block


def test_block_of_a_report_made_by_hand():
    truth = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    dense = [0, 0, 0, 0, 1, 1, 1, 0, 2, 0]
    shipped = [0, 0, 1, 1, 1, 1, 1, 1, 2, 2]
    block = block_of(report(truth, dense, shipped), reads=3)
    assert block["images"] == 10 and block["holdout_reads"] == 3
    assert (block["source"]["correct"], block["shipped"]["correct"]) == (8, 8)
    assert block["source"]["top1"] == 0.8 and block["shipped"] == block["exported"] == block["pruned"]
    assert tuple(block["source"]["top1_ci95"]) == wilson(8, 10)
    assert (block["only_dense_right"], block["only_shipped_right"], block["drop_pp"]) == (2, 2, 0.0)
    assert np.allclose(block["drop_ci95_pp"], [100 * bound for bound in paired_drop(2, 2, 10)])
    assert block["agreement"] == 0.6
    assert block["worst_classes"] == [
        {"label": "ant", "drop_pp": 50.0, "images": 4},
        {"label": "bee", "drop_pp": -25.0, "images": 4},
        {"label": "cow", "drop_pp": -50.0, "images": 2},
    ]


def test_worst_classes_are_five_ties_in_the_order_of_the_outputs():
    truth = [6, 5, 4, 3, 2, 1, 0]
    shipped = [6, 0, 0, 0, 0, 0, 0]
    block = block_of(report(truth, truth, shipped), tuple("abcdefg"))
    assert [row["label"] for row in block["worst_classes"]] == list("bcdef")
    assert {row["drop_pp"] for row in block["worst_classes"]} == {100.0}


def test_classes_without_hold_out_images_are_not_listed():
    block = block_of(report([1, 1], [1, 1], [1, 0]))
    assert block["worst_classes"] == [{"label": "bee", "drop_pp": 50.0, "images": 2}]


outcomes = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=40)


@given(outcomes, st.sampled_from([None, 0.0, 2.5, 100.0]), st.sampled_from(["point", "bound"]))
def test_figures_of_a_block_agree_with_each_other_and_with_the_schema(rows, limit, rule):
    made = report(*zip(*rows, strict=True))
    block = block_of(made, max_drop=limit, rule=rule)
    low, high = block["drop_ci95_pp"]
    assert list(faults(block, manifest.schema()["properties"]["accuracy"])) == []
    assert isclose(block["drop_pp"], 100 * (block["source"]["top1"] - block["shipped"]["top1"]), abs_tol=1e-9)
    assert low - 1e-9 <= block["drop_pp"] <= high + 1e-9
    assert block["only_dense_right"] - block["only_shipped_right"] == (
        block["source"]["correct"] - block["shipped"]["correct"]
    )
    reasons = facts.gate_reasons(made, made.models["fp32"], Gate(**block["gate"]))
    assert [reason.exit_code for reason in reasons] == ([7] if block["gate"]["verdict"] == "fail" else [])
    json.dumps(block, allow_nan=False)


@pytest.mark.parametrize(
    ("shipped", "limit", "rule", "verdict", "proven", "provable"),
    [
        ([0] * 10, None, "point", "off", False, False),
        ([0] * 10, 1.0, "point", "pass", False, True),
        ([0] * 10, 50.0, "point", "pass", True, True),
        ([0] * 10, 1.0, "bound", "fail", False, True),
        ([0] * 8 + [1] * 2, 1.0, "point", "fail", False, False),
        ([0] * 9 + [1], 10.0, "point", "pass", False, False),
    ],
)
def test_gate_of_a_block(shipped, limit, rule, verdict, proven, provable):
    block = block_of(report([0] * 10, [0] * 10, shipped), max_drop=limit, rule=rule)["gate"]
    assert (block["verdict"], block["proven"]) == (verdict, proven)
    assert (block["images_to_prove"] is not None) == provable
    assert block["max_drop_pp"] == limit and block["rule"] == rule


def test_reason_names_limit_drop_and_images():
    made = report([0] * 10, [0] * 10, [0] * 8 + [1] * 2)

    def reasons(verdict: Gate) -> list[str]:
        return [reason.text for reason in facts.gate_reasons(made, made.models["fp32"], verdict)]

    assert reasons(Gate(1.0, "point", 0.95, "fail", False, None)) == [
        "accuracy: the drop exceeds 1 points (observed +20.00 points on 10 images)"
    ]
    assert reasons(Gate(0.5, "bound", 0.9, "fail", False, None)) == [
        "accuracy: the upper bound at 90 % of the drop exceeds 0.5 points (observed +20.00 points on 10 images)"
    ]
    assert reasons(Gate(None, "point", 0.95, "off", False, None)) == []


def test_the_gate_judges_what_ships_and_each_model_has_its_outcome():
    right, wrong = (Evaluation((label,) * 10, (True,) * 10) for label in (0, 1))
    made = AccuracyReport((0,) * 10, right, right, {"fp32": right, "int8": wrong})
    shipped = block_of(made, ships="int8")
    assert shipped["gate"]["verdict"] == "fail" and shipped["shipped"]["top1"] == 0 and shipped["drop_pp"] == 100
    assert shipped["exported"]["top1"] == 1 and shipped["variants"]["int8"]["top1"] == 0
    kept = block_of(made, ships="fp32")
    assert kept["gate"]["verdict"] == "pass" and kept["variants"]["int8"]["top1"] == 0


def test_an_engine_that_ships_is_judged_by_its_own_outcome():
    right, wrong = (Evaluation((label,) * 10, (True,) * 10) for label in (0, 1))
    made = AccuracyReport((0,) * 10, right, right, {"fp32": right})
    verdict = facts.gate_of(made, wrong, AccuracySettings())
    block = facts.accuracy_block(made, wrong, wrong, verdict, LABELS, 1)
    assert block["engine"]["top1"] == 0 and block["gate"]["verdict"] == "fail" and block["exported"]["top1"] == 1


# --- the schema's own checker


@pytest.mark.parametrize(
    ("value", "schema", "message"),
    [
        (1, manifest.TEXT, "expected string, found int"),
        (True, manifest.INTEGER, "expected integer, found bool"),
        (float("nan"), manifest.NUMBER, "expected number"),
        (2**70, manifest.INTEGER, "expected integer"),
        (1.5, manifest.FRACTION, "1.5 is out of range"),
        (0, manifest.POSITIVE, "0 is out of range"),
        ({}, manifest.record(a=manifest.TEXT), "'a' is missing"),
        ({"a": {"b": 1}}, manifest.record(a=manifest.record(b=manifest.TEXT)), "a.b: expected string"),
        ([1], {"type": "array", "items": manifest.INTEGER, "minItems": 2}, "1 items"),
        ([1, "x"], {"type": "array", "items": manifest.INTEGER}, r"\[1\]: expected integer"),
        ("x", {"enum": ["pass", "fail"]}, "expected pass or fail"),
        ("x", manifest.nullable(manifest.INTEGER), "none of the allowed forms"),
    ],
)
def test_faults_are_named_by_place(value, schema, message):
    assert re.search(message, "; ".join(manifest.faults(value, schema)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(["pass", "point", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["verdict", "label"]), inner),
)


@given(json_values, st.sampled_from(list(manifest.schema()["properties"].values())))
def test_the_checker_agrees_with_the_tests_own_validator(value, schema):
    assert any(manifest.faults(value, schema)) == any(faults(value, schema))


# --- an engine on its target


def test_an_engine_that_the_target_has_removed_is_sent_again(tmp_path):
    """Its store keeps what was used last: the engine is put there with the images, before anything is asked."""
    (tmp_path / "engine").write_bytes(b"native code")
    (tmp_path / "pixels.npy").write_bytes(b"pixels")
    engine = Engine(File.of(tmp_path / "engine"), File.of(tmp_path / "engine"), "10.3.0", None, 1.0, "")
    with pytest.raises(DeviceError, match="nothing more is played"):
        on_engine(
            tmp_path, engine, File.of(tmp_path / "pixels.npy"), (0, 1), SPEC, 1, (board := Emptied("a board", ()))
        )
    assert board.sent == [engine.file.sha256, sha256_of(tmp_path / "pixels.npy")]
    assert board.asked["model"] == {"sha256": engine.file.sha256, "name": "the engine"}


class Emptied(Target):
    """A board over ssh that has none of the files, and stores what it gets."""

    sent: ClassVar[list[str]] = []
    asked: ClassVar[dict[str, Any]] = {}

    def _exchange(self, request, seconds, source=None, into=None, most=0):
        if request["verb"] == "missing":
            return {"missing": request["sha256"]}, ""
        if request["verb"] == "store":
            self.sent.append(request["sha256"])
            return {}, ""
        self.asked.update(request)
        raise DeviceError("nothing more is played")
