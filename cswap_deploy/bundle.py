"""The bundle: everything a Jetson or phone team needs, in one folder with a manifest. Assembling, reading, reloading.

A bundle is not trusted: reading one imports nothing that it names and follows no path out of it.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cswap_deploy import bom, facts, handoff, onnx_facts
from cswap_deploy import manifest as manifests
from cswap_deploy.artifacts import (
    Architecture,
    BundleFiles,
    Engine,
    Evaluation,
    File,
    FileLatency,
    LatencyReport,
    OnnxModel,
    sha256_of,
)
from cswap_deploy.budget import account
from cswap_deploy.digests import SEAL, is_sealed, sealed
from cswap_deploy.errors import ModelError, UsageError, VerifyError, require_module
from cswap_deploy.handoff import FILES
from cswap_deploy.prepared import Prepared, Reason
from cswap_deploy.recipe import (
    AccuracySettings,
    EngineSettings,
    LatencySettings,
    OnnxSettings,
    Precision,
    PruneSettings,
    Recipe,
)
from cswap_deploy.report import render_card, render_html, render_readme, web_files
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

MANIFEST = "manifest.json"
RECORD = "# A record of what was built; local files are named without their folders, with their sha256.\n"
LARGEST_MANIFEST = 64 << 20
ENGINE, LAYERS = "engine/model.engine", "engine/layers.json"
ENVIRONMENT = ("torch", "timm", "onnx", "onnxruntime", "onnxsim", "onnxscript", "numpy")
SAFE_KWARGS = frozenset(
    (
        "num_classes in_chans img_size patch_size embed_dim depth depths num_heads mlp_ratio qkv_bias global_pool "
        "class_token drop_rate drop_path_rate proj_drop_rate attn_drop_rate pos_drop_rate channels stem_type stem_width "
        "stem_chs width base_width cardinality output_stride window_size dims kernel_size layers growth_rate fix_stem "
        "reg_tokens init_values channel_multiplier depth_multiplier dynamic_img_size no_embed_class pre_norm fc_norm "
        "ls_init_value"
    ).split()
)
"""Arguments that only set sizes; a bundle whose network was built with others is reloaded through the caller's factory."""

MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, RecursionError)
"""What code that trusts its input raises when a plan or an array holds something else than we write."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; reading it needs no torch."""

    folder: Path
    manifest: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Bundle:
        """Errors: UsageError when there is no bundle, VerifyError when its manifest is not one of ours.

        Every key that the manifest must have is there and of its type afterwards, and no listed name leads out.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UsageError(
                f"{folder} is not a bundle: it holds no {MANIFEST}", "give the bundle folder of a work folder"
            )
        _inside(folder, MANIFEST)
        if path.stat().st_size > LARGEST_MANIFEST:
            raise VerifyError(f"{path} is larger than any manifest of this tool", "build the bundle again")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise VerifyError(f"{path} is not valid JSON: {error}", "build the bundle again") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != manifests.SCHEMA:
            raise VerifyError(f"{path} has schema {schema!r}, expected {manifests.SCHEMA!r}", "update cswap-deploy")
        if fault := next(manifests.faults(document, manifests.schema()), None):
            raise VerifyError(f"{path} is not a manifest: {fault.removeprefix(': ')}", "build the bundle again")
        for entry in document["files"]:
            _require_plain(entry["path"])
        return Bundle(folder, document)

    def require_sealed(self) -> Bundle:
        """This bundle. Errors: VerifyError when a value of the manifest is not the one that was written; earlier versions kept no seal."""
        if SEAL in self.manifest and not is_sealed(self.manifest):
            raise VerifyError(
                f"{self.folder / MANIFEST} is not as it was written: its sha256 differs",
                "copy the bundle again, or build it again",
            )
        return self

    @property
    def verdict(self) -> str:
        return str(self.manifest["verdict"])

    def file(self, name: str) -> File:
        """A listed file, its digest checked. Errors: VerifyError."""
        entry = next((item for item in self.manifest["files"] if item["path"] == name), None)
        if entry is None:
            raise VerifyError(f"the manifest of {self.folder} lists no file {name!r}")
        path = _inside(self.folder, name)
        if not path.is_file():
            raise VerifyError(f"file {name!r} of the bundle is missing", "copy the bundle again")
        if sha256_of(path) != entry["sha256"]:
            raise VerifyError(f"file {name!r} of the bundle is not what the manifest says", "copy the bundle again")
        return File(path, entry["sha256"], path.stat().st_size)


def load_pruned(bundle: Path | str, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The pruned PyTorch module of a bundle, in eval mode on the CPU, bit-equal to the one that was exported.

    A timm network is rebuilt from timm's own registry without a checkpoint; a factory network needs the caller's
    `factory`, called with the recorded kwargs: nothing that a bundle names is imported. The test vectors are replayed.
    Errors: ModelError, VerifyError.
    """
    for library in ("torch", "timm", "safetensors"):
        require_module(library)
    from cswap_deploy.model import build
    from cswap_deploy.prune.cut import rebuild

    opened = Bundle.read(Path(bundle))
    architecture = _architecture(opened.manifest["model"])
    if factory is not None:
        dense = _called(factory, architecture.kwargs)
    elif architecture.source == "factory":
        raise ModelError(
            f"this bundle's network comes from a factory ({architecture.name}), which is not imported from a bundle",
            "pass it yourself: load_pruned(bundle, factory=your_function)",
        )
    else:
        _require_safe(architecture)
        dense = build(architecture)
    plan, weights = opened.file("plan.json"), opened.file("weights.safetensors")
    try:
        module = rebuild(dense, architecture, plan, weights)
    except MALFORMED as error:
        raise ModelError(
            f"the bundle's plan.json does not fit the network: {type(error).__name__}: {error}",
            "copy the bundle again, or build it again",
        ) from error
    _replay(module, opened)
    return module


@dataclass(frozen=True)
class Terms:
    """What the recipe says about the bundle: nothing in it names a path."""

    name: str
    prune: PruneSettings
    accuracy: AccuracySettings
    ship: Precision
    ships_engine: bool
    shipped_file: str
    remote: bool
    engine: EngineSettings | None
    latency: LatencySettings | None
    onnx: OnnxSettings

    @staticmethod
    def of(recipe: Recipe) -> Terms:
        return Terms(**{item.name: getattr(recipe, item.name) for item in fields(Terms)})


@dataclass(frozen=True)
class Deployed:
    """The device's half: what was built and measured on the target. Nothing, when nothing was asked for or it failed."""

    engine: Engine | None = None
    on_engine: Evaluation | None = None
    latency: LatencyReport | None = None
    files: FileLatency | None = None
    reasons: tuple[Reason, ...] = ()


@stage("bundle", returns=BundleFiles, libraries=("cswap-deploy", "jinja2"))
def assemble(
    out: Path, terms: Terms, ready: Prepared, deployed: Deployed, holdout_reads: int, created: str
) -> BundleFiles:
    """Write the bundle; the manifest is written last and lists every other file. Equal arguments give equal bytes."""
    assert ready.pruned.plan is not None
    copies = handoff.copies(ready.models, ready.models["fp32"].vectors)
    copies |= {"plan.json": ready.pruned.plan, "weights.safetensors": ready.pruned.weights}
    if deployed.engine:
        copies |= {ENGINE: deployed.engine.file, LAYERS: deployed.engine.layers}
    for name, file in copies.items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file.path, out / name)
    (out / "recipe.yaml").write_text(RECORD + _placed(ready.recipe, terms, deployed), encoding="utf-8")
    handoff.write(out, ready.models, ready.labels, ready.source.input)
    for name, text in web_files().items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    document = _manifest(terms, ready, deployed, holdout_reads, sha256_of(out / "recipe.yaml"), created)
    document["files"] = _entries(out)
    later: dict[str, Callable[[], str]] = {
        "bom.cdx.json": lambda: json.dumps(bom.bill(document), indent=1, ensure_ascii=False) + "\n",
        "README.md": lambda: render_readme(document),
        "MODEL_CARD.md": lambda: render_card(document),
        "report.html": lambda: render_html(document),  # it names all files but itself
        MANIFEST: lambda: json.dumps(sealed(document), indent=1, ensure_ascii=False),
    }
    for name, text_of in later.items():
        (out / name).write_text(text_of(), encoding="utf-8")
        document["files"] = _entries(out)
    manifest = out / MANIFEST
    others = [File.of(path) for path in sorted(out.rglob("*")) if path.is_file() and path != manifest]
    return BundleFiles(File.of(manifest), (*others, File.of(manifest)))


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Every file in it, by name."""
    files = sorted((File.of(path) for path in folder.rglob("*") if path.is_file()), key=lambda file: file.path)
    return [
        {"path": file.path.relative_to(folder).as_posix(), "sha256": file.sha256, "bytes": file.bytes} for file in files
    ]


def _manifest(
    terms: Terms, ready: Prepared, deployed: Deployed, holdout_reads: int, recipe_sha256: str, created: str
) -> dict[str, Any]:
    """Everything but the list of files."""
    name, shipped = _shipped(terms, ready, deployed)
    verdict = facts.gate_of(ready.accuracy, shipped, terms.accuracy)
    reasons = [*ready.reasons, *deployed.reasons, *facts.gate_reasons(ready.accuracy, shipped, verdict)]
    budget = account.account(ready.budget, ready.groups, deployed.latency) if ready.budget else None
    reasons += account.reasons(budget) if budget else []
    reasons.sort(key=lambda reason: reason.exit_code)
    prune = terms.prune
    how = ("none", "none", "none")
    if prune.target is not None:
        how = (prune.criterion.kind, prune.compensate.kind, prune.allocation.kind)
    no_engine = next((reason.text for reason in deployed.reasons), "")
    engine, latency = deployed.engine, deployed.latency
    return {
        "schema": manifests.SCHEMA,
        "name": terms.name,
        "created": created,
        "tool": {"name": "cswap-deploy", "version": metadata.version("cswap-deploy")},
        "recipe_sha256": recipe_sha256,
        "shipped": name,
        "verdict": "fail" if reasons else "pass",
        "reasons": [reason.text for reason in reasons],
        "exit_code": reasons[0].exit_code if reasons else 0,
        "model": facts.model_block(ready.source),
        "pruned": facts.pruned_block(ready.pruned, ready.plan, ready.groups, *how),
        "accuracy": facts.accuracy_block(
            ready.accuracy, deployed.on_engine, shipped, verdict, ready.labels, holdout_reads
        ),
        "size": facts.size_block(ready.source, ready.pruned, *_sizes(name, ready, deployed)),
        "onnx": onnx_facts.onnx_block(
            ready.exported, ready.models, FILES, ready.accuracy, verdict, terms.onnx.runtimes, deployed.files
        ),
        "latency": facts.latency_block(latency, terms.latency, terms.ship, terms.remote)
        if latency and terms.latency
        else None,
        "budget": budget,
        "engine": facts.engine_block(engine, terms.engine, "" if engine else no_engine, terms.onnx.dynamic_batch)
        if terms.engine
        else None,
        "environment": ready.environment,
    }


def _placed(recipe: str, terms: Terms, deployed: Deployed) -> str:
    """The resolved recipe with the board that was measured in place of the target's address."""
    device = deployed.latency.conditions["device"] if deployed.latency else "another machine" if terms.remote else ""
    place = f"{device}, over ssh" if terms.remote else device
    return re.sub(r"(?m)^(  target: local).*$", lambda found: f"{found[1]}  # {place}" if place else found[1], recipe)


def _shipped(terms: Terms, ready: Prepared, deployed: Deployed) -> tuple[str, Evaluation]:
    """The file that ships, and how it did on the hold-out; where it is missing, which is a reason to fail, its nearest."""
    nearest = terms.shipped_file if terms.shipped_file in ready.models else "fp32"
    if terms.ships_engine and deployed.engine and deployed.on_engine:
        return ENGINE, deployed.on_engine
    return FILES[nearest], ready.accuracy.models[nearest]


def _sizes(name: str, ready: Prepared, deployed: Deployed) -> tuple[OnnxModel | None, int]:
    """The dense twin of the file that ships, and that file's bytes; a dense engine does not leave the target."""
    if name == ENGINE and deployed.engine:
        return None, deployed.engine.file.bytes
    nearest = next(key for key in ready.models if FILES[key] == name)
    return ready.dense.get(nearest), ready.models[nearest].graph.bytes


def _architecture(model: dict[str, Any]) -> Architecture:
    try:
        library = f"timm {metadata.version('timm')}"
    except metadata.PackageNotFoundError:
        library = "no timm"
    return Architecture(model["source"], str(model["name"]), dict(model["kwargs"]), library)


def _require_safe(architecture: Architecture) -> None:
    name = architecture.name
    if not name.replace(".", "_").isidentifier():
        raise ModelError(f"the bundle's model name {name!r} is not a name of timm's registry", "pass factory= yourself")
    other = sorted(set(architecture.kwargs) - SAFE_KWARGS)
    if other:
        raise ModelError(
            f"the bundle's network was built with {', '.join(other)}, which a bundle may not pass to timm",
            f"pass it yourself: load_pruned(bundle, factory=lambda **kwargs: timm.create_model({name!r}, **kwargs))",
        )


def _called(factory: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    from torch import nn

    module = factory(**kwargs)
    if not isinstance(module, nn.Module):
        raise ModelError(f"factory returned {type(module).__name__}", "it must return a torch.nn.Module")
    return module.eval()


def _replay(module: nn.Module, bundle: Bundle) -> None:
    """The test vectors must come out as they were recorded, up to the rounding of another machine."""
    import numpy as np
    import torch

    inputs, wanted = _vector(bundle, "test_vectors/input.npy"), _vector(bundle, "test_vectors/output.npy")
    try:
        with torch.no_grad():
            found = module(torch.from_numpy(inputs)).numpy()
    except MALFORMED as error:
        raise ModelError(f"the network cannot run on the test vectors: {error}", "build the bundle again") from error
    if found.shape != wanted.shape:
        raise ModelError(
            f"the network returns {found.shape}, the test vectors hold {wanted.shape}", "build the bundle again"
        )
    difference = float(np.abs(found - wanted).max())
    if not difference <= 1e-3 * max(float(np.abs(wanted).max()), 1e-6):
        made = json.loads(bundle.file("plan.json").path.read_text(encoding="utf-8"))["source"]["library"]
        raise ModelError(
            f"the reloaded network differs from the recorded test vectors by {difference:.2e}; made with {made}",
            "install the version of timm that the bundle was made with",
        )


def _vector(bundle: Bundle, name: str) -> NDArray[np.float32]:
    """Errors: VerifyError for anything but a plain array of floats that is not empty; nothing is unpickled."""
    import numpy as np

    try:
        with bundle.file(name).path.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except (*MALFORMED, EOFError, MemoryError) as error:
        raise VerifyError(f"{name} is not a plain array: {error}", "build the bundle again") from error
    if array.dtype != np.float32 or not array.size:
        raise VerifyError(f"{name} is not an array of float32", "build the bundle again")
    return array


def _inside(folder: Path, name: str) -> Path:
    """The path of a listed file, links resolved, which must not lead out of the bundle."""
    _require_plain(name)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise VerifyError(f"{name!r} leads out of the bundle {folder}", "copy the bundle with its links resolved")
    return path


def _require_plain(name: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\\" in name or not name.isprintable():
        raise VerifyError(f"the manifest names {name!r}, which lies outside the bundle", "build the bundle again")


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that make a bundle, and the platform."""
    versions = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    for library in ENVIRONMENT:
        try:
            versions[library.replace("-", "_")] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
