"""Every error that a user can cause, with the exit code that it ends in.

CswapError             1   the base; raised bare it is a bug of ours
├── UsageError         2   a command line or a work folder that cannot be used
│   ├── RecipeError        a recipe: file, line, key, value, what was expected
│   ├── MissingPartError   a command lacks an optional part of the installation
│   └── WorkdirError       a work folder: locked, of another version, not writable
├── DataError          3   images, class folders, labels
├── ModelError         4   model name, factory, checkpoint, a plan that does not fit its network
│   └── PruningError       a target or a multiple that the network cannot reach
├── DeviceError        5   target, TensorRT, engine
├── ExportError        6   ONNX export, parity with PyTorch
│   └── UnshippableError   a pruned network that cannot be made in the format that ships
└── VerifyError        9   a bundle that differs from its manifest
"""

from __future__ import annotations

from copy import copy
from typing import Any, ClassVar

from typing_extensions import Self


class CswapError(Exception):
    """An error with a way out. `hint` is one sentence in the imperative, or empty."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def at(self, where: str) -> Self:
        """The same, told with its place."""
        told = copy(self)
        told.message = f"{where}: {self.message}"
        told.args = (told.message,)
        return told


class UsageError(CswapError):
    exit_code = 2


class RecipeError(UsageError):
    """One fault of a recipe; `where` is `file:line`, `key` dotted."""

    def __init__(self, message: str, hint: str = "", *, where: str = "", key: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint)
        self.where = where
        self.key = key


class MissingPartError(UsageError):
    pass


class WorkdirError(UsageError):
    pass


class DataError(CswapError):
    exit_code = 3


class ModelError(CswapError):
    """`key`: where a recipe is being read, its dotted key whose value is at fault; empty where it is the network itself."""

    exit_code = 4

    def __init__(self, message: str, hint: str = "", *, key: str = "") -> None:
        super().__init__(message, hint)
        self.key = key


class PruningError(ModelError):
    pass


class DeviceError(CswapError):
    """`public`: what a bundle, which others read, may say about it: no host, user or path of the target.

    `kind`: the agent's own word for its fault. `log`: what TensorRT printed before it failed; `parser`: what its ONNX parser
    refuses, by node.
    """

    exit_code = 5

    def __init__(self, message: str, hint: str = "", *, public: str = "the target failed", log: str = "") -> None:
        super().__init__(message, hint)
        self.public = public
        self.log = log
        self.kind = ""
        self.parser: list[dict[str, Any]] = []


class ExportError(CswapError):
    exit_code = 6


class UnshippableError(ExportError):
    pass


class VerifyError(CswapError):
    exit_code = 9


def reason(error: BaseException) -> str:
    """An error of somebody else's in one line; many have no message, or a page of it."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


HOST_MODULES = (
    "torch",
    "timm",
    "safetensors",
    "PIL",
    "scipy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxconverter_common",
)


def require_host() -> None:
    """Refuse early where the host part of the installation is missing or incomplete. Errors: MissingPartError."""
    for name in HOST_MODULES:
        require_module(name)


def require_module(name: str, extra: str = "host") -> None:
    """Refuse early, with the command that helps, when an optional library is not installed."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise MissingPartError(
            f"this command needs the Python package {name!r}, which is not installed",
            hint=f'install it with: pip install "cswap-deploy[{extra}]"',
        )
