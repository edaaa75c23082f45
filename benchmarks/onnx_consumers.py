"""Do other runtimes read our ONNX files, and say what PyTorch says? Dense and pruned (random units, 30 % of each group).

    python benchmarks/onnx_consumers.py --nets all --images DATA --weights MODELS

Prints the largest difference from PyTorch, relative to the largest logit, on two images; writes JSON beside itself, and asks again
about nothing that it holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import consumers
import numpy as np
import oneshot_nets

from cswap_deploy import data, export, model, prune, recipe
from cswap_deploy.artifacts import ImageSet, Network, PruningPlan, sha256_of
from cswap_deploy.onnx_file import reference

TIMM = (
    "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto", "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip
NETS = ("quickstart", "quickstart-vit", "resnet56-jpeg", *TIMM)
LIMIT = 1e-3
SHAPES = ("dense", "pruned")
PROOF_SIDE = 64
"""Pixels at which the groups of a convolutional network are proven: they are the same at any size."""
FIXED = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
REMOVED = 0.3
IMAGES = 2
DIGITS = Path(__file__).parents[1] / "calibration" / "digits"


def main() -> None:
    options = _options()
    found: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for name in oneshot_nets.names(options.nets, NETS):
        known = {each["shape"] for each in found if each["net"] == name}
        for shape, row in _rows(name, options, [shape for shape in SHAPES if shape not in known]):
            found.append({"net": name, "shape": shape, "consumers": row})
            options.out.write_text(json.dumps(found, indent=1))
            print(_line(name, shape, row), flush=True)
    rows = [each["consumers"] for each in found]
    worst = max((value for row in rows for value in row.values() if isinstance(value, float)), default=0.0)
    failed = [
        (each["net"], each["shape"], key)
        for each in found
        for key, value in each["consumers"].items()
        if value is not None and not _agrees(value)
    ]
    print(
        f"{len(rows)} files; worst difference {worst:.1e} of the largest logit, limit {LIMIT:g}; failed: {failed or 'none'}"
    )
    sys.exit(bool(failed))


def _rows(name: str, options: argparse.Namespace, shapes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not shapes:
        return
    with tempfile.TemporaryDirectory() as scratch:
        network, images = _network(name, options, Path(scratch))
        for shape in shapes:
            (out := Path(scratch) / shape).mkdir()
            shown = network if shape == "dense" else _pruned(network, images, out)
            yield shape, _asked(_exported(shown, images, out), shown, images, options.consumers)


def _network(name: str, options: argparse.Namespace, scratch: Path) -> tuple[Network, ImageSet]:
    """With the weights that it has: those of timm's names are random."""
    if name in TIMM:
        settings, folder = recipe.ModelSettings(name=name, pretrained=False), DIGITS
    else:
        settings, folder = oneshot_nets._settings(name, options.images, options.weights)
    network = model.load(scratch, settings, 0)
    split = data.divide(_catalogue(folder), 64, 32, 0)
    return network, ImageSet(split.fit[:16], folder)


def _catalogue(folder: Path) -> data.Catalogue:
    return data.catalogue(folder, None, 10, sha256_of)


def _pruned(network: Network, images: ImageSet, out: Path) -> Network:
    shown = network
    if network.input.shape[1] > PROOF_SIDE and network.architecture.name not in FIXED:
        shown = replace(network, input=replace(network.input, shape=(network.input.shape[0], PROOF_SIDE, PROOF_SIDE)))
    groups = prune.find_groups(out, shown, ())
    random = np.random.default_rng(0)
    keep = {
        group.name: tuple(
            sorted(random.permutation(group.units)[: max(1, round((1 - REMOVED) * group.units))].tolist())
        )
        for group in groups.groups
    }
    plan = PruningPlan(keep, (), None)
    (made := out / "cut").mkdir()
    cut = prune.apply(made, network, groups, plan, images, recipe.NoCompensation(), "cpu")
    return replace(cut, architecture=network.architecture)


def _exported(network: Network, images: ImageSet, out: Path) -> Path:
    labels, settings = tuple(map(str, range(network.outputs))), recipe.OnnxSettings()
    for stage in ("exported", "simplified"):
        (out / stage).mkdir()
    whole = export.to_onnx(out / "exported", network, labels, images, settings)
    return export.simplify(out / "simplified", whole, network, images, settings).graph.path


def _asked(path: Path, network: Network, images: ImageSet, wanted: list[str]) -> dict[str, Any]:
    """Difference of each consumer, or why there is none."""
    inputs, logits = reference(network, ImageSet(images.images[:IMAGES], images.root))
    row: dict[str, Any] = {}
    for name in wanted:
        if why := consumers.missing(name):
            row[name] = f"missing: {why}"
            continue
        began = time.monotonic()
        try:
            run = consumers.CONSUMERS[name]
            found = np.concatenate([run(path, image[None]) for image in inputs])
            row[name] = consumers.difference(found, logits)
        except Exception as error:  # whatever a runtime raises is its answer
            row[name] = f"failed: {type(error).__name__}: {str(error)[:160]}"
        print(f"  {name} {row[name]} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return row


def _agrees(value: Any) -> bool:
    return isinstance(value, float) and value < LIMIT


def _line(name: str, shape: str, row: dict[str, Any]) -> str:
    cells = [f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()]
    return f"| {name} | {shape} | {' | '.join(cells)} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", default="all")
    parser.add_argument("--consumers", type=lambda text: oneshot_nets.names(text, list(consumers.CONSUMERS)),
                        default=list(consumers.CONSUMERS))  # fmt: skip
    parser.add_argument("--images", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
