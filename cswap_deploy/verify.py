"""`cswap-deploy verify`: is a bundle what its manifest says, and does it still compute what was recorded.

A bundle is not trusted: nothing that it names is imported, nothing is unpickled, no path is followed out of it, and its
ONNX files run in a process of their own, which may crash or hang without harm. What passes agrees with itself; who wrote
it is another question. Needs numpy; onnxruntime, and torch with timm, where a check says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from cswap_deploy.artifacts import File
from cswap_deploy.bundle import ENGINE, FILES, MANIFEST, Bundle, load_pruned
from cswap_deploy.checkpoint import reason
from cswap_deploy.digests import SEAL
from cswap_deploy.errors import CswapError, DeviceError, UsageError, VerifyError
from cswap_deploy.external_data import refers_to_other_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    Array = NDArray[np.float32]
    Vectors = tuple[Array, Array]
    Factory = Callable[..., nn.Module]

VARIANTS = tuple(name for name in FILES if name != "fp32")
ALWAYS = ("manifest", "files", "unlisted", "onnx", "pytorch")
NAMES = ("manifest", "files", "unlisted", "onnx", *(f"onnx:{kind}" for kind in VARIANTS), "pytorch", "engine")
"""Every check that there is, in order; those of variants and of the engine only where the manifest names them."""

VECTORS = ("test_vectors/input.npy", "test_vectors/output.npy")
TOLERANCE = 1e-3
"""Largest difference from PyTorch, relative to the largest logit: the export's own limit."""
VARIANT_MARGIN = 1.5
"""A variant's test vectors may differ by this much more than the 16 images did at build; other CPUs round otherwise."""
LARGEST_FILE = 4 << 30
LARGEST_VECTOR = 256 << 20
MOST_FILES = 1000
SECONDS: float = 300
"""Time that one ONNX file has for the test vectors."""
NOT_IMPORTED = 3
AGAIN = "copy the bundle again, or build it again"

MEMORY = 16 << 30
"""Bytes of addresses that an ONNX file may take; a hostile one asks for all there is."""

RUN = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    import numpy as np, onnxruntime
    from pathlib import Path
    from cswap_deploy.checkpoint import reason
    from cswap_deploy.runtime import Session
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit({NOT_IMPORTED})
try:
    inputs, wanted = np.load(sys.argv[2]), np.load(sys.argv[3])
    found = np.asarray(Session(Path(sys.argv[1])).logits(inputs), np.float32)
    if found.shape != wanted.shape:
        sys.exit(f"it returns {{found.shape}}, the test vectors hold {{wanted.shape}}")
    np.save(sys.argv[4], found, allow_pickle=False)
except Exception as error:
    sys.exit(reason(error))
print(onnxruntime.__version__)
"""
"""Runs an ONNX file: model, input, output, where to put the logits. What it refuses is its last line on standard error."""


@dataclass(frozen=True)
class Check:
    """`detail`: the numbers, or why it was skipped or failed and what to do."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str


def verify(folder: Path, require: Sequence[str] = (), factory: Factory | None = None) -> tuple[Check, ...]:
    """All checks, in the order of NAMES; one that fails does not stop the others. A skipped one of `require` has failed.

    `factory` makes the network of a bundle that came from a factory, as for load_pruned; it is the caller's own code.
    Errors: UsageError when there is no bundle at all, or when `require` names a check that there is not.
    """
    try:
        bundle = Bundle.read(folder)
    except VerifyError as error:
        _require_known(require, NAMES)
        rest = [name for name in NAMES[1:] if name in ALWAYS or name in require]
        skipped = [Check(name, "skipped", "the manifest cannot be read") for name in rest]
        return _with_required([Check("manifest", "failed", str(error)), *skipped], require)
    names = _names(bundle)
    _require_known(require, names)
    runs = _runs(bundle, factory)
    return _with_required([_outcome(name, runs[name]) for name in names], require)


class _Skipped(Exception):
    """Why a check could not be made here."""


@dataclass(frozen=True)
class _Contents:
    """The listed files: those that are what the manifest says, and what is wrong with the others."""

    files: Mapping[str, File]
    faults: Mapping[str, str]

    def path(self, name: str) -> Path:
        """A file that may be used. Errors: VerifyError when it is not listed, _Skipped when it is not sound."""
        if name in self.faults:
            raise _Skipped(f"{name}: {self.faults[name]}, see files")
        if name not in self.files:
            raise VerifyError(f"the manifest lists no file {name!r}", "build the bundle again")
        return self.files[name].path


def _names(bundle: Bundle) -> tuple[str, ...]:
    """The checks of this bundle, in order."""
    variants = {f"onnx:{kind}" for kind in _variants(bundle)}
    engine = {"engine"} if bundle.manifest["engine"] is not None else set()
    return tuple(name for name in NAMES if name in {*ALWAYS, *variants, *engine})


def _runs(bundle: Bundle, factory: Factory | None) -> Mapping[str, Callable[[], str]]:
    """Each check returns its detail, or raises VerifyError or _Skipped."""
    contents, variants = _read_files(bundle), _variants(bundle)
    return {
        "manifest": partial(_manifest, bundle),
        "files": partial(_files, bundle, contents),
        "unlisted": partial(_unlisted, bundle),
        "onnx": partial(_onnx, contents, FILES["fp32"]),
        **{
            f"onnx:{kind}": partial(_onnx, contents, entry["file"], entry["parity"]["max_abs"])
            for kind, entry in variants.items()
        },
        "pytorch": partial(_pytorch, bundle, contents, factory),
        "engine": partial(_engine, bundle.manifest["engine"], contents),
    }


def _outcome(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", run())
    except _Skipped as why:
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


# --- the networks


def _onnx(contents: _Contents, name: str, recorded: float | None = None) -> str:
    """Replay the test vectors through an ONNX file; `recorded`: a variant's difference from PyTorch when it was built."""
    path, (_, wanted) = contents.path(name), _vectors(contents)
    _require_installed("onnxruntime", "pip install onnxruntime")
    if path.suffix != ".onnx":  # ONNX Runtime chooses its parser by the name
        raise VerifyError(f"{name!r} is not named .onnx", "build the bundle again")
    try:
        external = refers_to_other_files(path.read_bytes())
    except ValueError as error:
        raise VerifyError(f"{name} is not an ONNX file: {error}", AGAIN) from error
    if external:
        raise VerifyError(f"{name} keeps weights in other files, which is not followed", "build the bundle again")
    found, version = _run(name, [path, *(contents.path(vector) for vector in VECTORS)])
    return f"{_compare(name, found, wanted, recorded)}; ONNX Runtime {version}, CPU"


def _run(name: str, arguments: Sequence[Path]) -> tuple[Array, str]:
    """Logits of an ONNX file and the version of ONNX Runtime. The process starts in / with this one's search path, so that
    no module can come from the folder that one stands in, which may be the bundle.
    """
    import numpy as np

    bundle = arguments[0].absolute().parent
    places = [Path(place).absolute() for place in sys.path if place]
    search = os.pathsep.join(str(place) for place in places if not place.is_relative_to(bundle))
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "logits.npy"
        command = [sys.executable, "-c", RUN, *(str(path.absolute()) for path in arguments), str(target)]
        try:
            done = subprocess.run(
                command, cwd="/", env={**os.environ, "PYTHONPATH": search}, capture_output=True,
                timeout=SECONDS, check=False, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise VerifyError(f"{name} did not end within {SECONDS:g} s", AGAIN) from error
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == NOT_IMPORTED:
            raise _Skipped(f"onnxruntime cannot be imported: {said}; pip install onnxruntime")
        if done.returncode < 0:
            fault = signal.strsignal(-done.returncode)
            raise VerifyError(f"{name} ended ONNX Runtime by signal {-done.returncode} ({fault})", AGAIN)
        if done.returncode > 0:
            raise VerifyError(f"{name} cannot run on the test vectors: {said}", AGAIN)
        return np.load(target), done.stdout.split()[-1]


def _pytorch(bundle: Bundle, contents: _Contents, factory: Factory | None) -> str:
    model = bundle.manifest["model"]
    if factory is None and model["source"] == "factory":
        raise _Skipped(
            f"the network comes from a factory ({model['name']}), which is not imported from a bundle; "
            "in Python: cswap_deploy.verify.verify(folder, factory=your_function)"
        )
    for name in ("plan.json", "weights.safetensors"):
        contents.path(name)
    inputs, wanted = _vectors(contents)
    for library in ("torch", "timm", "safetensors"):
        _require_installed(library, 'pip install "cswap-deploy[host]"')
        try:
            import_module(library)
        except Exception as error:  # a half-installed torch raises ImportError, OSError, RuntimeError
            raise _Skipped(f"{library} cannot be imported: {reason(error)}; install it again") from error
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
    return f"{_compare('the reloaded network', found, wanted, None)}; {versions}"


def _engine(engine: Mapping[str, Any], contents: _Contents) -> str:
    if not engine["built"]:
        raise _Skipped(f"it was not built: {engine['reason'] or 'the manifest gives no reason'}")
    contents.path(ENGINE)
    if find_spec("tensorrt") is None:
        raise _Skipped("its sha256 agrees; running it needs the device: cswap-deploy measure")
    from cswap_deploy.engine_check import replay

    inputs, wanted = (contents.path(name) for name in VECTORS)
    try:
        return replay(contents.files[ENGINE], inputs, wanted, dict(engine))
    except DeviceError as error:
        raise _Skipped(f"its sha256 agrees; it is not run: {error}") from error


def _require_installed(library: str, command: str) -> None:
    try:
        found = find_spec(library) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise _Skipped(f"{library} is not installed; {command}")


# --- test vectors


def _vectors(contents: _Contents) -> Vectors:
    """Normalised images (n, C, H, W) and PyTorch's logits for them (n, classes)."""
    import numpy as np

    inputs, wanted = (_vector(contents.path(name), name) for name in VECTORS)
    if inputs.ndim != 4 or wanted.ndim != 2 or len(inputs) != len(wanted):
        raise VerifyError(
            f"the test vectors are {inputs.shape} and {wanted.shape}, expected images and as many rows of logits", AGAIN
        )
    if not (np.isfinite(inputs).all() and np.isfinite(wanted).all()):
        raise VerifyError("the test vectors hold numbers that are not finite", AGAIN)
    return inputs, wanted


def _vector(path: Path, name: str) -> Array:
    """A plain array of float32. It is mapped before it is copied: a header that promises more than the file holds is refused."""
    import numpy as np

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # on garbage NumPy raises almost anything
        raise VerifyError(f"{name} is not a plain array: {reason(error)}", AGAIN) from error
    if array.dtype != np.float32 or not array.size:
        raise VerifyError(f"{name} is not an array of float32", AGAIN)
    if array.nbytes > LARGEST_VECTOR:
        raise VerifyError(f"{name} holds {array.nbytes} bytes, at most {LARGEST_VECTOR} are read", AGAIN)
    return np.array(array)


def _compare(what: str, found: Array, wanted: Array, recorded: float | None) -> str:
    """The measured difference and its tolerance. Errors: VerifyError beyond it, or when a variant's top-1 differs."""
    import numpy as np

    exact, largest = wanted.astype(np.float64), float(np.abs(wanted).max())
    tolerance = TOLERANCE * max(largest, 1e-6) + VARIANT_MARGIN * (recorded or 0.0)
    if found.shape != wanted.shape:
        raise VerifyError(f"{what} returns {found.shape}, the test vectors hold {wanted.shape}", AGAIN)
    difference = float(np.abs(found - exact).max())
    numbers = f"{len(wanted)} test vectors differ from PyTorch by up to {difference:.2e}, tolerance {tolerance:.2e}"
    if not difference <= tolerance:
        raise VerifyError(f"{what}: {numbers}", AGAIN)
    if recorded is None:
        return numbers
    if other := int(((found.argmax(1) != exact.argmax(1)) & (_leads(exact) > tolerance)).sum()):
        raise VerifyError(f"{what}: top-1 of {other} differs, though their best logit leads by more; {numbers}", AGAIN)
    proof = f"; that is more than the largest logit ({largest:.2e}) and proves little" if tolerance > largest else ""
    return f"{numbers}, top-1 agrees{proof}"


def _leads(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the best logit of each row is ahead of the next; 0 where there is one class only."""
    import numpy as np

    ordered = np.sort(logits, 1)
    lead: NDArray[np.float64] = ordered[:, -1] - ordered[:, -min(2, logits.shape[1])]
    return lead
