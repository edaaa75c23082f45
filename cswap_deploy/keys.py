"""What a stage's result depends on, as flat text: its key, and the reason of a rerun, come from the same lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cswap_deploy.artifacts import File
from cswap_deploy.codec import canonical
from cswap_deploy.digests import digest_of
from cswap_deploy.sources import source_digests

SHOWN = 80
"""Settings longer than this many characters are not spelt out in a reason."""
Digest = Callable[[Path], str]


def ingredients(
    function: Callable[..., Any],
    libraries: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    digest: Digest,
) -> dict[str, str]:
    """Arguments (settings key by key, files and artefacts by content), versions of libraries, digests of source files."""
    bound = inspect.signature(function).bind(None, *args, **kwargs)
    bound.apply_defaults()
    parts: dict[str, str] = {}
    for name, value in list(bound.arguments.items())[1:]:
        parts |= _flat(name, value, digest)
    parts |= {f"version of {library}": _version(library) for library in libraries}
    return parts | {f"source {file}": f"sha256:{text}" for file, text in source_digests(function.__module__).items()}


def arguments_of(parts: Mapping[str, str]) -> set[str]:
    """Names of the arguments among the ingredients."""
    return {key.partition(".")[0] for key in parts if key != "stage" and not key.startswith(("version of ", "source "))}


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One phrase for each ingredient that differs, old and new where they are short."""
    return [_change(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def _flat(name: str, value: object, digest: Digest) -> dict[str, str]:
    match value:
        case BaseModel():
            flat = {f"{name}.kind": type(value).__name__}
            for key in type(value).model_fields:
                flat |= _flat(f"{name}.{key}", getattr(value, getattr(value, "KEYED_BY", {}).get(key, key)), digest)
            return flat
        case _ if _is_artefact(value):
            flat = {}
            for key, item in _counted(value).items():
                nested = isinstance(item, BaseModel)
                flat |= _flat(f"{name}.{key}", item, digest) if nested else {f"{name}.{key}": _text(item, digest)}
            return flat
        case Path():
            return {name: f"sha256:{digest(value)}" if value.exists() else "missing"}
        case Mapping():
            return {f"{name}.{key}": _text(item, digest) for key, item in value.items()}
        case _:
            return {name: _text(value, digest)}


def _text(value: object, digest: Digest) -> str:
    """A short plain value as JSON, so that a reason can show it; anything else by digest."""
    plain = _plain(value, digest)
    text = canonical(plain)
    return text if _is_json(value) and len(text) <= SHOWN else f"sha256:{digest_of(plain)}"


def _plain(value: object, digest: Digest) -> Any:
    """JSON data of an artefact for its digest: files by content, machine paths left out."""
    if isinstance(value, File):
        return value.sha256
    if _is_artefact(value):
        return {key: _plain(item, digest) for key, item in _counted(value).items()}
    if isinstance(value, BaseModel):
        return _plain(_flat("", value, digest), digest)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, digest) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digest) for item in value]
    if isinstance(value, Path):
        return digest(value)
    return value


def _is_artefact(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type | File)


def _counted(value: Any) -> dict[str, Any]:
    """Fields of an artefact that its content consists of; where it lies on this machine is none."""
    return {field.name: getattr(value, field.name) for field in fields(value) if field.metadata.get("key", True)}


def _is_json(value: object) -> bool:
    match value:
        case None | bool() | int() | float() | str():
            return True
        case list() | tuple():
            return all(_is_json(item) for item in value)
        case dict():
            return all(_is_json(item) for item in value.values())
        case _:
            return False


def _change(key: str, old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{key} is {'new' if old is None else 'gone'}"
    if old.startswith("sha256:") or new.startswith("sha256:"):
        return f"{key} changed"
    before, after = _short(old), _short(new)
    return f"{key}: {before} -> {after}" if before != after else f"{key}: {old} -> {new}"


def _short(text: str) -> str:
    """A number of many digits with six."""
    try:
        return f"{float(text):.6g}" if "." in text and len(text) > 9 else text
    except ValueError:
        return text


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "absent"
