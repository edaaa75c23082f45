"""Causal effect of a unit: what log p(true class) does when the unit leaves.

An independent implementation of the idea of C-SWAP (arXiv 2510.18636). Its relative effect
xi = mean((p* - p) / p) is kept beside ours, mean(log p* - log p), which hard images do not dominate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy import progress
from cswap_deploy.artifacts import Group, GroupScores, Verdict
from cswap_deploy.prune.ablation import ablated, channel_axis, taps, unit_sums
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.replay import prefix_reused
from cswap_deploy.recipe import CausalCriterion

if TYPE_CHECKING:
    from torch import Tensor, nn

NEUTRAL_MARGIN = 0.01
"""A unit is neutral when the interval of its effect lies within this many nats: one percent of the true class's probability."""


@dataclass(frozen=True)
class CausalEffect:
    """`attribution`: first order, all units from one forward and one backward. `exact`: one ablated forward per unit."""

    settings: CausalCriterion

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        """Scores over all units of each group; `module` is left as it was."""
        if not groups:
            return ()
        batches = batches.first(self.settings.images)
        means = _input_means(module, groups, batches) if self.settings.intervention == "mean" else None
        match self.settings.estimator:
            case "attribution":
                effects = _attribution(module, groups, batches, means)
            case "exact":
                effects = _exact(module, groups, batches, means)
            case _:
                raise AssertionError("refused by the pipeline before anything runs")
        exact = self.settings.estimator == "exact"
        verdicts = _verdicts(effects, self.settings.alpha, decisive=exact)
        return tuple(
            _group_scores(group, values, own) for group, values, own in zip(groups, effects, verdicts, strict=True)
        )


def _group_scores(group: Group, values: Tensor, verdicts: tuple[Verdict, ...]) -> GroupScores:
    """values: (images, units) change of log p(true class) per image."""
    error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else values[0] * 0
    return GroupScores(
        group.name,
        tuple(range(group.units)),
        tuple(values.abs().mean(0).tolist()),
        tuple(values.mean(0).tolist()),
        tuple(error.tolist()),
        tuple(values.clamp(max=50).expm1().mean(0).tolist()),
        verdicts,
    )


def _log_p(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    picked: Tensor = module(images).log_softmax(1).gather(1, labels[:, None])[:, 0]
    return picked


def _attribution(
    module: nn.Module, groups: Sequence[Group], batches: Batches, means: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """First order: sum over consumers and positions of (replacement - activation) * d log p / d activation."""
    import torch

    parts: list[list[Tensor]] = [[] for _ in groups]
    layers = sorted({member.module for group in groups for member in group.consumers})
    for images, labels in batches:
        images.requires_grad_(True)
        with torch.enable_grad(), taps(module, layers) as seen:
            torch.autograd.backward(
                _log_p(module, images, labels).sum(), inputs=[tap for inputs in seen.values() for tap in inputs]
            )
        products = {name: [_product(module, name, tap, means) for tap in inputs] for name, inputs in seen.items()}
        for part, group in zip(parts, groups, strict=True):
            total = [
                unit_sums(product, member, module.get_submodule(member.module), group.units, len(images))
                for member in group.consumers
                for product in products[member.module]
            ]
            part.append(torch.stack(total).sum(0).double().cpu())
    return [torch.cat(part) for part in parts]


def _product(module: nn.Module, name: str, tap: Tensor, means: Mapping[str, Tensor] | None) -> Tensor:
    assert tap.grad is not None
    value = tap.detach()
    if means is None:
        return -value * tap.grad
    axis = channel_axis(module.get_submodule(name))
    replacement = means[name].reshape([-1 if i == axis % value.ndim else 1 for i in range(value.ndim)])
    return (replacement - value) * tap.grad


def _exact(
    module: nn.Module, groups: Sequence[Group], batches: Batches, means: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """One forward per unit and batch with the unit ablated; what runs before its consumers is computed once."""
    import torch

    results = []
    with torch.no_grad():
        for number, group in enumerate(groups, 1):
            layers = [member.module for member in group.consumers]
            rows = []
            for images, labels in batches:
                with prefix_reused(module, images, layers):
                    whole = _log_p(module, images, labels)
                    columns = []
                    for unit in range(group.units):
                        with ablated(module, group, [unit], means):
                            columns.append((_log_p(module, images, labels) - whole).double().cpu())
                rows.append(torch.stack(columns, 1))
            results.append(torch.cat(rows))
            progress.advance("groups ablated", number, len(groups))
    return results


def _input_means(module: nn.Module, groups: Sequence[Group], batches: Batches) -> dict[str, Tensor]:
    """Mean of each consumer's input channels over images and positions."""
    import torch

    layers = sorted({member.module for group in groups for member in group.consumers})
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for images, _ in batches:
            with taps(module, layers) as seen:
                module(images)
            for name, inputs in seen.items():
                axis = channel_axis(module.get_submodule(name))
                own = torch.stack([tap.movedim(axis, -1).flatten(0, -2).mean(0) for tap in inputs]).mean(0)
                sums[name] = sums.get(name, torch.zeros_like(own)) + own * len(images)
    return {name: total / len(batches) for name, total in sums.items()}


def _verdicts(effects: Sequence[Tensor], alpha: float, *, decisive: bool) -> list[tuple[Verdict, ...]]:
    """Paired t-test of each unit over the images, false discovery rate alpha over all units (Benjamini-Hochberg).

    Without exact ablation (`decisive` false) nothing is called critical or detrimental: the first order may be wrong.
    """
    import numpy as np
    from scipy import stats

    means = np.concatenate([values.mean(0).numpy() for values in effects])
    count = len(effects[0])
    if count < 2:
        return [_unresolved(values) for values in effects]
    errors = np.concatenate([values.std(0).numpy() for values in effects]) / count**0.5
    safe = np.maximum(errors, 1e-300)
    p_values = np.where(errors > 0, 2 * stats.t.sf(np.abs(means) / safe, count - 1), np.where(means == 0, 1.0, 0.0))
    significant = stats.false_discovery_control(p_values) <= alpha
    half = errors * stats.t.ppf(1 - alpha / 2, count - 1)
    inside = (means - half > -NEUTRAL_MARGIN) & (means + half < NEUTRAL_MARGIN)
    verdicts = iter(
        [_verdict(mean, bool(sig and decisive), bool(within)) for mean, sig, within in zip(means, significant, inside)]
    )
    return [tuple(next(verdicts) for _ in range(values.shape[1])) for values in effects]


def _verdict(mean: float, significant: bool, inside: bool) -> Verdict:
    if inside:
        return "neutral"
    if significant:
        return "critical" if mean < 0 else "detrimental"
    return "unresolved"


def _unresolved(values: Tensor) -> tuple[Verdict, ...]:
    return tuple("unresolved" for _ in range(values.shape[1]))
