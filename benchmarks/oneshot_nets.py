"""The networks of the one-shot benchmark, the images each seed prunes with, and the images that all are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch
from oneshot_cells import Bools, Cell, Key, code_of, packed
from torch import nn

from cswap_deploy import data, model, prune, recipe
from cswap_deploy.artifacts import Axis, CostTerm, Groups, ImageSet, Network
from cswap_deploy.data import Catalogue
from cswap_deploy.digests import digest_of
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import restore
from cswap_deploy.prune.refit import Structure
from cswap_deploy.prune.rotation import rotated
from cswap_deploy.prune.select import Kept

HERE = Path(__file__).parent
SCORING = 1024
"""Images of a seed unless told otherwise: three quarters to fit, one to choose with."""
RESERVED = 2000
"""Scoring images that no seed prunes with, half of what there is at most: they judge while choices are still open."""
INPUT = {"size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0}
RESNET20, RESNET56 = ({"factory": f"{HERE / 'cifar_resnet.py'}:resnet{depth}", "input": INPUT} for depth in (20, 56))
VIT = {"name": "vit_tiny_patch16_224", "num_classes": 10, "input": INPUT,
       "kwargs": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}}  # fmt: skip
NETS: dict[str, tuple[dict[str, Any] | str, str, str]] = {
    "resnet56-jpeg": (RESNET56, "cifar10jpeg_resnet56", "cifar10-jpeg"),
    "resnet56-lossless": (RESNET56, "cifar10_resnet56", "cifar10-lossless"),
    "resnet20-lossless": (RESNET20, "cifar10_resnet20", "cifar10-lossless"),
    "vit-jpeg": (VIT, "cifar10jpeg_vit", "cifar10-jpeg"),
    "vit-jpeg-dims": (VIT, "cifar10jpeg_vit", "cifar10-jpeg"),
    "quickstart": ("quickstart.yaml", "", ""),
    "quickstart-vit": ("quickstart-vit.yaml", "", ""),
    "quickstart-vit-dims": ("quickstart-vit.yaml", "", ""),
}
"""Settings, weights below `--weights` and images below `--images`; or a recipe that comes with both. Attention loses whole heads, in a
network called `-dims` dimensions within them."""
KINDS = {"mlp": "channels", "heads": "heads"}
"""Targets that count units of one kind rather than cost."""


@dataclass(frozen=True)
class Net:
    """A dense network and the images that everything made of it is judged on."""

    name: str
    judge: str
    network: Network
    groups: Groups
    catalogue: Catalogue
    """What seeds are divided from: its hold-out part is what judges."""
    judged: Batches
    scoring: int = 0
    """Images of a seed; 0: `SCORING`."""

    @staticmethod
    def load(
        name: str, images: Path | None, weights: Path | None, judge: str, scratch: Path, scoring: int = 0, device: str = "cpu"
    ) -> Net:  # fmt: skip
        """With `scoring` images of a seed the name says so."""
        settings, folder = _settings(name, images, weights)
        network = model.load(scratch, settings, seed=0)
        if judge == "holdout":
            catalogue = data.catalogue(folder, None, network.outputs)
        else:
            catalogue = reserved(data.catalogue(folder / "scoring", None, network.outputs))
        heads: recipe.HeadsMode = "dims" if name.endswith("-dims") else "whole"
        found = Net.of(name, judge, network, prune.find_groups(scratch, network, (), heads), catalogue, device)
        return replace(found, name=f"{name} ({scoring} scoring images)", scoring=scoring) if scoring else found

    @staticmethod
    def of(name: str, judge: str, network: Network, groups: Groups, catalogue: Catalogue, device: str = "cpu") -> Net:
        held = sorted(data.divide(catalogue, SCORING, None, 0).holdout, key=lambda image: image.path)
        judged = Batches.read(ImageSet(tuple(held), catalogue.folder), network.input, device)
        return Net(name, judge, network, groups, catalogue, judged)

    @cached_property
    def digest(self) -> str:
        """Of the weights and of the images that judge."""
        images = digest_of([sha256(self.judged.pixels.tobytes()).hexdigest(), self.judged.labels.tolist()])
        return digest_of([self.network.weights.sha256, images])[:16]

    @cached_property
    def dense(self) -> nn.Module:
        return restore(self.network).to(self.judged.device)

    @cached_property
    def logits(self) -> paired.Floats:
        return logits(self.dense, self.judged)

    def key(self, target: str, cut: float, method: str, column: str, seed: int | None, stride: float) -> Key:
        return Key(self.name, self.judge, target, cut, method, column, seed, stride)

    def refused(self, key: Key, reason: str) -> Cell:
        return Cell(key, code_of(key.method, key.column), self.digest, len(self.judged), refused=reason)

    def cell(self, key: Key, module: nn.Module, keep: Kept, seconds: float, conditions: dict[str, Any]) -> Cell:
        """`module` is what ships: cut, not masked."""
        found = logits(module, self.judged)
        params, macs = model.count(module, self.network.input)
        return Cell(
            key,
            code_of(key.method, key.column),
            self.digest,
            len(self.judged),
            packed(found.argmax(1) == self.judged.labels),
            int(paired.agreement(self.logits, found).sum()),
            float(paired.divergence(self.logits, found).sum()),
            macs / self.network.macs,
            params / self.network.params,
            seconds,
            packed(self._bits(keep)) if keep else "",
            conditions=conditions,
        )

    def _bits(self, keep: Kept) -> Bools:
        """Groups that `keep` does not name stay whole."""
        parts = [
            np.isin(np.arange(group.units), keep.get(group.name, range(group.units))) for group in self.groups.groups
        ]
        return np.concatenate(parts)

    def kept(self, bits: Bools) -> Kept:
        """What `cell` packed; bits behind the last group do not count."""
        ends = np.cumsum([group.units for group in self.groups.groups])
        parts = zip(self.groups.groups, np.split(bits, ends), strict=False)
        return {group.name: tuple(np.flatnonzero(part).tolist()) for group, part in parts}


@dataclass(frozen=True)
class Case:
    """A network with what one seed prunes it with, towards a target."""

    net: Net
    dense: nn.Module
    """The network, its heads rotated where dimensions within them may leave."""
    seed: int
    target: str
    groups: Groups
    """Those that may leave; their cost counts units where the target does."""
    fit: Batches
    selection: Batches
    structure: Structure
    """Of the networks between steps."""
    shipped: Structure
    """Of the fit of what ships."""

    @staticmethod
    def of(net: Net, seed: int, target: str) -> Case:
        split = data.divide(net.catalogue, net.scoring or SCORING, None, seed)
        fit, selection = (
            Batches.read(ImageSet(part, net.catalogue.folder), net.network.input, net.judged.device)
            for part in (split.fit, split.selection)
        )
        inner = any(group.kind == "dims" for group in net.groups.groups)
        dense = rotated(net.dense, net.groups.groups, fit) if inner else net.dense
        return Case(net, dense, seed, target, counted(net.groups, target), fit, selection, Structure(), Structure())

    def macs(self, cut: float) -> float:
        """The fraction of the MACs that is kept when all groups keep this part of their units, for a target in units."""
        if self.target not in KINDS:
            return cut
        keep = {group.name: tuple(range(round(cut * group.units))) for group in self.groups.groups}
        return self.net.groups.cost(keep)[1] / self.net.groups.cost({})[1]


def counted(groups: Groups, target: str) -> Groups:
    """All groups with their cost; for a target in units those of its kind alone, where a unit costs 1 of everything."""
    if target not in KINDS:
        return groups
    chosen = tuple(group for group in groups.groups if group.kind == KINDS[target])
    terms = [
        CostTerm(group.name, group.units, group.units, (Axis(group.units, ((group.name, 1),)),)) for group in chosen
    ]
    return replace(groups, groups=chosen, terms=tuple(terms))


def reserved(pool: Catalogue) -> Catalogue:
    """The same images with some set aside to judge, whatever the seed: no hold-out image is listed or read."""
    count = min(RESERVED, len(pool.scoring) // 2)
    parts = data.divide(pool, count, None, 0)
    return replace(pool, scoring=parts.holdout, holdout=(*parts.fit, *parts.selection))


def logits(module: nn.Module, batches: Batches) -> paired.Floats:
    """(images, classes)"""
    with torch.no_grad():
        found: paired.Floats = torch.cat([module(images) for images, _ in batches]).double().cpu().numpy()
    return found


def _settings(name: str, images: Path | None, weights: Path | None) -> tuple[recipe.ModelSettings, Path]:
    """The network's settings and its folder of images."""
    source, checkpoint, folder = NETS[name]
    if isinstance(source, str):
        own = recipe.load(HERE.parent / "recipes" / source, [])
        return own.model, own.calibration.images
    if not (images and weights):
        raise SystemExit(f"{name} needs --images and --weights")
    settings = {**source, "input": recipe.InputSettings(**source["input"])}
    path = (weights / f"{checkpoint}.safetensors").resolve()
    return recipe.ModelSettings(**settings, checkpoint=path), (images / folder).resolve()


def names(text: str, known: Sequence[str]) -> list[str]:
    """A comma-separated choice; `all` is everything known."""
    chosen = list(known) if text == "all" else [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    return chosen
