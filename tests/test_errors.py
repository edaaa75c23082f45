"""Errors carry a message, a hint and the exit code that users and scripts rely on."""

from __future__ import annotations

import inspect
import re

import pytest

from cswap_deploy import errors
from cswap_deploy.errors import CswapError, MissingPartError, RecipeError, WorkdirError, require_module

TREE = {
    "CswapError": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "MissingPartError": 2,
    "WorkdirError": 2,
    "DataError": 3,
    "ModelError": 4,
    "PruningError": 4,
    "DeviceError": 5,
    "ExportError": 6,
    "UnshippableError": 6,
    "VerifyError": 9,
}


def test_exit_codes() -> None:
    kinds = dict(inspect.getmembers(errors, inspect.isclass))
    assert {name: kind.exit_code for name, kind in kinds.items() if issubclass(kind, CswapError)} == TREE


def test_docstring_draws_the_tree() -> None:
    drawn = re.findall(r"^[│├└─ ]*(\w+Error)\b", inspect.getdoc(errors) or "", re.MULTILINE)
    assert drawn == list(TREE)


def test_message_and_hint() -> None:
    error = WorkdirError("it is in use", "wait")
    assert (str(error), error.message, error.hint) == ("it is in use (wait)", "it is in use", "wait")
    assert CswapError("bare").hint == ""


def test_recipe_error_begins_with_its_place() -> None:
    error = RecipeError("expected a number", "write one", where="recipe.yaml:3", key="prune.steps")
    assert str(error) == "recipe.yaml:3: expected a number (write one)"
    assert (error.where, error.key, error.exit_code) == ("recipe.yaml:3", "prune.steps", 2)
    assert str(RecipeError("no such file")) == "no such file"


def test_missing_part_names_the_extra() -> None:
    require_module("json")
    with pytest.raises(MissingPartError, match="needs the Python package 'no_such_library'") as caught:
        require_module("no_such_library", extra="tensorrt")
    assert caught.value.hint == 'install it with: pip install "cswap-deploy[tensorrt]"'
