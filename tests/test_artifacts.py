"""Artefacts survive the disk unchanged, wherever the folder that holds them lies afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cswap_deploy import artifacts
from cswap_deploy.artifacts import (
    AccuracyReport,
    Architecture,
    Axis,
    BundleFiles,
    CostTerm,
    Curve,
    Curves,
    Engine,
    Evaluation,
    File,
    FileLatency,
    Group,
    Groups,
    GroupScores,
    HeadDims,
    HeadRows,
    Image,
    ImageSet,
    InputSpec,
    LatencyReport,
    Network,
    OnnxModel,
    Parity,
    PruningPlan,
    PruningStep,
    Reference,
    Refusal,
    Scores,
    Slice,
    Split,
    UnitAttribute,
    sha256_of,
)
from cswap_deploy.codec import canonical, decode, encode
from cswap_deploy.intervals import Gate
from cswap_deploy.prepared import Prepared, Reason

ROOT = Path("/work folder/stages/x/1")
FILE = File(ROOT / "sub" / "weights.safetensors", "ab" * 32, 7)
SPEC = InputSpec((3, 8, 8), (0.1, 0.2, 0.3), (1.0, 1.0, 0.5), "bicubic", 0.875, "squash")
ARCHITECTURE = Architecture(
    "factory", "net.py:tiny", {"width": 8, "act": None, "deep": [True, 1.5]}, "sha256:1", "/n.py"
)
GROUP = Group("stem", "channels", 4, (Slice("conv", "weight", 1, 0, 1), Slice("", "bias", 0, 4, 2)))
SCORES = Scores(
    "causal",
    12,
    (GroupScores("stem", (0, 2), (0.5, -1e-300), (0.0, 1.0), (0.1, 0.2), (1, 2), ("critical",), (True, False)),),
)
STEP = PruningStep(0.5, 0.25, {"stem": (1,)}, -0.5, SCORES.groups)
PLAN = PruningPlan({"stem": (0, 2), "empty": ()}, (STEP,), SCORES, SCORES)
CURVES = Curves(4.0, 12, (Curve("stem", (2, 0, 1), (2, 1), (-1e-9, 0.5)), Curve("empty", (0,), (), ())))
EVALUATION = Evaluation((0, 3, 1), (True, False, True))
ONNX = OnnxModel(
    graph=FILE,
    opset=18,
    ir_version=10,
    nodes=40,
    parity=Parity(8, 1e-6, 120.0),
    vectors=artifacts.TestVectors(FILE, FILE, FILE, (FILE,)),
    note="ünïcode",
    quantised=artifacts.Quantised("entropy", ("n",), 9, 16, 0.5, 1e-3, 4, True),
    beside=(FILE,),
    operators=("Conv",),
    unsigned=True,
    coverage=(artifacts.Coverage("XNNPACK", 3, 4, 0, "unknown", ("Gelu",), ""),),
)

ACCURACY = AccuracyReport((0, 3, 2), EVALUATION, EVALUATION, {"fp32": EVALUATION, "int8": EVALUATION})
NETWORK = Network(ARCHITECTURE, None, FILE, SPEC, 10, 100, 2000, None)
HEAD_DIMS = HeadDims(
    "attn.qk_dims", "dims", 8, GROUP.members, (), queries=HeadRows(("qkv",), (0, 8)), keys=HeadRows(("qkv", "norm"), (16, 24)),
    values=None, scales=(("attn", "scale"),),
)  # fmt: skip
GROUPS = Groups(
    (GROUP, dataclasses.replace(GROUP, kind="heads", attributes=(UnitAttribute("attn", "num_heads", 1),)), HEAD_DIMS),
    (Refusal("norm", "normalises over its own units"),),
    (CostTerm("conv", 10, 100, (Axis(4, (("stem", 1),)), Axis(3, ()))),),
)

EXAMPLES: list[Any] = [
    FILE,
    NETWORK,
    Network(dataclasses.replace(ARCHITECTURE, source="timm", location=""), FILE, FILE, SPEC, 10, 1, 2, "apache-2.0"),
    Split(("cat", "dog"), (Image("cat/1.png", "cd", 0),), (), (Image("dog/ö.png", "ef", 1),)),
    GROUPS,
    SCORES,
    CURVES,
    PLAN,
    dataclasses.replace(PLAN, scores=None, dense_scores=None),
    ONNX,
    ACCURACY,
    Reference((0, 3, 2), EVALUATION),
    Gate(None, "bound", 0.95, "off", False, None),
    LatencyReport(FILE, "onnxruntime 1.32.0", (61.5, 60.25), 0.01, {"device": "x"}, {"load": [0.1, None]}),
    FileLatency(("fp32", "int8"), FILE),
    Engine(FILE, FILE, "10.3.0", "Orin", 27.8, ""),
    Prepared(
        "name: x\n",
        NETWORK,
        NETWORK,
        GROUPS,
        PLAN,
        ONNX,
        {"fp32": ONNX, "int8": ONNX},
        {},
        ACCURACY,
        ("cat", "dog"),
        None,
        (Reason(6, "variant fp16: no"),),
        {"python": "3.11"},
    ),
    BundleFiles(FILE, (FILE, dataclasses.replace(FILE, path=ROOT / "README.md"))),
]


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_disk_and_back(value: Any) -> None:
    stored = json.loads(canonical(encode(value, ROOT)))
    assert decode(type(value), stored, ROOT) == value


def test_every_artefact_has_an_example() -> None:
    members = [kind for _, kind in inspect.getmembers(artifacts, inspect.isclass)]
    defined = {kind for kind in members if dataclasses.is_dataclass(kind) and kind.__module__ == artifacts.__name__}

    def kinds(value: object) -> set[type]:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {type(value)}.union(*(kinds(getattr(value, field.name)) for field in dataclasses.fields(value)))
        items = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else []
        return set().union(*map(kinds, items))

    missing = defined - kinds(tuple(EXAMPLES)) - {ImageSet}  # ImageSet is an argument only
    assert sorted(kind.__name__ for kind in missing) == [], "add an example to EXAMPLES"


def test_integers_where_floats_belong_come_back_equal_in_key() -> None:
    """What a stage returns and what it is read back as must give the stages after it the same key."""
    step = PruningStep(1, 0.5, {}, 0)
    back = decode(PruningStep, encode(step, ROOT), ROOT)
    assert canonical(encode(back, ROOT)) == '{"drop_pp":0.0,"macs":0.5,"params":1.0,"removed":{},"scores":[]}'


def test_paths_are_relative_on_disk_and_follow_the_folder() -> None:
    stored = encode(ONNX, ROOT)
    assert stored["graph"]["path"] == "sub/weights.safetensors"
    assert decode(OnnxModel, stored, Path("/elsewhere")).graph.path == Path("/elsewhere/sub/weights.safetensors")


def test_file_outside_its_stage_is_refused() -> None:
    with pytest.raises(Exception, match=r"is not in the subpath of '/other'"):
        encode(ONNX, Path("/other"))


def test_wrong_data_is_refused() -> None:
    stored = encode(ONNX, ROOT)
    with pytest.raises(ValidationError, match="opset"):
        decode(OnnxModel, {**stored, "opset": "new"}, ROOT)
    with pytest.raises(ValidationError, match=r"graph\.sha256"):
        decode(OnnxModel, {**stored, "graph": {"path": "a", "bytes": 1}}, ROOT)


def test_canonical_has_one_spelling() -> None:
    assert canonical({"b": (1, 2), "a": {"d": None, "c": True}}) == '{"a":{"c":true,"d":null},"b":[1,2]}'
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert len({canonical(value) for value in (1, 1.0, True, "1", "true", [1], None, "null")}) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        canonical({"sqnr_db": [value]})


def test_file_of_counts_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * ((1 << 20) + 1))
    assert File.of(path) == File(path, hashlib.sha256(path.read_bytes()).hexdigest(), (1 << 20) + 1)
    assert sha256_of(path) == File.of(path).sha256


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.keep = {}  # type: ignore[misc]


def test_cost_of_a_plan() -> None:
    """Half of the units of one axis and a third of the other, by hand."""
    axes = (Axis(4, (("a", 1),)), Axis(9, (("b", 3),)))
    terms = (CostTerm("both", 36, 360, axes), CostTerm("fixed", 5, 50, ()))
    groups = Groups((dataclasses.replace(GROUP, name="a"), dataclasses.replace(GROUP, name="b", units=3)), (), terms)
    assert groups.cost({}) == (41, 410)
    assert groups.cost({"a": (0, 3), "b": (1,)}) == (36 / 2 / 3 + 5, 360 / 2 / 3 + 50)


def test_consumers_read_the_units_on_axis_one_of_weights() -> None:
    assert [member.tensor for member in GROUP.consumers] == ["conv.weight"]
    assert [member.tensor for member in GROUP.members] == ["conv.weight", "bias"]
