"""Running a network without repeating what it has computed before: outputs of finished submodules are kept and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.observe import Place, observe

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHE_BYTES = 1 << 30
"""Kept outputs of one walk (a refit makes two); batches beyond it are computed from the start each time."""

Kept = dict[str, "Tensor"]
"""Per submodule its output, or zeros without memory of their own where nothing that is still to come reads it."""


@contextmanager
def replayed(module: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block these submodules return what was kept; where only a shape was kept, zeros that nobody reads."""

    def answer(value: Tensor) -> Any:
        return lambda *_args, **_kwargs: value.clone()

    with ExitStack() as undo:
        for name, value in outputs.items():
            layer = module.get_submodule(name)
            own = layer.__dict__.get("forward")
            layer.forward = answer(value)
            undo.callback(
                layer.__dict__.pop if own is None else layer.__dict__.__setitem__, "forward", *([own] if own else [])
            )
        yield


@contextmanager
def finished_before(module: nn.Module, layers: Sequence[str], among: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the outermost submodules (`among` these) that end before any of `layers` begins."""
    import torch

    done: dict[str, Tensor] = {}
    begun = False

    def begin(_layer: nn.Module, _inputs: Any) -> None:
        nonlocal begun
        begun = True

    def leave(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if begun or not isinstance(output, torch.Tensor):
                return
            for inner in [other for other in done if other.startswith(f"{name}.")]:
                del done[inner]
            done[name] = output.clone()

        return hook

    with ExitStack() as undo:
        for name in layers:
            undo.callback(module.get_submodule(name).register_forward_pre_hook(begin).remove)
        for name in among:
            undo.callback(module.get_submodule(name).register_forward_hook(leave(name)).remove)
        yield done


@contextmanager
def prefix_reused(module: nn.Module, images: Tensor, layers: Sequence[str]) -> Iterator[None]:
    """Inside the block, `module(images)` repeats nothing that ended before the first of `layers` began.

    Where that would change the result (a layer that writes into its input, say) everything runs again each time.
    """
    with finished_before(module, layers, called_once(module, images[:1])) as done:
        plain = module(images)
    with replayed(module, done):
        faithful = _same(module(images), plain)
    with replayed(module, done if faithful else {}):
        yield


def called_once(module: nn.Module, images: Tensor) -> list[str]:
    """Names of the submodules that one forward calls exactly once: only their outputs can be replayed."""
    calls: dict[str, int] = {}

    def enter(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    with ExitStack() as undo:
        for name, layer in module.named_modules():
            if name:
                undo.callback(layer.register_forward_pre_hook(enter(name)).remove)
        module(images)
    return [name for name, count in calls.items() if count == 1]


def still_read(module: nn.Module, images: Tensor, outputs: Mapping[str, Tensor]) -> set[str] | None:
    """Which of these outputs the rest of the forward depends on; None where replaying them changes the logits.

    Autograd says which; running with the others as zeros must then give the logits of a plain forward.
    """
    import torch

    with torch.no_grad():
        plain = module(images)
    leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in outputs.items()}
    with torch.enable_grad(), replayed(module, leaves):
        total = module(images).sum()
    floating = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    read = set(outputs)
    if floating and total.requires_grad:
        gradients = torch.autograd.grad(total, list(floating.values()), allow_unused=True)
        read -= {name for name, gradient in zip(floating, gradients, strict=True) if gradient is None}
    for candidate in (read, set(outputs)):
        thinned = {name: value if name in candidate else _unread(value) for name, value in outputs.items()}
        with torch.no_grad(), replayed(module, thinned):
            if _same(module(images), plain):
                return candidate
    return None


def _same(found: Tensor, wanted: Tensor) -> bool:
    import torch

    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max().clamp_min(1e-6)))


def _unread(value: Tensor) -> Tensor:
    return value.new_zeros(()).expand_as(value)


@dataclass
class Walk:
    """Visits a network's layers in execution order, each time going on from where the last visit came to."""

    module: nn.Module
    batches: Batches
    reads: dict[str, set[str] | None]
    """Per visited layer what `still_read` says there: true of every network of the same structure."""
    kept: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.once = called_once(self.module, next(iter(self.batches.first(1)))[0])

    def visit(self, name: str, *, as_far_as_sum: bool) -> Iterator[Place]:
        """What layer `name` reads and gives, batch by batch. Layers must come in the order in which a forward calls them."""
        size = 0
        for number, (images, _) in enumerate(self.batches):
            before = self.kept.pop(number, {})
            with replayed(self.module, before), finished_before(self.module, [name], self.once) as done:
                place = observe(self.module, name, images, as_far_as_sum=as_far_as_sum)
            if name not in self.reads:
                self.reads[name] = self._read_from(name, images[:1])
            read = self.reads[name]
            if read is None:
                yield place
                continue
            size += sum(value.nbytes for key, value in done.items() if key in read)
            if size <= CACHE_BYTES:
                self.kept[number] = {key: value if key in read else _unread(value) for key, value in done.items()}
            yield place

    def _read_from(self, name: str, images: Tensor) -> set[str] | None:
        with finished_before(self.module, [name], self.once) as done:
            self.module(images)
        return still_read(self.module, images, done)
