"""Names and what they hold: how kinds are bound, kept, taken out of containers and asked for attributes."""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from facts.kinds import (
    FOREIGN,
    NOTHING,
    UNKNOWN,
    Class,
    Const,
    Foreign,
    Function,
    Instance,
    Items,
    Kinds,
    Module,
    Null,
    Own,
    holds_tensorrt,
    kinds_of,
    kinds_of_member,
)

if TYPE_CHECKING:
    from facts.tracker import Tracker


@dataclass
class Scope:
    """One function's names, and the versions that its current place can be reached in."""

    tracker: Tracker
    names: dict[str, Kinds]
    versions: frozenset[str]
    outer: Scope | None = None
    returned: Kinds = field(default=NOTHING)

    def value(self, node: ast.expr) -> Kinds:
        """What an expression can be: see expressions.py."""
        raise NotImplementedError

    def name(self, node: ast.Name) -> Kinds:
        scope: Scope | None = self
        while scope:
            if node.id in scope.names:
                return scope.names[node.id]
            scope = scope.outer
        known = hasattr(builtins, node.id) or node.id in ("__file__", "__name__")
        return self.tracker.globals.get(node.id, FOREIGN if known else UNKNOWN)

    def child(self, names: dict[str, Kinds]) -> Any:
        """A scope inside this one, with names of its own."""
        return type(self)(self.tracker, names, self.versions, self)

    def place(self, node: ast.AST, kinds: Kinds, number: int | None) -> Kinds:
        """What a container holds at a position; `number` None: at any."""
        found = NOTHING
        for kind in kinds:
            match kind:
                case Items(places=places) if number is not None and -len(places) <= number < len(places):
                    found |= places[number]
                case Items():
                    found |= kind.all or FOREIGN
                case Foreign() | Const():
                    found |= FOREIGN
                case Null():
                    pass
                case Instance(name=owner):
                    for text in self.tracker.look_up(node, owner, "__getitem__", self.versions).values():
                        found |= kinds_of(text.partition(" -> ")[2].partition(" | ")[0])
                case _:
                    found |= UNKNOWN
        return found

    def elements(self, node: ast.AST, kinds: Kinds) -> Kinds:
        return self.place(node, kinds, None)

    def attribute(self, node: ast.AST, kind: Any, name: str) -> Kinds:
        match kind:
            case Module() | Class() | Instance():
                owner = "" if isinstance(kind, Module) else kind.name
                texts = self.tracker.look_up(node, owner, name, self.versions).values()
                return NOTHING.union(*(kinds_of_member(owner, name, text) for text in texts)) or UNKNOWN
            case Own(name=own, made=made):
                if (own, name) in self.tracker.functions:
                    return frozenset({Function(name, own, bound=made)})
                return self.tracker.attributes.get((own, name), UNKNOWN if made else FOREIGN)
            case Const(value=str()) | Items() if name in (
                "split",
                "items",
                "values",
                "append",
                "setdefault",
                "get",
                "pop",
            ):
                return frozenset({kind}) if name in ("split", "items", "values", "get", "pop") else FOREIGN
            case Foreign() | Const() | Items() | Function():
                return FOREIGN
            case _:
                owner = next(part for part in ast.iter_child_nodes(node) if part is not getattr(node, "func", None))
                self.tracker.fault(node, f"{ast.unparse(node)}: cannot tell what {ast.unparse(owner)} is")
                return UNKNOWN

    def having(self, kind: Any, name: str) -> frozenset[str]:
        match kind:
            case Module():
                owner = ""
            case Class(name=owner) | Instance(name=owner):
                pass
            case _:
                return self.versions
        return frozenset(v for v in self.versions if self.tracker.facts[v].member(owner, name) is not None)

    def bind(self, target: ast.expr, kinds: Kinds) -> None:
        match target:
            case ast.Name(id=name):
                self.add(name, kinds)
            case ast.Starred(value=value):
                self.bind(value, frozenset({Items(every=kinds)}))
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                starred = any(isinstance(element, ast.Starred) for element in elts)
                for number, element in enumerate(elts):
                    self.bind(element, self.place(target, kinds, None if starred else number))
            case ast.Attribute(value=value, attr=name):
                self.store(target, self.value(value), name, kinds)
            case ast.Subscript(value=value, slice=index):
                self.value(index)
                holders = self.value(value)
                if holds_tensorrt(kinds) and not holds_tensorrt(holders):
                    self.tracker.fault(target, f"{ast.unparse(target)} hides an object of TensorRT in a container")
            case _:
                self.tracker.fault(target, f"a target that is not followed: {type(target).__name__}")

    def add(self, name: str, kinds: Kinds) -> None:
        self.names[name] = self.merged(self.names.get(name, NOTHING), kinds)

    def merged(self, some: Kinds, more: Kinds) -> Kinds:
        """Containers are merged into one, so that sets of kinds stay finite."""
        items = [kind for kind in some | more if isinstance(kind, Items)]
        if len(items) < 2:
            return some | more
        return frozenset(k for k in some | more if not isinstance(k, Items)) | {
            Items(every=NOTHING.union(*(kind.all for kind in items)))
        }

    def store(self, node: ast.AST, owners: Kinds, name: str, kinds: Kinds) -> None:
        for owner in owners - {Null()} or UNKNOWN:
            match owner:
                case Own(name=own):
                    known = self.tracker.attributes.get((own, name), NOTHING)
                    self.tracker.attributes[own, name] = self.merged(known, kinds)
                case Instance(name=of):
                    for version, text in self.tracker.look_up(node, of, name, self.versions).items():
                        if text.startswith("(") or text.endswith("(read-only)"):
                            self.tracker.fault(node, f"{of}.{name} cannot be set in TensorRT {version}")
                case Foreign() | Const() | Items():
                    if holds_tensorrt(kinds):
                        self.tracker.fault(node, f"{ast.unparse(node)} hides an object of TensorRT")
                case _:
                    self.tracker.fault(node, f"{ast.unparse(node)} is set on something unknown")
