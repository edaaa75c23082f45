"""What came of a budget, for the manifest: judged on the last measurement of what ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from cswap_deploy.artifacts import Groups, LatencyReport
from cswap_deploy.budget.staircase import Steps, off_by
from cswap_deploy.budget.values import Budget
from cswap_deploy.prepared import Reason
from cswap_deploy.samples import Samples
from cswap_deploy.wording import plural

MISSED = 8
"""Exit code."""
PLACE = ("device", "power_mode", "gpu", "compute_capability", "runtime")
"""Facts of a measurement that make it another place than was planned for."""


def account(budget: Budget, groups: Groups, report: LatencyReport | None) -> dict[str, Any]:
    """`ratio`: what ships to its dense twin, in one run; `achieved_ms`: that part of the dense latency when the budget was set;
    `took_ms`: what ships, in that run.

    `proven`: the upper end of the ratio's 95 % interval is within the budget. Where what ships could not be measured, and so
    it is not known where it would run, no budget is met: `missed`.
    """
    samples = Samples.load(report.samples.path) if report else None
    planned, budget = budget, _there(budget, report.facts, samples) if report and samples else budget
    found = samples.ratio(1, 0, budget.percentile) if samples else None
    verdict = budget.verdict
    if found and verdict in ("met", "missed"):
        verdict = "met" if found.value <= budget.ratio else "missed"
    elif found and budget is not planned:  # the dense network ships, whose latency is another there
        verdict = "not needed" if found.value <= budget.ratio else "missed"
    elif not found and verdict != "infeasible":
        verdict = "missed"
    return {
        "latency_ms": budget.latency_ms,
        "percentile": budget.percentile,
        "achieved_ms": found.value * budget.dense_ms if found else None,
        "verdict": verdict,
        "trials": planned.tried,
        "unbuilt": budget.unbuilt,
        "planned_here": budget is planned,
        "dense_ms": budget.dense_ms,
        "dense_ci95_ms": list(budget.dense_ci95_ms),
        **({"floor_ms": budget.floor_ms} if budget.floor is not None else {}),
        **(_took(samples, budget.percentile) if samples else {}),
        "ratio_asked": budget.ratio,
        "ratio": found.value if found else None,
        "ratio_ci95": [found.low, found.high] if found else None,
        "proven": bool(found and found.high <= budget.ratio),
        "candidates": [
            {key: value for key, value in asdict(trial).items() if key != "widths"} for trial in budget.trials
        ],
        "staircase": _staircase(Steps(groups, budget.staircase), budget.dense_ms) if budget.staircase else None,
    }


def reasons(block: dict[str, Any]) -> list[Reason]:
    """Why the budget is not met; empty when it is, or when it is not needed."""
    asked = f"p{block['percentile']} of {block['latency_ms']:.4g} ms"
    if block["verdict"] == "infeasible":
        return _infeasible(asked, block["floor_ms"], block["dense_ms"])
    if block["verdict"] == "missed":
        if block["achieved_ms"] is None:
            return [Reason(MISSED, f"budget: {asked} is not shown to be met: what ships was not measured")]
        got = f"{block['achieved_ms']:.4g} ms"
        tried = (
            f"after {plural(block['trials'], 'trial')}"
            if block["planned_here"]
            else "on a device, in a power mode or with a runtime that it was not planned for"
        )
        return [Reason(MISSED, f"budget: {asked} was missed {tried}: what ships takes {got}")]
    return []


def foreseen(budget: Budget) -> list[Reason]:
    """Why it will not be met, as far as planning knows."""
    asked = f"p{budget.percentile} of {budget.latency_ms:.4g} ms"
    if budget.verdict == "missed":
        return [Reason(MISSED, f"budget: {asked} was missed after {plural(budget.tried, 'trial')}")]
    return _infeasible(asked, budget.floor_ms, budget.dense_ms) if budget.verdict == "infeasible" else []


def _infeasible(asked: str, floor_ms: float, dense_ms: float) -> list[Reason]:
    why = f"with every group at its narrowest {floor_ms:.4g} ms are left of {dense_ms:.4g} ms"
    if floor_ms == dense_ms:  # the dense network is the narrowest
        why = f"nothing in this network can be pruned, and it takes {dense_ms:.4g} ms"
    further = "ask for more time, or start from a smaller network"
    return [Reason(MISSED, f"budget: {asked} cannot be reached: {why}; the dense network ships ({further})")]


def in_doubt(budget: Budget, report: LatencyReport) -> bool:
    """Whether the measurement leaves open on which side of the budget what ships is, or of what it may leave unused."""
    samples = Samples.load(report.samples.path)
    found, ratio = samples.ratio(1, 0, budget.percentile), _there(budget, report.facts, samples).ratio
    return any(found.low <= edge <= found.high for edge in (ratio, (1 - budget.tolerance) * ratio))


def _there(budget: Budget, facts: Mapping[str, str], samples: Samples) -> Budget:
    """On another device than was planned for, in another power mode or with another runtime the dense network has a latency of its own.

    What was learned where it was planned, floor, trials and staircase, is not known there.
    """
    if all(facts.get(key) == budget.facts.get(key) for key in PLACE):
        return budget
    interval = samples.percentile_ci95_ms(0, budget.percentile)
    took = samples.percentile_ms(0, budget.percentile)
    return replace(budget, dense_ms=took, dense_ci95_ms=interval, floor=None, trials=(), staircase=None)


def _took(samples: Samples, percentile: int) -> dict[str, Any]:
    interval = samples.percentile_ci95_ms(1, percentile)
    return {"took_ms": samples.percentile_ms(1, percentile), "took_ci95_ms": list(interval)}


def _staircase(steps: Steps, dense_ms: float) -> dict[str, Any]:
    """How it was learned, how well it predicts, and what it says of each kind of group when all of them have one width."""
    found = steps.staircase
    median, p95 = off_by(found.errors) if found.errors else (None, None)
    return {
        "multiple": found.multiple,
        "settings": found.settings,
        "error_median": median,
        "error_p95": p95,
        "kinds": [
            {
                "name": kind.groups[0],
                "groups": len(kind.groups),
                "widths": list(kind.widths),
                "ms": [dense_ms * steps.total(dict.fromkeys(kind.groups, width)) for width in kind.widths],
            }
            for kind in found.steps
        ],
    }
