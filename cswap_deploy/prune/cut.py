"""Plan → smaller module. Pure: every function works on a copy. A network is saved and rebuilt without pickle or tracing."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import (
    Architecture,
    File,
    Group,
    HeadDims,
    HeadRows,
    Network,
    PruningPlan,
    Slice,
    UnitAttribute,
)
from cswap_deploy.checkpoint import load_state, read_checkpoint
from cswap_deploy.errors import ModelError, PruningError
from cswap_deploy.model import build
from cswap_deploy.recipe import without_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "cswap-deploy/plan/1"
DIGITS = 6
"""Significant digits of the scores in plan.json."""
Keep = Mapping[str, Sequence[int]]


def cut_copy(module: nn.Module, groups: Sequence[Group], keep: Keep) -> nn.Module:
    """A copy of `module` with only the kept units of each group; groups that `keep` does not name stay whole.

    Of a branch that keeps none (`Group.branch`) nothing is left but what its last layer gives without them.
    """
    module = fresh_copy(module)
    emptied = [group for group in groups if group.branch and group.name in keep and not keep[group.name]]
    groups = [group for group in groups if group not in emptied]
    for group in groups:
        if isinstance(group, HeadDims) and group.queries and group.name in keep:
            _keep_temperature(module, group, len(keep[group.name]))
    for (owner, parameter, axis), indices in _kept_indices(module, groups, keep).items():
        _select(module.get_submodule(owner), parameter, axis, indices)
    for group in groups:
        for attribute in group.attributes if group.name in keep else ():
            _lower(module, attribute, (group.units - len(keep[group.name])) * attribute.per_unit)
    for owner in {member.module for group in groups if group.name in keep for member in group.members}:
        _repair(module.get_submodule(owner))
    for group in emptied:
        _empty(module, group)
    return module


def fresh_copy(module: nn.Module) -> nn.Module:
    """A deep copy without the tensors that layers keep from former forwards (timm's caches of attention biases).

    Empty dictionaries (a dozen of hooks a layer) are made new here: `deepcopy` takes most of its time for them.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for name, value in vars(layer).items():
            if name.endswith("cache") and isinstance(value, dict):
                memo[id(value)] = {}
            elif type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)


def masked_copy(module: nn.Module, groups: Sequence[Group], keep: Keep) -> nn.Module:
    """A copy of `module` of the same shape in which nothing reads the units that are not kept."""
    import torch

    module = fresh_copy(module)
    with torch.no_grad():
        for group in groups:
            gone = sorted(set(range(group.units)) - set(keep.get(group.name, range(group.units))))
            for member in group.consumers:
                weight: Any = module.get_submodule(member.module).weight
                weight[:, positions(member, gone)] = 0
            if isinstance(group, HeadDims):
                silence(module, group.silenced(gone))
    return module


def silence(module: nn.Module, rows: Mapping[str, Sequence[int]]) -> None:
    """Let these rows of layers give 0, in place; of queries and keys: a dimension that is 0 adds nothing to any logit."""
    for name, own in rows.items():
        layer: Any = module.get_submodule(name)
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor[list(own)] = 0


def positions(member: Slice, units: Sequence[int]) -> list[int]:
    """The indices that these units own on the member's axis."""
    return [member.offset + unit * member.repeat + k for unit in units for k in range(member.repeat)]


def add_bias(module: nn.Module, name: str) -> Tensor:
    """The bias of layer `name`, created as zeros where the layer has none."""
    from torch import nn

    layer: Any = module.get_submodule(name)
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=layer.weight.requires_grad)
    bias: Tensor = layer.bias
    return bias


# --- at rest


def write_plan(
    path: Path, dense: nn.Module, pruned: nn.Module, network: Network, groups: Sequence[Group], plan: PruningPlan
) -> None:
    """All that is needed to rebuild `pruned` from its architecture's name (read by `rebuild`), and why units left.

    Numbers of the scores are rounded to `DIGITS` significant digits.
    """
    before, after = _shapes(dense), _shapes(pruned)
    biases = sorted(set(after) - set(before))
    document = {
        "schema": SCHEMA,
        "source": {
            key: without_folder(getattr(network.architecture, key)) for key in ("source", "name", "kwargs", "library")
        },
        "groups": [asdict(group) for group in groups if group.name in plan.keep],
        "keep": plan.keep,
        "rewrites": [{"kind": "add_bias", "module": name.removesuffix(".bias")} for name in biases],
        "shapes": {"before": before, "after": after},
        "steps": [asdict(step) | {"scores": _rounded([asdict(item) for item in step.scores])} for step in plan.steps],
        "scores": _rounded(asdict(plan.scores)) if plan.scores else None,
        "dense_scores": _rounded(asdict(plan.dense_scores)) if plan.dense_scores else None,
        "dense_order": plan.dense_order,
    }
    path.write_text(_text(document) + "\n")


def _rounded(value: Any) -> Any:
    """The same data; its floats have `DIGITS` significant digits."""
    match value:
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
        case float():
            return float(f"{value:.{DIGITS}g}")
        case _:
            return value


def _text(value: Any, margin: str = "") -> str:
    """JSON with what holds no further list or object on one line: a network may have a hundred thousand units."""
    inner = margin + " "
    if isinstance(value, dict) and any(isinstance(item, dict | list | tuple) for item in value.values()):
        lines = [f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{margin}]"
    return json.dumps(value)


def restore(network: Network) -> nn.Module:
    """The module of a network at rest, in eval mode, on the CPU. Errors: ModelError."""
    return rebuild(build(network.architecture), network.architecture, network.plan, network.weights)


def rebuild(dense: nn.Module, architecture: Architecture, plan: File | None, weights: File) -> nn.Module:
    """Apply a stored plan to a freshly built dense module and load the stored weights."""
    module = dense
    if plan is not None:
        document = json.loads(plan.path.read_text())
        if document.get("schema") != SCHEMA:
            raise ModelError(
                f"{plan.path.name} has schema {document.get('schema')!r}, expected {SCHEMA!r}", "update cswap-deploy"
            )
        _require_shapes(dense, document["shapes"]["before"], document, architecture)
        groups = [_group(item) for item in document["groups"]]
        for group in groups:
            _require_inside(dense, group)  # before anything counts to `units`, which may be any number
        module = cut_copy(dense, groups, document["keep"])
        for rewrite in document["rewrites"]:
            if rewrite["kind"] != "add_bias":
                raise ModelError(f"plan asks for an unknown rewrite {rewrite['kind']!r}", "update cswap-deploy")
            add_bias(module, rewrite["module"])
        _require_shapes(module, document["shapes"]["after"], document, architecture)
    load_state(module, read_checkpoint(weights.path), weights.path.name)
    return module.eval().requires_grad_(False)


def _group(item: dict[str, Any]) -> Group:
    members = tuple(Slice(**member) for member in item["members"])
    attributes = tuple(UnitAttribute(**attribute) for attribute in item["attributes"])
    if item["kind"] != "dims":
        return Group(item["name"], item["kind"], item["units"], members, attributes, item.get("branch", False))
    queries, keys, values = (_rows(item[name]) for name in ("queries", "keys", "values"))
    scales = tuple((owner, name) for owner, name in item["scales"])
    return HeadDims(
        item["name"],
        "dims",
        item["units"],
        members,
        attributes,
        queries=queries,
        keys=keys,
        values=values,
        scales=scales,
    )


def _rows(item: dict[str, Any] | None) -> HeadRows | None:
    return HeadRows(tuple(item["modules"]), tuple(item["offsets"])) if item else None


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def _require_shapes(
    module: nn.Module, expected: dict[str, list[int]], document: dict[str, Any], found: Architecture
) -> None:
    actual = _shapes(module)
    different = sorted(name for name in {*actual, *expected} if actual.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise ModelError(
            f"the plan was made for another network: {name} is {actual.get(name)}, the plan says {expected.get(name)} "
            f"({len(different)} tensors differ); made with {document['source']['library']}, built here with {found.library}",
            "install the version that the plan was made with, or build the bundle again",
        )


# --- surgery


def _kept_indices(module: nn.Module, groups: Sequence[Group], keep: Keep) -> dict[tuple[str, str, int], list[int]]:
    """For each (module, parameter, axis) that shrinks, the indices that stay; several groups may share an axis."""
    gone: dict[tuple[str, str, int], set[int]] = {}
    for group in groups:
        if group.name not in keep:
            continue
        _require_inside(module, group)
        removed = sorted(set(range(group.units)) - set(keep[group.name]))
        if len(removed) == group.units:
            raise PruningError(f"group {group.name!r} would lose all of its {group.units} units")
        for member in group.members:
            indices = positions(member, removed)
            gone.setdefault((member.module, member.parameter, member.axis), set()).update(indices)
            if member.parameter == "weight" and member.axis == 0 and _has_bias(module.get_submodule(member.module)):
                gone.setdefault((member.module, "bias", 0), set()).update(indices)
    kept = {}
    for (owner, parameter, axis), lost in gone.items():
        size = getattr(module.get_submodule(owner), parameter).shape[axis]
        kept[owner, parameter, axis] = [index for index in range(size) if index not in lost]
    return kept


def _require_inside(module: nn.Module, group: Group) -> None:
    """A group may come from a file: its units must lie within the tensors that it names, of which there is one at least."""
    if not group.members:
        raise PruningError(f"group {group.name!r} names no tensor that its {group.units} units would lie in")
    for member in group.members:
        size = getattr(module.get_submodule(member.module), member.parameter).shape[member.axis]
        if member.offset < 0 or member.repeat < 1 or member.offset + group.units * member.repeat > size:
            raise PruningError(
                f"{member.tensor} has {size} indices on axis {member.axis}, group {group.name!r} owns more"
            )


def _empty(module: nn.Module, group: Group) -> None:
    """Put what stands for a branch that has left in the place of its layers."""
    from cswap_deploy.prune.absent import Constant, Nothing

    consumers = {member.module for member in group.consumers}
    for name in dict.fromkeys(member.module for member in group.members):
        layer = module.get_submodule(name)
        if isinstance(layer, Nothing) or (isinstance(layer, Constant) and name in consumers):
            continue  # a gate within a branch that has left
        module.set_submodule(name, Constant(layer) if name in consumers else Nothing(layer))


def _keep_temperature(module: nn.Module, group: HeadDims, kept: int) -> None:
    """The logits of fewer dimensions stay divided by the root of all: the queries take up the difference. Errors: PruningError."""
    import torch

    assert group.queries
    layer: Any = module.get_submodule(group.queries.last)
    rows = [offset + unit for offset in group.queries.offsets for unit in range(group.units)]
    if max(rows) >= len(layer.weight) or min(rows) < 0:
        raise PruningError(f"{group.queries.last} has {len(layer.weight)} rows, group {group.name!r} owns more")
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor[rows] *= (kept / group.units) ** 0.5
    for owner, name in group.scales:
        value = vars(module.get_submodule(owner)).get(name)
        if type(value) is not float:
            raise PruningError(f"{owner or 'the network'} has no number {name!r} that could scale logits")
        setattr(module.get_submodule(owner), name, kept**-0.5)


def _has_bias(layer: nn.Module) -> bool:
    """Also of a bias that compensation gave to a layer which had none when the groups were found."""
    return getattr(layer, "bias", None) is not None


def _lower(module: nn.Module, attribute: UnitAttribute, by: int) -> None:
    """Errors: PruningError where the attribute is no integer, nor the item of a list or tuple: a plan may come from a file."""
    layer = module.get_submodule(attribute.module)
    name, _, place = attribute.name.partition(".")
    value: Any = vars(layer).get(name)
    items: list[Any] = list(value) if place and type(value) in (list, tuple) else [value]
    number = int(place) if place.isdigit() else 0
    if number >= len(items) or type(items[number]) is not int:
        raise PruningError(
            f"{attribute.module or 'the network'} has no number {attribute.name!r} that could count units"
        )
    items[number] -= by
    setattr(layer, name, (items if isinstance(value, list) else tuple(items)) if place else items[0])


def _select(layer: nn.Module, parameter: str, axis: int, indices: Sequence[int]) -> None:
    import torch
    from torch import nn

    old = getattr(layer, parameter)
    new = old.detach().index_select(axis, torch.tensor(indices, device=old.device, dtype=torch.long)).clone()
    setattr(
        layer, parameter, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    )


def _repair(layer: Any) -> None:
    """Make the layer's size attributes say what its tensors are now."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvNd

    match layer:
        case _ConvNd():
            depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
            layer.groups = layer.weight.shape[0] if depthwise else layer.groups
            layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        case nn.Linear():
            layer.out_features, layer.in_features = layer.weight.shape
        case _NormBase():
            layer.num_features = layer.weight.shape[0] if layer.weight is not None else layer.running_mean.shape[0]
        case nn.PReLU():
            layer.num_parameters = layer.weight.shape[0]
