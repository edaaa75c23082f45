"""What travels between stages: frozen values that are JSON on disk, with the files that they own beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from cswap_deploy.codec import Rooted


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a stage; `path` is absolute in memory and relative to the stage's folder on disk."""

    path: Rooted
    sha256: str
    bytes: int

    @staticmethod
    def of(path: Path) -> File:
        return File(path, sha256_of(path), path.stat().st_size)


# --- model -----------------------------------------------------------------------------------------------------------


CropMode = Literal["center", "squash", "border"]
"""timm's names."""


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the network's input; one value for scoring, accuracy, export and the phone team.

    `shape` is (channels, height, width); pixels are RGB in 0..1, then `(pixel - mean) / std` per channel. The resize is
    `interpolation` to `floor(side / crop_pct)`, then a centre crop (`squash`: straight to (height, width), no crop;
    `border`: the longer side, then borders of the mean colour).
    """

    shape: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop_pct: float
    crop_mode: CropMode = "center"

    @property
    def shown(self) -> str:
        """In a few words: `3x32x32, mean 0.491 0.482 0.447, std 0.247 0.243 0.262, bilinear, crop 1`."""
        channels, *_ = self.shape
        mean, std = (" ".join(f"{value:.3g}" for value in values[:channels]) for values in (self.mean, self.std))
        crop = self.crop_mode if self.crop_mode != "center" else f"crop {self.crop_pct:g}"
        return f"{'x'.join(map(str, self.shape))}, mean {mean}, std {std}, {self.interpolation}, {crop}"


@dataclass(frozen=True)
class Architecture:
    """How to build the dense module, weights aside."""

    source: Literal["timm", "factory"]
    name: str
    kwargs: dict[str, Any]
    library: str
    """For timm its version, for a factory the digest of its file."""
    location: str = field(default="", metadata={"key": False})
    """Where a factory is found on this machine: `/path/file.py:function` or `module:function`."""


@dataclass(frozen=True)
class Network:
    """A network at rest: architecture, what the plan did to it (None: dense), weights as safetensors."""

    architecture: Architecture
    plan: File | None
    weights: File
    input: InputSpec
    outputs: int
    params: int
    macs: int
    """Multiply-accumulates of one image."""
    license: str | None


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """`path` is relative to the folder of the recipe's `calibration.images`; `label` indexes the model's outputs."""

    path: str
    sha256: str
    label: int


@dataclass(frozen=True)
class ImageSet:
    """Images and where they lie on this machine; the place does not count in a stage's key."""

    images: tuple[Image, ...]
    root: Path = field(metadata={"key": False})


@dataclass(frozen=True)
class Split:
    """Disjoint: `fit` shapes the model, `selection` makes every choice, `holdout` only reports."""

    labels: tuple[str, ...]
    """One name per model output."""
    fit: tuple[Image, ...]
    selection: tuple[Image, ...]
    holdout: tuple[Image, ...]


# --- pruning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Where the units of a group live in one tensor: unit i owns `offset + i * repeat` up to `repeat` indices on `axis`."""

    module: str
    parameter: str
    axis: int
    offset: int
    repeat: int

    @property
    def tensor(self) -> str:
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True)
class UnitAttribute:
    """An attribute that forward code reads and that counts units: each unit that leaves takes `per_unit` from it."""

    module: str
    name: str
    """`name`, or `name.place` for an item of a tuple or list."""
    per_unit: int


@dataclass(frozen=True)
class Group:
    """Units that can only leave together with all that is coupled to them: coupled structure as data."""

    name: str
    kind: Literal["channels", "heads", "dims"]
    units: int
    members: tuple[Slice, ...]
    attributes: tuple[UnitAttribute, ...] = ()
    branch: bool = False
    """Whether all units may leave: the layers that read them then give a constant, those that make them are not there."""

    @property
    def consumers(self) -> tuple[Slice, ...]:
        """The slices through which the rest of the network reads the units: input axes of weights."""
        return tuple(member for member in self.members if member.axis == 1 and member.parameter == "weight")


@dataclass(frozen=True)
class HeadRows:
    """Where the vectors of an attention's heads are made: head h owns the group's units from row `offsets[h]` on.

    `modules`: a linear layer or convolution and, where there is one, the BatchNorm behind it.
    """

    modules: tuple[str, ...]
    offsets: tuple[int, ...]

    @property
    def last(self) -> str:
        """What leaves this module is what the attention reads."""
        return self.modules[-1]


@dataclass(frozen=True, kw_only=True)
class HeadDims(Group):
    """Dimensions within the heads of one attention: unit j is index j of every head.

    Where `queries` and `keys` are given the units are theirs: nothing reads those through weights, so that a mask holds their rows at
    0, and `cut` multiplies the queries by sqrt(kept / units), for a softmax that divides by the root of the dimensions. `values`: where
    they can be rotated.
    """

    queries: HeadRows | None
    keys: HeadRows | None
    values: HeadRows | None
    scales: tuple[tuple[str, str], ...]
    """(module, attribute) of numbers that are the inverse root of the dimensions: they stay so."""

    def silenced(self, units: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Per module that makes queries or keys the rows of these units."""
        found: dict[str, set[int]] = {}
        for rows in filter(None, (self.queries, self.keys)):
            for name in rows.modules:
                found.setdefault(name, set()).update(offset + unit for offset in rows.offsets for unit in units)
        return {name: tuple(sorted(own)) for name, own in found.items()}


@dataclass(frozen=True)
class Axis:
    """One axis of a cost term and how many of its `size` indices each unit of each group owns."""

    size: int
    owners: tuple[tuple[str, int], ...]

    def kept(self, removed: Mapping[str, int]) -> int:
        return self.size - sum(removed.get(group, 0) * repeat for group, repeat in self.owners)


@dataclass(frozen=True)
class CostTerm:
    """Parameters and MACs (one image) that shrink with the kept part of each axis. `name`: no other one's."""

    name: str
    params: int
    macs: int
    axes: tuple[Axis, ...]

    def fraction(self, removed: Mapping[str, int]) -> float:
        return prod(axis.kept(removed) / axis.size for axis in self.axes)


@dataclass(frozen=True)
class Refusal:
    """A structure that is not pruned, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Groups:
    """What can leave the network, what cannot and why, and what everything costs."""

    groups: tuple[HeadDims | Group, ...]
    refused: tuple[Refusal, ...]
    terms: tuple[CostTerm, ...]

    @cached_property
    def by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @property
    def without_branches(self) -> Groups:
        """The same, each of which keeps a unit."""
        return replace(self, groups=tuple(replace(group, branch=False) for group in self.groups))

    @cached_property
    def behind(self) -> dict[str, str]:
        """Per branch the one that it leaves with: all that reads it makes units of that one (the first layers of a bottleneck)."""
        makers = {
            group.name: {member.module for member in group.members if member.axis == 0}
            for group in self.groups
            if group.branch
        }
        readers = {name: {member.module for member in self.by_name[name].consumers} for name in makers}
        return {
            name: other
            for name in makers
            for other in makers
            if name != other and readers[name] and readers[name] <= makers[other]
        }

    def closed(self, widths: Mapping[str, int]) -> dict[str, int]:
        """With no units of branches whose readers have left."""
        found = dict(widths)
        while gone := [name for name, other in self.behind.items() if found.get(other) == 0 != found.get(name)]:
            found |= dict.fromkeys(gone, 0)
        return found

    @cached_property
    def leaving(self) -> tuple[str, ...]:
        """Branches that leave of their own accord, behind no other."""
        return tuple(group.name for group in self.groups if group.branch and group.name not in self.behind)

    def cost(self, keep: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
        """(params, macs) of the network that keeps these units; groups that `keep` does not name stay whole."""
        removed = {name: self.by_name[name].units - len(units) for name, units in keep.items()}
        fractions = [term.fraction(removed) for term in self.terms]
        params = sum(term.params * fraction for term, fraction in zip(self.terms, fractions, strict=True))
        return params, sum(term.macs * fraction for term, fraction in zip(self.terms, fractions, strict=True))


Verdict = Literal["critical", "neutral", "detrimental", "unresolved"]


@dataclass(frozen=True)
class GroupScores:
    """Per unit of one group. `keep_value`: what the network loses when the unit leaves; where units are ranked by it the lowest leave
    first.

    The other fields are empty for criteria that are not causal. `effect`: mean change of log p(true class) when the unit
    leaves (negative: the unit helps, positive: it harms); `error`: its standard error; `xi`: the relative effect
    mean((p* - p) / p) of C-SWAP (arXiv 2510.18636); `verified`: whether the unit was ablated on every image.
    """

    group: str
    units: tuple[int, ...]
    """Indices in the dense group."""
    keep_value: tuple[float, ...]
    effect: tuple[float, ...] = ()
    error: tuple[float, ...] = ()
    xi: tuple[float, ...] = ()
    verdict: tuple[Verdict, ...] = ()
    verified: tuple[bool, ...] = ()

    def of(self, units: Collection[int]) -> GroupScores:
        """The scores of these units alone."""
        places = [place for place, unit in enumerate(self.units) if unit in set(units)]

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[place] for place in places) if values else ()

        return GroupScores(self.group, *(pick(getattr(self, item.name)) for item in fields(self)[1:]))


@dataclass(frozen=True)
class Scores:
    """What units were found to be worth, and how; the last three fields are those of the causal criterion."""

    criterion: str
    images: int
    groups: tuple[GroupScores, ...]
    estimator: str | None = None
    intervention: str | None = None
    alpha: float | None = None
    """False discovery rate of the verdicts, over all units of all groups."""


@dataclass(frozen=True)
class Curve:
    """What a group's narrowing costs: `order` lists its units, first to leave first; `damage` is what the whole network loses at
    each of `widths` after compensation, beyond what it has lost already (nats of softened divergence per image)."""

    group: str
    order: tuple[int, ...]
    widths: tuple[int, ...]
    damage: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """Measured on the dense network on `images` images at a softmax `temperature`."""

    temperature: float
    images: int
    groups: tuple[Curve, ...]


@dataclass(frozen=True)
class PruningStep:
    """One step of the progressive schedule; `drop_pp` is measured on the selection images, not the hold-out."""

    params: float
    macs: float
    """Fractions of the dense network that are kept after this step."""
    removed: dict[str, tuple[int, ...]]
    """Units that left in this step, by dense index; removal is judged given what already left."""
    drop_pp: float
    scores: tuple[GroupScores, ...] = ()
    """Of the units that left in this step, when they left."""


@dataclass(frozen=True)
class PruningPlan:
    keep: dict[str, tuple[int, ...]]
    """Dense unit indices kept, ascending, for each group."""
    steps: tuple[PruningStep, ...]
    scores: Scores | None
    """Scores of the last step, over the units that were still there; None where elimination ordered them and none were made."""
    dense_scores: Scores | None = None
    """Scores of all units on the dense network: what the first step went by."""
    dense_order: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Units of each group in the order in which they would leave the dense network; empty where scores alone decide."""


# --- export and proof ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """Distance of a model's logits from PyTorch's on real images."""

    images: int
    max_abs: float
    sqnr_db: float


@dataclass(frozen=True)
class TestVectors:
    """Preprocessed images (n, C, H, W) and PyTorch's logits (n, classes) for them, float32, as .npy."""

    input: File
    output: File
    pixels: File
    """The same images before they are normalised: uint8 (n, H, W, C), as .npy."""
    pictures: tuple[File, ...] = ()
    """The same images before they are resized, as PNG; those too large to hand on are left out."""


@dataclass(frozen=True)
class Coverage:
    """How many nodes an accelerator of phones takes, by the operator tables of ONNX Runtime."""

    provider: str
    supported: int
    nodes: int
    partitions: int
    suitable: str
    """yes, maybe or no, as ONNX Runtime's checker has it; else unknown."""
    missing: tuple[str, ...]
    """Operators that it lacks."""
    note: str


@dataclass(frozen=True)
class Quantised:
    """How an int8 file was chosen, against the float32 file on the selection images."""

    method: str
    """How ranges were found; `weights`: only weights are in 8 bits."""
    in_float: tuple[str, ...]
    """Weighted nodes that stay in float, the most sensitive first."""
    nodes: int
    images: int
    drop_pp: float
    divergence: float
    """Nats per image."""
    tried: int
    met: bool
    """Whether the drop is within what the recipe allows."""


@dataclass(frozen=True)
class OnnxModel:
    """One ONNX file (or one in ORT format) with what was found out about it when it was written."""

    graph: File
    opset: int
    ir_version: int
    nodes: int
    parity: Parity
    vectors: TestVectors
    note: str
    """Why the graph is what it is, when it is not what was asked for; else empty."""
    quantised: Quantised | None = None
    beside: tuple[File, ...] = ()
    """Files that belong to it: weights of a model beyond 2 GB, the operators that a model in ORT format needs."""
    operators: tuple[str, ...] = ()
    unsigned: bool = False
    """It quantises to uint8, or around a zero point: not for TensorRT."""
    coverage: tuple[Coverage, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Raw outcome on a split: per image the predicted class and whether the true one is among the first five."""

    predicted: tuple[int, ...]
    in_top5: tuple[bool, ...]


@dataclass(frozen=True)
class Reference:
    """What the dense network makes of the hold-out images."""

    labels: tuple[int, ...]
    """True class of each image."""
    outcome: Evaluation


@dataclass(frozen=True)
class AccuracyReport:
    """Raw counts of every model on the same hold-out images; percentages, intervals and the gate are derived from them."""

    labels: tuple[int, ...]
    """True class of each image."""
    source: Evaluation
    pruned: Evaluation
    models: dict[str, Evaluation]
    """Of the ONNX files: `fp32` and the variants."""
    at: str = "1970-01-01T00:00:00+00:00"
    """When it was made, ISO 8601."""


# --- the device ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine, as it was built on the target."""

    file: File
    layers: File
    """JSON: milliseconds of each layer with its ONNX nodes and groups, and what TensorRT's inspector says."""
    tensorrt: str
    gpu: str | None
    seconds: float
    note: str
    """What of the settings could not be obeyed; else empty."""
    compute_capability: str | None = None
    board: str | None = None
    power_mode: str | None = None
    gpu_layers: tuple[str, ...] = ()
    """Of an engine for a DLA: what runs on the GPU all the same."""


@dataclass(frozen=True)
class FileLatency:
    """Raw durations of models, run in turn on the target; of the bundle's ONNX files `fp32` comes first."""

    names: tuple[str, ...]
    samples: File


@dataclass(frozen=True)
class LatencyReport:
    """Raw durations of the dense and the shipped model, run in turn; percentiles and the ratio are derived from them."""

    samples: File
    """`samples.Samples`: model 0 is the dense one, model 1 the one that ships."""
    runtime: str
    peak_memory_mb: tuple[float, ...]
    """Per model, of a process that loads and runs it alone; empty where it could not be measured."""
    overhead: float | None
    """Share of the sampling time in which no model ran."""
    facts: dict[str, str]
    """What the measurement depends on, of the device: as a budget's."""
    conditions: dict[str, Any]
    layers: File | None = None
    """JSON: milliseconds of each layer of the dense (`source`) and the shipped (`pruned`) model, from runs of their own; None where
    the runtime could not tell them."""
    gpu_samples: File | None = None
    """As `samples`, of an engine: between two events on the GPU, without the host's part."""
    cold_ms: tuple[float, ...] = ()
    """Per model, the median of single inferences after pauses; empty where none were made."""
    energy_mj: tuple[float, ...] = ()
    """Per model, of one inference, everything on the board included; empty where power could not be read."""
    models: tuple[dict[str, Any], ...] = ()
    """Per model, what the agent says of it: seconds to load it, whether it ran as a CUDA graph and why not."""
    duration_s: float | None = None
    """Sampling of each model: the recipe's, or longer where that left open whether a budget is met."""


@dataclass(frozen=True)
class BundleFiles:
    """An assembled bundle: `root` holds manifest.json and every file that it lists."""

    manifest: File
    files: tuple[File, ...]
