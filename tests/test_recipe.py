"""Recipes: defaults, paths, overrides, and every refusal with its place and its words."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cswap_deploy import recipe
from cswap_deploy.errors import RecipeError

HEAD = "name: small\nmodel: {name: resnet18}\ncalibration: {images: images}\n"
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a recipe into the current folder, so that places read `recipe.yaml:LINE`."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path: Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_defaults(write: Callable[[str], Path], tmp_path: Path) -> None:
    assert recipe.load(write(HEAD)).model_dump() == {
        "name": "small",
        "seed": 0,
        "device": "auto",
        "model": {
            "name": "resnet18",
            "factory": None,
            "kwargs": {},
            "pretrained": True,
            "checkpoint": None,
            "num_classes": None,
            "input": None,
        },
        "calibration": {"images": tmp_path / "images", "labels": None, "scoring": 1024, "holdout": None},
        "prune": {
            "target": {"macs": 0.7},
            "criterion": {
                "kind": "causal",
                "estimator": "screened",
                "intervention": "surgery",
                "images": 256,
                "alpha": 0.05,
            },
            "compensate": {"kind": "least_squares", "producer_steps": 2, "views": "auto"},
            "allocation": {"kind": "curves", "temperature": 4.0, "images": 256},
            "steps": 8,
            "round_to": "auto",
            "skip": (),
            "heads": "whole",
        },
        "ship": "fp32",
        "accuracy": {"max_drop": 1.0, "rule": "point", "confidence": 0.95},
        "onnx": {
            "opset": 18,
            "dynamic_batch": False,
            "runtimes": (),
            "ort_format": False,
            "image_input": False,
        },
        "variants": (),
        "int8": {"images": 128, "max_drop": 0.5, "max_float": 0.25},
        "sign": None,
        "engine": None,
        "latency": None,
    }


def test_defaults_of_the_device_half(write: Callable[[str], Path]) -> None:
    loaded = recipe.load(write(HEAD + "engine: {precision: int8}\nlatency: {}\n"))
    assert loaded.engine is not None and loaded.latency is not None
    assert loaded.engine.model_dump() == {
        "precision": "int8",
        "workspace_mib": 1024,
        "optimization_level": 3,
        "dla_core": None,
        "dla_fallback": False,
        "batch": {"min": 1, "opt": 1, "max": 1},
        "keep_fp32": "auto",
    }
    assert loaded.latency.model_dump() == {
        "runtime": "tensorrt",
        "target": "local",
        "batch": 1,
        "threads": 1,
        "warmup_s": 1.0,
        "duration_s": 5.0,
    }
    assert loaded.ship == "int8"


@pytest.mark.parametrize(
    ("block", "target"),
    [
        ("{macs: 1}", recipe.MacsTarget(macs=1.0)),
        ("{params: 0.5}", recipe.ParamsTarget(params=0.5)),
        ("{max_drop: 2}", recipe.MaxDropTarget(max_drop=2.0)),
        ("{latency_ms: 4.5}", recipe.LatencyTarget(latency_ms=4.5, percentile=50, trials=8)),
        ("{fps: 60, percentile: 99, trials: 3}", recipe.FpsTarget(fps=60.0, percentile=99, trials=3)),
        ("null", None),
    ],
)
def test_targets(write: Callable[[str], Path], block: str, target: Any) -> None:
    loaded = recipe.load(write(HEAD + f"latency: {{}}\nprune: {{target: {block}}}\n"))
    assert loaded.prune.target == target
    assert type(loaded.prune.target) is type(target)


@pytest.mark.parametrize(
    ("text", "criterion"),
    [
        ("taylor", recipe.TaylorCriterion(images=256)),
        ("{kind: taylor, images: 9}", recipe.TaylorCriterion(images=9)),
        ("magnitude", recipe.MagnitudeCriterion()),
        ("variance", recipe.VarianceCriterion()),
        ("{kind: random}", recipe.RandomCriterion()),
        ("{kind: causal, estimator: exact}", recipe.CausalCriterion(estimator="exact")),
    ],
)
def test_criteria(write: Callable[[str], Path], text: str, criterion: Any) -> None:
    assert recipe.load(write(HEAD + f"prune: {{criterion: {text}}}\n")).prune.criterion == criterion


@pytest.mark.parametrize(
    ("text", "compensation"),
    [
        ("none", recipe.NoCompensation()),
        ("mean", recipe.MeanCompensation()),
        ("{kind: batchnorm}", recipe.BatchNormCompensation()),
    ],
)
def test_compensations(write: Callable[[str], Path], text: str, compensation: Any) -> None:
    assert recipe.load(write(HEAD + f"prune: {{compensate: {text}}}\n")).prune.compensate == compensation


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("{name: resnet18}", True),
        ("{name: resnet18, pretrained: null}", True),
        ("{name: resnet18, pretrained: false}", False),
        ("{name: resnet18, checkpoint: w.pth}", False),
        ("{factory: 'nets:small'}", False),
    ],
)
def test_pretrained_follows_the_source(write: Callable[[str], Path], model: str, pretrained: bool) -> None:
    text = f"name: small\nmodel: {model}\ncalibration: {{images: images}}\n"
    assert recipe.load(write(text)).model.pretrained is pretrained


@pytest.mark.parametrize("size", ["224", "[224, 224]"])
def test_size(write: Callable[[str], Path], size: str) -> None:
    loaded = recipe.load(write(HEAD), [f"model.input.size={size}"])
    assert loaded.model.input == recipe.InputSettings(size=(224, 224))


@pytest.mark.parametrize(
    "target", ["local", "ssh://orin", "ssh://me@orin.local:22", "ssh://me@10.0.0.7:65535", "ssh://[fe80::1]:22"]
)
def test_device_targets(write: Callable[[str], Path], target: str) -> None:
    loaded = recipe.load(write(HEAD + f'latency: {{target: "{target}"}}\n'))
    assert loaded.latency is not None and loaded.latency.target == target


def test_paths_are_of_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deep" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(
        "name: small\nmodel: {factory: ../nets.py:net, checkpoint: ~/w.pth}\n"
        "calibration: {images: ./images, labels: /data/labels.txt}\n"
    )
    loaded = recipe.load(Path("deep/recipe.yaml"))
    assert loaded.model.factory == f"{tmp_path}/nets.py:net"
    assert loaded.model.factory_file == tmp_path / "nets.py"
    assert loaded.model.checkpoint == tmp_path / "home/w.pth"
    assert loaded.calibration.images == tmp_path / "deep/images"
    assert loaded.calibration.labels == Path("/data/labels.txt")
    assert recipe.load(path, ["calibration.images=images"]).calibration.images == tmp_path / "images"
    assert recipe.load(path, ["calibration={images: images}"]).calibration.images == tmp_path / "images"


def test_a_package_factory_has_no_file(write: Callable[[str], Path]) -> None:
    model = recipe.load(write(HEAD), ["model={factory: 'nets.small:net'}"]).model
    assert (model.factory, model.factory_file) == ("nets.small:net", None)


def test_overrides(write: Callable[[str], Path]) -> None:
    path = write(HEAD + "prune:\n  steps: 4\n")
    loaded = recipe.load(path, ["prune.steps=5", "prune.target={params: 0.5}", "model.kwargs.drop_rate=0.1", "seed=3"])
    assert (loaded.prune.steps, loaded.prune.target, loaded.seed) == (5, recipe.ParamsTarget(params=0.5), 3)
    assert loaded.model.kwargs == {"drop_rate": 0.1}
    assert recipe.load(path, ["prune.steps=many", "prune.steps=6"]).prune.steps == 6
    assert refused(path, "prune.target={params: 0.5, macs: 0.5}").where.startswith("--set prune.target=")


def test_an_override_repairs_the_file(write: Callable[[str], Path]) -> None:
    assert recipe.load(write(HEAD + "seed: many\n"), ["seed=1"]).seed == 1


def test_where(write: Callable[[str], Path]) -> None:
    loaded = recipe.load(write(HEAD + "prune:\n  target:\n    macs: 0.5\n"), ["seed=3"])
    assert loaded.where("prune.target.macs") == "recipe.yaml:6"
    assert loaded.where("prune.criterion.images") == "recipe.yaml:4"
    assert loaded.where("accuracy.max_drop") == "recipe.yaml:1"
    assert loaded.where("seed") == "--set seed=3"
    assert loaded == recipe.load(write("# moved\n" + HEAD + "seed: 3\nprune: {target: {macs: 0.5}}\n"))


def test_settings_are_frozen_values() -> None:
    prune = recipe.PruneSettings(skip=("head",))
    assert prune == recipe.PruneSettings.model_validate({"skip": ["head"]})
    with pytest.raises(ValidationError, match="frozen"):
        prune.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="a factory has no timm weights"):
        recipe.ModelSettings(factory="nets:net", pretrained=True)


def test_python_and_yaml_resolve_alike(write: Callable[[str], Path], tmp_path: Path) -> None:
    built = recipe.Recipe(
        name="small",
        model=recipe.ModelSettings(name="resnet18"),
        calibration=recipe.CalibrationSettings(images=tmp_path / "images"),
        engine=recipe.EngineSettings(precision="fp16"),
        latency=recipe.LatencySettings(batch=1),
    )
    assert built == recipe.load(write(HEAD + "engine: {precision: fp16}\nlatency: {}\n"))
    assert built.where("seed") == "the recipe"


# --- what is refused -------------------------------------------------------------------------------------------------

BAD = [
    # text after HEAD (which has three lines), line, key, fragment
    ("sead: 3", 4, "sead", "unknown key; did you mean 'seed'?"),
    ("device: gpu", 4, "device", "got 'gpu'; did you mean 'cuda'?"),
    ("prune: {target: {macs:0.7}}", 4, "prune.target.macs:0.7", "a space is missing after 'macs:'"),
    ("latency: {percentil: 90}", 4, "latency.percentil", "unknown key; valid here: runtime"),
    ("zzz: 3", 4, "zzz", "unknown key; valid here: name, seed, device, model"),
    ("prune: {target: {mac: 0.7}}", 4, "prune.target.mac", "unknown key; did you mean 'macs'?"),
    ("prune:\n  target:\n    flips: 1", 6, "prune.target.flips", "unknown key; "),
    ("prune: {target: {macs: 0.5, params: 0.5}}", 4, "prune.target", "got macs and params"),
    ("prune: {target: {}}", 4, "prune.target", "one of the keys macs, params, max_drop, latency_ms, fps, got {}"),
    ("prune: {target: {trials: 3}}", 4, "prune.target", "one of the keys macs, params"),
    ("prune: {target: 0.7}", 4, "prune.target", "expected null or a block with one of the keys macs"),
    ("prune: {target: {macs: 70%}}", 4, "prune.target.macs", "a number above 0 and at most 1, got '70%'"),
    ("prune: {target: {macs: 1.5}}", 4, "prune.target.macs", "a number above 0 and at most 1, got 1.5"),
    ("prune: {target: {params: 0}}", 4, "prune.target.params", "got 0"),
    ("prune: {target: {max_drop: -1}}", 4, "prune.target.max_drop", "a number above 0 and at most 100, got -1"),
    ("prune: {target: {macs: .nan}}", 4, "prune.target.macs", "got .nan"),
    ("prune: {target: {macs: 0.5, percentile: 50}}", 4, "prune.target.percentile", "unknown key; valid here: macs"),
    (
        "latency: {}\nprune: {target: {fps: 9, percentile: 95}}",
        5,
        "prune.target.percentile",
        "one of 50, 90, 99, got 95",
    ),
    ("prune:\n  criterion: tailor", 5, "prune.criterion", "got 'tailor'; did you mean 'taylor'?"),
    ("prune:\n  criterion:\n    kind: casual", 6, "prune.criterion.kind", "did you mean 'causal'?"),
    ("prune: {criterion: {images: 3}}", 4, "prune.criterion", "one of causal, taylor, magnitude, variance, random"),
    (
        "prune: {criterion: {kind: taylor, alpha: 1}}",
        4,
        "prune.criterion.alpha",
        "unknown key; valid here: kind, images",
    ),
    ("prune: {criterion: {kind: causal, alpha: 1}}", 4, "prune.criterion.alpha", "above 0 and below 1, got 1"),
    (
        "prune: {compensate: {kind: 3}}",
        4,
        "prune.compensate.kind",
        "one of none, mean, batchnorm, least_squares, got 3",
    ),
    ("prune:\n\n  steps: many", 6, "prune.steps", "expected an integer from 1 to 100, got 'many'"),
    ("prune: {steps: 0}", 4, "prune.steps", "an integer from 1 to 100, got 0"),
    ('prune: {steps: "8"}', 4, "prune.steps", "got '8' (in quotes it is text)"),
    ("prune: {steps: true}", 4, "prune.steps", "an integer from 1 to 100, got true"),
    ("prune: {steps: 8.0}", 4, "prune.steps", "got 8.0"),
    (
        "prune: {round_to: atuo}",
        4,
        "prune.round_to",
        "an integer of at least 1 or auto, got 'atuo'; did you mean 'auto'?",
    ),
    ("prune: {skip: head}", 4, "prune.skip", "expected a list, each text, got 'head'"),
    ("prune: {skip:\n  [a,\n  3]}", 6, "prune.skip.1", "expected text, got 3 (put it in quotes"),
    ("prune:", 4, "prune", "expected a block with keys among target, criterion, compensate, allocation, steps"),
    ("device: gpu", 4, "device", "expected one of auto, cpu, cuda, got 'gpu'"),
    ("seed: -1", 4, "seed", "an integer from 0 to 4294967295, got -1"),
    ("accuracy: {rule: bond}", 4, "accuracy.rule", "one of point, bound, got 'bond'; did you mean 'bound'?"),
    ("accuracy: {max_drop: none}", 4, "accuracy.max_drop", "a number from 0 to 100 or null, got 'none'"),
    ("onnx: {opset: 23}", 4, "onnx.opset", "an integer from 18 to 22, got 23"),
    ("onnx: {dynamic_batch: 1}", 4, "onnx.dynamic_batch", "expected true or false, got 1"),
    ("variants: fp16", 4, "variants", "expected a list, each one of fp16, int8"),
    ("variants: [int9]", 4, "variants.0", "got 'int9'; did you mean 'int8'?"),
    ("ship: fp8", 4, "ship", "expected one of fp32, fp16, int8, got 'fp8'"),
    ("engine: {}", 4, "engine.precision", "required and not given; for example `precision: fp16`"),
    ("engine: {precison: fp16}", 4, "engine.precison", "unknown key; did you mean 'precision'?"),
    ("engine:\n  precision: fp32\n  dla_core: 0", 6, "engine.dla_core", "fp16 and int8 only, got 0"),
    ("engine: {precision: fp16, batch: {min: 4}}", 4, "engine.batch", "min <= opt <= max, got 4, 1, 1"),
    ("ship: int8\nengine: {precision: fp16}", 4, "ship", "expected engine.precision (fp16) or fp32, got int8"),
    ("prune: {target: {latency_ms: 3}}", 4, "prune.target.latency_ms", "add a latency block"),
    ("prune: {target: {fps: 3}}", 4, "prune.target.fps", "add a latency block"),
    ("latency: {runtime: tensorrt}", 4, "latency.runtime", "add an engine block"),
    ("engine: {precision: fp16}\nlatency: {batch: 2}", 5, "latency.batch", "the engine (1 to 1), got 2"),
    (
        "latency: {target: ssh://-oProxyCommand=x}",
        4,
        "latency.target",
        "no user or host starts with '-', got 'ssh://-o",
    ),
    ("latency: {target: ssh://-l@host}", 4, "latency.target", "got 'ssh://-l@host'"),
    ("latency: {target: 'ssh://host:99999'}", 4, "latency.target", "got 'ssh://host:99999'"),
    ("latency: {target: orin}", 4, "latency.target", "expected local or ssh://[user@]host[:port]"),
    ("latency: {duration_s: 0}", 4, "latency.duration_s", "a number above 0, got 0"),
    ("seed: 1\nseed: 2", 5, "seed", "given twice, first at recipe.yaml:4"),
    ("seed: !!python/object:os.system x", 4, "seed", "the YAML tag python/object:os.system is not used"),
    ("prune: &a {target: *a}", 4, "prune.target", "an alias of a block is not supported"),
    ("onnx: {<<: {opset: 18}}", 4, "onnx", "expected keys that are text, got <<"),
    ("3: 4", 4, "", "expected keys that are text, got 3"),
]


def test_no_other_number_is_guessed(write: Callable[[str], Path]) -> None:
    error = refused(write(HEAD + "latency: {}\nprune: {target: {latency_ms: 5, percentile: 95}}\n"))
    assert error.message.endswith("expected one of 50, 90, 99, got 95")


@pytest.mark.parametrize(("text", "line", "key", "fragment"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_recipes(write: Callable[[str], Path], text: str, line: int, key: str, fragment: str) -> None:
    error = refused(write(HEAD + text + "\n"))
    assert (error.where, error.key) == (f"recipe.yaml:{line}", key)
    assert error.message.startswith(f"recipe.yaml:{line}: {key}: " if key else f"recipe.yaml:{line}: ")
    assert fragment in error.message
    assert len(error.message.splitlines()) == 1


BAD_HEADS = [
    ("", "recipe.yaml:1: the file is empty"),
    ("# nothing\n", "recipe.yaml:1: the file is empty"),
    ("- a\n", "recipe.yaml:1: expected a mapping of keys, got [a]"),
    ("small\n", "recipe.yaml:1: expected a mapping of keys, got 'small'"),
    ("name: a: b\n", "recipe.yaml:1:8: not valid YAML: mapping values are not allowed here"),
    ("name: a\n\tmodel: b\n", "recipe.yaml:2:1: not valid YAML: found character '\\t'"),
    ("name: a\n---\nname: b\n", "recipe.yaml:2:1: not valid YAML: but found another document"),
    ("name: \x01\n", "recipe.yaml:1:7: not valid YAML: a control character"),
    ("[" * 600, "recipe.yaml: not valid YAML: nested too deeply"),
    (HEAD.replace("small", "Small"), "recipe.yaml:1: name: expected lower-case letters"),
    (HEAD.replace("small", "12"), "got 12 (put it in quotes to make it text)"),
    (HEAD.replace("small", "small\nname: b"), "recipe.yaml:2: name: given twice, first at recipe.yaml:1"),
    (
        HEAD.replace("name: small\n", ""),
        "recipe.yaml:1: name: required and not given; for example `name: resnet18-orin`",
    ),
    ("name: a\n", "model: required and not given; for example `model: {name: resnet18}`"),
    (HEAD.replace("images: images", "scoring: 9"), "recipe.yaml:3: calibration.images: required and not given"),
    (
        HEAD.replace("images: images", "imags: x"),
        "recipe.yaml:3: calibration.imags: unknown key; did you mean 'images'?",
    ),
    (HEAD.replace("images: images", "images: ''"), "recipe.yaml:3: calibration.images: expected a path, got ''"),
    (HEAD.replace("images: images", "images: ~nobody-here/x"), "calibration.images: expected a path, got '~nobody"),
    (HEAD.replace("images: images", "images: 3"), "calibration.images: expected a path, got 3"),
    (HEAD.replace("images: images", "images: x, scoring: 7"), "calibration.scoring: expected an integer of at least 8"),
    (
        HEAD.replace("{name: resnet18}", "resnet18"),
        "recipe.yaml:2: model: expected a block with keys among name, factory",
    ),
    (HEAD.replace("{name: resnet18}", "{}"), "recipe.yaml:2: model: one of name and factory is required"),
    (HEAD.replace("resnet18}", "a, factory: 'nets.py:b'}"), "model.factory: name and factory exclude each other"),
    (HEAD.replace("name: resnet18", "factory: nets.py"), "expected file.py:function or package.module:function"),
    (HEAD.replace("name: resnet18", "factory: 'n:f', pretrained: true"), "model.pretrained: a factory has no timm"),
    (HEAD.replace("resnet18}", "a, pretrained: true, checkpoint: w}"), "model.pretrained: weights come from timm or"),
    (HEAD.replace("resnet18}", "a, kwargs: {num_classes: 3}}"), "write it as model.num_classes"),
    (HEAD.replace("resnet18}", "a, kwargs: {1: 3}}"), "model.kwargs: expected keys that are text, got 1"),
    (HEAD.replace("resnet18}", "a, kwargs: {a: .inf}}"), "model.kwargs.a: expected a plain value, got .inf"),
    (HEAD.replace("resnet18}", "a, input: {mean: [1, 2]}}"), "model.input.mean: expected a list of 3, each a number"),
    (HEAD.replace("resnet18}", "a, input: {std: [1, 1, 0]}}"), "model.input.std.2: expected a number above 0, got 0"),
    (
        HEAD.replace("resnet18}", "a, input: {size: 0}}"),
        "model.input.size: expected one side in pixels, or a list [height, width], got 0",
    ),
    (HEAD.replace("resnet18}", "a, num_classes: 0}"), "model.num_classes: expected an integer of at least 1 or null"),
]


@pytest.mark.parametrize(("text", "fragment"), BAD_HEADS, ids=[bad[0][:60] for bad in BAD_HEADS])
def test_bad_heads(write: Callable[[str], Path], text: str, fragment: str) -> None:
    assert fragment in refused(write(text)).message


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("name: a: b\n", "check the indentation of this line and the one before, and quote a text that holds ': '"),
        ("name: a\n\tmodel: b\n", "indent with spaces, and put a text that begins with a sign in quotes"),
        ("a: {b: 1\nc: 2\n", "close the bracket, or put a comma before this"),
        ("a:\n  b: 1\n c: 2\n", "let all keys of a block begin in the same column"),
        ("a: 'b\n", "close the quote"),
        ("a: 1\nb\n", "write a key as `name: value`"),
        ("name: a\n---\nname: b\n", "keep one recipe in a file, without a line of ---"),
    ],
)
def test_what_is_no_yaml_is_refused_with_a_way_out(write: Callable[[str], Path], text: str, way: str) -> None:
    assert refused(write(text)).hint == way


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("prune.target.mac=0.5", "--set prune.target.mac=0.5: prune.target.mac: unknown key; did you mean 'macs'?"),
        ("prun.steps=3", "--set prun.steps=3: prun: unknown key; did you mean 'prune'?"),
        ("prune.steps=many", "prune.steps: expected an integer from 1 to 100, got 'many'"),
        ("prune.steps='8'", "got '8' (in quotes it is text)"),
        ("prune.steps", "--set prune.steps: expected KEY.PATH=VALUE"),
        ("=3", "expected KEY.PATH=VALUE"),
        ("prune..steps=3", "expected KEY.PATH=VALUE"),
        ("seed=[1", "--set seed=[1: seed: not valid YAML"),
        ("name.first=a", "name.first: name is 'small' there, not a block of keys"),
        ("name=", "name: expected lower-case letters"),
    ],
)
def test_bad_overrides(write: Callable[[str], Path], override: str, fragment: str) -> None:
    error = refused(write(HEAD), override)
    assert fragment in error.message
    assert error.where == f"--set {override}"


def test_all_faults_are_listed_in_order(write: Callable[[str], Path]) -> None:
    path = write(HEAD + "prune:\n  target: {mac: 0.7}\n  steps: many\nseed: 1\nseed: 2\n")
    assert refused(path, "ship=fp64").message.splitlines() == [
        "recipe.yaml:5: prune.target.mac: unknown key; did you mean 'macs'?",
        "recipe.yaml:6: prune.steps: expected an integer from 1 to 100, got 'many'",
        "recipe.yaml:8: seed: given twice, first at recipe.yaml:7",
        "--set ship=fp64: ship: expected one of fp32, fp16, int8, got 'fp64'; did you mean 'fp16'?",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.yaml").message
    assert "is a directory" in refused(tmp_path).message
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: a\n# \xe9\n")
    assert refused(latin).message == f"{latin}:2: this is not UTF-8 text"


# --- schema, bundle and documentation --------------------------------------------------------------------------------


def test_schema_describes_every_key() -> None:
    schema = recipe.schema()
    assert schema["$schema"].endswith("2020-12/schema") and "$id" not in schema
    assert schema["required"] == ["name", "model", "calibration"]
    for block in [schema, *schema["$defs"].values()]:
        for key, node in block.get("properties", {}).items():
            assert node["description"], key
        assert block == {} or block["additionalProperties"] is False
    assert schema["$defs"]["TaylorCriterion"]["properties"]["kind"]["const"] == "taylor"
    assert schema["$defs"]["TaylorCriterion"]["required"] == ["kind"]


def test_schema_knows_the_keys_of_the_examples() -> None:
    schema = recipe.schema()

    def check(node: dict[str, Any], value: Any) -> bool:
        node = {**schema["$defs"][node["$ref"].rpartition("/")[2]], **node} if "$ref" in node else node
        if branches := node.get("anyOf") or node.get("oneOf"):
            return any(check(branch, value) for branch in branches)
        if isinstance(value, dict):
            keys = node.get("properties", {key: {} for key in value} if "additionalProperties" in node else {})
            return value.keys() <= keys.keys() and all(check(keys[key], value[key]) for key in value)
        if "enum" in node or "const" in node:
            return value in node.get("enum", [node.get("const")])
        types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
        fits = isinstance(value, types[node["type"]]) if node.get("type") in types else "type" not in node
        return fits and ("pattern" not in node or re.search(node["pattern"], value) is not None)

    from ruamel.yaml import YAML

    for example in examples():
        assert check(schema, YAML(typ="safe", pure=True).load(example))
    assert not check(schema, {"name": "Bad"})


def examples() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (DOCS / "recipe.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", [0, 1])
def test_documented_examples_load(write: Callable[[str], Path], number: int) -> None:
    assert recipe.load(write(examples()[number])).name.startswith("resnet18")


def test_documentation_is_current() -> None:
    generator = runpy.run_path(str(DOCS / "generate_recipe.py"))
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == generator["page"](), "run make docs"
    assert (DOCS / "recipe.schema.json").read_text(encoding="utf-8") == generator["schema_text"](), "run make docs"


def test_to_yaml_round_trip(write: Callable[[str], Path]) -> None:
    more = "prune: {criterion: taylor, skip: ['*.fc', '1.0'], round_to: 4}\nvariants: [int8]\nlatency: {}\n"
    loaded = recipe.load(write(HEAD + more), ["model.kwargs={a: [1, null, {b: 'yes'}], c: 1.0e-7}"])
    text = recipe.to_yaml(loaded, lambda path: "0" * 8)
    assert recipe.load(write(text)) == loaded
    assert "  labels: null\n" in text


def test_to_yaml_names_no_place_of_this_machine(write: Callable[[str], Path], tmp_path: Path) -> None:
    text = (
        "name: small\nmodel: {factory: nets.py:net, checkpoint: w.pth, kwargs: {cache: /home/me/cache}}\n"
        "calibration: {images: data/images, labels: labels.txt}\nlatency: {target: 'ssh://me@secret:22'}\n"
    )
    asked: list[Path] = []

    def digest(path: Path) -> str:
        asked.append(path)
        return f"d{path.name}"

    portable = recipe.to_yaml(recipe.load(write(text)), digest, board="Jetson Orin Nano")
    for line in (
        "  factory: nets.py:net  # sha256:dnets.py",
        "  checkpoint: w.pth  # sha256:dw.pth",
        "  images: images  # sha256:dimages",
        "  labels: labels.txt  # sha256:dlabels.txt",
        "  target: local  # Jetson Orin Nano, over ssh",
        "    cache: cache",
    ):
        assert line in re.sub(" +#", "  #", portable).splitlines()
    assert not re.search(rf"{tmp_path}|/home|secret|me@", portable)
    assert {path.parent for path in asked} == {tmp_path, tmp_path / "data"}


def test_to_yaml_strips_the_folder_of_a_local_timm_model(write: Callable[[str], Path]) -> None:
    loaded = recipe.load(write(HEAD), ["model.name='local-dir:/home/me/net'"])
    assert "  name: local-dir:net\n" in recipe.to_yaml(loaded, lambda _: "")


def test_importing_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'timm', 'numpy', 'onnx', 'onnxruntime'}"
    code = f"import sys, cswap_deploy.recipe; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
