"""The bundle on disk: reading it, and reloading its network. `assembling.py` writes it.

A bundle is not trusted: reading one imports nothing that it names and follows no path out of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cswap_deploy import manifest as manifests
from cswap_deploy.artifacts import Architecture, File, sha256_of
from cswap_deploy.digests import SEAL, is_sealed
from cswap_deploy.errors import ModelError, UsageError, VerifyError, require_module

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 << 20
ENGINE, LAYERS = "engine/model.engine", "engine/layers.json"
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
