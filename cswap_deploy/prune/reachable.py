"""Whether what a recipe asks for can be reached by the groups that a network has, before anything is scored."""

from __future__ import annotations

from cswap_deploy.artifacts import Groups
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.select import CostKind, narrowest, nothing, unreachable
from cswap_deploy.recipe import MacsTarget, ParamsTarget, Recipe
from cswap_deploy.wording import plural


def left(groups: Groups, kind: CostKind, multiple: int) -> float:
    """Of the dense network's cost, where every group is as narrow as `multiple` lets it be."""
    return narrowest(groups, kind, multiple) if groups.groups else 1.0


def fault(recipe: Recipe, groups: Groups, multiple: int) -> PruningError | None:
    """Why the target cannot be reached. Biases that compensation adds are not counted, so a target of `params` that is just
    out of reach is found by the search."""
    target, where = recipe.prune.target, recipe.where("prune.target")
    match target:
        case MacsTarget(macs=fraction) | ParamsTarget(params=fraction) if fraction >= 1:
            return None
    if not groups.groups:
        return nothing(groups).at(where)
    whole = min(left(groups, "macs", multiple), left(groups, "params", multiple)) >= 1
    if whole and not any(group.branch for group in groups.groups):
        widest = max(group.units for group in groups.groups)
        return PruningError(
            f"{recipe.where('prune.round_to')}: prune.round_to {multiple} leaves nothing to remove: no group has more than "
            f"{plural(widest, 'unit')}",
            f"set prune.round_to to {max(1, widest // 2)} or less",
        )
    match target:
        case MacsTarget(macs=fraction):
            found = unreachable(groups, "macs", fraction, multiple)
        case ParamsTarget(params=fraction):
            found = unreachable(groups, "params", fraction, multiple)
        case _:
            return None
    return found and found.at(where)
