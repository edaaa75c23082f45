"""Which groups may be branches: all that is computed from their units could be a constant. Proven in `proof`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group

if TYPE_CHECKING:
    from torch import nn


def candidates(module: nn.Module, groups: Sequence[Group]) -> tuple[str, ...]:
    """Names of groups of channels whose layers are theirs alone: nothing else passes through what makes, carries or reads them."""
    return tuple(
        group.name
        for group in groups
        if group.kind == "channels" and group.units > 1 and _owns_its_layers(module, group)
    )


def _owns_its_layers(module: nn.Module, group: Group) -> bool:
    """Each of its layers has all indices of one axis, and what reads it is a plain convolution or linear layer."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    readers = {member.module for member in group.consumers}
    owned: dict[str, dict[int, set[int]]] = {}
    for member in group.members:
        indices = range(member.offset, member.offset + group.units * member.repeat)
        owned.setdefault(member.module, {}).setdefault(member.axis, set()).update(indices)
    for name, axes in owned.items():
        layer = module.get_submodule(name)
        weight, axis = getattr(layer, "weight", None), int(name in readers)
        if weight is None or [*axes] != [axis] or len(axes[axis]) != weight.shape[axis]:
            return False
        match layer:
            case nn.Conv2d():
                plain = type(layer).forward is nn.Conv2d.forward and not isinstance(layer.padding, str)
                if not plain or (name in readers and layer.groups != 1):
                    return False
            case nn.Linear():
                pass
            case _ if not (isinstance(layer, _BatchNorm) and name not in readers):
                return False
    return bool(readers)
