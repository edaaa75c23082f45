"""Dense, pruned and exported model on the same hold-out images: raw outcomes, and the gate on what ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy import progress
from cswap_deploy.artifacts import AccuracyReport, Evaluation, ImageSet, Network, OnnxModel
from cswap_deploy.data import require_learned
from cswap_deploy.images import batches, normalise
from cswap_deploy.intervals import discordant, gate
from cswap_deploy.prune.batches import resolve_device
from cswap_deploy.prune.cut import restore
from cswap_deploy.recipe import AccuracySettings
from cswap_deploy.runtime import Session
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Predict = Callable[[Array], Array]

BATCH = 64
NO_CLASS = -1
"""What is predicted where a logit is NaN or infinite: never right, whereas sorting would put the first class first."""


@stage(
    "accuracy",
    returns=AccuracyReport,
    libraries=("torch", "timm", "numpy", "pillow", "onnxruntime"),
    reads_holdout=True,
)
def compare(
    out: Path,
    source: Network,
    pruned: Network,
    shipped: OnnxModel,
    holdout: ImageSet,
    settings: AccuracySettings,
    device: str,
) -> AccuracyReport:
    """Every model sees the same decoded pixels, batch by batch; the gate compares what ships with the dense network."""
    where = resolve_device(device)
    models = (_torch(source, where), _torch(pruned, where), Session(shipped.graph.path).logits)
    labels, (dense, cut, exported) = evaluate(models, source, holdout)
    correct = sum(best == truth for best, truth in zip(dense.predicted, labels, strict=True))
    require_learned(correct, len(labels), source.outputs, "hold-out", gated=settings.max_drop is not None)
    only_dense, only_shipped = discordant(labels, dense.predicted, exported.predicted)
    verdict = gate(only_dense, only_shipped, len(labels), settings.max_drop, settings.rule, settings.confidence)
    return AccuracyReport(labels, dense, cut, exported, verdict)


def evaluate(
    models: tuple[Predict, ...], network: Network, images: ImageSet
) -> tuple[tuple[int, ...], list[Evaluation]]:
    """True classes, and per model the outcome of each image; `network` gives the preprocessing."""
    import numpy as np

    labels: list[int] = []
    predicted: list[list[int]] = [[] for _ in models]
    in_top5: list[list[bool]] = [[] for _ in models]
    for pixels, truth in batches(images, network.input, BATCH):
        inputs = normalise(pixels, network.input)
        labels += truth.tolist()
        for number, predict in enumerate(models):
            logits = predict(inputs.copy())
            best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
            best[~np.isfinite(logits).all(1)] = NO_CLASS
            predicted[number] += best[:, 0].tolist()
            in_top5[number] += (best == truth[:, None]).any(1).tolist()
        progress.advance("hold-out images", len(labels), len(images.images))
    for number, classes in enumerate(predicted):
        if lost := classes.count(NO_CLASS):
            progress.warn(
                f"model {number + 1} of {len(models)}: logits of {lost} images are not finite and count as wrong"
            )
    outcomes = [Evaluation(tuple(best), tuple(top5)) for best, top5 in zip(predicted, in_top5, strict=True)]
    return tuple(labels), outcomes


def _torch(network: Network, device: str) -> Predict:
    import torch

    module = restore(network).to(device)

    def predict(inputs: Array) -> Array:
        with torch.no_grad():
            logits: Array = module(torch.from_numpy(inputs).to(device)).cpu().numpy()
        return logits

    return predict
