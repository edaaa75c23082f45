"""JSON Schema in plain words: what a place of it takes, and where a location of pydantic's leads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
_LONGEST_VALUE = 60


def locate(schema: Schema, loc: Sequence[str | int]) -> tuple[Schema, list[str | int]]:
    """The schema of a pydantic location, and the keys that lead to it; stops where the location leaves the schema."""
    node, path = schema, list[str | int]()
    for item in loc:
        if isinstance(item, str) and item.startswith("@"):
            node = schema["$defs"][item[1:]]
            continue
        child = _child(schema, node, item)
        if child is None:
            break
        node = child
        path.append(item)
    return node, path


def _child(schema: Schema, node: Schema, item: str | int) -> Schema | None:
    for branch in branches(schema, node):
        if item in branch.get("properties", {}):
            return dict(branch["properties"][item])
        if isinstance(item, int) and branch.get("type") == "array":
            return dict(branch.get("items") or branch["prefixItems"][min(item, len(branch["prefixItems"]) - 1)])
        if isinstance(branch.get("additionalProperties"), Mapping):
            return dict(branch["additionalProperties"])
    return None


def branches(schema: Schema, node: Schema) -> Iterator[Schema]:
    for branch in (node, *node.get("anyOf", ())):
        yield _resolved(schema, branch)


def _resolved(schema: Schema, node: Schema) -> Schema:
    return {**schema["$defs"][node["$ref"].rpartition("/")[2]], **node} if "$ref" in node else node


def choices(node: Schema) -> list[Any]:
    own = [node["const"]] if "const" in node else list(node.get("enum", ()))
    return own + [choice for branch in node.get("anyOf", ()) for choice in choices(branch)]


def expected(schema: Schema, node: Schema) -> str:
    """What a schema takes, in plain words."""
    node = _resolved(schema, node)
    match node:
        case {"anyOf": branches}:
            return " or ".join(expected(schema, branch) for branch in branches)
        case {"const": const}:
            return flow(const)
        case {"enum": choices}:
            return f"one of {', '.join(map(flow, choices))}"
        case {"type": "integer" | "number" as kind}:
            return _range("an integer" if kind == "integer" else "a number", node)
        case {"type": "array", "prefixItems": items}:
            return f"a list of {len(items)}, each {expected(schema, items[0])}"
        case {"type": "array", "items": items}:
            return f"a list, each {expected(schema, items)}"
        case {"type": "object", "properties": keys}:
            return f"a block with keys among {', '.join(keys)}"
        case {"format": "path"}:
            return "a path"
        case {"type": str() as kind}:
            return {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}[kind]
        case _:
            return "a plain value"


def _range(noun: str, node: Schema) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None:
        return f"{noun} from {low:g} to {high:g}" if high < 1e6 else f"{noun} from {low} to {high}"
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return " ".join([noun, " and ".join(f"{word} {node[key]:g}" for key, word in words.items() if key in node)]).strip()


def shown(value: Any) -> str:
    """A value in one short line; text in quotes."""
    text = repr(value) if isinstance(value, str) else flow(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def flow(value: Any) -> str:
    """A plain value as one line of YAML."""
    match value:
        case str():
            return spelt(value)
        case dict():
            return "{" + ", ".join(f"{spelt(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(flow, value)) + "]"
        case _:
            return json.dumps(value)


def spelt(text: str) -> str:
    """A key or value as messages and `places` spell it."""
    return text if text.isprintable() else repr(text)
