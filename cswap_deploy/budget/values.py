"""What travels between the stages of a latency budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cswap_deploy.artifacts import Curve, File, GroupScores, PruningStep


@dataclass(frozen=True)
class Unbuilt:
    """A setting of which TensorRT could make no engine, and what it said."""

    widths: dict[str, int]
    reason: str


@dataclass(frozen=True)
class WidthTimings:
    """Networks with narrower groups and the dense one's twin, run in turn. Groups that a setting does not name are whole.

    None has weights of its own, nor has the twin: all read those of one file (`budget.shared`).
    """

    samples: File
    """`samples.Samples`: model 0 is the twin, n + 1 has the widths `settings[n]`."""
    settings: tuple[dict[str, int], ...]
    """Those that were measured."""
    runtime: str
    conditions: dict[str, Any]
    unbuilt: tuple[Unbuilt, ...] = ()
    build_s: tuple[float, ...] = ()
    """Of each engine that was built for it, in seconds."""


@dataclass(frozen=True)
class LayerTime:
    """What layers of one shape take each, as a part of the dense network's latency, as far as that goes in blocks of one size.

    `product` shrinks with all axes that groups shorten, `sides` with one of them each, `once` is there as long as the layer is.
    """

    terms: tuple[str, ...]
    """Names of the cost terms."""
    product: float
    sides: tuple[float, ...]
    once: float
    block: int
    """Sizes count in whole blocks of so many units: constant between steps."""


@dataclass(frozen=True)
class GroupSteps:
    """Groups that cost the same, and the widths that they may have."""

    groups: tuple[str, ...]
    widths: tuple[int, ...]
    """Narrow to wide, the last all units."""
    beside: dict[int, float] = field(default_factory=dict)
    """What one such group takes beside what its layers say, by width: of widths that are finer than a multiple."""


@dataclass(frozen=True)
class Staircase:
    """The latency of a network over the widths of its groups as a part of the dense one's, learned on one device."""

    multiple: int
    """Of which widths are chosen: finer ones do not pay, but for those that small groups have in `steps`."""
    block: int
    """The larger of the sizes of blocks that widths count in, or the only one."""
    constant: float
    layers: tuple[LayerTime, ...]
    steps: tuple[GroupSteps, ...]
    settings: int
    """Networks that it was learned from."""
    errors: tuple[float, ...]
    """Relative, of settings of all groups that the fit had not seen (cross-validation)."""


@dataclass(frozen=True)
class Trial:
    """A candidate: the part of the dense latency that was predicted and measured, the latter with its 95 % interval."""

    widths: dict[str, int]
    predicted: float
    ratio: float
    low: float
    high: float


BudgetVerdict = Literal["met", "missed", "infeasible", "not needed"]


@dataclass(frozen=True)
class Budget:
    """A latency that was asked for, and what came of it. Ratios are parts of the dense network's latency in the same run."""

    latency_ms: float
    percentile: int
    dense_ms: float
    """Of the dense network, alone, when the budget was set."""
    dense_ci95_ms: tuple[float, float]
    floor: float | None
    """Ratio of the fastest network that groups as narrow as they can be give; None where it was not looked for."""
    verdict: BudgetVerdict
    """Before what ships was measured."""
    trials: tuple[Trial, ...]
    staircase: Staircase | None
    facts: dict[str, str]
    """Of the device."""
    unbuilt: int = 0
    """Narrower networks of which no engine could be built."""
    refused: int = 0
    """Candidates among them, which count as trials."""
    call_ms: float = 0.0
    """Of the dense network, the median: how long it takes to see so many calls."""
    tolerance: float = 0.0
    """Part of the budget that what ships may leave unused."""

    @property
    def ratio(self) -> float:
        return self.latency_ms / self.dense_ms

    @property
    def tried(self) -> int:
        """Candidates, those included of which no engine could be built."""
        return len(self.trials) + self.refused

    @property
    def floor_ms(self) -> float:
        assert self.floor is not None
        return self.floor * self.dense_ms


@dataclass(frozen=True)
class Approach:
    """A search on its way: what it keeps, what narrowing that costs, and how it came there."""

    keep: dict[str, tuple[int, ...]]
    curves: tuple[Curve, ...]
    scores: tuple[GroupScores, ...]
    steps: tuple[PruningStep, ...]
