"""A test double of the Python module `tensorrt`: the agent's code runs against it for real; a GPU is never involved.

It offers the names of one version (FAKE_TENSORRT_VERSION) as tests/facts/tensorrt.json has them, no more: a class has the
version's members, a call must fit the version's signatures and types, a property may be read-only. What a member does is
in `behaviour.py`, for the few that the agent needs; any other member raises NotImplementedError when it is used.

Each call and each property that is set becomes a line of FAKE_TENSORRT_RECORD. FAKE_TENSORRT_FAIL names what is to go
wrong: see behaviour.py.
"""

from __future__ import annotations

import json
import os
import re
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from facts.versions import FACTS, Facts, members, overloads, takes

VERSION = os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0")
LACKS = os.environ.get("FAKE_TENSORRT_LACKS", "").split()
"""Members that an older version does not have: there are no facts of TensorRT 8.5."""
UNRECORDED = ("execute_async_v3", "get_", "num_", "report_layer_time", "name", "type", "log")
PLAIN = {"int": "__index__", "float": "__float__"}


def module(version: str = VERSION) -> dict[str, Any]:
    """What `import tensorrt` finds."""
    import behaviour

    facts, names = Facts(version), {}
    for name in FACTS["enums"]:
        if facts.has(name) and "." not in name:
            names[name] = enum_of(name, facts)
    severity = enum_of("Logger.Severity", facts)
    for name in FACTS["classes"]:
        if facts.has(name):
            names[name] = class_of(name, facts, names, getattr(behaviour, name, None), severity)
    for name, text in members("module", "", version).items():
        if text.startswith("= "):
            names[name] = getattr(names["DataType"], behaviour.TYPES[name])
        elif text.startswith("("):
            names[name] = getattr(behaviour, name, absent(name))
    names["__version__"] = version
    behaviour.NAMES.update(names)
    return names


def enum_of(name: str, facts: Facts) -> Any:
    """Like pybind11's enums: `int()` works; the numbers are none that NVIDIA gave, so nobody can rely on those."""
    known = [text for text in members("enums", name, facts.version) if f"{name}.{text}" not in LACKS]
    numbered = {text: number + 3 for number, text in enumerate(known)}
    made = Enum(name.rpartition(".")[2], numbered)
    made.__int__ = made.__index__ = lambda member: member.value
    return made


class Pybind(type):
    """An object whose class overrides `__init__` without calling the base's is refused, as pybind11 does."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        made = super().__call__(*arguments, **named)
        if not hasattr(made, "_"):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return made


def class_of(name: str, facts: Facts, names: dict[str, Any], behaviour: Any, severity: Any) -> Any:
    body: dict[str, Any] = {"__slots__": ("_",), "__init__": no_constructor(name)}
    for member, text in facts.members(name).items():
        if f"{name}.{member}" in LACKS:
            continue
        known = vars(behaviour).get(member) if behaviour else None
        if text.startswith("= "):
            body[member] = getattr(severity, member)
        elif text.startswith("("):
            body[member] = method(f"{name}.{member}", text, known, names)
        else:
            body[member] = prop(f"{name}.{member}", text, known, names)
    invented = {key for key in vars(behaviour or object) if not key.startswith("_")}
    for version in FACTS["versions"]:
        invented -= Facts(version).members(name).keys() if Facts(version).has(name) else set()
    assert not invented, f"the double of {name} has {invented}, which no version of TensorRT has"
    return Pybind(name, (), body)


def new(class_name: str, /, **state: Any) -> Any:
    """An object that TensorRT itself makes; its state is under `_`."""
    import behaviour

    made = object.__new__(behaviour.NAMES[class_name])
    made._ = SimpleNamespace(**state)
    return made


def no_constructor(name: str) -> Any:
    def refuse(self: Any, *_: Any) -> None:
        raise TypeError(f"{name}: No constructor defined!")

    return refuse


def absent(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the double does not imitate {name}")

    return refuse


def method(name: str, text: str, known: Any, names: dict[str, Any]) -> Any:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        tried = [bound(signature, arguments, named, names) for signature in overloads(text)]
        fitting = [found for found in tried if found is not None]
        if not fitting:
            raise TypeError(f"{name}(): incompatible function arguments: {text} invoked with {arguments}, {named}")
        if name.endswith(".__init__"):
            self._ = SimpleNamespace()
        record(name, self, fitting[0])
        return (known or (absent(name) if not name.endswith("__init__") else done))(self, *fitting[0])

    return call


def done(*_: Any) -> None:
    """A constructor that has nothing to do."""


def prop(name: str, text: str, known: Any, names: dict[str, Any]) -> Any:
    kind, _, access = text.partition(" (")
    short = name.partition(".")[2]

    def read(self: Any) -> Any:
        if known:
            return known(self)
        if not hasattr(self._, short):
            raise NotImplementedError(f"the double does not imitate {name}")
        return getattr(self._, short)

    def write(self: Any, value: Any) -> None:
        if not fits(value, kind, names):
            raise TypeError(f"{name}: incompatible function arguments: {kind} set to {value!r}")
        record(name, self, [value])
        setattr(self._, short, value)

    return property(read, None if access.startswith("read-only") else write)


def bound(signature: str, given: tuple[Any, ...], named: dict[str, Any], names: dict[str, Any]) -> list[Any] | None:
    """The arguments in the signature's order; None: they do not fit it."""
    if not takes(signature, len(given), set(named)):
        return None
    inside = signature.partition(" -> ")[0][1:-1]
    declared = [
        re.fullmatch(r"(\w+)(?:: (.+?))?(?: = (.*))?", part) for part in re.split(r", (?![^\[]*\])", inside) if part
    ]
    values = list(given)
    for found in declared[len(given) :]:
        assert found
        if found[1] in named:
            values.append(named[found[1]])
    kinds = [found[2] or "object" for found in declared if found]
    return values if all(fits(value, kind, names) for value, kind in zip(values, kinds, strict=False)) else None


def fits(value: Any, kind: str, names: dict[str, Any]) -> bool:
    """Whether pybind11 would convert a value to a type."""
    if kind in PLAIN:
        return hasattr(value, PLAIN[kind]) and not isinstance(value, Enum)
    match kind:
        case "bool" | "str" | "tuple" | "list":
            return type(value).__name__ == kind
        case "Dims":
            return isinstance(value, tuple | list | names["Dims"]) and all(hasattr(size, "__index__") for size in value)
        case "buffer":
            try:
                return bool(memoryview(value).contiguous)
            except TypeError:
                return False
        case "ILogger":
            return isinstance(value, names["ILogger"] | names["Logger"])
        case "ILogger.Severity":
            return type(value).__name__ == "Severity"
        case _ if kind in names:
            return isinstance(value, names[kind])
        case _:
            return True


def record(name: str, owner: Any, values: list[Any]) -> None:
    path, short = os.environ.get("FAKE_TENSORRT_RECORD"), name.partition(".")[2]
    if not path or short.startswith(UNRECORDED):
        return
    line = {
        "call": name,
        "of": getattr(getattr(owner, "_", None), "name", None),
        "with": [shown(value) for value in values],
    }
    with Path(path).open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def shown(value: Any) -> Any:
    match value:
        case Enum():
            return value.name
        case bytes():
            return f"{len(value)} bytes"
        case tuple() | list():
            return [shown(item) for item in value]
        case str() | int() | float() | None:
            return value
        case _:
            return type(value).__name__
