"""From a pretrained image classifier to a pruned, checked model, without fine-tuning.

from cswap_deploy import Recipe, build, load_pruned

Importing this package loads neither torch nor numpy; each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cswap_deploy.bundle import Bundle as Bundle
    from cswap_deploy.bundle import load_pruned as load_pruned
    from cswap_deploy.pipeline import build as build
    from cswap_deploy.recipe import Recipe as Recipe
    from cswap_deploy.recipe import load as load_recipe
    from cswap_deploy.stage import Workdir as Workdir

__all__ = ["Bundle", "Recipe", "Workdir", "build", "load_pruned", "load_recipe"]

_HOMES = {
    "Bundle": ("bundle", "Bundle"),
    "Recipe": ("recipe", "Recipe"),
    "Workdir": ("stage", "Workdir"),
    "build": ("pipeline", "build"),
    "load_pruned": ("bundle", "load_pruned"),
    "load_recipe": ("recipe", "load"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
