"""Does a bundle's engine still compute what was recorded? Only on the device that built it; elsewhere it is never loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cswap_deploy import vectors
from cswap_deploy.artifacts import File
from cswap_deploy.device.target import reach
from cswap_deploy.errors import VerifyError

SECONDS = 600.0


def replay(engine: File, inputs: Path, wanted: Path, block: dict[str, Any]) -> str:
    """The test vectors through the engine, by this machine's agent, which refuses one of another board. `block`: the manifest's.

    Logits of fp16 and int8 differ from PyTorch's; the predicted classes must agree wherever the best logit leads by more than
    they do. Errors: DeviceError when the engine is refused or does not run, VerifyError when its outputs are others.
    """
    _, expected = vectors.read(inputs, wanted)  # the bundle's own: its header may promise any size
    batch = block.get("batch", {}).get("opt", 1) if block.get("open_batch") else 1
    with reach("local") as target, TemporaryDirectory() as scratch:
        model, images = target.put(engine, File.of(inputs), names=("the engine", "the test vectors"))
        answer = target.ask(
            "infer", SECONDS, runtime="tensorrt", model=model, images=images, mean=[0.0] * 4, std=[1.0] * 4, batch=batch
        )
        path = target.get(answer["outcomes"], Path(scratch) / "outcomes.npz").path
        with np.load(path, allow_pickle=False) as outcomes:
            found = outcomes["logits"]
    if found.shape != expected.shape:
        raise VerifyError(f"the engine returns {found.shape}, the test vectors hold {expected.shape}", "build it again")
    difference = float(np.abs(found - expected).max())
    ordered = np.sort(expected, axis=1)
    leads = ordered[:, -1] - ordered[:, -min(2, expected.shape[1])]
    other = int(((found.argmax(1) != expected.argmax(1)) & (leads > 2 * difference)).sum())
    if other or not np.isfinite(found).all():
        raise VerifyError(
            f"the engine predicts {other} of {len(found)} test vectors otherwise than PyTorch", "build it again"
        )
    return f"{len(found)} test vectors on the device differ from PyTorch by up to {difference:.2e}, top-1 agrees"
