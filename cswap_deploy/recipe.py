"""The recipe: every setting of a run as frozen values, read from YAML, refused with file, line and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cswap_deploy import recipe_file, runtimes

Conflicts: TypeAlias = Iterator[tuple[str, str]]
"""Keys relative to the block, each with what is wrong."""

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Variant: TypeAlias = Literal["fp16", "int8", "int8-tensorrt", "int8-arm"]
LocalPath: TypeAlias = Annotated[Path, Field(strict=False)]
Names: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]
Fraction: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Images: TypeAlias = Annotated[int, Field(ge=1, description="images of the fit split to score on; capped at its size")]


def _refusal(faults: Sequence[tuple[str, str]]) -> PydanticCustomError:
    text = "; ".join(f"{key}: {text}" if key else text for key, text in faults)
    return PydanticCustomError("conflict", "{text}", {"text": text, "faults": list(faults)})


class Settings(BaseModel):
    """Frozen, strict ("8" is not 8, true is not 1), unknown keys refused; `_conflicts`: faults between valid keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def _conflicts(self) -> Conflicts:
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Settings:
        if faults := list(self._conflicts()):
            raise _refusal(faults)
        return self


# --- model and data --------------------------------------------------------------------------------------------------


def _square(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


_SIDE = {"type": "integer", "minimum": 1}
_SIZE_SCHEMA: dict[str, Any] = {
    "anyOf": [_SIDE, {"type": "array", "prefixItems": [_SIDE, _SIDE], "minItems": 2, "maxItems": 2}, {"type": "null"}],
    "errorMessage": "expected one side in pixels, or a list [height, width]",
}
Side: TypeAlias = Annotated[int, Field(ge=1)]
Size: TypeAlias = Annotated[tuple[Side, Side], Field(strict=False)]
Channels: TypeAlias = Annotated[tuple[float, float, float], Field(strict=False)]
Spread: TypeAlias = Annotated[float, Field(gt=0)]


class InputSettings(Settings):
    """How an image becomes the network's input, where it differs from what timm says."""

    size: Annotated[Size | None, BeforeValidator(_square)] = Field(
        default=None, description="height and width in pixels; one number for a square", json_schema_extra=_SIZE_SCHEMA
    )
    mean: Channels | None = Field(default=None, description="subtracted per channel (red, green, blue), pixels in 0..1")
    std: Annotated[tuple[Spread, Spread, Spread], Field(strict=False)] | None = Field(
        default=None, description="divides per channel (red, green, blue), pixels in 0..1"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        default=None, description="filter of the resize"
    )
    crop_pct: Fraction | None = Field(
        default=None, description="fraction of the resized image that the centre crop keeps"
    )


_FACTORY = r"^(.*[^/]\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*$"
_OWN_KEYS = {"pretrained": "pretrained", "num_classes": "num_classes", "checkpoint_path": "checkpoint"}


class ModelSettings(Settings):
    """Which network: a timm name, or a callable of the user's that returns a module."""

    KEYED_BY: ClassVar[Mapping[str, str]] = {"factory": "factory_shown"}
    """Fields that count in a stage's key by another attribute: a factory's folder does not, its files do by content."""

    name: str | None = Field(default=None, min_length=1, description="a timm model name; or give `factory`")
    factory: str | None = Field(
        default=None,
        pattern=_FACTORY,
        description="`file.py:function` from the recipe's folder, or `package.module:function`; returns an nn.Module",
        json_schema_extra={"errorMessage": "expected file.py:function or package.module:function"},
    )
    kwargs: dict[str, JsonValue] = Field(default={}, description="arguments of timm.create_model or of the factory")
    pretrained: bool = Field(
        default_factory=bool,
        description="load timm's weights; default: true for a timm name without checkpoint, else false",
        json_schema_extra={"type": ["boolean", "null"], "errorMessage": "expected true or false"},
    )
    checkpoint: LocalPath | None = Field(
        default=None, description="weights: .safetensors, or .pth read with weights_only"
    )
    num_classes: int | None = Field(
        default=None,
        ge=1,
        description="number of outputs; a factory gets it as the argument num_classes; null: the model's own",
    )
    input: InputSettings | None = Field(
        default=None,
        description="preprocessing; null: timm's own, for a factory whose module has no `pretrained_cfg` ImageNet's at 224 pixels",
    )

    @property
    def factory_file(self) -> Path | None:
        """The file of a `file.py:function` factory; None for a package's and for a timm name."""
        file = (self.factory or "").rpartition(":")[0]
        return Path(file) if file.endswith(".py") else None

    @model_validator(mode="before")
    @classmethod
    def _resolve_pretrained(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("pretrained") is not None:
            return data
        from_timm = data.get("name") is not None and data.get("factory") is None
        return {**data, "pretrained": from_timm and data.get("checkpoint") is None}

    def _conflicts(self) -> Conflicts:
        if self.name is None and self.factory is None:
            yield "", "one of name and factory is required; for example `name: resnet18`"
        if self.name is not None and self.factory is not None:
            yield "factory", f"name and factory exclude each other, got {self.name!r} and {self.factory_shown!r}"
        if self.pretrained and self.factory is not None:
            yield "pretrained", "a factory has no timm weights, got true; leave it out, or load a checkpoint"
        if self.pretrained and self.checkpoint is not None:
            yield "pretrained", "weights come from timm or from a checkpoint, got true and a checkpoint; drop one"
        for key in _OWN_KEYS.keys() & self.kwargs.keys() if self.name is not None else ():
            yield f"kwargs.{key}", f"not an argument to pass on; write it as model.{_OWN_KEYS[key]}"

    @property
    def factory_shown(self) -> str | None:
        """`factory` without the folder of its file: fit for a message or a bundle."""
        return (
            f"{self.factory_file.name}:{self.factory.rpartition(':')[2]}"
            if self.factory_file and self.factory
            else self.factory
        )


class CalibrationSettings(Settings):
    """The images: scoring (3/4 fit, 1/4 selection) and holdout, which only reports."""

    images: LocalPath = Field(
        description="folder of class folders, split by seed; or a folder holding `scoring/` and `holdout/`",
        examples=["path/to/images"],
    )
    labels: LocalPath | None = Field(default=None, description="file with one class name per model output, one a line")
    scoring: int = Field(default=1024, ge=8, description="images to score and choose with: 3/4 `fit`, 1/4 `selection`")
    holdout: int | None = Field(default=None, ge=1, description="images to report on; null: all the rest")


# --- pruning ---------------------------------------------------------------------------------------------------------

Percentile: TypeAlias = Literal[50, 90, 99]


class MacsTarget(Settings):
    """Keep this fraction of the multiply-accumulates."""

    macs: Fraction = Field(description="fraction of the multiply-accumulates to keep")


class ParamsTarget(Settings):
    """Keep this fraction of the parameters."""

    params: Fraction = Field(description="fraction of the parameters to keep")


class MaxDropTarget(Settings):
    """Prune until the accuracy on `selection` has dropped this far."""

    max_drop: float = Field(gt=0, le=100, description="top-1 drop allowed on `selection`, in percentage points")


class LatencyTarget(Settings):
    """Prune until the network is this fast, as measured on the device."""

    latency_ms: float = Field(gt=0, description="latency to reach on the device, in milliseconds per batch")
    percentile: Percentile = Field(default=50, description="percentile of the samples that must meet it")
    trials: int = Field(default=8, ge=1, description="candidates to measure on the device, at most")
    tolerance: float = Field(
        default=0.05, gt=0, lt=1, description="part of the budget that a candidate may leave unused, as a fraction"
    )


class FpsTarget(Settings):
    """Prune until the network reaches this rate, as measured on the device."""

    fps: float = Field(gt=0, description="images per second to reach on the device")
    percentile: Percentile = Field(default=50, description="percentile of the samples that must meet it")
    trials: int = Field(default=8, ge=1, description="candidates to measure on the device, at most")
    tolerance: float = Field(
        default=0.05, gt=0, lt=1, description="part of the budget that a candidate may leave unused, as a fraction"
    )


class CausalCriterion(Settings):
    """Mean change of log p(true class) when a unit leaves."""

    kind: Literal["causal"] = Field(default="causal", description="effect of removing a unit on the true class")
    estimator: Literal["attribution", "screened", "exact"] = Field(
        default="screened",
        description="attribution: one backward pass; exact: ablate every unit; screened: the first, then the second where in doubt",
    )
    intervention: Literal["zero", "mean", "surgery"] = Field(
        default="surgery", description="what a removed unit leaves: zero, its mean, or consumers that absorb it"
    )
    images: Images = Field(default=256)
    alpha: float = Field(default=0.05, gt=0, lt=1, description="false discovery rate of the verdicts, as a fraction")


class TaylorCriterion(Settings):
    """First-order change of the loss."""

    kind: Literal["taylor"] = Field(default="taylor", description="first-order change of the loss")
    images: Images = Field(default=256)


class MagnitudeCriterion(Settings):
    """Norm of a unit's weights; needs no images."""

    kind: Literal["magnitude"] = Field(default="magnitude", description="norm of the unit's weights")


class VarianceCriterion(Settings):
    """Variance of a unit's output."""

    kind: Literal["variance"] = Field(default="variance", description="variance of the unit's output")
    images: Images = Field(default=256)


class RandomCriterion(Settings):
    """Random scores from the recipe's seed: the baseline."""

    kind: Literal["random"] = Field(default="random", description="random scores from the recipe's seed")


class NoCompensation(Settings):
    """Leave the consumers as they are."""

    kind: Literal["none"] = Field(default="none", description="the consumers stay as they are")


class MeanCompensation(Settings):
    """Add the mean of what left to the consumers' biases."""

    kind: Literal["mean"] = Field(default="mean", description="the means of what left go to the consumers' biases")


class BatchNormCompensation(Settings):
    """Estimate the batch-norm statistics anew."""

    kind: Literal["batchnorm"] = Field(default="batchnorm", description="batch-norm statistics are estimated anew")


class LeastSquaresCompensation(Settings):
    """Consumers absorb what the remaining units explain, in closed form."""

    kind: Literal["least_squares"] = Field(
        default="least_squares", description="consumers absorb what the remaining units explain, in closed form"
    )
    producer_steps: int = Field(
        default=2,
        ge=0,
        le=20,
        description="Gauss-Newton steps in which the layer that makes a group's units moves too, 0 for none",
    )
    views: Annotated[int, Field(ge=1, le=8)] | Literal["auto"] = Field(
        default="auto",
        description="times that each fit image is seen, shifted by up to an eighth of its size; auto: as often as makes 768 in all",
    )


class CurvesAllocation(Settings):
    """The widths of the groups follow from the damage that is measured at several widths of each."""

    kind: Literal["curves"] = Field(
        default="curves", description="widths by the measured damage of each group after compensation"
    )
    temperature: float = Field(default=4.0, gt=0, description="softmax temperature at which the damage is measured")
    images: int = Field(
        default=256,
        ge=1,
        description="images of the fit split to measure it on; as many as take 5e10 MACs, or 32, if these are fewer",
    )


class GlobalAllocation(Settings):
    """One ranking of all units by score per saved cost decides."""

    kind: Literal["global"] = Field(default="global", description="one ranking of all units by score per saved cost")


_TARGETS: dict[str, type[Settings]] = {
    "macs": MacsTarget,
    "params": ParamsTarget,
    "max_drop": MaxDropTarget,
    "latency_ms": LatencyTarget,
    "fps": FpsTarget,
}
_KINDS: dict[str, type[Settings]] = {
    "causal": CausalCriterion,
    "taylor": TaylorCriterion,
    "magnitude": MagnitudeCriterion,
    "variance": VarianceCriterion,
    "random": RandomCriterion,
    "none": NoCompensation,
    "mean": MeanCompensation,
    "batchnorm": BatchNormCompensation,
    "least_squares": LeastSquaresCompensation,
    "curves": CurvesAllocation,
    "global": GlobalAllocation,
}


def _one_target(value: Any) -> Any:
    """Refuse a block that has not exactly one target key, so that what follows is about the right class."""
    if not isinstance(value, Mapping):
        return value
    goals = [key for key in _TARGETS if key in value]
    if len(goals) > 1:
        raise _refusal([("", f"expected one of {', '.join(_TARGETS)}, got {' and '.join(goals)}")])
    strange = [recipe_file.spelt(str(key)) for key in value if key not in ("percentile", "trials", "tolerance")]
    if not goals and strange:
        raise _refusal([(key, recipe_file.unknown(key, list(_TARGETS))) for key in strange])
    return value


def _target_tag(value: Any) -> str | None:
    if isinstance(value, Settings):
        return f"@{type(value).__name__}"
    goals = [key for key in _TARGETS if isinstance(value, Mapping) and key in value]
    return f"@{_TARGETS[goals[0]].__name__}" if goals else None


def _kind_tag(value: Any) -> str | None:
    if isinstance(value, Settings):
        return f"@{type(value).__name__}"
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return f"@{_KINDS[kind].__name__}" if isinstance(kind, str) and kind in _KINDS else None


def _from_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _kinds_schema(*kinds: str, default: str) -> Callable[[dict[str, Any]], None]:
    def change(schema: dict[str, Any]) -> None:
        schema["default"] = {"kind": default}
        schema["anyOf"] = [{"enum": list(kinds)}, *schema.pop("oneOf")]
        schema["errorMessage"] = f"expected one of {', '.join(kinds)}"

    return change


TargetSettings: TypeAlias = Annotated[
    Annotated[MacsTarget, Tag("@MacsTarget")]
    | Annotated[ParamsTarget, Tag("@ParamsTarget")]
    | Annotated[MaxDropTarget, Tag("@MaxDropTarget")]
    | Annotated[LatencyTarget, Tag("@LatencyTarget")]
    | Annotated[FpsTarget, Tag("@FpsTarget")],
    Discriminator(_target_tag),
    BeforeValidator(_one_target),
]
CriterionSettings: TypeAlias = Annotated[
    Annotated[CausalCriterion, Tag("@CausalCriterion")]
    | Annotated[TaylorCriterion, Tag("@TaylorCriterion")]
    | Annotated[MagnitudeCriterion, Tag("@MagnitudeCriterion")]
    | Annotated[VarianceCriterion, Tag("@VarianceCriterion")]
    | Annotated[RandomCriterion, Tag("@RandomCriterion")],
    Discriminator(_kind_tag),
    BeforeValidator(_from_kind),
]
CompensationSettings: TypeAlias = Annotated[
    Annotated[NoCompensation, Tag("@NoCompensation")]
    | Annotated[MeanCompensation, Tag("@MeanCompensation")]
    | Annotated[BatchNormCompensation, Tag("@BatchNormCompensation")]
    | Annotated[LeastSquaresCompensation, Tag("@LeastSquaresCompensation")],
    Discriminator(_kind_tag),
    BeforeValidator(_from_kind),
]

AllocationSettings: TypeAlias = Annotated[
    Annotated[CurvesAllocation, Tag("@CurvesAllocation")] | Annotated[GlobalAllocation, Tag("@GlobalAllocation")],
    Discriminator(_kind_tag),
    BeforeValidator(_from_kind),
]


HeadsMode: TypeAlias = Literal["whole", "dims"]


class PruneSettings(Settings):
    """What to remove, how to rank it, and how the rest makes up for it."""

    target: TargetSettings | None = Field(
        default_factory=lambda: MacsTarget(macs=0.7),
        description="what to prune for: one key; null: no pruning",
        json_schema_extra={
            "default": {"macs": 0.7},
            "errorMessage": f"expected null or a block with one of the keys {', '.join(_TARGETS)}",
        },
    )
    criterion: CriterionSettings = Field(
        default_factory=CausalCriterion,
        description="what a unit's leaving does, for verdicts and where units are ranked by it; the name alone stands for `{kind: name}`",
        json_schema_extra=_kinds_schema("causal", "taylor", "magnitude", "variance", "random", default="causal"),
    )
    compensate: CompensationSettings = Field(
        default_factory=LeastSquaresCompensation,
        description="what is done for the units that stay; the name alone stands for `{kind: name}`",
        json_schema_extra=_kinds_schema("none", "mean", "batchnorm", "least_squares", default="least_squares"),
    )
    allocation: AllocationSettings = Field(
        default_factory=CurvesAllocation,
        description="how the widths of the groups are found; the name alone stands for `{kind: name}`",
        json_schema_extra=_kinds_schema("curves", "global", default="curves"),
    )
    steps: int = Field(
        default=8,
        ge=1,
        le=100,
        description="number of steps in which units leave; for a latency, as many as lie between the dense one and half of it; "
        "max_drop has steps of its own",
    )
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="layers keep a multiple of it of the channels that a group narrows; "
        "auto: TensorRT fp16 8, TensorRT int8 32, a latency target: from the staircase, else 1",
    )
    skip: Names = Field(default=(), description="patterns of module names to leave alone")
    heads: HeadsMode = Field(
        default="whole",
        description="what attention loses: whole heads; dims: dimensions within all its heads, where that can be proven",
    )


# --- what ships ------------------------------------------------------------------------------------------------------


class AccuracySettings(Settings):
    """The gate on what ships, judged on `holdout`."""

    max_drop: float | None = Field(
        default=1.0,
        ge=0,
        le=100,
        description="top-1 drop allowed, dense minus shipped, in percentage points; null: no gate",
    )
    rule: Literal["point", "bound"] = Field(
        default="point", description="point: the observed drop decides; bound: its upper bound does"
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="confidence of the interval, as a fraction")


RuntimeWish: TypeAlias = Annotated[
    str,
    Field(
        pattern=runtimes.WISH,
        json_schema_extra={
            "errorMessage": "expected onnxruntime, onnxruntime-web, onnxruntime-node or tensorrt with >= or == and a version"
        },
    ),
]


class OnnxSettings(Settings):
    """The ONNX export."""

    opset: int = Field(default=18, ge=18, le=22, description="version of the ONNX operator set")
    dynamic_batch: bool = Field(default=False, description="leave the batch size open")
    runtimes: Annotated[tuple[RuntimeWish, ...], Field(strict=False)] = Field(
        default=(),
        description="what the files must run on, such as onnxruntime>=1.18 or tensorrt==10.3; impossible ones are refused",
    )
    ort_format: bool = Field(
        default=False, description="also write what ships in ORT format (model.ort), for minimal builds of ONNX Runtime"
    )
    image_input: bool = Field(
        default=False,
        description="also write what ships with normalisation and softmax inside (model.image.onnx): "
        "resized uint8 NHWC in, probabilities out",
    )

    @property
    def graph(self) -> OnnxSettings:
        """What the exported graph depends on: further files of it do not make it another."""
        return self.model_copy(update={"ort_format": False, "image_input": False})

    @property
    def ir_version(self) -> int:
        """Of the written files, at most 10."""
        return runtimes.ir_version(self.runtimes)

    def _conflicts(self) -> Conflicts:
        for _, fault in runtimes.impossible(self.runtimes, self.opset):
            yield "runtimes", f"{fault}; lower onnx.opset, or drop it"


class Int8Settings(Settings):
    """How the int8 files are made: ranges from `fit`, every choice on `selection`."""

    images: int = Field(default=128, ge=1, description="fit images that the ranges come from; capped at their number")
    max_drop: float = Field(
        default=0.5,
        ge=0,
        le=100,
        description="top-1 that an int8 file may lose on `selection` against the float32 file, in percentage points, "
        "before nodes stay in float",
    )
    max_float: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.25, description="fraction of the weighted nodes that may stay in float"
    )


class BatchSettings(Settings):
    """Batch sizes that an engine is built for."""

    min: int = Field(default=1, ge=1, description="smallest batch, in images")
    opt: int = Field(default=1, ge=1, description="batch that the engine is tuned for, in images")
    max: int = Field(default=1, ge=1, description="largest batch, in images")

    def _conflicts(self) -> Conflicts:
        if not self.min <= self.opt <= self.max:
            yield "", f"expected min <= opt <= max, got {self.min}, {self.opt}, {self.max}"


class EngineSettings(Settings):
    """The TensorRT engine, built on the target."""

    precision: Precision = Field(description="precision of the engine", examples=["fp16"])
    workspace_mib: int = Field(default=1024, ge=1, description="scratch memory of the builder, in MiB")
    optimization_level: int = Field(default=3, ge=0, le=5, description="effort of the builder, 0 to 5")
    dla_core: int | None = Field(default=None, ge=0, description="number of the DLA core to run on; null: the GPU")
    dla_fallback: bool = Field(
        default=False, description="whether the GPU may run what the DLA cannot; counted in the bundle"
    )
    batch: BatchSettings = Field(default_factory=BatchSettings, description="batch sizes of the optimization profile")
    keep_fp32: Names | Literal["auto"] = Field(
        default="auto",
        description="patterns of ONNX node names that stay fp32, by TensorRT's module up to 10.x; auto: LayerNorm, Softmax, reductions",
    )

    def _conflicts(self) -> Conflicts:
        if self.dla_core is not None and self.precision == "fp32":
            yield "dla_core", f"a DLA runs fp16 and int8 only, got {self.dla_core} with engine.precision fp32"
        if self.dla_fallback and self.dla_core is None:
            yield "dla_fallback", "it says what a DLA does, and none is asked for: set engine.dla_core"


_NAME = r"[A-Za-z0-9_.][A-Za-z0-9_.-]*"
_PORT = r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
TARGET = rf"^(local|ssh://({_NAME}@)?({_NAME}|\[[0-9A-Fa-f:.]+\])(:{_PORT})?)$"


class LatencySettings(Settings):
    """How latency is measured, dense and shipped in turn."""

    KEYED_BY: ClassVar[Mapping[str, str]] = {"target": "anywhere"}
    """What the target is counts in a stage's key, by its own facts; where it is does not."""

    runtime: Literal["onnxruntime", "tensorrt"] = Field(
        default_factory=lambda: "onnxruntime",
        description="what runs the model; default: tensorrt with an engine, else onnxruntime",
    )
    target: str = Field(
        default="local",
        pattern=TARGET,
        description="`local` or `ssh://[user@]host[:port]`",
        json_schema_extra={
            "errorMessage": "expected local or ssh://[user@]host[:port], where no user or host starts with '-'"
        },
    )
    batch: int = Field(default=1, ge=1, description="images per inference")
    threads: int = Field(default=1, ge=1, description="CPU threads of the runtime")
    warmup_s: float = Field(default=1.0, ge=0, description="running before the first sample, in seconds")
    duration_s: float = Field(default=5.0, gt=0, description="sampling of each model, in seconds")

    @property
    def anywhere(self) -> str:
        return "anywhere"


# --- the recipe ------------------------------------------------------------------------------------------------------


class Recipe(Settings):
    """Everything a run depends on except the machine it runs on."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        description="name of the run and of its bundle",
        examples=["resnet18-orin"],
        json_schema_extra={
            "errorMessage": "expected lower-case letters, digits, '.', '_' and '-', a letter or digit first"
        },
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of every random choice")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where PyTorch runs")
    model: ModelSettings = Field(description="the network", examples=[{"name": "resnet18"}])
    calibration: CalibrationSettings = Field(description="the images", examples=[{"images": "path/to/images"}])
    prune: PruneSettings = Field(default_factory=PruneSettings, description="what to remove and how")
    ship: Precision = Field(
        default_factory=lambda: "fp32",
        description="precision that the gate, the latency and the budget are about; "
        "default: engine.precision with an engine, else fp32",
    )
    accuracy: AccuracySettings = Field(default_factory=AccuracySettings, description="the accuracy gate")
    onnx: OnnxSettings = Field(default_factory=OnnxSettings, description="the ONNX export")
    variants: Annotated[tuple[Variant, ...], Field(strict=False)] = Field(
        default=(), description="further ONNX files; int8 is U8S8 (phones, x86), int8-tensorrt and int8-arm are S8S8"
    )
    int8: Int8Settings = Field(default_factory=Int8Settings, description="how the int8 files are made")
    sign: LocalPath | None = Field(
        default=None, description="private key (EC, PEM) that signs the bundle, beside it; null: it is not signed"
    )
    engine: EngineSettings | None = Field(default=None, description="the TensorRT engine; null: none is built")
    latency: LatencySettings | None = Field(default=None, description="the latency measurement; null: not measured")

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def ships_engine(self) -> bool:
        """The engine ships, when there is one in the precision of `ship`; else an ONNX file does."""
        return self.engine is not None and self.engine.precision == self.ship

    @property
    def engine_file(self) -> str:
        """`fp32` or the variant that carries the engine's precision in its own types."""
        precision = self.engine.precision if self.engine else "fp32"
        return "int8-tensorrt" if precision == "int8" else precision

    @property
    def shipped_file(self) -> str:
        """`fp32` or the variant that ships, or that is the nearest to the engine that ships."""
        return self.engine_file if self.ships_engine else self.ship

    @property
    def wanted_variants(self) -> tuple[Variant, ...]:
        """Those asked for, the one that ships, and what an engine of any TensorRT version may be built from."""
        wanted = {*self.variants, self.shipped_file, self.engine_file}
        return tuple(variant for variant in get_args(Variant) if variant in wanted)

    @property
    def goal_ms(self) -> float | None:
        """The latency that is asked for, of one batch; None where something else is."""
        match self.prune.target:
            case LatencyTarget(latency_ms=value):
                return value
            case FpsTarget(fps=rate):
                assert self.latency
                return 1000 * self.latency.batch / rate
            case _:
                return None

    @property
    def target(self) -> str:
        return self.latency.target if self.latency else "local"

    @property
    def remote(self) -> bool:
        return self.target != "local"

    def on(self, target: str) -> Recipe:
        """The same recipe, measured on `target`; without a latency block it gets one with the defaults."""
        data = self.model_dump(mode="json")
        data["latency"] = {**(data["latency"] or {}), "target": target}
        return Recipe.model_validate_json(json.dumps(data))

    def where(self, key: str) -> str:
        """Where a dotted key, or the nearest block around it, was written: `file:line` or the `--set` text."""
        return next((self._places[k] for k in recipe_file.parents(key) if k in self._places), "the recipe")

    def __eq__(self, other: object) -> bool:
        """Settings count, not where they were written."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @model_validator(mode="before")
    @classmethod
    def _follow_engine(cls, data: Any) -> Any:
        engine = data.get("engine") if isinstance(data, Mapping) else None
        precision = engine.get("precision") if isinstance(engine, Mapping) else getattr(engine, "precision", None)
        if precision not in ("fp32", "fp16", "int8"):
            return data
        latency = data.get("latency")
        if isinstance(latency, LatencySettings):
            latency = latency.model_dump(exclude_unset=True)
        if isinstance(latency, Mapping) and data.get("ship", precision) == precision:
            latency = {"runtime": "tensorrt", **latency}
        return {"ship": precision, **data, "latency": latency}

    def _conflicts(self) -> Conflicts:
        if self.engine and self.ship != "fp32" and self.ship != self.engine.precision:
            yield "ship", f"expected engine.precision ({self.engine.precision}) or fp32, got {self.ship}"
        if isinstance(self.prune.target, LatencyTarget | FpsTarget) and self.latency is None:
            goal = "fps" if isinstance(self.prune.target, FpsTarget) else "latency_ms"
            yield (
                f"prune.target.{goal}",
                "a speed is measured: add a latency block; for example `latency: {target: local}`",
            )
        timed = isinstance(self.prune.target, LatencyTarget | FpsTarget)
        if timed and not isinstance(self.prune.allocation, CurvesAllocation):
            yield "prune.allocation", "a latency is weighed against measured damage: leave allocation out"
        if self.prune.heads == "dims" and not isinstance(self.prune.allocation, CurvesAllocation):
            yield (
                "prune.heads",
                "dimensions within heads have no place in one ranking of all units: leave allocation out",
            )
        if self.latency and self.latency.runtime == "tensorrt":
            yield from self._engine_conflicts(self.latency)
        if self.latency and self.latency.runtime == "onnxruntime":
            yield from self._onnxruntime_conflicts(self.latency)
        if self.engine and self.engine.batch.max > 1 and not self.onnx.dynamic_batch:
            yield "engine.batch", "more than one image needs a file with an open batch: set onnx.dynamic_batch: true"

    def _onnxruntime_conflicts(self, latency: LatencySettings) -> Conflicts:
        if self.ships_engine:
            yield (
                "latency.runtime",
                "what ships is the engine, which tensorrt runs: leave runtime out, or set ship: fp32",
            )
        if latency.batch > 1 and not self.onnx.dynamic_batch:
            yield "latency.batch", "more than one image needs a file with an open batch: set onnx.dynamic_batch: true"

    def _engine_conflicts(self, latency: LatencySettings) -> Conflicts:
        if self.engine is None:
            yield (
                "latency.runtime",
                "tensorrt runs an engine: add an engine block; for example `engine: {precision: fp16}`",
            )
        elif not self.ships_engine:
            yield (
                "latency.runtime",
                f"what ships is the {self.ship} ONNX file, which onnxruntime runs: leave runtime out",
            )
        elif not self.engine.batch.min <= latency.batch <= self.engine.batch.max:
            batch = self.engine.batch
            yield "latency.batch", f"expected a batch of the engine ({batch.min} to {batch.max}), got {latency.batch}"


# --- in and out ------------------------------------------------------------------------------------------------------


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`key.path=value`, value as YAML), resolve and check a recipe; one RecipeError lists every fault.

    Paths become absolute: the file's against its folder, an override's against the current folder.
    """
    document = recipe_file.read(Path(path), overrides)
    for key in ("model.checkpoint", "calibration.images", "calibration.labels", "sign"):
        document.replace(key, recipe_file.absolute)
    document.replace("model.factory", _absolute_factory)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        faults = recipe_file.explain(error.errors(include_url=False), _schema(), document)
        raise recipe_file.refusal([*document.faults, *faults]) from None
    if document.faults:
        raise recipe_file.refusal(document.faults)
    recipe._places = {key: place.where for key, place in document.places.items()}
    return recipe


def _absolute_factory(base: Path, factory: str) -> str:
    file, _, function = factory.rpartition(":")
    return f"{recipe_file.absolute(base, file)}:{function}" if file.endswith(".py") else factory


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what a user writes."""
    return deepcopy(_schema())


@cache
def _schema() -> dict[str, Any]:
    body = Recipe.model_json_schema()
    for name, block in body["$defs"].items():
        goals = [key for key in ("kind", *_TARGETS) if key in block.get("properties", ())]
        if name.endswith(("Target", "Criterion", "Compensation", "Allocation")):
            block["required"] = goals
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "cswap-deploy recipe"}
    return {**title, **_plain(body)}


def _plain(node: Any) -> Any:
    """Without the titles that pydantic makes out of key names, and as flat as its newer versions write it."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node.get("allOf", ())) == 1:
        node = {**node["allOf"][0], **{key: item for key, item in node.items() if key != "allOf"}}
    if "const" in node:
        node = {key: item for key, item in node.items() if key != "enum"}
    return {key: _plain(item) for key, item in node.items() if not (key == "title" and isinstance(item, str))}


def to_yaml(recipe: Recipe, digest: Callable[[Path], str], board: str = "") -> str:
    """The resolved recipe for a bundle, every default written out, no path and no host of this machine.

    A local file or folder becomes its name, with `digest` (SHA-256 in hex) in a comment; an ssh target becomes `local`,
    with the `board` it stands for in a comment.
    """
    from io import StringIO

    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.representer import RoundTripRepresenter

    def commented(data: Mapping[str, Any], outer: str = "") -> CommentedMap:
        block = CommentedMap()
        for key, value in data.items():
            path = f"{outer}{key}"
            block[key], comment = portable.get(path, (value, ""))
            if isinstance(block[key], dict) and block[key]:
                block[key] = commented(block[key], f"{path}.")
            if comment:
                block.yaml_add_eol_comment(comment, key)
        return block

    class Representer(RoundTripRepresenter):
        def represent_none(self, _: None) -> Any:
            return self.represent_scalar("tag:yaml.org,2002:null", "null")

    Representer.add_representer(type(None), Representer.represent_none)
    portable = _portable(recipe, digest, board)
    stream = StringIO()
    yaml = YAML()
    yaml.Representer = Representer
    yaml.width = 4096
    yaml.dump(commented(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def _portable(recipe: Recipe, digest: Callable[[Path], str], board: str) -> dict[str, tuple[Any, str]]:
    """Dotted key: the value that may leave this machine, and a comment."""
    model, calibration = recipe.model, recipe.calibration
    paths = {
        "model.checkpoint": model.checkpoint,
        "calibration.images": calibration.images,
        "calibration.labels": calibration.labels,
    }
    values: dict[str, tuple[Any, str]] = {
        key: (path.name, f"sha256:{digest(path)}") for key, path in paths.items() if path is not None
    }
    if recipe.sign:
        values["sign"] = recipe.sign.name, "a private key, which is not in the bundle"
    if model.factory_file:
        values["model.factory"] = model.factory_shown, f"sha256:{digest(model.factory_file)}"
    if model.name is not None:
        values["model.name"] = without_folder(model.name), ""
    values["model.kwargs"] = without_folder(model.kwargs), ""
    if recipe.latency and recipe.latency.target != "local":
        values["latency.target"] = "local", f"{board or 'another machine'}, over ssh"
    elif recipe.latency and board:
        values["latency.target"] = "local", board
    return values


def without_folder(value: Any) -> Any:
    """Text that is an absolute path, also behind timm's `local-dir:`, becomes its last name."""
    match value:
        case dict():
            return {key: without_folder(item) for key, item in value.items()}
        case list():
            return [without_folder(item) for item in value]
        case str() if value.removeprefix("local-dir:").startswith(("/", "~")):
            prefix = "local-dir:" if value.startswith("local-dir:") else ""
            return prefix + Path(value.removeprefix(prefix)).name
        case _:
            return value
