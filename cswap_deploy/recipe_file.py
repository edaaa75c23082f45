"""A YAML file as plain data that knows where each key was written, and its faults in a user's words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from cswap_deploy.errors import RecipeError
from cswap_deploy.schema_words import Schema, branches, choices, expected, flow, locate, shown
from cswap_deploy.schema_words import spelt as spelt

_YAML_TAG = "tag:yaml.org,2002:"
_YAML_WAYS = (
    ("found character", "indent with spaces, and put a text that begins with a sign in quotes"),
    (
        "mapping values are not allowed",
        "check the indentation of this line and the one before, and quote a text that holds ': '",
    ),
    ("but found '<scalar>'", "put the whole text in quotes"),
    ("but found '-'", "let a list stand under a key of its own"),
    ("expected <block end>", "let all keys of a block begin in the same column"),
    ("could not find expected ':'", "write a key as `name: value`"),
    ("expected ',' or", "close the bracket, or put a comma before this"),
    ("unexpected end of stream", "close the quote"),
    ("another document", "keep one recipe in a file, without a line of ---"),
)
"""What a parser's words say of the way out."""
SYNONYMS = {"gpu": "cuda"}
"""What people write for what is spelt otherwise, and nearer to something else."""


@dataclass(frozen=True)
class Place:
    """Where a key was written: `where` is `file:line` or the `--set` text, `base` the folder of its relative paths."""

    where: str
    order: tuple[int, int]
    base: Path
    value: str = ""
    """The value as it was written."""


@dataclass(frozen=True)
class Fault:
    key: str
    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place.where}: {self.key}: {self.text}" if self.key else f"{self.place.where}: {self.text}"


@dataclass
class Document:
    """Data of a file and of what overrides it; keys of `places` are dotted, the empty one is the file."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Keys whose value was refused while reading; nothing more is said of them."""

    def place(self, key: str) -> Place:
        """The place of a key, or of the nearest block around it."""
        return self.places[next(k for k in parents(key) if k in self.places)]

    def fault(self, key: str, text: str) -> None:
        self.faults.append(Fault(key, self.place(key), text))

    def replace(self, key: str, change: Callable[[Path, str], str]) -> None:
        """Change the text at `key`, if there is one; what `change` cannot read as a path becomes a fault."""
        *outer, last = key.split(".")
        block: Any = self.data
        for part in outer:
            block = block.get(part) if isinstance(block, dict) else None
        if isinstance(block, dict) and isinstance(block.get(last), str):
            try:
                block[last] = change(self.place(key).base, block[last])
            except (OSError, RuntimeError, ValueError):
                self.fault(key, f"expected a path, got {self.place(key).value}")


def parents(key: str) -> Iterator[str]:
    """The dotted key, each block around it, and the empty key."""
    while key:
        yield key
        key = key.rpartition(".")[0]
    yield ""


def refusal(faults: Iterable[Fault]) -> RecipeError:
    """One error with a line for every fault, in the order of the file."""
    ordered = sorted(dict.fromkeys(faults), key=lambda fault: fault.place.order)
    first = ordered[0]
    head = f"{first.key}: {first.text}" if first.key else first.text
    message = "\n".join([head, *map(str, ordered[1:])])
    hint = "`cswap-deploy schema` tells every key with its type and default"
    return RecipeError(message, hint, where=first.place.where, key=first.key)


def absolute(base: Path, text: str) -> str:
    """`text` as an absolute path; links above the last name are followed, that name stays as the user wrote it."""
    if not text.strip():
        raise ValueError("empty path")
    path = base / Path(text).expanduser()
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, overrides: Sequence[str]) -> Document:
    """The file with the overrides in it. What is no YAML mapping is refused here; lesser faults are collected."""
    document = Document()
    document.places[""] = Place(f"{path}:1", (0, 0), path.parent)
    node = _compose(_text(path), str(path))
    if node is None:
        raise RecipeError("the file is empty", "docs/recipe.md begins with a minimal recipe", where=f"{path}:1")
    base = path.parent.absolute()
    walker = _Walker(document, lambda line: Place(f"{path}:{line}", (0, line), base))
    data = walker.plain(node, "", node.start_mark.line + 1)
    if not isinstance(data, dict):
        raise RecipeError(f"expected a mapping of keys, got {shown(data)}", where=document.places[""].where)
    document.data = data
    for index, text in enumerate(overrides):
        _override(document, text, Place(f"--set {spelt(text)}", (1, index), Path.cwd()))
    return document


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError("this is not UTF-8 text", "save the file as UTF-8", where=f"{path}:{line}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError(
            f"cannot read the recipe: {reason}", "give the path of a YAML file", where=str(path)
        ) from None


def _compose(text: str, name: str) -> Any:
    """The YAML node of one document, None when it is empty. Places in errors: `name:line:column`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False
    try:
        return yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = error.problem or str(error)
        hint = next((way for sign, way in _YAML_WAYS if sign in problem), "look at this line and the one before")
        raise RecipeError(f"not valid YAML: {spelt(problem)}", hint, where=where) from None
    except YAMLError as error:
        before = text[: getattr(error, "position", 0)]
        where = f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise RecipeError("not valid YAML: a control character", where=where) from None
    except RecursionError:
        raise RecipeError("not valid YAML: nested too deeply", where=name) from None


def _override(document: Document, text: str, place: Place) -> None:
    key, equals, value = text.partition("=")
    *outer, last = key.split(".")
    if not equals or not all([*outer, last]):
        document.faults.append(Fault("", place, "expected KEY.PATH=VALUE, such as prune.steps=4"))
        return
    try:
        node = _compose(value, place.where)
    except RecipeError as error:
        said = error.message.removeprefix(f"{error.where}: ")
        document.faults.append(Fault(key, place, f"{said} ({error.hint})" if error.hint else said))
        return
    block, path = document.data, ""
    for part in outer:
        path = f"{path}.{part}".lstrip(".")
        if block.get(part) is None:
            block[part] = {}
            document.places[path] = place
        if not isinstance(block[part], dict):
            text = f"{path} is {document.place(path).value} there, not a block of keys"
            document.faults.append(Fault(key, place, text))
            return
        block = block[part]
    for old in [k for k in document.places if k == key or k.startswith(f"{key}.")]:
        del document.places[old]
    block[last] = _Walker(document, lambda _: place).plain(node, key, 0)


@dataclass
class _Walker:
    """Turns YAML nodes into plain data, noting the place of each key; never builds objects from tags."""

    document: Document
    at: Callable[[int], Place]
    seen: set[int] = field(default_factory=set)

    @cached_property
    def constructor(self) -> Any:
        from ruamel.yaml import YAML

        return YAML(typ="safe", pure=True).constructor

    def plain(self, node: Any, key: str, line: int) -> Any:
        value = None if node is None else self._value(node, key, line)
        place = self.at(line)
        written = node.value if isinstance(value, int | float) else shown(value)
        self.document.places[key] = Place(place.where, place.order, place.base, written)
        return value

    def _value(self, node: Any, key: str, line: int) -> Any:
        kind = str(node.tag).removeprefix(_YAML_TAG)
        if kind in ("map", "seq") and id(node) in self.seen:
            return self._refuse(key, line, "an alias of a block is not supported; write the block out")
        self.seen.add(id(node))
        match kind, node.value:
            case "map", list():
                return self._mapping(node, key)
            case "seq", list():
                return [self.plain(v, f"{key}.{i}", v.start_mark.line + 1) for i, v in enumerate(node.value)]
            case (("str" | "timestamp"), str()):
                return node.value
            case (("int" | "float" | "bool" | "null"), str()):
                return self._scalar(node, key, line)
            case _:
                return self._refuse(key, line, f"the YAML tag {spelt(kind)} is not used in recipes")

    def _mapping(self, node: Any, outer: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if str(name.tag) != f"{_YAML_TAG}str" or not name.value:
                got = spelt(name.value) if isinstance(name.value, str) else "a block"
                self._fault(outer, line, f"expected keys that are text, got {got or 'nothing'}")
                continue
            key = f"{outer}.{spelt(name.value)}".lstrip(".")
            if name.value in data:
                self._fault(key, line, f"given twice, first at {self.document.places[key].where}")
            else:
                data[name.value] = self.plain(value, key, line)
        return data

    def _scalar(self, node: Any, key: str, line: int) -> Any:
        try:
            return self.constructor.construct_object(node)
        except (ValueError, KeyError):
            return self._refuse(key, line, f"not a value: {spelt(node.value)}")

    def _refuse(self, key: str, line: int, text: str) -> None:
        self.document.unread.add(key)
        self._fault(key, line, text)

    def _fault(self, key: str, line: int, text: str) -> None:
        self.document.faults.append(Fault(key, self.at(line), text))


# --- faults in plain words -------------------------------------------------------------------------------------------


def explain(errors: Sequence[Mapping[str, Any]], schema: Schema, document: Document) -> list[Fault]:
    """pydantic's errors as faults. A union's tag is `@` and the class; an error of type `conflict` has its own text."""
    faults: list[Fault] = []
    missing: list[tuple[str, Fault]] = []
    guessed: set[str] = set()
    for error in errors:
        loc = tuple(error["loc"])
        match error["type"]:
            case "conflict":
                block = _dotted(locate(schema, loc)[1])
                found = [(f"{block}.{key}".strip("."), text) for key, text in error["ctx"]["faults"]]
                faults += [Fault(key, document.place(key), text) for key, text in found]
            case "extra_forbidden":
                node, path = locate(schema, loc[:-1])
                key = _dotted((*path, loc[-1]))
                valid = [name for branch in branches(schema, node) for name in branch.get("properties", ())]
                guessed.update(f"{_dotted(path)}.{name}".strip(".") for name in _nearest(loc[-1], valid))
                faults.append(Fault(key, document.place(key), unknown(loc[-1], valid)))
            case "missing" if isinstance(loc[-1], str):
                node, path = locate(schema, loc)
                key = _dotted(path)
                example = f"; for example `{path[-1]}: {flow(node['examples'][0])}`" if "examples" in node else ""
                missing.append((key, Fault(key, document.place(key), f"required and not given{example}")))
            case _:
                faults.append(_wrong_value(schema, loc, document))
    faults += [fault for key, fault in missing if key not in guessed]
    return [fault for fault in faults if fault.key not in document.unread]


def unknown(key: str, valid: Sequence[str]) -> str:
    """What to say of a key that is not among the valid ones."""
    before, colon, _ = key.partition(":")
    if colon and before in valid:
        return f"a space is missing after '{before}:'"
    if near := _nearest(key, valid):
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; valid here: {', '.join(valid)}"


def _wrong_value(schema: Schema, loc: Sequence[str | int], document: Document) -> Fault:
    node, path = locate(schema, loc)
    while path and isinstance(path[-1], int) and _dotted(path) not in document.places:
        node, path = locate(schema, path[:-1])
    key = _dotted(path)
    if f"{key}.kind" in document.places:
        key = f"{key}.kind"
    value = document.place(key).value or "a block without kind"
    valid = [str(choice) for choice in choices(node)]
    near = [] if _is_number(value) else _nearest(value.strip("'\""), valid)
    text = f"{node.get('errorMessage') or f'expected {expected(schema, node)}'}, got {value}"
    if near:
        text += f"; did you mean {near[0]!r}?"
    elif value[:1] in "'\"" and _is_number(value[1:-1]):
        text += " (in quotes it is text)"
    elif node.get("type") == "string" and value[:1] not in "'\"[{" and value != "null":
        text += " (put it in quotes to make it text)"
    return Fault(key, document.place(key), text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return text in ("true", "false")


def _nearest(word: str, valid: Sequence[str]) -> list[str]:
    if (meant := SYNONYMS.get(str(word).lower())) and meant in valid:
        return [meant]
    return get_close_matches(str(word).lower(), valid, n=1, cutoff=0.6)


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(spelt(str(part)) for part in path)
