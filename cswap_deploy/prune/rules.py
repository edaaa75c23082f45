"""What each ATen operator does to the units on its tensors' axes: one rule per operator, in a table.

A rule is called after the operator has run, as (trace, operator's name, args, kwargs, result). What no rule knows freezes all that
it reads, with the operator's name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.dims import Dim, divided, factored, freeze, give_role, product, reshaped, side_by_side, unify

if TYPE_CHECKING:
    from torch import Tensor

    from cswap_deploy.prune.tracing import Trace

Rule = Callable[["Trace", str, Any, Any, Any], None]
POSITION = "it is a position, not a unit"
FIXED = "a step of the forward that picks by number reads its units"


def unknown(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """All that it reads stays, and so does all that it gives."""
    from cswap_deploy.prune.tracing import tensors

    why = f"{name} in {trace.place} is no operator whose units can be followed"
    for tensor in tensors([args, kwargs]):
        _freeze_all(trace, tensor, why)
    for tensor in tensors(result):
        if tensor not in trace.known:
            trace.give(tensor, [Dim(size, why if size > 1 else "") for size in tensor.shape])


def _freeze_all(trace: Trace, tensor: Tensor, why: str) -> None:
    for dim in trace.dims(tensor):
        freeze(dim, why)


# --- element by element


def _pointwise(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """Axes are matched from the last, as in broadcasting; what stays below is written or read in place."""
    from cswap_deploy.prune.tracing import tensors

    made = list(tensors(result))
    given = [tensor for tensor in tensors([args, kwargs]) if not any(tensor is own for own in made)]
    given += [own for own in made if own in trace.known]
    for own in made:
        dims: list[Dim] = []
        for axis in range(-own.ndim, 0):
            others = [trace.dims(other)[axis] for other in given if other.ndim >= -axis]
            matching = [dim for dim in others if dim.size == own.shape[axis]]
            joined = matching[0] if matching else Dim(own.shape[axis])
            for dim in matching[1:]:
                joined = unify(joined, dim)
            dims.append(joined)
        if own not in trace.known:
            trace.give(own, dims)


def _same(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    if result is not args[0]:
        trace.give(result, trace.dims(args[0]))
        if args[0] in trace.names and name in ("detach", "alias"):
            trace.names[result] = trace.names[args[0]]


def _strided(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """A pooling that brings its result into another order in memory."""
    (unknown if tuple(args[1]) != tuple(size.size for size in trace.dims(args[0])) else _same)(trace, name, args, kwargs, result)


# --- the same values, arranged anew


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
    axis, start, end, step = [*args[1:], *[0, None, None, 1][len(args) - 1 :]]
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


def _chunk(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
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
    _chunk(trace, "chunk", (args[0], 2, axis), {}, [result])


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


# --- what mixes along an axis


def _reduce(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """The units on the axes that it runs over are mixed, the others pass through."""
    from cswap_deploy.prune.tracing import tensors

    dims = trace.dims(args[0])
    at = AXES.get(name, 1)
    axes = kwargs.get("dim", args[at] if len(args) > at else None)
    axes = [axes] if isinstance(axes, int) else axes or range(len(dims))
    over = {axis % len(dims) for axis in axes} if dims else set()
    for axis in over:
        freeze(dims[axis], trace.norm and f"a {trace.norm} normalises over its units" or _mixes(trace, name))
    for own in tensors(result):
        if own.ndim == len(dims):
            trace.give(
                own, [dim if dim.size == size else Dim(size, POSITION) for dim, size in zip(dims, own.shape, strict=True)]
            )
        else:
            trace.give(own, [dim for axis, dim in enumerate(dims) if axis not in over])


AXES = {"linalg_vector_norm": 2, "norm": 2, "topk": 2}
"""Which argument names the axes, where it is not the second."""


def _mixes(trace: Trace, name: str) -> str:
    return f"{name.lstrip('_')} in {trace.place} mixes its units"


def _spatial(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """Poolings and resizings: batch and channels pass through."""
    from cswap_deploy.prune.tracing import tensors

    dims = trace.dims(args[0])
    kept = min(2, len(dims) - 1)
    for own in tensors(result):
        trace.give(own, [*dims[:kept], *(Dim(size, POSITION if size > 1 else "") for size in own.shape[kept:])])


def _pad(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = list(trace.dims(args[0]))
    for axis in range(len(dims)):
        if any(args[1][2 * (len(dims) - 1 - axis) :][:2]):
            freeze(dims[axis], f"pad in {trace.place} puts other units beside its units")
            dims[axis] = Dim(result.shape[axis], POSITION)
    trace.give(result, dims)


# --- norms


def _batch_norm(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    stored = [value for value in args[1:5] if hasattr(value, "ndim") and value.ndim == 1]
    for tensor in stored:
        trace.couple(tensor, 0, dims[1])
    if not any(hasattr(value, "ndim") for value in args[3:5]):
        for axis in (0, *range(2, len(dims))):
            freeze(dims[axis], "a norm without stored statistics runs over its units")
    trace.give(result[0] if isinstance(result, tuple) else result, dims)


def _layer_norm(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    over = dims[len(dims) - len(args[1]) :]
    for tensor in (value for value in args[2:4] if hasattr(value, "ndim")):
        for axis, dim in enumerate(over):
            trace.couple(tensor, axis, dim)
    for dim in over:
        freeze(dim, f"a {trace.norm or 'LayerNorm'} normalises over its units")
    trace.give(result[0] if isinstance(result, tuple) else result, dims)


def _group_norm(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims = trace.dims(args[0])
    for tensor in args[1:3]:
        if tensor is not None:
            trace.couple(tensor, 0, dims[1])
    for dim in dims[1:]:
        freeze(dim, f"a {trace.norm or 'GroupNorm'} normalises over its units")
    trace.give(result[0], dims)


def _prelu(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    dims, slopes = trace.dims(args[0]), args[1]
    axis = max(range(slopes.ndim), key=lambda place: slopes.shape[place])
    if slopes.numel() > 1:
        trace.couple(slopes, axis, dims[1])
    trace.give(result, dims)


# --- products


def _mm(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """mm, addmm, bmm, baddbmm: (..., m, k) times (..., k, n), plus a bias."""
    a, b = args[-2:]
    rows, columns = trace.dims(a), trace.dims(b)
    inner = unify(rows[-1], columns[-2])
    batch = [unify(x, y) for x, y in zip(rows[:-2], columns[:-2], strict=True)]
    dims = [*batch, rows[-2], columns[-1]]
    for axis in range(-args[0].ndim, 0) if len(args) > 2 else ():
        if args[0].shape[axis] > 1:
            trace.couple(args[0], axis, dims[axis])
    trace.give(result, dims)
    _log(trace, [a, b], batch, inner, [*dims, inner])


def _mv(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    rows = trace.dims(args[-2])
    inner = unify(rows[-1], trace.dims(args[-1])[0])
    trace.give(result, rows[:-1])
    _log(trace, args[-2:], [], inner, [*rows[:-1], inner])


def _log(trace: Trace, factors: Sequence[Tensor], batch: Sequence[Dim], inner: Dim, dims: Sequence[Dim]) -> None:
    fixed = [factor for factor in factors if factor in trace.static]
    if not fixed:
        for dim in batch:
            give_role(dim, "heads")
        give_role(inner, "dims")
    weight = next((trace.names[factor] for factor in fixed if factor in trace.names), "")
    trace.note(weight, prod(dim.size for dim in dims), dims)


def _convolution(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    image, weight, bias, groups = args[0], args[1], args[2], args[8]
    dims, own = trace.dims(image), trace.dims(weight)
    axis = image.ndim - weight.ndim + 1
    if args[6]:
        for dim in (dims[axis], *own):
            freeze(dim, "transposed convolutions are not pruned")
        made = Dim(result.shape[axis], "transposed convolutions are not pruned")
    elif groups == 1:
        unify(dims[axis], own[1])
        made = own[0]
    else:
        made = _grouped(trace, weight, dims[axis], own, groups)
    if bias is not None:
        trace.couple(bias, 0, made)
    for dim in dims[axis + 1 :]:
        freeze(dim, POSITION)
    spatial = [Dim(size, POSITION if size > 1 else "") for size in result.shape[axis + 1 :]]
    trace.give(result, [*dims[:axis], made, *spatial])
    macs = weight.numel() * prod(result.shape[axis + 1 :]) * prod(image.shape[:axis])
    if weight not in trace.static:
        for dim in own:
            freeze(dim, "a convolution whose weights are computed from the image reads it")
    trace.note(trace.names.get(weight, "") if weight in trace.names else "", macs, own)


def _grouped(trace: Trace, weight: Tensor, channels: Dim, own: Sequence[Dim], groups: int) -> Dim:
    inputs = factored(channels, own[1].size)
    outputs = factored(own[0], own[0].size // groups)
    if inputs is None or outputs is None:
        freeze(channels, f"a grouped convolution (groups={groups}) is coupled to it")
        freeze(own[0], f"a grouped convolution (groups={groups}) is coupled to it")
        return own[0]
    unify(inputs[1], own[1])
    shared = unify(inputs[0], outputs[0])
    if weight in trace.names:
        trace.fixed_groups[trace.names[weight]] = shared
    else:
        freeze(shared, f"a grouped convolution (groups={groups}) with computed weights is coupled to it")
    return own[0]


# --- functions that are seen before they are taken apart


def _attention(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """softmax(q k' + mask) v; (..., heads, tokens, dims)."""
    query, key, value = args[:3]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    q, k, v = (trace.dims(tensor) for tensor in (query, key, value))
    batch = [*q[:-2]]
    for place, (x, y, z) in enumerate(zip(q[:-2], k[:-2], v[:-2], strict=True)):
        for other in (y, z):
            batch[place] = unify(batch[place], other) if batch[place].size == other.size else _uneven(batch[place], other)
        batch[place] = unify(batch[place], x)
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    freeze(k[-2], _mixes(trace, "softmax"))
    for axis in range(-mask.ndim, 0) if mask is not None else ():
        if mask.shape[axis] > 1:
            trace.couple(mask, axis, [*batch, q[-2], k[-2]][axis])
    for dim in batch:
        give_role(dim, "heads")
    give_role(q[-1], "dims")
    trace.give(result, [*batch, q[-2], v[-1]])
    macs = prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    trace.note("", macs, batch)


def _uneven(own: Dim, other: Dim) -> Dim:
    """Heads of the query that share those of the key and the value."""
    freeze(own, FIXED)
    freeze(other, FIXED)
    return own


FUNCTIONS: dict[str, Rule] = {"scaled_dot_product_attention": _attention, "chunk": _chunk, "split": _chunk}

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "pointwise copy_ fill_ zero_ masked_fill_ hardswish hardswish_ native_dropout rsub floor_divide bernoulli_".split(),
        _pointwise,
    ),
    **dict.fromkeys(
        "clone detach alias _to_copy contiguous lift_fresh zeros_like ones_like empty_like full_like rand_like".split(), _same
    ),
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias unflatten flatten view_copy".split(), _reshape),
    **dict.fromkeys("squeeze unsqueeze".split(), _squeeze),
    **dict.fromkeys("transpose t numpy_T swapaxes".split(), _transpose),
    **dict.fromkeys("split split_with_sizes split_copy".split(), _split),
    **dict.fromkeys("roll flip".split(), _roll),
    **dict.fromkeys("index_select embedding".split(), _pick_one),
    **dict.fromkeys("pixel_shuffle pixel_unshuffle".split(), _pixel_shuffle),
    **dict.fromkeys("channel_shuffle native_channel_shuffle".split(), _channel_shuffle),
    **dict.fromkeys(
        "sum mean var std var_mean std_mean amax amin max min prod any all argmax argmin logsumexp cumsum softmax _softmax "
        "_log_softmax log_softmax linalg_vector_norm norm topk sort".split(),
        _reduce,
    ),
    **dict.fromkeys(
        "max_pool2d_with_indices max_pool2d avg_pool2d avg_pool1d avg_pool3d _adaptive_avg_pool2d adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d".split(),
        _spatial,
    ),
    **dict.fromkeys(
        "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "_batch_norm_no_update".split(),
        _batch_norm,
    ),
    **dict.fromkeys("native_layer_norm rms_norm _fused_rms_norm".split(), _layer_norm),
    **dict.fromkeys("mm addmm bmm baddbmm".split(), _mm),
    **dict.fromkeys("mv".split(), _mv),
    "as_strided_": _strided,
    "expand": _expand,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    **dict.fromkeys("prelu _prelu_kernel".split(), _prelu),
    "glu": _glu,
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeat,
    "index": _pick,
    "im2col": _im2col,
    "col2im": _col2im,
    "constant_pad_nd": _pad,
    "native_group_norm": _group_norm,
    "convolution": _convolution,
}
