"""Rules of operators that arrange the same values anew: reshapes, slices, concatenations, indexing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.dims import (
    FIXED,
    POSITION,
    Dim,
    divided,
    factored,
    freeze,
    product,
    reshaped,
    side_by_side,
    unify,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cswap_deploy.prune.tracing import Trace

Rule = Callable[["Trace", str, Any, Any, Any], None]
"""(trace, operator's name, args, kwargs, result), called after the operator has run."""


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in an operator's arguments or results."""
    import torch

    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)


def _reshape(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    trace.give(result, reshaped(trace.dims(args[0]), result.shape))


def _expand(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """What was one is as many as the other operand has, or as a number says that the module stores."""
    own = trace.dims(args[0])
    new = result.ndim - len(own)
    kept = [dim if dim.size == size else Dim(size) for dim, size in zip(own, result.shape[new:], strict=True)]
    trace.give(result, [*(Dim(size) for size in result.shape[:new]), *kept])


def _permute(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    trace.give(result, [trace.dims(args[0])[axis] for axis in args[1]])
    _keep_name(trace, args[0], result)


def _transpose(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = list(trace.dims(args[0]))
    a, b = args[1:3] if len(args) > 2 else (0, 1)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    trace.give(result, dims)
    _keep_name(trace, args[0], result)


def _keep_name(trace: Trace, tensor: Tensor, view: Tensor) -> None:
    if tensor in trace.names:
        trace.names[view] = trace.names[tensor]


def _squeeze(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = iter([dim for dim in trace.dims(args[0]) if dim.size != 1])
    trace.give(result, [next(dims) if size != 1 else Dim(1) for size in result.shape])


def _slice(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    given = dict(enumerate(args))
    axis, start, end, step = given.get(1, 0), given.get(2), given.get(3), given.get(4, 1)
    axis, (size,) = axis % args[0].ndim, [args[0].shape[axis]]
    start, end, _ = slice(start, end).indices(size)
    dims = list(trace.dims(args[0]))
    dims[axis] = _every(_part(trace, dims[axis], start, max(start, end)), step, result.shape[axis])
    trace.give(result, dims)


def _part(trace: Trace, dim: Dim, start: int, end: int) -> Dim:
    tail = divided(dim, start)
    head = divided(tail[1], end - start) if tail else None
    if tail is None or head is None:
        freeze(dim, FIXED)
        return Dim(end - start, FIXED)
    trace.handled.setdefault(trace.module, []).extend((tail[0], head[1]))
    return head[0]


def _every(dim: Dim, step: int, size: int) -> Dim:
    if step == 1:
        return dim
    pair = factored(dim, step) if dim.size % step == 0 else None
    if pair is None:
        freeze(dim, FIXED)
        return Dim(size, FIXED)
    freeze(pair[1], FIXED)
    return pair[0]


def _select(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = list(trace.dims(args[0]))
    freeze(dims.pop(args[1]), FIXED)
    trace.give(result, dims)


def _unbind(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = list(trace.dims(args[0]))
    freeze(dims.pop(args[1] if len(args) > 1 else 0), FIXED)
    for part in result:
        trace.give(part, dims)


def _split(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """Into parts of stated sizes: each has units of its own."""
    dims = list(trace.dims(args[0]))
    axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(dims)
    start = 0
    for part in result:
        own = [*dims]
        own[axis] = _part(trace, dims[axis], start, start + part.shape[axis])
        start += part.shape[axis]
        trace.give(part, own)
    trace.splits.setdefault(trace.module, []).append(tuple(trace.dims(part)[axis] for part in result))


def split_equally(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """chunk, and split by one number: unit i of each part leaves with unit i of the others, so that parts stay equal."""
    axis = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    dims = list(trace.dims(args[0]))
    sizes = {part.shape[axis] for part in result}
    stated = args[1] if len(args) > 1 else next((kwargs[key] for key in kwargs if key != "dim"), None)
    by_list = not isinstance(stated, int)
    pair = factored(dims[axis], min(sizes)) if len(sizes) == 1 and not by_list else None
    if pair is None:
        _split(trace, name, (args[0], None, axis), {}, result)
        if not by_list:
            freeze(dims[axis], FIXED)
        return
    freeze(pair[0], FIXED)
    for part in result:
        own = [*dims]
        own[axis] = pair[1]
        trace.give(part, own)


def _glu(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    axis = args[1] if len(args) > 1 else -1
    split_equally(trace, "chunk", (args[0], 2, axis), {}, [result])


def _cat(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    parts = [tensor for tensor in args[0] if tensor.shape != (0,)]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
    dims = []
    for place in range(result.ndim):
        own = [trace.dims(tensor)[place] for tensor in parts]
        joined = own[0]
        for other in () if place == axis else own[1:]:
            joined = unify(joined, other)
        dims.append(side_by_side(own) if place == axis else joined)
    trace.give(result, dims)


def _stack(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
    dims = list(trace.dims(args[0][0]))
    for other in args[0][1:]:
        dims = [unify(own, dim) for own, dim in zip(dims, trace.dims(other), strict=True)]
    trace.give(result, [*dims[:axis], Dim(result.shape[axis], FIXED), *dims[axis:]])


def _repeat(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    new = result.ndim - args[0].ndim
    own = [Dim(1)] * new + list(trace.dims(args[0]))
    trace.give(result, [product([Dim(n, POSITION), dim]) for n, dim in zip(args[1], own, strict=True)])


def _roll(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    axes = (args[2] if len(args) > 2 else kwargs.get("dims", [])) if name == "roll" else args[1]
    for axis in axes or range(len(dims)):
        freeze(dims[axis], f"{name} in {trace.place} moves its units")
    trace.give(result, dims)


def _pick(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """index: the axes that are indexed stay as they are; those behind pass through."""
    dims, indices = trace.dims(args[0]), [*args[1]]
    indices += [None] * (len(dims) - len(indices))
    indexed = [place for place, index in enumerate(indices) if index is not None]
    for place in indexed:
        freeze(dims[place], FIXED)
    shape = [dim for place, dim in enumerate(dims) if place not in indexed]
    new = result.ndim - len(shape)
    at = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    own = [Dim(size, FIXED if size > 1 else "") for size in result.shape[at : at + new]]
    trace.give(result, [*shape[:at], *own, *shape[at:]])


def _pick_one(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """index_select and embedding: along one axis."""
    table, axis = args[0], args[1] if name == "index_select" else 0
    dims = list(trace.dims(table))
    freeze(dims[axis], FIXED)
    new = result.ndim - table.ndim + 1
    own = [Dim(size, FIXED if size > 1 else "") for size in result.shape[axis : axis + new]]
    trace.give(result, [*dims[:axis], *own, *dims[axis + 1 :]])


def _im2col(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    channels = product([dims[-3], Dim(prod(args[1]), POSITION)])
    trace.give(result, [*dims[:-3], channels, Dim(result.shape[-1], POSITION)])


def _col2im(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    pair = factored(dims[-2], prod(args[2]))
    assert pair is not None
    freeze(pair[1], POSITION)
    trace.give(result, [*dims[:-2], pair[0], *(Dim(size, POSITION) for size in result.shape[-2:])])


def _pixel_shuffle(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    square = args[1] ** 2
    if name == "pixel_unshuffle":
        channels = product([dims[-3], Dim(square, POSITION)])
    else:
        pair = factored(dims[-3], square)
        assert pair is not None
        freeze(pair[1], POSITION)
        channels = pair[0]
    trace.give(result, [*dims[:-3], channels, *(Dim(size, POSITION) for size in result.shape[-2:])])


def _channel_shuffle(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = list(trace.dims(args[0]))
    pair = factored(dims[1], dims[1].size // args[1])
    assert pair is not None
    freeze(pair[0], FIXED)
    trace.give(result, [dims[0], product(pair[::-1]), *dims[2:]])


ARRANGING: dict[str, Rule] = {
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias unflatten flatten view_copy".split(), _reshape),
    **dict.fromkeys("squeeze unsqueeze".split(), _squeeze),
    **dict.fromkeys("transpose t numpy_T swapaxes".split(), _transpose),
    **dict.fromkeys("split split_with_sizes split_copy".split(), _split),
    **dict.fromkeys("roll flip".split(), _roll),
    **dict.fromkeys("index_select embedding".split(), _pick_one),
    **dict.fromkeys("pixel_shuffle pixel_unshuffle".split(), _pixel_shuffle),
    **dict.fromkeys("channel_shuffle native_channel_shuffle".split(), _channel_shuffle),
    "expand": _expand,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "glu": _glu,
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeat,
    "index": _pick,
    "im2col": _im2col,
    "col2im": _col2im,
}
