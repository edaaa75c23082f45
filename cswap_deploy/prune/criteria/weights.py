"""What the criteria that look at tensors share: a unit's part of each tensor, and scores without causal facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group, GroupScores

if TYPE_CHECKING:
    from torch import Tensor


def unit_rows(tensors: Mapping[str, Tensor], group: Group) -> Iterator[Tensor]:
    """For each member tensor that is there, the values that each unit owns: (units, values)."""
    for member in group.members:
        tensor = tensors.get(member.tensor)
        if tensor is not None:
            own = tensor.movedim(member.axis, 0)[member.offset : member.offset + group.units * member.repeat]
            yield own.reshape(group.units, -1)


def scores_of(group: Group, parts: Sequence[Tensor]) -> GroupScores:
    """Sum of per-unit parts, each of shape (units,)."""
    import torch

    total = torch.stack([part.double().cpu() for part in parts]).sum(0)
    return GroupScores(group.name, tuple(range(group.units)), tuple(total.tolist()))


def relative_scores(group: Group, parts: Sequence[Tensor]) -> GroupScores:
    """As `scores_of`, divided by the group's mean: for measures whose scale says nothing across layers."""
    import torch

    total = torch.stack([part.double().cpu() for part in parts]).sum(0)
    return GroupScores(group.name, tuple(range(group.units)), tuple((total / total.mean().clamp_min(1e-30)).tolist()))
