"""Artefacts as JSON: their files by paths that are relative to a folder, one spelling for one value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BeforeValidator, PlainSerializer, SerializationInfo, TypeAdapter, ValidationInfo

T = TypeVar("T")


def _absolute(path: Any, info: ValidationInfo) -> Any:
    return Path(info.context["root"]) / path if info.context else path


def _relative(path: Path, info: SerializationInfo) -> str:
    return path.relative_to(info.context["root"]).as_posix() if info.context else path.as_posix()


Rooted: TypeAlias = Annotated[Path, BeforeValidator(_absolute), PlainSerializer(_relative)]
"""A path that is absolute in memory and relative to the artefact's folder on disk."""


def encode(value: object, root: Path) -> Any:
    """Plain JSON data of an artefact whose files lie under `root`."""
    return TypeAdapter(type(value)).dump_python(value, mode="json", context={"root": root})


def decode(kind: type[T], data: Any, root: Path) -> T:
    """The artefact that `encode` wrote, its files now under `root`."""
    return TypeAdapter(kind).validate_python(data, context={"root": root})


def canonical(data: Any) -> str:
    """JSON with one spelling for one value: what digests and stored files are made of."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
