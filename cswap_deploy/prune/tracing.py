"""One forward of a network, watched operator by operator: which axes of all its tensors have the same units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import InputSpec
from cswap_deploy.errors import PruningError, reason
from cswap_deploy.prune.arranging import tensors
from cswap_deploy.prune.cut import fresh_copy
from cswap_deploy.prune.dims import Dim, freeze, unify
from cswap_deploy.prune.rules import FUNCTIONS, RULES, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

BY_NUMBER = frozenset(
    "view _unsafe_view reshape _reshape_alias expand split split_with_sizes chunk slice repeat convolution".split()
)
"""Operators that take sizes, or a number of groups, which a module may have stored."""
OUTPUTS = "its units are outputs of the network"


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution that ran inside a module: `size` multiply-accumulates, a product over `dims`.

    `weight`: the parameter that it reads through its axes, "" where both factors are activations.
    """

    module: str
    weight: str
    macs: int
    dims: tuple[Dim, ...]


@dataclass
class Trace:
    """What is known of each tensor while a forward runs, and what is left of it at the end."""

    parameters: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    """Axes of each parameter and buffer by its name."""
    products: list[Product] = field(default_factory=list)
    fixed_groups: dict[str, Dim] = field(default_factory=dict)
    """Per convolution the axis that its `groups` counts."""
    handled: dict[str, list[Dim]] = field(default_factory=dict)
    """Per module the axes, and their parts, of what its own forward has split or reshaped by numbers."""
    splits: dict[str, list[tuple[Dim, ...]]] = field(default_factory=dict)
    """Per module the parts of each axis that its own forward has split by a list of sizes, in their order."""
    modules: list[str] = field(default_factory=lambda: [""])
    kinds: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    """Modules whose forward ran."""
    known: Any = None
    """Tensor → axes, by identity, without keeping the tensor."""
    names: Any = None
    """Tensor → name, of parameters, buffers, and what is only a view of one."""
    static: Any = None
    """Tensors that no image has gone into."""

    @staticmethod
    def begin(module: nn.Module) -> Trace:
        """Its parameters and buffers, each axis an atom of its own."""
        from torch.utils.weak import WeakTensorKeyDictionary

        trace = Trace(
            known=WeakTensorKeyDictionary(), names=WeakTensorKeyDictionary(), static=WeakTensorKeyDictionary()
        )
        trace.kinds = {name: type(layer).__name__ for name, layer in module.named_modules()}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            dims = tuple(Dim(size) for size in tensor.shape)
            trace.parameters[name] = dims
            trace.known[tensor] = dims
            trace.names[tensor] = name
            trace.static[tensor] = True
        return trace

    def dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """Its axes; one that nobody has told of holds constants."""
        if tensor not in self.known:
            reason = f"a tensor that is neither a parameter nor a buffer is coupled to it, in {self.place}"
            self.known[tensor] = tuple(Dim(size, "" if size == 1 else reason) for size in tensor.shape)
            self.static[tensor] = True
        dims: tuple[Dim, ...] = self.known[tensor]
        return dims

    def give(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        """Errors: AssertionError where these are not the tensor's axes."""
        assert tuple(dim.size for dim in dims) == tuple(tensor.shape), (tensor.shape, [dim.size for dim in dims])
        self.known[tensor] = tuple(dims)

    def couple(self, tensor: Tensor, axis: int, dim: Dim) -> None:
        unify(self.dims(tensor)[axis], dim)

    def note(self, weight: str, macs: int, dims: Sequence[Dim]) -> None:
        """A product ran here."""
        self.products.append(Product(self.module, weight, macs, tuple(dims)))

    def enter(self, module: str) -> None:
        self.modules.append(module)
        self.called.add(module)

    @property
    def module(self) -> str:
        return self.modules[-1]

    @property
    def place(self) -> str:
        """The module that runs, for people."""
        return f"{self.module} ({self.kinds[self.module]})" if self.module else self.kinds[""]

    @property
    def norm(self) -> str:
        """The kind of the running module where it is a norm, else the words for what is done."""
        kind = self.kinds[self.module]
        return kind if "norm" in kind.lower() else ""


def traced(module: nn.Module, spec: InputSpec) -> Trace:
    """Run a private copy of `module` on one random image. Errors: PruningError where its forward fails."""
    import torch

    image = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(0))
    try:
        module = fresh_copy(module).eval().requires_grad_(False)
        trace = Trace.begin(module)
        trace.known[image] = tuple(Dim(size, "it is an axis of the image") for size in image.shape)
        with warnings.catch_warnings(), torch.no_grad(), ExitStack() as undo:
            warnings.simplefilter("ignore")
            for name, layer in module.named_modules():
                layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: trace.enter(name))
                layer.register_forward_hook(lambda _layer, _inputs, _output: _drop_last(trace.modules))
            for mode in _modes(trace):
                undo.enter_context(mode)
            logits = module(image)
    except Exception as error:  # whatever the user's forward raises
        raise PruningError(
            f"the network's structure could not be traced: {reason(error)}",
            "set prune.target: null to export it without pruning",
        ) from error
    for dim in trace.dims(logits):
        freeze(dim, OUTPUTS)
    return trace


def _drop_last(modules: list[str]) -> None:
    modules.pop()


def _modes(trace: Trace) -> tuple[Any, Any]:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    silent = [False]

    class Functions(TorchFunctionMode):
        """What loses its meaning on the way down to ATen."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            rule = FUNCTIONS.get(getattr(func, "__name__", ""))
            if rule is None or silent[0]:
                return func(*args, **kwargs)
            silent[0] = True
            try:
                result = func(*args, **kwargs)
            finally:
                silent[0] = False
            _apply(trace, rule, func.__name__, args, kwargs, result)
            return result

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            if not silent[0]:
                name = func._schema.name.removeprefix("aten::")
                _apply(trace, RULES.get(name) or _by_tag(func), name, args, kwargs, result)
            return result

    return Operators(), Functions()  # type: ignore[no-untyped-call]


def _by_tag(operator: Any) -> Any:
    import torch

    return RULES["pointwise"] if torch.Tag.pointwise in operator.tags else unknown


def _apply(trace: Trace, rule: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
    given, made = list(tensors([args, kwargs])), list(tensors(result))
    if not (given and made):
        return
    fixed = all(tensor in trace.static or tensor not in trace.known for tensor in given)
    try:
        rule(trace, name, args, kwargs, result)
    except Exception:  # a call in a form that the rule was not written for
        unknown(trace, name, args, kwargs, result)
    if name in BY_NUMBER:
        trace.handled.setdefault(trace.module, []).extend(dim for own in (*given[:1], *made) for dim in trace.dims(own))
    for tensor in made:
        if fixed:
            trace.static[tensor] = True
        else:
            trace.static.pop(tensor, None)
