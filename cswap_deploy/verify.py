"""`cswap-deploy verify`: is a bundle what its manifest says, and does it still compute what was recorded.

A bundle is not trusted: nothing that it names is imported, nothing is unpickled, no path is followed out of it, and its
ONNX files run in a process of their own, which may crash or hang without harm. What passes agrees with itself; who wrote
it is another question. Needs numpy; onnxruntime, and torch with timm, where a check says so.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from cswap_deploy import isolated, signing, vectors
from cswap_deploy.artifacts import File
from cswap_deploy.bundle import ENGINE, MANIFEST, Bundle, load_pruned
from cswap_deploy.digests import SEAL
from cswap_deploy.errors import CswapError, DeviceError, UsageError, VerifyError, reason
from cswap_deploy.external_data import locations_in
from cswap_deploy.handoff import FILES
from cswap_deploy.isolated import AGAIN, Skipped
from cswap_deploy.ort_format import IDENTIFIER
from cswap_deploy.vectors import softmax

if TYPE_CHECKING:
    from torch import nn

    Factory = Callable[..., nn.Module]

VARIANTS = tuple(name for name in FILES if name != "fp32")
ALWAYS = ("manifest", "files", "unlisted", "onnx", "pytorch")
NAMES = (
    "manifest",
    "files",
    "unlisted",
    "signature",
    "onnx",
    *(f"onnx:{kind}" for kind in VARIANTS),
    "pytorch",
    "engine",
)
"""Every check that there is, in order; those of variants and of the engine only where the manifest names them."""

INPUT, OUTPUT, PIXELS = (f"test_vectors/{name}.npy" for name in ("input", "output", "pixels"))
LARGEST_FILE = 16 << 30
MOST_FILES = 1000


@dataclass(frozen=True)
class Check:
    """`detail`: the numbers, or why it was skipped or failed and what to do."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str


def verify(
    folder: Path,
    require: Sequence[str] = (),
    factory: Factory | None = None,
    public_key: Path | None = None,
    signature: Path | None = None,
) -> tuple[Check, ...]:
    """All checks, in the order of NAMES; one that fails does not stop the others. A skipped one of `require` has failed.

    `factory` makes the network of a bundle that came from a factory, as for load_pruned; it is the caller's own code.
    With `public_key` the signature is checked: `signature`, or the bundle's name with .sig beside it.
    Errors: UsageError when there is no bundle at all, or when `require` names a check that there is not.
    """
    try:
        bundle = Bundle.read(folder)
    except VerifyError as error:
        _require_known(require, NAMES)
        rest = [name for name in NAMES[1:] if name in ALWAYS or name in require]
        skipped = [Check(name, "skipped", "the manifest cannot be read") for name in rest]
        return _with_required([Check("manifest", "failed", str(error)), *skipped], require)
    names = _names(bundle, signed=public_key is not None)
    _require_known(require, names)
    runs = _runs(bundle, factory)
    if public_key is not None:
        runs["signature"] = partial(_signature, bundle.folder, signature, public_key)
    return _with_required([_outcome(name, runs[name]) for name in names], require)


@dataclass(frozen=True)
class _Contents:
    """The listed files: those that are what the manifest says, and what is wrong with the others."""

    files: Mapping[str, File]
    faults: Mapping[str, str]

    def path(self, name: str) -> Path:
        """A file that may be used. Errors: VerifyError when it is not listed, Skipped when it is not sound."""
        if name in self.faults:
            raise Skipped(f"{name}: {self.faults[name]}, see files")
        if name not in self.files:
            raise VerifyError(f"the manifest lists no file {name!r}", "build the bundle again")
        return self.files[name].path


def _names(bundle: Bundle, signed: bool) -> tuple[str, ...]:
    """The checks of this bundle, in order."""
    variants = {f"onnx:{kind}" for kind in _variants(bundle)}
    engine = {"engine"} if bundle.manifest["engine"] is not None else set()
    signature = {"signature"} if signed else set()
    return tuple(name for name in NAMES if name in {*ALWAYS, *variants, *engine, *signature})


def _runs(bundle: Bundle, factory: Factory | None) -> dict[str, Callable[[], str]]:
    """Each check returns its detail, or raises VerifyError or Skipped."""
    contents, variants = _read_files(bundle), _variants(bundle)
    return {
        "manifest": partial(_manifest, bundle),
        "files": partial(_files, bundle, contents),
        "unlisted": partial(_unlisted, bundle),
        "onnx": partial(_onnx, contents, "fp32", FILES["fp32"]),
        **{
            f"onnx:{kind}": partial(_onnx, contents, kind, entry["file"], entry["parity"]["max_abs"])
            for kind, entry in variants.items()
        },
        "pytorch": partial(_pytorch, bundle, contents, factory),
        "engine": partial(_engine, bundle.manifest["engine"], contents),
    }


def _outcome(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", run())
    except Skipped as why:
        return Check(name, "skipped", str(why))
    except CswapError as error:
        return Check(name, "failed", str(error))
    except (OSError, MemoryError) as error:
        return Check(name, "failed", f"{reason(error)} ({AGAIN})")


def _require_known(require: Sequence[str], possible: Sequence[str]) -> None:
    for name in require:
        if name not in possible:
            raise UsageError(
                f"--require: this bundle has no check {name!r}",
                f"choose from {', '.join(possible)}, with commas between",
            )


def _with_required(checks: Sequence[Check], require: Sequence[str]) -> tuple[Check, ...]:
    return tuple(
        Check(check.name, "failed", f"required, but skipped: {check.detail}")
        if check.outcome == "skipped" and check.name in require
        else check
        for check in checks
    )


# --- manifest and files


def _manifest(bundle: Bundle) -> str:
    bundle.require_sealed()
    unknown = sorted(set(_variants(bundle)) - set(VARIANTS))
    more = f"; variants that this version does not know and cannot check: {', '.join(unknown[:5])}" if unknown else ""
    made = f"made by cswap-deploy {bundle.manifest['tool']['version']} at {bundle.manifest['created']}"
    seal = "" if SEAL in bundle.manifest else "; no digest of its own, so a changed figure cannot be told"
    return f"{bundle.manifest['name']}, verdict {bundle.verdict}, {made}{seal}{more}"


def _variants(bundle: Bundle) -> Mapping[str, Any]:
    found: Mapping[str, Any] = bundle.manifest["onnx"].get("variants", {})
    return found


def _read_files(bundle: Bundle) -> _Contents:
    files: dict[str, File] = {}
    faults: dict[str, str] = {}
    for entry in bundle.manifest["files"][:MOST_FILES]:
        name = entry["path"]
        try:
            if fault := _fault(bundle.folder, entry):
                faults[name] = fault
            else:
                files[name] = bundle.file(name)
        except VerifyError:
            faults[name] = "its sha256 is wrong"
        except (OSError, RuntimeError) as error:  # a name too long, no permission, links in a circle
            faults[name] = f"cannot be read: {reason(error)}"
    return _Contents(files, faults)


def _fault(folder: Path, entry: Mapping[str, Any]) -> str:
    """What is wrong with a listed file before its content is read; empty when nothing is."""
    path = folder / entry["path"]
    if not path.resolve().is_relative_to(folder.resolve()):
        return "leads out of the bundle"
    if not path.is_file():
        return "is missing" if not path.exists() else "is not a file"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes instead of {entry['bytes']}"
    return f"has {size} bytes, more than any file of this tool" if size > LARGEST_FILE else ""


def _files(bundle: Bundle, contents: _Contents) -> str:
    listed = bundle.manifest["files"]
    if not 0 < len(listed) <= MOST_FILES:
        raise VerifyError(
            f"the manifest lists {len(listed)} files, expected 1 to {MOST_FILES}", "build the bundle again"
        )
    twice = [name for name, times in Counter(entry["path"] for entry in listed).items() if times > 1]
    faults = [f"{name}: {fault}" for name, fault in contents.faults.items()] + [
        f"{name}: is listed twice" for name in twice
    ]
    if faults:
        raise VerifyError(f"{len(faults)} of {len(listed)} files: {'; '.join(faults)}", AGAIN)
    size = sum(file.bytes for file in contents.files.values())
    return f"{len(listed)} files, {size / 2**20:.1f} MiB, sizes and sha256 agree"


def _unlisted(bundle: Bundle) -> str:
    listed = {PurePosixPath(entry["path"]).as_posix() for entry in bundle.manifest["files"]}
    other = sorted(set(_present(bundle.folder)) - listed - {MANIFEST})
    if other:
        shown = ", ".join(map(ascii, other[:20])) + (f" and {len(other) - 20} more" if len(other) > 20 else "")
        raise VerifyError(f"{len(other)} not in the manifest: {shown}", "delete them, or copy the bundle again")
    return "every file is in the manifest"


def _present(folder: Path) -> Iterator[str]:
    """Names of everything that is no folder, of links and of empty folders; links are not followed."""

    def stop(error: OSError) -> None:
        raise VerifyError(f"a folder of the bundle cannot be read: {reason(error)}", "correct its permissions")

    for here, folders, names in os.walk(folder, onerror=stop):
        place = Path(here)
        yield from ((place / name).relative_to(folder).as_posix() for name in names)
        yield from ((place / name).relative_to(folder).as_posix() for name in folders if (place / name).is_symlink())
        if not folders and not names and place != folder:
            yield f"{place.relative_to(folder).as_posix()}/"


def _signature(folder: Path, signature: Path | None, public_key: Path) -> str:
    path = signature or signing.beside(folder.absolute())
    signing.check(folder, path, public_key)
    return f"{path.name} holds for every file, with the key {public_key.name}"


# --- the networks


def _onnx(contents: _Contents, kind: str, name: str, recorded: float | None = None) -> str:
    """Replay the test vectors through an ONNX file; `recorded`: a variant's difference from PyTorch when it was built."""
    pixels = kind == "image"
    path, given, expected = contents.path(name), contents.path(PIXELS if pixels else INPUT), contents.path(OUTPUT)
    _, logits = vectors.read(given, expected, pixels)
    wanted = softmax(logits) if pixels else logits
    _require_installed("onnxruntime", "pip install onnxruntime")
    _require_plain_file(contents, kind, name, path)
    found, version = isolated.run(name, path, given)
    return f"{vectors.compare(name, found, wanted, recorded)}; ONNX Runtime {version}, CPU"


def _require_plain_file(contents: _Contents, kind: str, name: str, path: Path) -> None:
    """ONNX Runtime chooses its parser by the name; weights may lie in the one file beside it that the manifest lists."""
    ending = ".ort" if kind == "ort" else ".onnx"
    if path.suffix != ending:
        raise VerifyError(f"{name!r} is not named {ending}", "build the bundle again")
    if kind == "ort":
        with path.open("rb") as stream:
            if stream.read(8)[4:] != IDENTIFIER:
                raise VerifyError(f"{name} is not in ORT format", AGAIN)
        return
    try:
        places = locations_in(path)
    except ValueError as error:
        raise VerifyError(f"{name} is not an ONNX file: {error}", AGAIN) from error
    if not places:
        return
    if places != {f"{path.name}.data"} or f"{name}.data" not in contents.files:  # relative to the model's own folder
        raise VerifyError(f"{name} keeps weights in other files, which is not followed", "build the bundle again")


def _pytorch(bundle: Bundle, contents: _Contents, factory: Factory | None) -> str:
    model = bundle.manifest["model"]
    if factory is None and model["source"] == "factory":
        raise Skipped(
            f"the network comes from a factory ({model['name']}), which is not imported from a bundle; "
            "in Python: cswap_deploy.verify.verify(folder, factory=your_function)"
        )
    for name in ("plan.json", "weights.safetensors"):
        contents.path(name)
    inputs, wanted = vectors.read(contents.path(INPUT), contents.path(OUTPUT))
    for library in ("torch", "timm", "safetensors"):
        _require_installed(library, 'pip install "cswap-deploy[host]"')
        try:
            import_module(library)
        except Exception as error:  # a half-installed torch raises ImportError, OSError, RuntimeError
            raise Skipped(f"{library} cannot be imported: {reason(error)}; install it again") from error
    import torch

    try:
        module = load_pruned(bundle.folder, factory)
        with torch.no_grad():
            found = module(torch.from_numpy(inputs)).numpy()
    except CswapError:
        raise
    except Exception as error:  # names, sizes and weights come from the bundle, the factory from the caller
        raise VerifyError(f"the network cannot be rebuilt: {reason(error)}", AGAIN) from error
    versions = ", ".join(f"{library} {metadata.version(library)}" for library in ("torch", "timm"))
    return f"{vectors.compare('the reloaded network', found, wanted, None)}; {versions}"


def _engine(engine: Mapping[str, Any], contents: _Contents) -> str:
    if not engine["built"]:
        raise Skipped(f"it was not built: {engine['reason'] or 'the manifest gives no reason'}")
    contents.path(ENGINE)
    if find_spec("tensorrt") is None:
        raise Skipped("its sha256 agrees; running it needs the device: cswap-deploy measure")
    from cswap_deploy.engine_check import replay

    inputs, wanted = (contents.path(f"test_vectors/{name}.npy") for name in ("input", "output"))
    try:
        return replay(contents.files[ENGINE], inputs, wanted, dict(engine))
    except DeviceError as error:
        raise Skipped(f"its sha256 agrees; it is not run: {error.message}") from error


def _require_installed(library: str, command: str) -> None:
    try:
        found = find_spec(library) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise Skipped(f"{library} is not installed; {command}")
