"""What each ATen operator does to the units on its tensors' axes: one rule per operator, in a table.

A rule is called after the operator has run, as (trace, operator's name, args, kwargs, result). What no rule knows freezes all that
it reads, with the operator's name as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from cswap_deploy.prune.arranging import ARRANGING, Rule, split_equally, tensors
from cswap_deploy.prune.dims import FIXED, POSITION, Dim, factored, freeze, give_role, unify

if TYPE_CHECKING:
    from torch import Tensor

    from cswap_deploy.prune.tracing import Trace


def unknown(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """All that it reads stays, and so does all that it gives."""
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
    (unknown if tuple(args[1]) != tuple(size.size for size in trace.dims(args[0])) else _same)(
        trace, name, args, kwargs, result
    )


# --- what mixes along an axis


def _reduce(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """The units on the axes that it runs over are mixed, the others pass through."""
    dims = trace.dims(args[0])
    at = AXES.get(name, 1)
    axes = kwargs.get("dim", args[at] if len(args) > at else None)
    axes = [axes] if isinstance(axes, int) else axes or range(len(dims))
    over = {axis % len(dims) for axis in axes} if dims else set()
    for axis in over:
        freeze(dims[axis], (trace.norm and f"a {trace.norm} normalises over its units") or _mixes(trace, name))
    for own in tensors(result):
        if own.ndim == len(dims):
            trace.give(
                own,
                [dim if dim.size == size else Dim(size, POSITION) for dim, size in zip(dims, own.shape, strict=True)],
            )
        else:
            trace.give(own, [dim for axis, dim in enumerate(dims) if axis not in over])


AXES = {"linalg_vector_norm": 2, "norm": 2, "topk": 2}
"""Which argument names the axes, where it is not the second."""


def _mixes(trace: Trace, name: str) -> str:
    return f"{name.lstrip('_')} in {trace.place} mixes its units"


def _spatial(trace: Trace, name: str, args: Any, kwargs: Any, result: Any) -> None:
    """Poolings and resizings: batch and channels pass through."""
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
        for dim in dims[len(batch) : -1]:
            give_role(dim, "values")
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
    trace.note(trace.names.get(weight, "") if weight in trace.names else "", macs, [*dims[:axis], *own])


def _grouped(trace: Trace, weight: Tensor, channels: Dim, own: Sequence[Dim], groups: int) -> Dim:
    inputs = factored(channels, own[1].size)
    outputs = factored(own[0], own[0].size // groups)
    if inputs is None or outputs is None:
        freeze(channels, f"a grouped convolution (groups={groups}) is coupled to it")
        freeze(own[0], f"a grouped convolution (groups={groups}) is coupled to it")
        return own[0]
    unify(inputs[1], own[1])
    shared = unify(inputs[0], outputs[0])
    give_role(shared, "groups")
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
            batch[place] = (
                unify(batch[place], other) if batch[place].size == other.size else _uneven(batch[place], other)
            )
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
    give_role(v[-1], "values")
    trace.give(result, [*batch, q[-2], v[-1]])
    weights = prod(query.shape[:-1]) * key.shape[-2]
    for inner in (q[-1], v[-1]):
        trace.note("", weights * inner.size, [*batch, inner])


def _uneven(own: Dim, other: Dim) -> Dim:
    """Heads of the query that share those of the key and the value."""
    freeze(own, FIXED)
    freeze(other, FIXED)
    return own


FUNCTIONS: dict[str, Rule] = {
    "scaled_dot_product_attention": _attention,
    "chunk": split_equally,
    "split": split_equally,
}

RULES: dict[str, Rule] = {
    **ARRANGING,
    **dict.fromkeys(
        "pointwise copy_ fill_ zero_ masked_fill_ hardswish hardswish_ native_dropout rsub floor_divide bernoulli_".split(),
        _pointwise,
    ),
    **dict.fromkeys(
        "clone detach alias _to_copy contiguous lift_fresh zeros_like ones_like empty_like full_like rand_like".split(),
        _same,
    ),
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
    **dict.fromkeys("prelu _prelu_kernel".split(), _prelu),
    "constant_pad_nd": _pad,
    "native_group_norm": _group_norm,
    "convolution": _convolution,
}
