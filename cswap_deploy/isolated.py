"""An ONNX file from a bundle is run in a process of its own, which may crash, hang or ask for all memory without harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cswap_deploy.errors import VerifyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    from cswap_deploy.errors import reason
    from cswap_deploy.runtime import Session
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit({NOT_IMPORTED})
try:
    inputs = np.load(sys.argv[2])
    found = np.asarray(Session(Path(sys.argv[1])).run(inputs), np.float32)
    np.save(sys.argv[3], found, allow_pickle=False)
except Exception as error:
    sys.exit(reason(error))
print(onnxruntime.__version__)
"""
"""Runs an ONNX file: model, input, where to put its output. What it refuses is its last line on standard error."""


class Skipped(Exception):
    """Why a check could not be made here."""


def run(name: str, model: Path, inputs: Path) -> tuple[NDArray[np.float32], str]:
    """First output of an ONNX file for an array of inputs, and the version of ONNX Runtime. Errors: VerifyError, Skipped.

    The process starts in / with this one's search path, so that no module can come from the folder that one stands in,
    which may be the bundle.
    """
    import numpy as np

    bundle = model.absolute().parent
    places = [Path(place).absolute() for place in sys.path if place]
    search = os.pathsep.join(str(place) for place in places if not place.is_relative_to(bundle))
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "logits.npy"
        command = [sys.executable, "-c", RUN, str(model.absolute()), str(inputs.absolute()), str(target)]
        try:
            done = subprocess.run(
                command, cwd="/", env={**os.environ, "PYTHONPATH": search}, capture_output=True,
                timeout=SECONDS, check=False, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise VerifyError(f"{name} did not end within {SECONDS:g} s", AGAIN) from error
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == NOT_IMPORTED:
            raise Skipped(f"onnxruntime cannot be imported: {said}; pip install onnxruntime")
        if done.returncode < 0:
            fault = signal.strsignal(-done.returncode)
            raise VerifyError(f"{name} ended ONNX Runtime by signal {-done.returncode} ({fault})", AGAIN)
        if done.returncode > 0:
            raise VerifyError(f"{name} cannot run on the test vectors: {said}", AGAIN)
        return np.load(target), done.stdout.split()[-1]
