"""Module → coupled groups of units, each proven on the network itself. The only file that imports torch_pruning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from cswap_deploy import progress
from cswap_deploy.artifacts import Axis, CostTerm, Group, Groups, InputSpec, Refusal, Slice, UnitAttribute
from cswap_deploy.errors import CswapError, PruningError
from cswap_deploy.model import count_by_module
from cswap_deploy.prune.cut import cut_copy, masked_copy

if TYPE_CHECKING:
    from torch import nn

TOLERANCE, SINGLE_TOLERANCE = 1e-9, 1e-4
"""Largest difference between cut and masked network, relative to the largest logit, in float64; in float32 where the
network's own forward cannot run in float64."""


class _Unfit(Exception):
    """A proposed group cannot be expressed or must not be pruned; the text is the reason shown to the user."""


def find(module: nn.Module, spec: InputSpec, skip: Sequence[str] = ()) -> Groups:
    """Groups of `module` in the order of its layers, with what each unit costs and what is not prunable, and why.

    A group is kept only if cutting a random half of its units gives the same logits as masking them.
    `skip`: shell patterns of module names; a group with a member that matches is left alone. A pattern that matches
    nothing is a PruningError. `module` is not changed.
    """
    _require_matches(module, skip)
    proposals = [*_heads(module), *_channels(module, spec)]
    proof = _Proof.possible(module, spec)
    groups: list[Group] = []
    refused: list[Refusal] = [item for item in proposals if isinstance(item, Refusal)]
    order = {name: position for position, (name, _) in enumerate(module.named_modules())}
    candidates = _without_overlap(
        sorted(
            (item for item in proposals if isinstance(item, Group)), key=lambda group: order[group.members[0].module]
        )
    )
    for number, group in enumerate(candidates, 1):
        progress.advance("groups proven", number, len(candidates))
        pattern = next((p for p in skip if any(fnmatchcase(member.module, p) for member in group.members)), None)
        reason = (
            f"prune.skip names it ({pattern})"
            if pattern
            else _shared(module, group) or _disproof(module, group, spec, proof)
        )
        if reason is None:
            groups.append(group)
        else:
            refused.append(Refusal(group.name, reason))
    return Groups(tuple(groups), tuple(refused), _cost_terms(module, groups, spec))


# --- proposals: attention heads


def _heads(module: nn.Module) -> Iterator[Group | Refusal]:
    """Whole heads of attention blocks with one fused `qkv` and one `proj` layer, as timm writes them."""
    for name, block in module.named_modules():
        if not _is_fused_attention(block):
            continue
        heads, size = int(block.num_heads), int(block.head_dim)
        if heads < 2:
            yield Refusal(f"{name}.heads", "there is one head only")
            continue
        parameters = ["weight", "bias"] if block.qkv.bias is not None else ["weight"]
        members = [
            Slice(f"{name}.qkv", parameter, 0, part * heads * size, size)
            for parameter in parameters
            for part in range(3)
        ]
        members.append(Slice(f"{name}.proj", "weight", 1, 0, size))
        attributes = [UnitAttribute(name, "num_heads", 1)]
        if hasattr(block, "attn_dim"):
            attributes.append(UnitAttribute(name, "attn_dim", size))
        yield Group(f"{name}.heads", "heads", heads, tuple(members), tuple(attributes))


def _is_fused_attention(block: Any) -> bool:
    from torch import nn

    if not all(hasattr(block, name) for name in ("qkv", "proj", "num_heads", "head_dim")):
        return False
    if not (isinstance(block.qkv, nn.Linear) and isinstance(block.proj, nn.Linear)):
        return False
    width = block.num_heads * block.head_dim
    return bool(block.qkv.out_features == 3 * width and block.proj.in_features == width)


# --- proposals: channels


def _channels(module: nn.Module, spec: InputSpec) -> Iterator[Group | Refusal]:
    """Coupled channels and linear units as torch-pruning traces them; groups that touch an attention block's inside are left out."""
    module = copy.deepcopy(module)  # torch-pruning leaves eval mode, and after an error its hooks
    names = {child: name for name, child in module.named_modules()}
    attention = {
        f"{name}.{part}"
        for name, block in module.named_modules()
        if _is_fused_attention(block)
        for part in ("qkv", "proj")
    }
    for proposal in _trace(module, spec):
        root = names[proposal[0].dep.target.module]
        if root in attention and root.endswith(".qkv"):
            continue
        try:
            yield _channel_group(proposal, names)
        except _Unfit as reason:
            yield Refusal(root, str(reason))


def _trace(module: nn.Module, spec: InputSpec) -> list[Any]:
    import torch
    import torch_pruning

    example = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(0))
    try:
        module.requires_grad_(True)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(
                module,
                example_inputs=example,
                forward_fn=lambda network, images: network(images),
                unwrapped_parameters=[],
                customized_pruners={},
                ignored_layers=[],
                ignored_params=[],
                verbose=False,
            )
            return list(graph.get_all_groups(ignored_layers=[]))
    except Exception as error:  # the tracer raises whatever it stumbles over
        raise PruningError(
            f"the network's structure could not be traced: {_first_line(error)}",
            "set prune.target: null to export it without pruning",
        ) from error


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _channel_group(proposal: Any, names: dict[Any, str]) -> Group:
    """One group, named after the first layer that makes its units."""
    units = len(proposal[0].idxs)
    members: dict[Slice, None] = {}
    for dependency, indices, roots in ((item.dep, item.idxs, item.root_idxs) for item in proposal):
        target = dependency.target.module
        if target not in names:
            if _has_parameters(target):
                raise _Unfit("it is coupled to a parameter that stands outside any layer")
            continue
        for parameter, axis in _cut_axes(target, dependency.handler.__name__):
            offset, repeat = _layout(list(indices), list(roots), units)
            members[Slice(names[target], parameter, axis, offset, repeat)] = None
    if not any(member.axis == 1 and member.parameter == "weight" for member in members):
        raise _Unfit("its units are outputs of the network")
    if units < 2:
        raise _Unfit("it has one unit only")
    order = {name: position for position, name in enumerate(names.values())}
    ordered = sorted(members, key=lambda member: (order[member.module], member.axis, member.parameter))
    makers = [member.module for member in ordered if member.axis == 0 and member.parameter == "weight"]
    if not makers:
        raise _Unfit("no layer with a weight of its own makes its units")
    return Group(makers[0], "channels", units, tuple(ordered))


def _has_parameters(target: Any) -> bool:
    from torch import nn

    return isinstance(target, nn.Parameter) or (
        isinstance(target, nn.Module) and any(True for _ in target.parameters())
    )


def _cut_axes(layer: nn.Module, handler: str) -> list[tuple[str, int]]:
    """(parameter, axis) pairs that a unit owns in a layer of this kind, reached from the side that `handler` names."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    incoming = handler.endswith("in_channels")
    tensors = [name for name, tensor in layer.named_parameters(recurse=False) if tensor is not None]
    match layer:
        case nn.LayerNorm() | nn.GroupNorm():
            raise _Unfit(f"a {type(layer).__name__} normalises over its units")
        case _BatchNorm():
            buffers = ["running_mean", "running_var"] if layer.track_running_stats else []
            return [(name, 0) for name in [*tensors, *buffers]]
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            raise _Unfit("transposed convolutions are not pruned")
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if layer.groups > 1:
            if layer.groups != layer.in_channels or layer.in_channels != layer.out_channels:
                raise _Unfit(f"a grouped convolution (groups={layer.groups}) is coupled to it")
            return [(name, 0) for name in tensors]
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear():
            return [("weight", 1)] if incoming else [(name, 0) for name in tensors]
        case nn.PReLU():
            return [("weight", 0)] if layer.num_parameters > 1 else []
        case _ if not tensors:
            return []
        case _:
            raise _Unfit(f"it is coupled to a layer of an unknown kind, {type(layer).__name__}")


def _layout(indices: list[int], roots: list[int], units: int) -> tuple[int, int]:
    """(offset, repeat) such that unit u owns indices offset + u * repeat onwards; anything else is not expressible."""
    repeat = len(indices) // units
    offset = min(indices)
    expected = {offset + unit * repeat + k: unit for unit in range(units) for k in range(repeat)}
    if len(indices) != units * repeat or dict(zip(indices, roots, strict=True)) != expected:
        raise _Unfit("its units are scattered over a coupled layer")
    return offset, repeat


def _without_overlap(groups: list[Group]) -> list[Group]:
    """Drop a group whose members another one, earlier, already owns."""
    owned: set[tuple[str, int, int]] = set()
    kept: list[Group] = []
    for group in groups:
        places = {(member.tensor, member.axis, member.offset) for member in group.members}
        if not places & owned:
            owned |= places
            kept.append(group)
    return kept


def _require_matches(module: nn.Module, skip: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PruningError(
                f"prune.skip: pattern {pattern!r} matches no module of the network",
                f"module names look like {', '.join(repr(name) for name in names[1:4])}",
            )


# --- proof


@dataclass(frozen=True)
class _Proof:
    """The precision in which groups are proven."""

    dtype: Any
    tolerance: float

    @staticmethod
    def possible(module: nn.Module, spec: InputSpec) -> _Proof:
        import torch

        try:
            with torch.no_grad():
                copy.deepcopy(module).double()(torch.zeros(2, *spec.shape, dtype=torch.float64))
        except Exception as error:  # whatever a forward that insists on float32 raises
            progress.warn(f"groups are proven in float32, the network does not run in float64 ({_first_line(error)})")
            return _Proof(torch.float32, SINGLE_TOLERANCE)
        return _Proof(torch.float64, TOLERANCE)


def _shared(module: nn.Module, group: Group) -> str | None:
    """Why a tensor that stands under two names must not be cut: each of its layers would get one of its own."""
    names: dict[Any, list[str]] = {}
    for owner, layer in module.named_modules():
        for leaf, tensor in layer.named_parameters(recurse=False):
            names.setdefault(tensor, []).append(f"{owner}.{leaf}" if owner else leaf)
    twins = next((n for n in names.values() if len(n) > 1 and {m.tensor for m in group.members} & set(n)), None)
    return f"{' and '.join(twins)} are one tensor" if twins else None


def _disproof(module: nn.Module, group: Group, spec: InputSpec, proof: _Proof) -> str | None:
    """Why this group must not be pruned, or None: cutting a random half of it equals masking it, on random images."""
    import torch

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(group.units, generator=generator).tolist()
    keep = {group.name: tuple(sorted(order[: max(1, group.units // 2)]))}
    images = torch.randn(2, *spec.shape, generator=generator, dtype=torch.float64).to(proof.dtype)
    try:
        with torch.no_grad():
            cut = cut_copy(module, [group], keep).to(proof.dtype)(images.clone())
            masked = masked_copy(module, [group], keep).to(proof.dtype)(images.clone())
    except CswapError as error:
        return error.message
    except Exception as error:  # whatever the user's forward raises on the smaller layers
        return f"the network fails without some of its units: {_first_line(error)}"
    if cut.shape != masked.shape:
        return "its units are outputs of the network"
    difference = float((cut - masked).abs().max() / masked.abs().max().clamp_min(1e-30))
    return (
        None
        if difference <= proof.tolerance
        else f"cutting its units is not the same as masking them (relative difference {difference:.1e})"
    )


# --- cost


def _cost_terms(module: nn.Module, groups: Sequence[Group], spec: InputSpec) -> tuple[CostTerm, ...]:
    """What every parameter tensor and every layer costs, as a product over the axes that groups shorten."""
    axes = _axes(module, groups)
    totals = count_by_module(module, spec)
    terms = []
    counted: set[Any] = set()
    for name, layer in module.named_modules():
        inner = sum(totals.get(f"{name}.{child}" if name else child, 0) for child, _ in layer.named_children())
        own = totals.get(name, 0) - inner
        tensors = [f"{name}.{leaf}" if name else leaf for leaf, _ in layer.named_parameters(recurse=False)]
        weight = f"{name}.weight" if name else "weight"
        for tensor, (_, values) in zip(tensors, layer.named_parameters(recurse=False), strict=True):
            macs = own if tensor == weight else 0
            terms.append(CostTerm(tensor, 0 if values in counted else values.numel(), macs, axes.get(tensor, ())))
            counted.add(values)
        if own and weight not in tensors:
            heads = tuple(Axis(group.units, ((group.name, 1),)) for group in groups if group.name == f"{name}.heads")
            terms.append(CostTerm(name, 0, own, heads))
    return tuple(terms)


def _axes(module: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[Axis, ...]]:
    owners: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group in groups:
        for member in group.members:
            owners.setdefault((member.tensor, member.axis), []).append((group.name, member.repeat))
    sizes = {name: tensor.shape for name, tensor in module.named_parameters()}
    axes: dict[str, tuple[Axis, ...]] = {}
    for (tensor, axis), parts in owners.items():
        if tensor in sizes:
            axes[tensor] = (*axes.get(tensor, ()), Axis(int(sizes[tensor][axis]), tuple(parts)))
    return axes
