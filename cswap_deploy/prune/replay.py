"""Running a network without repeating what it has computed before: outputs of finished submodules are kept and replayed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.observe import Place, compact, observe

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHE_BYTES = 1 << 30
"""Kept outputs of one walk (a refit makes two, and two on fewer images where makers move); batches beyond it are computed
from the start each time."""

COMPARED_BYTES = 1 << 28
"""Outputs that are held at once to see whether anything writes into them, and as much again for their copies."""

Kept = dict[str, "Tensor"]
"""Per submodule its output, or zeros without memory of their own where nothing that is still to come reads it."""


@contextmanager
def replayed(
    module: nn.Module, outputs: Mapping[str, Tensor], untouched: Collection[str] = frozenset()
) -> Iterator[None]:
    """Inside the block these submodules return what was kept; where only a shape was kept, zeros that nobody reads.

    Those zeros have no memory of their own, so that writing into them is a RuntimeError. Of all but the `untouched` a copy is
    returned, since something behind them may write into it.
    """

    def answer(name: str, value: Tensor) -> Any:
        if name in untouched or (value.numel() > 1 and not any(value.stride())):
            return lambda *_args, **_kwargs: value
        return lambda *_args, **_kwargs: value.clone()

    with _forwards(module, {name: answer(name, value) for name, value in outputs.items()}):
        yield


@contextmanager
def answering(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block these submodules return the given tensors themselves, for one forward."""

    def answer(value: Tensor) -> Any:
        return lambda *_args, **_kwargs: value

    with _forwards(module, {name: answer(value) for name, value in values.items()}):
        yield


@contextmanager
def _forwards(module: nn.Module, forwards: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block these submodules have these forwards."""
    with ExitStack() as undo:
        for name, forward in forwards.items():
            layer = module.get_submodule(name)
            own = layer.__dict__.get("forward")
            layer.forward = forward
            undo.callback(
                layer.__dict__.pop if own is None else layer.__dict__.__setitem__, "forward", *([own] if own else [])
            )
        yield


@contextmanager
def finished_before(
    module: nn.Module,
    layers: Sequence[str],
    among: Sequence[str],
    read: Collection[str] | None = None,
    before: Mapping[str, Tensor] | None = None,
    untouched: Collection[str] = frozenset(),
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the outermost submodules (`among` these) that end before any of `layers` begins.

    Of those that are not in `read` only the shape is kept; of the others those `before` are replayed ones, which stay as they
    are. The `untouched` are kept themselves, of what is left a copy.
    """
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
            if read is not None and name not in read:
                done[name] = _unread(output)
            elif before is not None and name in before:
                done[name] = before[name]
            else:
                done[name] = compact(output) if name in untouched else output.clone()

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
    calls = _calls(module, [name for name, _ in module.named_modules() if name], images)
    return [name for name in dict.fromkeys(calls) if calls.count(name) == 1]


def in_order(module: nn.Module, names: Iterable[str], images: Tensor) -> list[str]:
    """These layers in the order in which a forward first calls them."""
    return list(dict.fromkeys(_calls(module, names, images)))


def _calls(module: nn.Module, names: Iterable[str], images: Tensor) -> list[str]:
    """One name per call, in the order in which the calls begin."""
    import torch

    called: list[str] = []
    with ExitStack() as undo, torch.no_grad():
        for name in dict.fromkeys(names):
            hook = module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
            undo.callback(hook.remove)
        module(images)
    return called


def still_read(module: nn.Module, images: Tensor, outputs: Mapping[str, Tensor]) -> set[str] | None:
    """Which of these outputs the rest of the forward depends on; None where replaying them changes the logits.

    Autograd says which; running with the others as zeros must then give the logits of a plain forward. Where something writes
    into one of the others, all count as read. Other images come in between, so that what a module keeps beside its output is theirs.
    """
    import torch

    with torch.no_grad():
        plain = module(images).clone()
        module(-images)
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
        with suppress(RuntimeError), torch.no_grad(), replayed(module, thinned):
            if _same(module(images), plain):
                return candidate
    return None


def _same(found: Tensor, wanted: Tensor) -> bool:
    import torch

    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max().clamp_min(1e-6)))


def _unread(value: Tensor) -> Tensor:
    return value.new_zeros(()).expand_as(value)


def left_untouched(module: nn.Module, names: Iterable[str], images: Tensor) -> set[str]:
    """Of these submodules, which a forward calls once, those whose output nothing changes, in this forward or in the next.

    Found by comparing, about `COMPARED_BYTES` of outputs at a time: whoever writes, in whatever way. PyTorch's count of writes
    tells also of those that change nothing on these images.
    """
    import torch

    waiting, found = [*names], set[str]()
    with torch.no_grad():
        while waiting:
            seen = _outputs(module, waiting, images)
            module(-images)
            found |= {name for name, output in seen.items() if output and output.untouched}
            waiting = [name for name in waiting if name not in seen] if seen else []
    return found


@dataclass(frozen=True)
class _Output:
    """What a submodule gave, and what that was: a copy, and how often it had been written into."""

    value: Tensor
    copy: Tensor
    writes: int

    @property
    def untouched(self) -> bool:
        import torch

        return self.value._version == self.writes and torch.equal(self.value, self.copy)


def _outputs(module: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, _Output | None]:
    """Outputs of one forward, as many as are compared at once; None for what is no tensor, or one that counts no writes."""
    import torch

    seen: dict[str, _Output | None] = {}

    def leave(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor) or output.is_inference():
                seen[name] = None
            elif sum(other.value.nbytes for other in seen.values() if other) < COMPARED_BYTES:
                seen[name] = _Output(output, output.clone(), output._version)

        return hook

    with ExitStack() as undo:
        for name in names:
            undo.callback(module.get_submodule(name).register_forward_hook(leave(name)).remove)
        module(images)
    return seen


@dataclass
class Reuse:
    """What holds of every network of one structure: found at the first walk, used by the later ones."""

    read: dict[str, set[str] | None] = field(default_factory=dict)
    """Per visited layer what `still_read` says there."""
    once: tuple[str, ...] | None = None
    """What a forward calls once."""
    untouched: frozenset[str] = frozenset()
    """Of these what `left_untouched` says."""

    def examine(self, module: nn.Module, images: Tensor) -> None:
        if self.once is None:
            self.once = tuple(called_once(module, images))
            self.untouched = frozenset(left_untouched(module, self.once, images))


@dataclass
class Walk:
    """Visits a network's layers in execution order, each time going on from where the last visit came to."""

    module: nn.Module
    batches: Batches
    reuse: Reuse
    kept: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reuse.examine(self.module, next(iter(self.batches.first(1)))[0])

    @property
    def once(self) -> tuple[str, ...]:
        return self.reuse.once or ()

    def visit(self, name: str, *, as_far_as_sum: bool) -> Iterator[Place]:
        """What layer `name` reads and gives, batch by batch. Layers must come in the order in which a forward calls them."""
        size = 0
        for number, (images, _) in enumerate(self.batches):
            read = self.read_from(name, images[:1])
            before = self.kept.pop(number, {})
            untouched = self.reuse.untouched
            seen = finished_before(self.module, [name], self.once, read, before, untouched)
            with replayed(self.module, before, untouched), seen as done:
                place = observe(self.module, name, images, as_far_as_sum=as_far_as_sum)
            if read is not None:
                size += sum(value.nbytes for key, value in done.items() if key in read)
                if size <= CACHE_BYTES:
                    self.kept[number] = done
            yield place

    def rest(self, number: int) -> AbstractContextManager[None]:
        """Inside the block a forward of batch `number` runs only what comes from the layer on that was visited last."""
        return replayed(self.module, self.kept.get(number, {}), self.reuse.untouched)

    def read_from(self, name: str, images: Tensor) -> set[str] | None:
        """Which outputs the network still reads when layer `name` begins; None: replaying them is not the same."""
        known = self.reuse.read
        if name not in known:
            with finished_before(self.module, [name], self.once) as done:
                self.module(images)
            known[name] = still_read(self.module, images, done)
        return known[name]
