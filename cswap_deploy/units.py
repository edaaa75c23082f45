"""Why a unit left or stayed: what a bundle's plan.json keeps of each unit. A bundle is not trusted; reading it needs no torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cswap_deploy.errors import UsageError, VerifyError
from cswap_deploy.intervals import mean_interval
from cswap_deploy.manifest import (
    FRACTION,
    INTEGER,
    NUMBER,
    POSITIVE,
    SCORED,
    TEXT,
    VERDICTS,
    Schema,
    faults,
    listing,
    nullable,
    pair,
    record,
    scored_schema,
    with_optional,
)
from cswap_deploy.wording import printable

LARGEST_PLAN = 256 << 20
AGAIN = "build the bundle again"
BOOLEAN: Schema = {"type": "boolean"}
PER_UNIT = ("keep_value", "effect", "error", "verdict", "verified")
Plan = dict[str, Any]
Facts = dict[str, Any]


def read(path: Path) -> Plan:
    """A bundle's plan.json; every key that is read here is there and of its type. Errors: VerifyError."""
    from cswap_deploy.prune.cut import SCHEMA

    if path.stat().st_size > LARGEST_PLAN:
        raise VerifyError(f"{path} is larger than any plan of this tool", AGAIN)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise VerifyError(f"{path} is not valid JSON: {error}", AGAIN) from error
    if fault := next(faults(document, _plan_schema(SCHEMA)), None):
        raise VerifyError(f"{path} is not a plan: {fault}", AGAIN)
    return dict(document)


def describe(plan: Plan, pruned: Facts, wanted: str) -> Facts:
    """The facts of one unit, as `schema` has them. `pruned`: that block of the bundle's manifest; `wanted`: GROUP:INDEX.

    GROUP may be any layer that belongs to one group only. Errors: UsageError; VerifyError for a plan that contradicts itself.
    """
    found = re.fullmatch(r"(.+):([0-9]{1,9})", wanted)
    if not found:
        hint = f"give a group and a unit, counted from 0; the nearest are {_nearest(plan, wanted.rpartition(':')[0] or wanted, 0)}"
        raise UsageError(f"--unit: {wanted!r} is not GROUP:INDEX", hint)
    index = int(found[2])
    group = _group(plan, found[1], index)
    name, size = group["name"], group["units"]
    if index >= size:
        text = f"--unit: group {name!r} has {size} units, counted from 0, so there is no unit {index}"
        raise UsageError(text, f"the nearest is {_unit(name, group, index)}")
    kept = _accounted(plan, group)
    dense, last = (_facts(plan.get(key), name, index) for key in ("dense_scores", "scores"))
    allocation, refitted = pruned.get("allocation", ""), pruned.get("compensation") == "least_squares"
    elimination = allocation == "curves" and refitted and dense is not None and dense["intervention"] == "surgery"
    rotated = bool(group.get("queries"))
    elimination = elimination and not rotated
    step = _step(plan, name, size, index)
    if step and step["scores"] and not elimination:  # those that leave are then the lowest of all
        step["scores"]["among"] = step["width_before"]
    return {
        "group": name,
        "index": index,
        "kind": group["kind"],
        "layers": list(dict.fromkeys(member["module"] for member in group["members"])),
        "units": size,
        "kept": len(kept),
        "left": step is not None,
        "kept_as": kept.index(index) if index in kept else None,
        "steps": len(plan["steps"]),
        "allocation": allocation,
        "by_elimination": elimination,
        "rotated": rotated,
        "turn": _turn(plan, name, size, index),
        "dense": dense,
        "step": step,
        "last": last if step is None else None,
    }


def schema() -> Schema:
    """Effects in nats; `interval` at 1 - alpha, of this unit alone; `rank` from 1, the lowest keep value first, among the units of
    the group that were still there (`by_elimination`: of a unit that left, among those that left in that step); `turn` from 1, in
    the order in which the group's units would leave the dense network. `rotated`: dimensions of queries and keys, whose keep value is
    their part of the logits and whose order the rotation of their heads has made.
    """
    facts: Schema = record(
        **scored_schema()["properties"],
        keep_value=NUMBER,
        rank=POSITIVE,
        among=POSITIVE,
        effect=nullable(NUMBER),
        error=nullable(NUMBER),
        interval=nullable(pair(NUMBER)),
        verdict=nullable({"enum": [*VERDICTS]}),
        verified=nullable(BOOLEAN),
    )
    step = record(
        number=POSITIVE,
        gone_before=INTEGER,
        width_before=POSITIVE,
        width_after=INTEGER,
        macs=NUMBER,
        drop_pp=NUMBER,
        scores=nullable(facts),
    )
    return record(
        group=TEXT,
        index={"type": "integer", "minimum": 0},
        kind=TEXT,
        layers=listing(TEXT),
        units=POSITIVE,
        kept=INTEGER,
        left=BOOLEAN,
        kept_as=nullable(INTEGER),
        steps=INTEGER,
        allocation=TEXT,
        by_elimination=BOOLEAN,
        rotated=BOOLEAN,
        turn=nullable(POSITIVE),
        dense=nullable(facts),
        step=nullable(step),
        last=nullable(facts),
    )


# --- one unit


def _group(plan: Plan, name: str, index: int) -> Facts:
    """The group of this name, else the only one that this layer belongs to."""
    groups: dict[str, Facts] = {group["name"]: group for group in plan["groups"]}
    owners = [group for group in groups.values() if name in _layers(group)]
    if name in groups or len(owners) == 1:
        return groups[name] if name in groups else owners[0]
    if owners:
        choices = " or ".join(f"{_unit(group['name'], group, index)} ({_side(group, name)})" for group in owners)
        raise UsageError(f"--unit: layer {name!r} belongs to {len(owners)} groups", f"name the group: {choices}")
    raise UsageError(f"--unit: no group is called {name!r}", f"the nearest are {_nearest(plan, name, index)}")


def _nearest(plan: Plan, name: str, index: int) -> str:
    """Units that exist, of the groups and layers with the most similar names, the most similar first."""
    groups: dict[str, Facts] = {group["name"]: group for group in plan["groups"]}
    if not groups:
        raise UsageError("nothing was pruned in this bundle, so no unit has left", "show it without --unit")
    layers = Counter(layer for group in groups.values() for layer in _layers(group))
    owned = {layer: group for group in groups.values() for layer in _layers(group) if layers[layer] == 1}
    known = {**owned, **groups}
    return ", ".join(_unit(near, known[near], index) for near in get_close_matches(name, known, n=3, cutoff=0))


def _unit(name: str, group: Facts, index: int) -> str:
    return printable(f"{name}:{min(index, group['units'] - 1)}")


def _layers(group: Facts) -> set[str]:
    return {member["module"] for member in group["members"]}


def _side(group: Facts, layer: str) -> str:
    """What a group's units are to a layer."""
    axes = {member["axis"] for member in group["members"] if member["module"] == layer}
    return "what it reads" if axes == {1} else "what it makes"


def _accounted(plan: Plan, group: Facts) -> list[int]:
    """The kept units of a group, of which each unit is kept or left, once. Errors: VerifyError."""
    name, size = group["name"], group["units"]
    kept: list[int] = plan["keep"].get(name, [])
    removed = [unit for step in plan["steps"] for unit in step["removed"].get(name, [])]
    if len(kept) + len(removed) != size or {*kept, *removed} != set(range(size)):
        raise VerifyError(f"plan.json does not say of every unit of {name!r} whether it stayed or when it left", AGAIN)
    return kept


def _step(plan: Plan, name: str, size: int, index: int) -> Facts | None:
    """The step in which a unit left; None when it stayed."""
    width = size
    for number, step in enumerate(plan["steps"], 1):
        gone = step["removed"].get(name, [])
        if index in gone:
            # what a step goes by is found as the last step's scores are, but for the first, which goes by the dense network's
            how = plan.get("dense_scores") if number == 1 else plan["scores"]
            return {
                "number": number,
                "gone_before": sum(
                    len(units) for old in plan["steps"][: number - 1] for units in old["removed"].values()
                ),
                "width_before": width,
                "width_after": width - len(gone),
                "macs": step["macs"],
                "drop_pp": step["drop_pp"],
                "scores": _facts(how and {**how, "groups": step["scores"]}, name, index),
            }
        width -= len(gone)
    return None


def _turn(plan: Plan, name: str, size: int, index: int) -> int | None:
    """Errors: VerifyError."""
    order = plan.get("dense_order", {}).get(name)
    if order is None:
        return None
    if len(order) != size or {*order} != set(range(size)):
        raise VerifyError(f"plan.json does not order the units of {name!r}", AGAIN)
    return int(order.index(index)) + 1


def _facts(scores: Facts | None, name: str, index: int) -> Facts | None:
    """What scores say of a unit; None where they do not. Errors: VerifyError."""
    own = next((item for item in scores["groups"] if item["group"] == name), None) if scores else None
    if scores is None or own is None:
        return None
    if fault := next(_score_faults(own), None):
        raise VerifyError(f"plan.json does not hold scores of {name!r}: {fault}", AGAIN)
    if index not in own["units"]:
        return None
    place = own["units"].index(index)
    values: Facts = {key: own[key][place] if own[key] else None for key in PER_UNIT}
    how: Facts = {key: scores.get(key) for key in SCORED}
    interval = None
    if own["effect"] and own["error"] and how["alpha"] is not None and how["images"] > 1:
        interval = [*mean_interval(values["effect"], values["error"], how["images"], 1 - how["alpha"])]
    rank = 1 + sum(value < values["keep_value"] for value in own["keep_value"])
    return {**how, **values, "interval": interval, "rank": rank, "among": len(own["units"])}


# --- what plan.json must look like


def _plan_schema(marker: str) -> Schema:
    """As far as it is read here; a group's scores are looked at when they are asked for (`_score_faults`)."""
    indices, items = listing(INTEGER), listing(record(group=TEXT))
    group = record(name=TEXT, kind=TEXT, units=POSITIVE, members=listing(record(module=TEXT, axis=INTEGER)))
    removed: Schema = {"type": "object", "additionalProperties": indices}
    scores = nullable(
        with_optional(
            record(criterion=TEXT, images={"type": "integer", "minimum": 0}, groups=items),
            estimator=nullable(TEXT),
            intervention=nullable(TEXT),
            alpha=nullable(FRACTION),
        )
    )
    return with_optional(
        record(
            schema={"const": marker},
            groups=listing(group),
            keep=removed,
            steps=listing(record(macs=NUMBER, drop_pp=NUMBER, removed=removed, scores=items)),
            scores=scores,
        ),
        dense_scores=scores,
        dense_order=removed,
    )


def _score_faults(own: Facts) -> Iterator[str]:
    """Where the scores of one group are not what they must be."""
    lists = {"keep_value": NUMBER, "effect": NUMBER, "error": NUMBER, "verified": BOOLEAN}
    wanted = record(
        units=listing(INTEGER),
        verdict=listing({"enum": [*VERDICTS]}),
        **{key: listing(items) for key, items in lists.items()},
    )
    yield from faults(own, wanted)
    size = len(own["units"])
    for key in PER_UNIT:
        if len(own[key]) not in ((size,) if key == "keep_value" else (0, size)):
            yield f"{key}: {len(own[key])} values for {size} units"
