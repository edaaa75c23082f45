"""First-order Taylor importance of weights (Molchanov et al. 2019, arXiv 1906.10771): squared gradient times weight, per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group, GroupScores
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria.weights import scores_of, unit_rows
from cswap_deploy.recipe import TaylorCriterion

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Taylor:
    """keep_value = sum over the unit's tensors of (sum of weight * gradient of the mean cross-entropy) squared."""

    settings: TaylorCriterion

    def score(self, module: nn.Module, groups: Sequence[Group], batches: Batches) -> tuple[GroupScores, ...]:
        """One forward and backward per batch; gradients are summed over batches, so memory does not grow with the images.

        Not channels last: oneDNN of PyTorch 2.14 then writes beyond the weights' gradient of a strided 1x1 convolution of fewer than 8
        channels, on processors with AVX2 alone.
        """
        import torch
        import torch.nn.functional as F

        batches = batches.first(self.settings.images)
        parameters = dict(module.named_parameters())
        wanted = [parameter.requires_grad for parameter in parameters.values()]
        module.requires_grad_(True)
        try:
            gradients = [torch.zeros_like(parameter) for parameter in parameters.values()]
            for images, labels in batches:
                with torch.enable_grad():
                    loss = F.cross_entropy(module(images.contiguous()), labels, reduction="sum") / len(batches)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for total, gradient in zip(gradients, found, strict=True):
                    if gradient is not None:
                        total += gradient
        finally:
            for parameter, want in zip(parameters.values(), wanted, strict=True):
                parameter.requires_grad_(want)
        products = {
            name: parameter.detach() * gradient
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        return tuple(
            scores_of(group, [rows.sum(1).square() for rows in unit_rows(products, group)]) for group in groups
        )
