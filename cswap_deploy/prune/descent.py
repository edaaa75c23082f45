"""What of a running forward was computed from a given tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def descent() -> Any:
    """A context that knows what descends from the tensor that it is told of; nothing else counts, before that nothing at all."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def memory(values: Any) -> list[Any]:
        weak: Any = StorageWeakRef
        return [weak(leaf.untyped_storage()) for leaf in tree_leaves(values) if strided(leaf)]

    def strided(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided

    class Descent(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Knows the memory that holds anything computed from a tensor, by whatever operators, views and writes."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.held: set[Any] = set()
            self.lost = False
            """Something went where it cannot be followed: from then on everything counts."""

        def begin(self, value: Tensor) -> None:
            self.held.update(memory(value))

        def holds(self, values: Any) -> bool:
            return self.lost or any(own in self.held for own in memory(values))

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            if self.held and self.holds((args, kwargs)):
                kinds = (argument.alias_info for argument in func._schema.arguments)
                written = [value for value, kind in zip(args, kinds) if kind and kind.is_write]
                self.held.update(memory((result, written)))
                self.lost |= any(leaf is not None and not strided(leaf) for leaf in tree_leaves(result))
            return result

    return Descent()
