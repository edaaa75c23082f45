"""What an expression can be, as far as the tracker is concerned: sets of kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from facts.versions import FACTS


@dataclass(frozen=True)
class Foreign:
    """Not TensorRT's: numbers, files, other libraries."""


@dataclass(frozen=True)
class Unknown:
    """Could be anything."""


@dataclass(frozen=True)
class Null:
    """None. Where something else is possible too, the file has its own ways to make sure."""


@dataclass(frozen=True)
class Const:
    value: Any


@dataclass(frozen=True)
class Module:
    """`import tensorrt`."""


@dataclass(frozen=True)
class Class:
    """A class or an enum of TensorRT itself; `Instance` is one of its objects, `Method` one of their methods."""

    name: str


@dataclass(frozen=True)
class Instance:
    name: str


@dataclass(frozen=True)
class Method:
    owner: str
    name: str


@dataclass(frozen=True)
class Items:
    """A container or an iterator: what each position holds, or `every` position."""

    places: tuple[Kinds, ...] = ()
    every: Kinds = frozenset()

    @property
    def all(self) -> Kinds:
        return self.every.union(*self.places)


@dataclass(frozen=True)
class Function:
    """A function of the file; `owner` is the class whose method it is; `bound`: `self` is given."""

    name: str
    owner: str = ""
    bound: bool = False


@dataclass(frozen=True)
class Own:
    """A class of the file, or (`made`) one of its objects."""

    name: str
    made: bool


Kinds: TypeAlias = "frozenset[Any]"
FOREIGN, UNKNOWN, NOTHING = frozenset({Foreign()}), frozenset({Unknown()}), frozenset[Any]()
OF_TENSORRT = (Module, Class, Instance, Method)


def kinds_of(text: str) -> Kinds:
    """The kinds of a type's name in the facts."""
    name = text.removeprefix("= ").partition(" (")[0].strip()
    if name in FACTS["classes"] or name in FACTS["enums"]:
        return frozenset({Instance(name)})
    if inner := re.fullmatch(r"list\[(.+)\]", name):
        return frozenset({Items(every=kinds_of(inner[1]))})
    return UNKNOWN if name in ("object", "") else FOREIGN


def kinds_of_member(owner: str, name: str, text: str) -> Kinds:
    if text.startswith("class "):
        return frozenset({Class(name)})
    return frozenset({Method(owner, name)}) if text.startswith("(") else kinds_of(text)


def kinds_of_result(name: str, signature: str) -> Kinds:
    """`nptype` says nothing about its result: a NumPy type."""
    return FOREIGN if name in ("nptype", "volume") else kinds_of(signature.partition(" -> ")[2])


def plain(kinds: Kinds) -> Kinds:
    return frozenset(Foreign() if isinstance(kind, Const) else kind for kind in kinds)


def holds_tensorrt(kinds: Kinds) -> bool:
    """Whether an object of TensorRT is among these or inside them. Its plain values, enum members, do not count."""
    return any(
        (isinstance(kind, OF_TENSORRT) and not (isinstance(kind, Instance) and kind.name in FACTS["enums"]))
        or (isinstance(kind, Items) and holds_tensorrt(kind.all))
        for kind in kinds
    )
