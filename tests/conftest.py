"""What many tests build on: one real bundle, and a project whose network is so small that a test can afford its builds."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sshd
from PIL import Image

from cswap_deploy import export, pipeline, progress
from cswap_deploy.artifacts import File, InputSpec
from cswap_deploy.bundle import Bundle
from cswap_deploy.digests import sealed
from cswap_deploy.recipe import OnnxSettings, Recipe, load
from cswap_deploy.stage import Workdir

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
QUICK = (
    "latency=null",
    "prune.round_to=1",
    "prune.steps=1",
    "calibration.scoring=128",
    "calibration.holdout=100",
    "device=cpu",
)
"""Settings that make a build of the quickstart recipe short."""

COLOURS = {
    "blue": (-1, -1, 1),
    "cyan": (-1, 1, 1),
    "green": (-1, 1, -1),
    "magenta": (1, -1, 1),
    "red": (1, -1, -1),
    "yellow": (1, 1, -1),
}
SCORING, HOLDOUT = 8, 4
"""Images per class of a colours project."""

FACTORY = '''
"""A classifier of solid colours, weights set by hand: each class has COPIES units per layer, so that most can leave."""
from pathlib import Path

import torch
from torch import nn

COLOURS = torch.tensor({colours})
COPIES = 4


class Colours(nn.Module):
    def __init__(self, copies=COPIES):
        super().__init__()
        classes = len(COLOURS)
        width = copies * classes
        self.conv1 = nn.Conv2d(3, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        with torch.no_grad():
            self.conv1.weight.copy_(COLOURS.repeat(copies, 1)[:, :, None, None] / 3)
            self.conv1.bias.zero_()
            self.conv2.weight.zero_()
            self.conv2.weight[:, :, 1, 1] = torch.eye(width)
            self.fc.weight.copy_(torch.eye(classes).repeat(1, copies) * 8 / copies)
            self.fc.bias.zero_()

    def forward(self, x):
        x = self.conv1(x).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


def colours(copies=COPIES):
    marker = Path(__file__).with_name("imported")
    marker.touch()
    return Colours(copies)
'''
RECIPE = """
name: colours
device: cpu
model:
  factory: net.py:colours
  input: {size: 8, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: bilinear, crop_pct: 1.0}
calibration:
  images: images
prune:
  steps: 2
  target: {macs: 0.5}
"""


@dataclass(frozen=True)
class Built:
    """A recipe, the work folder that it was built in, and the bundle that came out."""

    recipe: Path
    overrides: tuple[str, ...]
    work: Path
    bundle: Bundle

    @property
    def manifest(self) -> dict[str, Any]:
        return self.bundle.manifest


@dataclass(frozen=True)
class Project:
    """A folder with a factory, images of solid colours and a recipe."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def load(self, *overrides: str) -> Recipe:
        return load(self.recipe, overrides)

    def build(self, *overrides: str, work: str = "work") -> Built:
        return build(self.recipe, overrides, self.folder / work)


def _has_vnni() -> bool:
    """Of processors that are no x86 too: their products of bytes do not saturate."""
    flags = Path("/proc/cpuinfo")
    return platform.machine() not in ("x86_64", "AMD64") or not flags.exists() or "vnni" in flags.read_text()


VNNI = _has_vnni()
NO_VNNI = "an x86 without VNNI adds products of uint8 and int8 in 16 bits, which saturates (docs/onnx.md)"


def build(recipe: Path, overrides: Sequence[str], work: Path, force: Sequence[str] = ()) -> Built:
    with Workdir(work, force).open() as opened:
        bundle = pipeline.build(load(recipe, overrides), opened)
    return Built(recipe, tuple(overrides), work, bundle)


def events(recipe: Path, overrides: Sequence[str], work: Path, force: Sequence[str] = ()) -> dict[str, str]:
    """Stage → "up to date" or "finished", of one more build."""
    recording = progress.Recording()
    with progress.reporting(recording):
        build(recipe, overrides, work, force)
    return {event[1]: event[0] for event in recording.events if event[0] in ("up to date", "finished")}


def run(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of its own: `python` with these arguments, output captured."""
    command = [sys.executable, *map(str, arguments)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment}
    return subprocess.run(command, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=300, check=False)


def start_build(recipe: Path, work: Path, *options: str) -> subprocess.Popen[str]:
    """The real command in a process of its own, to be stopped by the test."""
    command = [sys.executable, "-m", "cswap_deploy", "build", str(recipe), "--work", str(work), *options]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.005)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traces(built: Built) -> dict[str, list[str]]:
    """Files of a bundle that tell about this machine, its user or a fault of a program, and by which words."""
    places = {str(ROOT), str(built.work), str(built.recipe.parent), str(Path.home()), tempfile.gettempdir(), sys.prefix}
    user = getpass.getuser()
    words = [place for place in places if len(place) > 3] + [f"/home/{user}", f"/{user}/", os.uname().nodename]
    words += ["Traceback", "site-packages", "stack_trace", "pkg.torch", 'File "']
    told = {
        name: [word for word in words if word.encode() in content]
        for name, content in tree(built.bundle.folder).items()
    }
    return {name: found for name, found in told.items() if found}


def reseal(folder: Path) -> None:
    """The manifest of someone who wants a changed file to be believed."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    for entry in document["files"]:
        content = folder / entry["path"]
        entry.update(sha256=File.of(content).sha256, bytes=content.stat().st_size)
    path.write_text(json.dumps(sealed(document)), "utf-8")


def faults(value: Any, schema: dict[str, Any], place: str = "$") -> Iterator[str]:
    """Where a document breaks a JSON Schema: the keywords that our schemas use; an unknown keyword is a KeyError."""
    for keyword, wanted in schema.items():
        if not _KEYWORDS[keyword](value, wanted):
            yield f"{place}: {keyword} {json.dumps(wanted)[:80]}, found {json.dumps(value)[:80]}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, item in value.items():
            rest = schema.get("additionalProperties", {})
            yield from faults(item, known.get(name, rest if isinstance(rest, dict) else {}), f"{place}.{name}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{place}[{number}]")


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    return not any(faults(value, schema))


def _is_type(value: Any, name: str) -> bool:
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    if name in ("number", "integer"):
        return isinstance(value, int | float if name == "number" else int) and not isinstance(value, bool)
    return isinstance(value, kinds[name])


_KEYWORDS = {
    "$schema": lambda value, wanted: True,
    "title": lambda value, wanted: True,
    "format": lambda value, wanted: True,
    "properties": lambda value, wanted: True,
    "additionalProperties": lambda value, wanted: True,
    "items": lambda value, wanted: True,
    "type": _is_type,
    "const": lambda value, wanted: value == wanted,
    "enum": lambda value, wanted: value in wanted,
    "required": lambda value, wanted: not isinstance(value, dict) or set(wanted) <= set(value),
    "minimum": lambda value, wanted: not isinstance(value, int | float) or value >= wanted,
    "maximum": lambda value, wanted: not isinstance(value, int | float) or value <= wanted,
    "minItems": lambda value, wanted: not isinstance(value, list) or len(value) >= wanted,
    "maxItems": lambda value, wanted: not isinstance(value, list) or len(value) <= wanted,
    "anyOf": lambda value, wanted: any(_fits(value, schema) for schema in wanted),
    "oneOf": lambda value, wanted: sum(_fits(value, schema) for schema in wanted) == 1,
}


def make_project(folder: Path) -> Project:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(
        FACTORY.replace("{colours}", repr([[float(v) for v in c] for c in COLOURS.values()]))
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    random = np.random.default_rng(0)
    for part, images in (("scoring", SCORING), ("holdout", HOLDOUT)):
        for name, colour in COLOURS.items():
            (folder / "images" / part / name).mkdir(parents=True)
            for number in range(images):
                noise = random.integers(-40, 41, (8, 8, 3))
                pixels = np.clip(127 + 80 * np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{number}.png")
    return Project(folder)


def benchmark(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The embedded digits and CNN, really built, once for all workers; each has a copy, which tests only read."""
    base = tmp_path_factory.getbasetemp()
    master = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built-quickstart"
    recipe, work = ROOT / "recipes" / "quickstart.yaml", tmp_path_factory.mktemp("quickstart") / "work"
    with master.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (master / "bundle").exists():
            build(recipe, QUICK, master)
    shutil.copytree(master, work, symlinks=True)
    return Built(recipe, tuple(QUICK), work, Bundle.read(work / "bundle"))


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A factory's network, really built; tests only read it."""
    return make_project(tmp_path_factory.mktemp("colours") / "project").build()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A colours project of the test's own, in a folder of the test's own."""
    return make_project(tmp_path / "project")


@pytest.fixture(scope="session")
def exports() -> dict[str, bytes]:
    """ONNX graphs by the digest of what they were exported from."""
    return {}


@pytest.fixture
def cheap_export(monkeypatch: pytest.MonkeyPatch, exports: dict[str, bytes]) -> None:
    """For tests about other stages: a network is exported once per session, and its graph passes for the simplified one."""
    import onnx

    really_export = export._export

    def remembered(module: torch.nn.Module, spec: InputSpec, settings: OnnxSettings) -> onnx.ModelProto:
        values = hashlib.sha256(repr(module).encode())
        for name, tensor in module.state_dict().items():
            values.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        key = f"{values.hexdigest()} {spec} {settings}"
        if key not in exports:
            exports[key] = really_export(module, spec, settings).SerializeToString()
        return onnx.load_from_string(exports[key])

    monkeypatch.setattr(export, "_export", remembered)
    monkeypatch.setattr(export, "_run_onnxsim", lambda source, target: shutil.copyfile(source, target) and None)


@pytest.fixture
def copy(quickstart: Built, tmp_path: Path) -> Path:
    """A copy of the quickstart's bundle to tamper with."""
    return shutil.copytree(quickstart.bundle.folder, tmp_path / "bundle")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the agents of a file of tests keep their things, in place of ~/.cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def device() -> Iterator[sshd.Device]:
    """One for all tests of ssh: it has a user of its own."""
    with sshd.device() as found:
        yield found


@pytest.fixture(scope="session")
def server(device: sshd.Device) -> Iterator[sshd.Server]:
    with device.serving() as found:
        yield found
