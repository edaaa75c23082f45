"""A timm name or a user's factory → a module with its weights and its input specification. The only file that imports timm."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cswap_deploy import progress
from cswap_deploy.artifacts import Architecture, CropMode, File, InputSpec, Network, sha256_of
from cswap_deploy.checkpoint import CHECKPOINT, load_state, read_checkpoint, save_state
from cswap_deploy.digests import digest_of
from cswap_deploy.errors import ModelError, reason, require_host
from cswap_deploy.factory import call_factory
from cswap_deploy.recipe import ModelSettings
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    from torch import nn

FUSED_TOLERANCE = 1e-3
"""Largest change of a logit, relative to the largest, by which fusing layers may round."""
FACTORY_INPUT = InputSpec(
    shape=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
)
"""What a factory's network is taken to expect where `model.input` says nothing: ImageNet's usual preprocessing."""


@stage("source", returns=Network, libraries=("torch", "timm", "safetensors"))
def load(out: Path, settings: ModelSettings, code: tuple[Path, ...] = (), seed: int = 0) -> Network:
    """Build the network, load its weights, and prove that it is a classifier with finite float32 weights.

    `code`: the user's files behind a factory, so that the result is stale when one changes; `seed`: of whatever the
    constructor draws.
    Errors: ModelError.
    """
    require_host()
    architecture, module, spec, outputs = _proven(settings, code, seed)
    progress.note(f"input {spec.shown}")
    save_state(module, out / "weights.safetensors")
    params, macs = count(module, spec)
    weights = File.of(out / "weights.safetensors")
    license_name = getattr(module, "pretrained_cfg", {}).get("license") if settings.pretrained else None
    return Network(architecture, None, weights, spec, outputs, params, macs, license_name)


def proven(settings: ModelSettings, code: tuple[Path, ...] = (), seed: int = 0) -> tuple[InputSpec, int]:
    """Input and number of classes, after all that `load` would refuse was looked for; nothing is kept. Errors: ModelError."""
    require_host()
    return _proven(settings, code, seed)[2:]


def expected_outputs(settings: ModelSettings) -> int | None:
    """Number of classes without building the network; None where only the factory knows. Errors: ModelError."""
    require_host()
    if settings.checkpoint is not None and not settings.checkpoint.is_file():
        raise ModelError(f"checkpoint {settings.checkpoint} does not exist", "correct model.checkpoint", key=CHECKPOINT)
    if settings.name is None:
        file = settings.factory_file
        if file is not None and not file.is_file():
            raise ModelError(f"factory file {file} does not exist", "its path starts at the recipe's folder")
        return settings.num_classes
    config = _timm_config(settings.name)
    if settings.pretrained:
        _require_pretrained_head(settings.name, settings.num_classes)
    return settings.num_classes or (config.num_classes if config is not None else 1000)


def describe(settings: ModelSettings) -> str:
    weights = "pretrained" if settings.pretrained else settings.checkpoint.name if settings.checkpoint else "untrained"
    return f"{settings.name or settings.factory_shown} ({weights})"


def build(architecture: Architecture) -> nn.Module:
    """The dense module in eval mode with whatever weights its constructor gives it, timm's fused. Errors: ModelError."""
    match architecture.source:
        case "timm":
            return _fused(_timm(architecture.name, architecture.kwargs, pretrained=False))
        case "factory":
            return call_factory(architecture.location, architecture.kwargs)


@contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """A logger of somebody else's says nothing below `level` inside the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def count(module: nn.Module, spec: InputSpec) -> tuple[int, int]:
    """(parameters, multiply-accumulates of one image): convolutions, linear layers and attention products."""
    return sum(parameter.numel() for parameter in module.parameters()), sum(count_by_module(module, spec).values())


def count_by_module(module: nn.Module, spec: InputSpec) -> dict[str, int]:
    """Multiply-accumulates of one image that each module's own forward takes, without those of the modules that it calls.

    A module that stands under several names counts under the first, as in `named_modules`; "" is the network's own forward.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops},
    )
    parameter = next(module.parameters())
    image = torch.zeros(1, *spec.shape, dtype=parameter.dtype, device=parameter.device)
    own = {name: 0 for name, _ in module.named_modules()}
    begun: list[int] = []
    """Of the modules that run: the count at which each one's own part goes on."""

    def enter(_layer: nn.Module, _inputs: Any) -> None:
        begun.append(counter.get_total_flops())

    def leave(name: str) -> None:
        now, start = counter.get_total_flops(), begun.pop()
        own[name] += (now - start) // 2
        begun[:] = [outer + now - start for outer in begun]

    with torch.no_grad(), _frozen(module), _taken_apart(), ExitStack() as hooks:
        for name, layer in module.named_modules():
            hooks.callback(layer.register_forward_pre_hook(enter).remove)
            hooks.callback(layer.register_forward_hook(lambda _l, _i, _o, name=name: leave(name)).remove)
        with counter:
            module(image)
    return own


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient: PyTorch's counter looks for the gradient functions of those that a module is given."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


@contextmanager
def _taken_apart() -> Iterator[None]:
    """PyTorch's attention and encoder layers call plain products: their fused operators are none that its counter knows."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of shapes (batch, heads, tokens, dims): PyTorch counts this operator on other devices only."""
    return 2 * math.prod((*query[:-1], key[-2], query[-1] + value[-1]))


# --- building


def _proven(
    settings: ModelSettings, code: tuple[Path, ...], seed: int
) -> tuple[Architecture, nn.Module, InputSpec, int]:
    """The network with its weights, its input and the number of its outputs. Errors: ModelError."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        architecture, module = _create(settings, code)
    if settings.checkpoint is not None:
        load_state(module, read_checkpoint(settings.checkpoint), f"checkpoint {settings.checkpoint.name}")
    _require_sound(module)
    spec = _input_spec(module, settings)
    outputs = _count_outputs(module, spec, settings.num_classes, bool(settings.input and settings.input.size))
    if architecture.source == "timm":
        module = _fused_alike(module, spec)
    return architecture, module, spec, outputs


def _create(settings: ModelSettings, code: tuple[Path, ...]) -> tuple[Architecture, nn.Module]:
    kwargs = dict(settings.kwargs)
    if settings.num_classes is not None:
        kwargs["num_classes"] = settings.num_classes
    if settings.name is not None:
        import timm

        architecture = Architecture("timm", settings.name, kwargs, f"timm {timm.__version__}")
        return architecture, _timm(settings.name, kwargs, pretrained=bool(settings.pretrained))
    assert settings.factory is not None
    place, function = settings.factory.rsplit(":", 1)
    shown = f"{Path(place).name if place.endswith('.py') else place}:{function}"
    module = call_factory(settings.factory, kwargs)
    digest = f"sha256:{digest_of([sha256_of(file) for file in code])}" if code else "unknown"
    return Architecture("factory", shown, kwargs, digest, settings.factory), module


def _timm(name: str, kwargs: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    import timm

    _timm_config(name)
    if pretrained:
        _require_pretrained_head(name, kwargs.get("num_classes"))
    try:
        with quiet("timm", logging.WARNING):
            module: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm passes on whatever wrong arguments make it stumble over
        if pretrained and isinstance(error, OSError):
            raise ModelError(
                f"the pretrained weights of {name!r} are neither in the local cache nor to be had: {reason(error)}",
                "connect to the network once, or set model.checkpoint to a local file",
            ) from error
        raise ModelError(
            f"timm cannot build {name!r}{' with its weights' if pretrained else ''} with kwargs {dict(kwargs)}: "
            f"{reason(error)}",
            "correct model.kwargs",
            key="model.kwargs",
        ) from error
    return module.eval()


def _fused(module: nn.Module) -> nn.Module:
    """The same function in eval mode: branches that are one convolution at inference become one (timm's re-parameterisation),
    convolutions that standardise their weights become plain ones with the standardised weights."""
    from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
    from timm.utils.model import reparameterize_model

    module = reparameterize_model(module, inplace=True)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, StdConv2d | StdConv2dSame | ScaledStdConv2d | ScaledStdConv2dSame):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, _standardised(layer))
    return module.eval()


def _fused_alike(module: nn.Module, spec: InputSpec) -> nn.Module:
    """`_fused`, and proof on one random image that the logits are the same. Errors: ModelError."""
    import torch

    image = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = module(image)
        module = _fused(module)
        change = float((module(image) - before).abs().max() / before.abs().max().clamp_min(1e-6))
    if not change <= FUSED_TOLERANCE:
        raise ModelError(
            f"timm's re-parameterisation changes the network's logits by {change:.1e} of the largest",
            "report this network; use another version of timm",
        )
    return module


def _standardised(layer: Any) -> nn.Module:
    """A plain convolution with the weights that `layer` computes from its own at each forward."""
    import torch
    import torch.nn.functional as F
    from timm.layers.conv2d_same import Conv2dSame
    from torch import nn

    kind = Conv2dSame if getattr(layer, "same_pad", False) else nn.Conv2d
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    plain: nn.Conv2d = kind(
        *sizes, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
        bias=layer.bias is not None,
    )  # fmt: skip
    with torch.no_grad():
        gain = (layer.gain.double() * layer.scale).view(-1) if hasattr(layer, "gain") else None
        own = layer.weight.double().reshape(1, layer.out_channels, -1)
        plain.weight.copy_(
            F.batch_norm(own, None, None, gain, training=True, eps=layer.eps).reshape(layer.weight.shape)
        )
        if layer.bias is not None:
            assert plain.bias is not None
            plain.bias.copy_(layer.bias)
    return plain


def _timm_config(name: str) -> Any:
    """timm's pretrained configuration of a name, None where it has none; a name or a tag that is unknown is refused."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(architecture, timm.list_models(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelError(
            f"timm {timm.__version__} has no model named {name!r}", f"{hint}timm.list_models() lists all names"
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)) or "none"
        raise ModelError(
            f"timm {timm.__version__} has no weights {tag!r} of {architecture!r}", f"it has {known}"
        ) from error


def _require_pretrained_head(name: str, wanted: int | None) -> None:
    """timm replaces the classifier by a random one when num_classes differs from the weights': refuse that."""
    config = _timm_config(name)
    if config is None or not config.has_weights:
        raise ModelError(
            f"timm publishes no pretrained weights for {name!r}", "set model.checkpoint, or model.pretrained: false"
        )
    if wanted not in (None, config.num_classes):
        raise ModelError(
            f"the pretrained weights of {name!r} have {config.num_classes} classes, model.num_classes asks for {wanted}: "
            "its classifier would be random",
            "remove model.num_classes, or set model.checkpoint to weights trained for those classes",
            key="model.num_classes",
        )


# --- weights


def _require_sound(module: nn.Module) -> None:
    import torch

    if next(module.parameters(), None) is None:
        raise ModelError("the network has no parameters", "give a network with weights")
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"weight {name!r} is {str(parameter.dtype).removeprefix('torch.')}, and networks are taken in float32",
                "let the factory return it .float(); what ships may be smaller",
            )
    for name, tensor in module.state_dict().items():
        bound = tensor.numel() == 1 and not bool(tensor.isnan())  # of a clamp, which may be infinite
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()) and not bound:
            bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"weight {name!r} holds {bad} values that are NaN or infinite, of {tensor.numel()}",
                "use a checkpoint from before the training diverged",
                key=CHECKPOINT,
            )


# --- input and output


def _input_spec(module: nn.Module, settings: ModelSettings) -> InputSpec:
    """timm's data configuration of the network, overridden key by key by the recipe."""
    wanted = settings.input
    if wanted is None and not hasattr(module, "pretrained_cfg"):
        size = "x".join(map(str, FACTORY_INPUT.shape))
        progress.note(f"preprocessing is taken to be ImageNet's, {size}: set model.input if yours is another")
    spec = _timm_input(module, settings.kwargs) if hasattr(module, "pretrained_cfg") else FACTORY_INPUT
    if wanted is None:
        return spec
    return InputSpec(
        shape=(spec.shape[0], *wanted.size) if wanted.size else spec.shape,
        mean=wanted.mean or spec.mean,
        std=wanted.std or spec.std,
        interpolation=wanted.interpolation or spec.interpolation,
        crop_pct=wanted.crop_pct or spec.crop_pct,
        crop_mode=spec.crop_mode,
    )


def _timm_input(module: nn.Module, kwargs: Mapping[str, Any]) -> InputSpec:
    from timm.data.config import resolve_data_config

    config: Any = resolve_data_config(model=module)  # type: ignore[no-untyped-call]
    mode: Any = config.get("crop_mode") or "center"
    if mode not in get_args(CropMode):
        raise ModelError(
            f"the network's crop mode {mode!r} is not known", f"use a model with one of {', '.join(get_args(CropMode))}"
        )
    return InputSpec(
        shape=(kwargs.get("in_chans", config["input_size"][0]), *config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] != "random" else "bilinear",
        crop_pct=config["crop_pct"],
        crop_mode=mode,
    )


def _count_outputs(module: nn.Module, spec: InputSpec, wanted: int | None, sized: bool) -> int:
    """`sized`: whether the recipe gives the input's size."""
    import torch

    try:
        with torch.no_grad():
            result = module(torch.zeros(2, *spec.shape))
    except Exception as error:  # a forward that does not fit its input raises anything
        raise ModelError(
            f"the network cannot run on an input of shape {spec.shape}: {reason(error)}",
            "set model.input.size to what the network takes",
            key="model.input.size" if sized else "",
        ) from error
    if not isinstance(result, torch.Tensor) or result.ndim != 2 or result.shape[0] != 2:
        found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ModelError(
            f"the network returns {found}, not logits of shape (images, classes)", "wrap it so that it returns logits"
        )
    if result.shape[1] < 2:
        raise ModelError(
            f"the network has {result.shape[1]} output; a classifier needs two or more",
            "set model.num_classes",
            key="model.num_classes",
        )
    if wanted not in (None, result.shape[1]):
        raise ModelError(
            f"model.num_classes is {wanted}, and the network has {result.shape[1]} outputs",
            "correct model.num_classes",
            key="model.num_classes",
        )
    return int(result.shape[1])
