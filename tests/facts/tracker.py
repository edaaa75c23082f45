"""Follows TensorRT's objects through a source file and says which attributes do not exist in which version.

A small abstract interpreter over the syntax tree: an expression's value is a set of kinds (below). It enters the file's
own functions with the kinds of their arguments, and keeps the versions that a place can be reached in: under
`hasattr(trt.BuilderFlag, "FP16")` only those that have it. What it cannot follow is a fault, never passed over: an
attribute of something unknown, a TensorRT object that disappears in foreign code, a syntax it has not learnt.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

from facts.kinds import FOREIGN, NOTHING, UNKNOWN, Function, Items, Kinds, Own
from facts.statements import Statements
from facts.versions import Facts

ROUNDS = 20


class Tracker:
    """`faults` of a source; all versions are those that it must run with."""

    def __init__(self, source: str, versions: Sequence[str]) -> None:
        self.tree = ast.parse(source)
        self.facts = {version: Facts(version) for version in versions}
        self.functions: dict[tuple[str, str], ast.FunctionDef] = {}
        self.attributes: dict[tuple[str, str], Kinds] = {}
        self.globals: dict[str, Kinds] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions["", node.name] = node
                self.globals[node.name] = frozenset({Function(node.name)})
            if isinstance(node, ast.ClassDef):
                self.globals[node.name] = frozenset({Own(node.name, made=False)})
                self.functions.update({(node.name, n.name): n for n in node.body if isinstance(n, ast.FunctionDef)})
        self.faults: list[str] = []
        self.results: dict[Any, Kinds] = {}
        self.entered: set[tuple[str, str]] = set()
        self.touched: set[tuple[str, str]] = set()

    def run(self) -> list[str]:
        """Until what the objects' attributes hold no longer grows; the last time counts."""
        everyone = frozenset(self.facts)
        for _ in range(ROUNDS):
            before = (dict(self.attributes), dict(self.globals), dict(self.results))
            self.faults, self.entered, done = [], set(), self.results
            self.results = {}
            Statements(self, self.globals, everyone).block(self.tree.body)
            for owner, name in sorted(set(self.functions) - self.entered):
                if (owner, name) not in self.entered:
                    bound = bool(owner)
                    self.call(Function(name, owner, bound), [], {}, everyone, at=self.functions[owner, name])
            self.results = {key: kinds | done.get(key, NOTHING) for key, kinds in self.results.items()}
            if before == (self.attributes, self.globals, self.results):
                return sorted(set(self.faults), key=lambda fault: int(fault.split()[1].rstrip(":")))
        raise AssertionError("the tracker does not come to an end: a container that holds itself?")

    def fault(self, node: ast.AST, text: str) -> None:
        self.faults.append(f"line {getattr(node, 'lineno', 0)}: {text}")

    def call(
        self, function: Function, given: list[Kinds], named: dict[str, Kinds], versions: frozenset[str], at: ast.AST
    ) -> Kinds:
        """What a function of the file returns; its body is followed with these arguments."""
        node = self.functions[function.owner, function.name]
        if function.bound and not _is_static(node):
            given = [frozenset({Own(function.owner, made=True)}), *given]
        key = (function.owner, function.name, tuple(given), tuple(sorted(named.items(), key=str)), versions)
        self.entered.add((function.owner, function.name))
        if key in self.results:
            return self.results[key]
        self.results[key] = NOTHING
        scope = Statements(self, dict[str, Kinds](), versions)
        arguments = [*node.args.posonlyargs, *node.args.args]
        for number, argument in enumerate(arguments):
            scope.names[argument.arg] = given[number] if number < len(given) else named.get(argument.arg, NOTHING)
            if not scope.names[argument.arg]:
                scope.names[argument.arg] = self.annotated(argument)
        for argument in node.args.kwonlyargs:
            scope.names[argument.arg] = named.get(argument.arg) or self.annotated(argument)
        if node.args.vararg:
            rest = given[len(arguments) :]
            scope.names[node.args.vararg.arg] = frozenset({Items(every=NOTHING.union(*rest) or FOREIGN)})
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            scope.value(default)
        scope.block(node.body)
        scope.block(node.body)  # a loop may use what it sets further down
        self.results[key] = scope.returned or FOREIGN
        return self.results[key]

    def annotated(self, argument: ast.arg) -> Kinds:
        text = ast.unparse(argument.annotation) if argument.annotation else "Any"
        if re.search(r"\bAny\b", text):
            return UNKNOWN
        return frozenset({Own(text, made=True)}) if ("", text) not in self.functions and text in self.globals and \
            Own(text, made=False) in self.globals[text] else FOREIGN  # fmt: skip

    def look_up(self, node: ast.AST, owner: str, name: str, versions: Iterable[str]) -> dict[str, str]:
        """Version → text of a member; a fault for each version without it."""
        self.touched.add((owner, name))
        found = {version: self.facts[version].member(owner, name) for version in versions}
        for version, text in found.items():
            if text is None:
                self.fault(node, f"{owner or 'tensorrt'}.{name} does not exist in TensorRT {version}")
        return {version: text for version, text in found.items() if text is not None}


def _is_static(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
