"""Weights at rest: read without running anything that a file may hold, and put into a module completely or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import ModelError, reason

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT = "model.checkpoint"
"""The recipe's key for it."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before the name of every weight."""
CONTAINERS = ("state_dict", "model", "model_state_dict")
"""Where training scripts put the state_dict in what they save."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a .pth file; a file that holds code is refused without running it."""
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist", "correct model.checkpoint", key=CHECKPOINT)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _state_of(_read_pickle(path), path)


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load all weights or refuse, naming the keys that do not fit; the module keeps its dtypes.

    Counters of BatchNorm may be absent, and every key may carry the prefix of a wrapper that the module does not have.
    """
    own = module.state_dict()
    state = _unwrapped(state, own)
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    both = [(name, own[name], state[name]) for name in own if name in state]
    faults = {
        "missing": sorted(set(own) - set(state) - optional),
        "unknown": sorted(set(state) - set(own)),
        "of another shape": [
            f"{name} is {tuple(new.shape)}, expected {tuple(old.shape)}"
            for name, old, new in both
            if old.shape != new.shape
        ],
        "not of floating point": [
            f"{name} is {str(new.dtype).removeprefix('torch.')}"
            for name, old, new in both
            if old.is_floating_point() and not new.is_floating_point()
        ],
    }
    shown = [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names]
    if shown:
        raise ModelError(
            f"{what} does not fit the network: {'; '.join(shown)}",
            "check model.name, model.kwargs and model.num_classes against what the weights were trained with",
            key=CHECKPOINT,
        )
    module.load_state_dict(dict(state), strict=False)


def save_state(module: nn.Module, path: Path) -> None:
    """All weights as .safetensors; a tensor that stands under several names is written for each."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}, path)


# --- files


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"checkpoint {path} is not a valid safetensors file: {error}", "copy or convert it again", key=CHECKPOINT
        ) from error


def _read_pickle(path: Path) -> Any:
    import pickle

    import torch

    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise ModelError(
            f"checkpoint {path} cannot be read: {error.strerror}",
            "give it a mode that lets you read it",
            key=CHECKPOINT,
        ) from error
    if not head.startswith((b"PK", b"\x80")):
        raise ModelError(
            f"checkpoint {path} is not a PyTorch file: it begins with {head!r}",
            "give a state_dict written by torch.save, or a file that ends in .safetensors and is one",
            key=CHECKPOINT,
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = (
            f"holds Python objects besides tensors ({named[1]})" if named else "is damaged or holds more than tensors"
        )
        raise ModelError(
            f"checkpoint {path} {found} and was refused; nothing in it was run",
            "save the state_dict alone (torch.save(model.state_dict(), ...)) or convert it to safetensors",
            key=CHECKPOINT,
        ) from error
    except Exception as error:  # on damaged bytes the reader raises almost anything
        raise ModelError(
            f"checkpoint {path} cannot be read: {reason(error)}",
            "copy it again, or save it as safetensors",
            key=CHECKPOINT,
        ) from error


def _state_of(data: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for key in CONTAINERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    tensors = isinstance(data, Mapping) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in data.items()
    )
    if not tensors or not data:
        raise ModelError(
            f"checkpoint {path} is not a state_dict of tensors",
            "save model.state_dict(), not something around it",
            key=CHECKPOINT,
        )
    return dict(data)


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
