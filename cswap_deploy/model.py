"""A timm name or a user's factory → a module with its weights and its input specification. The only file that imports timm."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Architecture, File, InputSpec, Network, sha256_of
from cswap_deploy.errors import ModelError, require_module
from cswap_deploy.recipe import InputSettings, ModelSettings
from cswap_deploy.stage import stage

if TYPE_CHECKING:
    from torch import Tensor, nn

FACTORY_INPUT = InputSpec(
    shape=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
)
"""What a factory's network is taken to expect where `model.input` says nothing: ImageNet's usual preprocessing."""


@stage("source", returns=Network, libraries=("torch", "timm", "safetensors"))
def load(out: Path, settings: ModelSettings, code: Path | None) -> Network:
    """Build the network, load its weights, and prove that it is a classifier with finite weights.

    `code`: the factory's file, so that the result is stale when it changes. Errors: ModelError.
    """
    require_module("torch")
    from safetensors.torch import save_file

    architecture, module = _create(settings, code)
    if settings.checkpoint is not None:
        load_state(module, read_checkpoint(settings.checkpoint), f"checkpoint {settings.checkpoint.name}")
    _require_finite(module)
    spec = _input_spec(module, settings.input)
    outputs = _count_outputs(module, spec)
    save_file(_contiguous(module.state_dict()), out / "weights.safetensors")
    params, macs = count(module, spec)
    weights = File.of(out / "weights.safetensors")
    license_name = getattr(module, "pretrained_cfg", {}).get("license") if settings.pretrained else None
    return Network(architecture, None, weights, spec, outputs, params, macs, license_name)


def expected_outputs(settings: ModelSettings) -> int | None:
    """Number of classes without building the network; None where only the factory knows. Errors: ModelError."""
    require_module("torch")
    if settings.checkpoint is not None and not settings.checkpoint.is_file():
        raise ModelError(f"checkpoint {settings.checkpoint} does not exist", "correct model.checkpoint")
    if settings.name is None:
        file = settings.factory_file
        if file is not None and not file.is_file():
            raise ModelError(f"factory file {file} does not exist", "its path starts at the recipe's folder")
        return settings.num_classes
    _require_known(settings.name)
    if settings.pretrained:
        _require_pretrained_head(
            settings.name, {} if settings.num_classes is None else {"num_classes": settings.num_classes}
        )
    import timm

    config = timm.get_pretrained_cfg(settings.name)
    return settings.num_classes or (config.num_classes if config is not None else 1000)


def describe(settings: ModelSettings) -> str:
    weights = "pretrained" if settings.pretrained else settings.checkpoint.name if settings.checkpoint else "untrained"
    return f"{settings.name or settings.factory_shown} ({weights})"


def build(architecture: Architecture) -> nn.Module:
    """The dense module in eval mode with whatever weights its constructor gives it. Errors: ModelError."""
    match architecture.source:
        case "timm":
            return _timm(architecture.name, architecture.kwargs, pretrained=False)
        case "factory":
            return _call_factory(architecture.location, architecture.kwargs)


def count(module: nn.Module, spec: InputSpec) -> tuple[int, int]:
    """(parameters, multiply-accumulates of one image): convolutions, linear layers and attention products."""
    return sum(parameter.numel() for parameter in module.parameters()), count_by_module(module, spec)[""]


def count_by_module(module: nn.Module, spec: InputSpec) -> dict[str, int]:
    """Multiply-accumulates of one image per module name, children included; "" is the whole network."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    parameter = next(module.parameters())
    image = torch.zeros(1, *spec.shape, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad(), counter:
        module(image)
    root = type(module).__name__
    totals = {"": counter.get_total_flops() // 2}
    for name, operators in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            totals[name.removeprefix(f"{root}.")] = sum(operators.values()) // 2
    return totals


# --- building


def _create(settings: ModelSettings, code: Path | None) -> tuple[Architecture, nn.Module]:
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
    digest = f"sha256:{sha256_of(code)}" if code else "unknown"
    return Architecture("factory", shown, kwargs, digest, settings.factory), _call_factory(settings.factory, kwargs)


def _timm(name: str, kwargs: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    import timm

    _require_known(name)
    if pretrained:
        _require_pretrained_head(name, kwargs)
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ModelError(
            f"timm cannot build {name!r} with kwargs {dict(kwargs)}: {error}", "correct model.kwargs"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ModelError(f"timm cannot build {name!r}: {error}", "correct model.kwargs") from error
        raise ModelError(
            f"the pretrained weights of {name!r} are neither in the local cache nor to be had: {str(error).splitlines()[0]}",
            "connect to the network once, or set model.checkpoint to a local file",
        ) from error
    return module.eval()


def _require_known(name: str) -> None:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelError(
            f"timm {timm.__version__} has no model named {name!r}", f"{hint}timm.list_models() lists all names"
        )


def _require_pretrained_head(name: str, kwargs: Mapping[str, Any]) -> None:
    """timm replaces the classifier by a random one when num_classes differs from the weights': refuse that."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ModelError(
            f"timm publishes no pretrained weights for {name!r}", "set model.checkpoint, or model.pretrained: false"
        )
    wanted = kwargs.get("num_classes", config.num_classes)
    if wanted != config.num_classes:
        raise ModelError(
            f"the pretrained weights of {name!r} have {config.num_classes} classes, model.num_classes asks for {wanted}: "
            "its classifier would be random",
            "remove model.num_classes, or set model.checkpoint to weights trained for those classes",
        )


def _call_factory(reference: str, kwargs: Mapping[str, Any]) -> nn.Module:
    from torch import nn

    factory = _find_factory(reference)
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ModelError(
            f"factory {reference!r} does not take these arguments: {error}", "correct model.kwargs"
        ) from error
    module = factory(**kwargs)
    if not isinstance(module, nn.Module):
        raise ModelError(f"factory {reference!r} returned {type(module).__name__}", "it must return a torch.nn.Module")
    return module.eval()


def _find_factory(reference: str) -> Callable[..., Any]:
    place, function = reference.rsplit(":", 1)
    namespace = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(namespace, function, None)
    if not callable(factory):
        names = [name for name in dir(namespace) if callable(getattr(namespace, name)) and not name.startswith("_")]
        near = difflib.get_close_matches(function, names, 1)
        raise ModelError(
            f"factory {place!r} has no function {function!r}",
            f"did you mean {near[0]!r}?" if near else "name a function that returns a torch.nn.Module",
        )
    result: Callable[..., Any] = factory
    return result


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(
            f"factory file {path} does not exist", "correct model.factory; its path starts at the recipe's folder"
        )
    name = f"cswap_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    sys.modules[name] = namespace
    try:
        spec.loader.exec_module(namespace)
    except Exception as error:
        raise ModelError(
            f"factory file {path} cannot be imported: {type(error).__name__}: {error}", "correct the file"
        ) from error
    return namespace


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"factory module {name!r} cannot be imported: {error}", "install it, or correct model.factory"
        ) from error


# --- weights


def _require_finite(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"weight {name!r} holds {bad} values that are NaN or infinite, of {tensor.numel()}",
                "use a checkpoint from before the training diverged",
            )


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


# --- input and output


def _input_spec(module: nn.Module, wanted: InputSettings | None) -> InputSpec:
    """timm's data configuration of the network, overridden key by key by the recipe."""
    spec = _timm_input(module) if hasattr(module, "pretrained_cfg") else FACTORY_INPUT
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


def _timm_input(module: nn.Module) -> InputSpec:
    from timm.data.config import resolve_data_config

    config: Any = resolve_data_config(model=module)  # type: ignore[no-untyped-call]
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ModelError(
            f"the network's crop mode {mode!r} is not supported", "use a model with crop mode center or squash"
        )
    return InputSpec(
        shape=tuple(config["input_size"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] != "random" else "bilinear",
        crop_pct=config["crop_pct"],
        crop_mode="squash" if mode == "squash" else "center",
    )


def _count_outputs(module: nn.Module, spec: InputSpec) -> int:
    import torch

    try:
        with torch.no_grad():
            result = module(torch.zeros(2, *spec.shape))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ModelError(
            f"the network cannot run on an input of shape {spec.shape}: {str(error).splitlines()[0]}",
            "set model.input.size to what the network takes",
        ) from error
    if not isinstance(result, torch.Tensor) or result.ndim != 2 or result.shape[0] != 2:
        found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ModelError(
            f"the network returns {found}, not logits of shape (images, classes)", "wrap it so that it returns logits"
        )
    if result.shape[1] < 2:
        raise ModelError(
            f"the network has {result.shape[1]} output; a classifier needs two or more", "set model.num_classes"
        )
    return int(result.shape[1])
