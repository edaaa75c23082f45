"""Rotating the heads of an attention, exactly: the network computes the same, and its last dimensions matter least.

Queries by R and keys by its inverse transpose leave every logit as it is; values by R and their columns of the projection by its
inverse leave what the projection gives. With A the second moment of a head's queries and B that of its keys, these about their
mean over the positions of an image (what all keys share moves no softmax), and A^1/2 B^1/2 = U S V' (singular values),

    queries: S^-1/2 V' B^1/2,    keys: its inverse transpose = S^-1/2 U' A^1/2

makes both moments S: the first r dimensions carry the best logits that r dimensions can (Eckart and Young 1936, for independent queries and
keys). With C the covariance of a head's part of what the projection reads, W its columns and W C^1/2 = U S V',

    values: S^1/2 V' C^-1/2,     columns: W C^1/2 V S^-1/2

does the same for what the projection gives. All in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group, GroupScores, HeadDims, HeadRows
from cswap_deploy.prune.ablation import channel_axis, first_argument
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import fresh_copy

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOOR = 1e-6
"""Of the largest moment, or of that about 0 in place of the mean: what vanishes counts as much, so that every matrix has an inverse."""
BALANCE = 1e-4
"""Of the largest singular value: smaller ones are not scaled up to it."""


def rotated(module: nn.Module, groups: Sequence[Group], batches: Batches) -> nn.Module:
    """A copy that computes the same, the dimensions of each head in the order of what they carry on these images."""
    import torch

    inner = [group for group in groups if isinstance(group, HeadDims)]
    module = fresh_copy(module)
    with torch.no_grad():
        moments = _moments(module, inner, batches)
        for group in inner:
            if group.queries and group.keys:
                queries, keys = _balanced(moments[group.name].queries, moments[group.name].keys)
                turn_rows(module, group.queries, queries)
                turn_rows(module, group.keys, keys)
            if group.values:
                values = _carrying(moments[group.name].values, _columns(module, group))
                turn_rows(module, group.values, values)
                turn_columns(module, group, torch.linalg.inv(values))
    return module


def logit_scores(module: nn.Module, groups: Sequence[HeadDims], batches: Batches) -> tuple[GroupScores, ...]:
    """keep_value: the mean square of a unit's part of the logits, before their scale, over heads; for groups with queries."""
    import torch

    with torch.no_grad():
        moments = _moments(module, groups, batches)
    found = []
    for group in groups:
        own = moments[group.name]
        power = (own.queries.diagonal(0, 1, 2) * own.keys.diagonal(0, 1, 2)).mean(0) / own.rows[0] / own.rows[1]
        found.append(GroupScores(group.name, tuple(range(group.units)), tuple(power.tolist())))
    return tuple(found)


# --- turning


def turn_rows(module: nn.Module, rows: HeadRows, matrices: Tensor) -> None:
    """Each head's vectors times its matrix (heads, units, units), in place; a BatchNorm behind is made the identity there."""
    import torch

    layer: Any = module.get_submodule(rows.modules[0])
    index = torch.tensor(rows.offsets)[:, None] + torch.arange(matrices.shape[1])
    weight = layer.weight[index].flatten(2).double()
    bias = layer.bias[index].double() if layer.bias is not None else weight.new_zeros(index.shape)
    if len(rows.modules) > 1:
        norm: Any = module.get_submodule(rows.last)
        factor = (norm.running_var[index].double() + norm.eps).rsqrt() * norm.weight[index].double()
        weight = weight * factor[..., None]
        bias = (bias - norm.running_mean[index].double()) * factor + norm.bias[index].double()
        norm.running_mean[index], norm.running_var[index] = 0, 1
        norm.weight[index] = (1 + norm.eps) ** 0.5
        if layer.bias is not None:
            layer.bias[index] = 0
    else:
        norm = layer
    layer.weight[index] = (matrices @ weight).to(layer.weight.dtype).reshape(*index.shape, *layer.weight.shape[1:])
    if norm.bias is not None:
        norm.bias[index] = (matrices @ bias[..., None])[..., 0].to(norm.bias.dtype)


def turn_columns(module: nn.Module, group: HeadDims, matrices: Tensor) -> None:
    """The projection's columns of each head times its matrix, in place."""
    layer: Any = module.get_submodule(group.consumers[0].module)
    found = _columns(module, group) @ matrices
    for member, own in zip(_heads(group), found, strict=True):
        part = layer.weight[:, member : member + group.units]
        part.copy_(own.to(part.dtype).reshape(part.shape))


def _columns(module: nn.Module, group: HeadDims) -> Tensor:
    """(heads, outputs, units) in float64."""
    import torch

    weight: Any = module.get_submodule(group.consumers[0].module).weight
    own = [weight[:, member : member + group.units].flatten(1) for member in _heads(group)]
    return torch.stack(own).double()


def _heads(group: HeadDims) -> list[int]:
    """Where the projection's columns of each head begin."""
    return sorted(member.offset for member in group.consumers)


# --- what the images say


@dataclass
class _Moments:
    """(heads, units, units) each, in float64, summed: of queries; of keys and values about their means."""

    queries: Any = 0.0
    keys: Any = 0.0
    values: Any = 0.0
    rows: tuple[int, int] = 0, 0
    """Of queries and keys."""


def _moments(module: nn.Module, groups: Sequence[HeadDims], batches: Batches) -> Mapping[str, _Moments]:
    found = {group.name: _Moments() for group in groups}
    sums: dict[str, tuple[Any, int]] = {}

    def made(group: HeadDims) -> Any:
        own = found[group.name]

        def queries(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            assert group.queries
            heads = _split(output, channel_last(module, group.queries), group.queries.offsets, group.units)
            own.queries = own.queries + _gram(heads.flatten(0, 1))
            own.rows = own.rows[0] + len(heads.flatten(0, 1)), own.rows[1]

        def keys(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            assert group.keys
            heads = _split(output, channel_last(module, group.keys), group.keys.offsets, group.units)
            centred = heads - heads.mean(1, keepdim=True)
            own.keys = own.keys + _gram(centred.flatten(0, 1)) + FLOOR * _gram(heads.flatten(0, 1))
            own.rows = own.rows[0], own.rows[1] + len(heads.flatten(0, 1))

        def values(layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            heads = _split(
                first_argument(inputs, named), channel_axis(layer) == -1, _heads(group), group.units
            ).flatten(0, 1)
            total, count = sums.get(group.name, (0.0, 0))
            sums[group.name] = total + heads.sum(0), count + len(heads)
            own.values = own.values + _gram(heads)

        return queries, keys, values

    with ExitStack() as undo:
        for group in groups:
            queries, keys, values = made(group)
            if group.queries and group.keys:
                undo.callback(module.get_submodule(group.queries.last).register_forward_hook(queries).remove)
                undo.callback(module.get_submodule(group.keys.last).register_forward_hook(keys).remove)
            if group.values:
                reader = module.get_submodule(group.consumers[0].module)
                undo.callback(reader.register_forward_pre_hook(values, with_kwargs=True).remove)
        for images, _ in batches:
            module(images)
    for name, (total, count) in sums.items():
        found[name].values -= (1 - FLOOR) * total[:, :, None] * total[:, None, :] / count
    return found


def channel_last(module: nn.Module, rows: HeadRows) -> bool:
    return channel_axis(module.get_submodule(rows.modules[0])) == -1


def _split(tensor: Tensor, last: bool, offsets: Sequence[int], units: int) -> Tensor:
    """(rows, positions, heads, units) in float64."""
    import torch

    flat = tensor if last else tensor.movedim(1, -1)
    flat = flat.reshape(len(flat), -1, flat.shape[-1])
    index = torch.tensor(offsets, device=flat.device)[:, None] + torch.arange(units, device=flat.device)
    found: Tensor = flat[..., index].double()
    return found


def _gram(heads: Tensor) -> Tensor:
    """(heads, units, units) of (rows, heads, units)"""
    turned = heads.movedim(0, 1)
    return turned.mT @ turned


# --- matrices, each (heads, units, units)


def _balanced(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    below, above = _root(queries), _root(keys)
    _, values, right = torch.linalg.svd(below @ above)
    turn = _level(_floored(values).rsqrt()[..., None] * (right @ above), queries)
    return turn, torch.linalg.inv(turn).mT


def _carrying(moments: Tensor, columns: Tensor) -> Tensor:
    import torch

    root = _root(moments)
    _, values, right = torch.linalg.svd(columns @ root, full_matrices=False)
    if right.shape[1] < right.shape[2]:  # a projection with fewer outputs than a head has dimensions
        _, values, right = torch.linalg.svd(
            torch.nn.functional.pad(columns @ root, (0, 0, 0, right.shape[2])), full_matrices=False
        )
    return _level(_floored(values).sqrt()[..., None] * (right @ torch.linalg.inv(root)), moments)


def _level(turn: Tensor, moments: Tensor) -> Tensor:
    """Each head's matrix times a number that leaves the power of its vectors as it is; the identity for heads without any."""
    import torch

    power = moments.diagonal(0, 1, 2).sum(1)
    after = (turn @ moments @ turn.mT).diagonal(0, 1, 2).sum(1)
    alive = (power > 0) & (after > 0)
    scale = torch.where(alive, power / after.where(alive, 1.0), 1.0).sqrt()
    one = torch.eye(turn.shape[1], dtype=turn.dtype, device=turn.device)
    return torch.where(alive[:, None, None], scale[:, None, None] * turn, one)


def _floored(values: Tensor) -> Tensor:
    largest = values[:, :1].clamp_min(1e-30)
    return values.clamp_min(BALANCE * largest)


def _root(moments: Tensor) -> Tensor:
    """The symmetric one."""
    import torch

    values, vectors = torch.linalg.eigh(moments)
    largest = values[:, -1:].clamp_min(1e-30)
    root: Tensor = (vectors * values.clamp_min(FLOOR * largest).sqrt()[:, None, :]) @ vectors.mT
    return root
