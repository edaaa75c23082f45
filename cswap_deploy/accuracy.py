"""Dense, pruned and exported models on the same hold-out images: raw outcomes, which the manifest turns into figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cswap_deploy import progress
from cswap_deploy.artifacts import (
    AccuracyReport,
    Engine,
    Evaluation,
    File,
    ImageSet,
    InputSpec,
    Network,
    OnnxModel,
    Reference,
)
from cswap_deploy.data import require_learned
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DeviceError
from cswap_deploy.images import Pixels, batches, load, normalise
from cswap_deploy.prune.batches import resolve_device
from cswap_deploy.prune.cut import restore
from cswap_deploy.runtime import Session
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


@dataclass(frozen=True)
class Shown:
    """A batch of images: pixels as they were cropped, uint8 (n, C, H, W), and normalised."""

    pixels: Pixels
    inputs: Array


Predict: TypeAlias = Callable[[Shown], "Array"]
"""To logits, or to whatever else rises with them, (n, classes)."""
BATCH = 64
NO_CLASS = -1
"""What is predicted where a logit is NaN or infinite: never right, whereas sorting would put the first class first."""
IMAGES_PER_SECOND = 5
"""Of an engine on the slowest board; below it the evaluation is given up."""


@stage("accuracy", returns=Reference, libraries=("torch", "timm", "numpy", "pillow"))
def of_dense(out: Path, source: Network, holdout: ImageSet, learned: bool, device: str) -> Reference:
    """The dense network, once for all that is made of it. `learned`: at chance level it is a DataError."""
    labels, (found,) = evaluate({"dense": _torch(source, resolve_device(device))}, source, holdout)
    correct = sum(best == truth for best, truth in zip(found.predicted, labels, strict=True))
    require_learned(correct, len(labels), source, "hold-out", gated=learned)
    return Reference(labels, found)


@stage(
    "accuracy",
    returns=AccuracyReport,
    libraries=("torch", "timm", "numpy", "pillow", "onnxruntime"),
    reads_holdout=True,
)
def compare(
    out: Path,
    source: Network,
    dense: Reference,
    pruned: Network,
    models: Mapping[str, OnnxModel],
    holdout: ImageSet,
    device: str,
) -> AccuracyReport:
    """All but the dense network see the same decoded pixels, batch by batch; one of which nothing left is not asked again."""
    asked = {name: _onnx(model.graph.path) for name, model in models.items()}
    whole = pruned.weights.sha256 == source.weights.sha256
    if not whole:
        asked = {"pruned": _torch(pruned, resolve_device(device)), **asked}
    labels, found = evaluate(asked, source, holdout)
    assert labels == dense.labels
    cut, *others = [dense.outcome, *found] if whole else found
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return AccuracyReport(labels, dense.outcome, cut, dict(zip(models, others, strict=True)), now)


@stage("accuracy", returns=File, libraries=("numpy", "pillow"))
def crop(out: Path, holdout: ImageSet, spec: InputSpec) -> File:
    """The hold-out images as a device gets them: uint8 (n, C, H, W), resized and cropped, not yet normalised."""
    import numpy as np

    np.save(out / "pixels.npy", load(holdout, spec)[0])
    return File.of(out / "pixels.npy")


@stage("accuracy", returns=Evaluation, libraries=("numpy",), reads_holdout=True)
def on_engine(
    out: Path, engine: Engine, pixels: File, labels: tuple[int, ...], spec: InputSpec, batch: int, target: Target
) -> Evaluation:
    """The engine on the target, where it was built; its outcomes count, whatever its ONNX file's are. Errors: DeviceError."""
    import numpy as np

    names = "the engine", pixels.path.name
    model, images = target.put(engine.file, pixels, names=names)  # the target's store may have let the engine go
    answer = target.ask(
        "infer",
        120 + len(labels) / IMAGES_PER_SECOND,
        model=model,
        images=images,
        **order(labels, spec, batch),
    )
    with np.load(target.get(answer["outcomes"], out / "outcomes.npz").path, allow_pickle=False) as found:
        best, finite = found["top"], found["finite"]
    if best.ndim != 2 or finite.shape != (len(labels),) or len(best) != len(labels):
        raise DeviceError(f"{target.name}: the engine answered for {len(best)} images of {len(labels)}", "run it again")
    best[~finite] = NO_CLASS
    predicted = best[:, 0].tolist()
    _warn_of_lost("the engine", predicted)
    return Evaluation(tuple(predicted), tuple((best == np.array(labels)[:, None]).any(1).tolist()))


def order(labels: tuple[int, ...], spec: InputSpec, batch: int) -> dict[str, Any]:
    """What the agent's `infer` is told beside engine and images."""
    return {"runtime": "tensorrt", "labels": labels, "mean": spec.mean, "std": spec.std, "batch": batch}


def evaluate(
    models: Mapping[str, Predict], network: Network, images: ImageSet
) -> tuple[tuple[int, ...], list[Evaluation]]:
    """True classes, and per model, by name, the outcome of each image; `network` gives the preprocessing."""
    labels: list[int] = []
    predicted: list[list[int]] = [[] for _ in models]
    in_top5: list[list[bool]] = [[] for _ in models]
    for pixels, truth in batches(images, network.input, BATCH):
        shown = Shown(pixels, normalise(pixels, network.input))
        labels += truth.tolist()
        for number, predict in enumerate(models.values()):
            best, top5 = _outcome(predict(shown), truth)
            predicted[number] += best
            in_top5[number] += top5
        progress.advance("hold-out images", len(labels), len(images.images))
    for name, classes in zip(models, predicted, strict=True):
        _warn_of_lost(name, classes)
    outcomes = [Evaluation(tuple(best), tuple(top5)) for best, top5 in zip(predicted, in_top5, strict=True)]
    return tuple(labels), outcomes


def _outcome(logits: Array, truth: NDArray[np.int64]) -> tuple[list[int], list[bool]]:
    """Per image the predicted class, and whether the true one is among the first five."""
    import numpy as np

    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    best[~np.isfinite(logits).all(1)] = NO_CLASS
    return best[:, 0].tolist(), (best == truth[:, None]).any(1).tolist()


def _warn_of_lost(what: str, predicted: list[int]) -> None:
    if lost := predicted.count(NO_CLASS):
        progress.warn(f"{what}: logits of {lost} images are not finite and count as wrong")


def _onnx(path: Path) -> Predict:
    session = Session(path)
    if session.takes_pixels:
        return lambda shown: session.run(shown.pixels.transpose(0, 2, 3, 1))
    return lambda shown: session.logits(shown.inputs.copy())


def _torch(network: Network, device: str) -> Predict:
    import torch

    module = restore(network).to(device)

    def predict(shown: Shown) -> Array:
        with torch.no_grad():
            logits: Array = module(torch.from_numpy(shown.inputs.copy()).to(device)).cpu().numpy()
        return logits

    return predict
