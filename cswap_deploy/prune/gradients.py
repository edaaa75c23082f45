"""Does a gradient go through all that reads units? Pruning goes by it, so it is asked before anything is scored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import Group, InputSpec
from cswap_deploy.errors import PruningError, reason
from cswap_deploy.prune.ablation import taps
from cswap_deploy.prune.cut import fresh_copy

if TYPE_CHECKING:
    from torch import nn


def require_gradients(module: nn.Module, groups: Sequence[Group], spec: InputSpec) -> None:
    """Once per network, on one image: a gradient goes from the image through all that reads units of these groups, and the image
    stays as it was, since it is read again. What does not depend on the image needs none. Errors: PruningError.
    """
    import torch

    read = {member.module for group in groups for member in group.consumers}
    layers = [name for name, _ in module.named_modules() if name in read]
    if not layers:
        return
    own = fresh_copy(module).eval().requires_grad_(False)
    image = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.enable_grad(), warnings.catch_warnings(), taps(own, layers) as seen:
            warnings.simplefilter("ignore")
            given = image.clone().requires_grad_(True) * 1
            writes = given._version
            logits = own(given)
    except Exception as error:  # whatever the user's forward raises where a gradient is asked for
        raise PruningError(
            f"the network's forward does not run with gradients: {reason(error)}",
            "let it run with gradients, or set prune.target: null to export it without pruning",
        ) from error
    if given._version != writes or not torch.equal(given, image):
        raise PruningError(
            "the network's forward writes into the images that it is given, and pruning shows it the same ones again",
            "let it start from a copy (x = x.clone()), or set prune.target: null to export it without pruning",
        )
    cut = [name for name in layers if not all(tap.requires_grad for tap in seen[name])]
    if cut:
        with torch.no_grad(), taps(own, cut) as other:
            own(-image)
        cut = [name for name in cut if not all(map(torch.equal, seen[name], other[name]))]
    if cut or not logits.requires_grad:
        place = f"what {cut[0]} reads" if cut else "its logits"
        names = ", ".join(map(repr, cut))
        skip = f", list {names} under prune.skip" if cut and logits.requires_grad else ""
        raise PruningError(
            f"the network's forward computes {place} without a gradient (torch.no_grad, detach), which pruning goes by",
            f"take that out of the forward{skip}, or set prune.target: null to export it without pruning",
        )
