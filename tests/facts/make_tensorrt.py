"""Makes tensorrt.json: what the Python module `tensorrt` of several versions offers, without the module itself.

    python tests/facts/make_tensorrt.py FOLDER

FOLDER holds one <version>.json for each of VERSIONS, written by walking NVIDIA's binding wheels with `inspect` (imported
against stub libraries): so names and signatures are the real module's, and nothing here says how they behave.

A class or an enum has `in`, the versions that have it (`*`: all of them), and `members` by the versions that have them. A
member's text is a signature without `self`, `(parameter: type = default) -> type`, overloads separated by ` | `; or a
property's type; or `= type` for a constant. `__bases__` names the classes that a class inherits from.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

VERSIONS = ("8.6.1", "10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106")
KEPT = {"__init__", "__len__", "__getitem__", "__iter__"}
"""Of the special methods; every class has the others."""
SPELLINGS = (
    (r"nvonnxparser::IParserError", "ParserError"),
    (r"nvinfer1::IBuilder\b", "Builder"),
    (r"\b(?:nvinfer1|nvonnxparser)::(?:v_1_0::)?|\btensorrt\.", ""),
    (r"::", "."),
    (r"typing\.Supports(Int|Float)", lambda found: found[1].lower()),
    (r"typing_extensions\.", ""),
    (r"\bBuffer\b", "buffer"),
    (r"\bList\[|\bcollections\.abc\.Sequence\[", "list["),
    (r"\bTuple\[", "tuple["),
    (r"= <(?:[\w.]+\.)?(\w+): -?\d+>", r"= \1"),
)
"""pybind11 spells the same type in several ways, by its own version."""


def main(folder: Path, target: Path) -> None:
    documents = {version: json.loads((folder / f"{version}.json").read_text()) for version in VERSIONS}
    classes = {version: document["classes"] for version, document in documents.items()}
    enums = {version: document["enums"] for version, document in documents.items()}
    facts = {
        "made_by": "tests/facts/make_tensorrt.py",
        "versions": {version: document["source"].partition(";")[0] for version, document in documents.items()},
        "module": grouped({version: module_members(document) for version, document in documents.items()}),
        "enums": {name: entry(enums, name, lambda members: dict.fromkeys(members, "")) for name in names(enums)},
        "classes": {name: entry(classes, name, members_of) for name in names(classes)},
    }
    target.write_text(dumped(facts))


def names(tables: dict[str, dict[str, Any]]) -> list[str]:
    return sorted({name for table in tables.values() for name in table})


def entry(tables: dict[str, dict[str, Any]], name: str, read: Any) -> dict[str, Any]:
    """One class or enum over all versions."""
    found = {version: table[name] for version, table in tables.items() if name in table}
    return {"in": together(found, list(tables)), "members": grouped({v: read(f) for v, f in found.items()})}


def members_of(facts: dict[str, Any]) -> dict[str, str]:
    members = {"__bases__": " ".join(facts["bases"])} if facts.get("bases") else {}
    for name, value in facts["methods"].items():
        if not name.startswith("__") or name in KEPT:
            overloads = [value] if isinstance(value, str) else value
            members[name] = " | ".join(signature(text, name) for text in overloads)
    for name in facts["properties"]:
        members[name] = spelt(facts["property_types"].get(name, ""))
    return members | dict.fromkeys(facts.get("constants", ()), "= ILogger.Severity")


def module_members(document: dict[str, Any]) -> dict[str, str]:
    functions = {name: signature(text, name) for name, text in document["functions"].items()}
    constants = dict(text.split(" = ") for text in document["module_attributes"])
    return (
        functions | {name: f"= {value.partition('.')[0]}" for name, value in constants.items()} | {"__version__": "str"}
    )


def signature(text: str, name: str) -> str:
    """`(a: int, b: str = None) -> bool`: without the function's own name and `self`."""
    return spelt(re.sub(r"^\((?:self(?:: [\w.]+)?(?:, )?)?", "(", text.removeprefix(name)))


def spelt(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text


def grouped(tables: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Versions → members; a list of names where there is nothing to say about them."""
    groups: dict[str, dict[str, str]] = {}
    for name in names(tables):
        for text in dict.fromkeys(table[name] for table in tables.values() if name in table):
            holders = [version for version, table in tables.items() if table.get(name) == text]
            groups.setdefault(together(holders, list(tables)), {})[name] = text
    return {key: members if any(members.values()) else " ".join(members) for key, members in groups.items()}


def together(holders: Any, everyone: list[str]) -> str:
    return "*" if list(holders) == everyone else " ".join(holders)


def dumped(facts: dict[str, Any]) -> str:
    """One class a line."""
    lines = []
    for key, value in facts.items():
        body = json.dumps(value)
        if key in ("classes", "enums"):
            body = "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()) + "\n}"
        lines.append(f"{json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_name("tensorrt.json"))
