"""Module → coupled groups of units, each proven on the network itself, with what they cost and what stays and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group, Groups, HeadDims, InputSpec, Refusal
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.branches import candidates as branch_candidates
from cswap_deploy.prune.costs import cost_terms
from cswap_deploy.prune.gradients import require_gradients
from cswap_deploy.prune.head_dims import Inner, within_heads
from cswap_deploy.prune.proof import branches, proven
from cswap_deploy.prune.proposals import SUMMED, Proposals, overlap, propose
from cswap_deploy.prune.tracing import Trace, traced
from cswap_deploy.recipe import HeadsMode

if TYPE_CHECKING:
    from torch import nn


def find(
    module: nn.Module, spec: InputSpec, skip: Sequence[str] = (), heads: HeadsMode = "whole", emptied: bool = False
) -> Groups:
    """Groups of `module` in the order of its layers, with what each unit costs and what is not prunable, and why.

    A group is kept only if cutting a random part of its units gives the same logits as masking them.
    `skip`: shell patterns of module names; a group with a member that matches is left alone. A pattern that matches
    nothing is a PruningError. `module` is not changed. `heads`: whether attention loses whole heads, or where that is possible
    dimensions within them. `emptied`: whether it is looked for groups that may lose all their units (`Group.branch`).
    Errors: PruningError, also where no gradient goes through what reads the units, or a forward writes into the images.
    """
    _require_matches(module, skip)
    trace = traced(module, spec)
    proposed = propose(module, trace)

    def leave(group: Group) -> str | None:
        return _skipped(group, skip) or _shared(module, group) or _uncalled(trace, group)

    if heads == "dims":
        inner = within_heads(module, trace, spec, leave)
        proposed = _beside(proposed, inner)
    order = {name: position for position, (name, _) in enumerate(module.named_modules())}
    candidates, refused = [], list(proposed.refused)
    for group in sorted(proposed.groups, key=lambda group: order[group.members[0].module]):
        reason = leave(group)
        candidates += [] if reason else [group]
        refused += [Refusal(group.name, reason)] if reason else []
    groups, disproven = proven(module, candidates, spec)
    require_gradients(module, groups, spec)
    if emptied:
        found = branches(module, groups, branch_candidates(module, groups), spec)
        groups = tuple(replace(group, branch=group.name in found) for group in groups)
    terms = cost_terms(module, spec, trace, groups, proposed.atoms)
    return Groups(groups, (*refused, *disproven), terms)


def _beside(proposed: Proposals, inner: Inner) -> Proposals:
    """What is left of the proposals where some heads lose dimensions, and these."""
    owned = {(member.tensor, member.axis) for group in inner.groups for member in group.members}
    taken = [(member, group.units) for group in inner.groups for member in group.members]

    def free(group: Group) -> bool:
        return not any(
            (member.tensor, member.axis) == (other.tensor, other.axis) and overlap(member, group.units, other, units)
            for member in group.members
            if (member.tensor, member.axis) in owned
            for other, units in taken
        )

    makers = {member.module for group in inner.groups for member in group.members if member.axis == 0}
    refused = (item for item in proposed.refused if item.reason != SUMMED or item.name.partition("[")[0] not in makers)
    groups = (*filter(free, proposed.groups), *inner.groups)
    return Proposals(groups, (*refused, *inner.refused), {**proposed.atoms, **inner.atoms})


def _skipped(group: Group, skip: Sequence[str]) -> str | None:
    pattern = next((p for p in skip if any(fnmatchcase(member.module, p) for member in group.members)), None)
    return f"prune.skip names it ({pattern})" if pattern else None


def _require_matches(module: nn.Module, skip: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PruningError(
                f"prune.skip: pattern {pattern!r} matches no module of the network",
                f"module names look like {', '.join(repr(name) for name in names[1:4])}",
            )


def _shared(module: nn.Module, group: Group) -> str | None:
    """Why a tensor that stands under two names must not be cut: each of its layers would get one of its own."""
    names: dict[Any, list[str]] = {}
    for owner, layer in module.named_modules():
        for leaf, tensor in layer.named_parameters(recurse=False):
            names.setdefault(tensor, []).append(f"{owner}.{leaf}" if owner else leaf)
    twins = next((n for n in names.values() if len(n) > 1 and {m.tensor for m in group.members} & set(n)), None)
    return f"{' and '.join(twins)} are one tensor" if twins else None


def _uncalled(trace: Trace, group: Group) -> str | None:
    """Why a layer must be called: what it reads is seen nowhere else. Of dimensions within heads those that make them, too."""
    layers = group.members if isinstance(group, HeadDims) else group.consumers
    unseen = next((m.module for m in layers if m.parameter == "weight" and m.module not in trace.called), None)
    return f"the forward uses the weight of {unseen} without calling the layer" if unseen else None
