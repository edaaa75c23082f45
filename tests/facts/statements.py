"""Statements in turn: which names they bind, and which versions reach them."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from facts.expressions import Expressions
from facts.kinds import FOREIGN, NOTHING, UNKNOWN, Class, Instance, Kinds, Module, holds_tensorrt


class Statements(Expressions):
    """What this does not know is a fault."""

    def block(self, body: Sequence[ast.stmt]) -> None:
        """Statements in turn. After `if not hasattr(…): return` the rest is for the other versions."""
        before = self.versions
        for statement in body:
            if self.versions:
                self.statement(statement)
        self.versions = before

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr() | ast.Return() | ast.Assert() | ast.Raise() | ast.Delete():
                found = [self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                if isinstance(node, ast.Return):
                    self.returned |= NOTHING.union(*found)
            case ast.Assign(targets=targets, value=value):
                found_value = self.value(value)
                for target in targets:
                    self.bind(target, found_value)
            case ast.AnnAssign(target=target, value=value):
                if value:
                    self.bind(target, self.value(value))
            case ast.AugAssign(target=target, value=value):
                found_value = self.value(value)
                if isinstance(target, ast.Name):
                    self.bind(target, self.merged(self.name(target), found_value))
                else:
                    self.bind(target, found_value)
            case ast.If(test=test, body=body, orelse=orelse):
                self.branch(test, body, orelse)
            case ast.For(target=target, iter=iterated, body=body, orelse=orelse):
                self.bind(target, self.elements(iterated, self.value(iterated)))
                self.block(body)
                self.block(orelse)
            case ast.While(test=test, body=body, orelse=orelse):
                self.value(test)
                self.block(body)
                self.block(orelse)
            case ast.With(items=items, body=body):
                for item in items:
                    kinds = self.value(item.context_expr)
                    if item.optional_vars:
                        self.bind(item.optional_vars, UNKNOWN if holds_tensorrt(kinds) else FOREIGN)
                self.block(body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self.block(body)
                for handler in handlers:
                    if handler.name:
                        self.names[handler.name] = FOREIGN
                    self.block(handler.body)
                self.block(orelse)
                self.block(final)
            case ast.Import(names=aliases):
                for alias in aliases:
                    kinds = frozenset({Module()}) if alias.name == "tensorrt" else FOREIGN
                    self.add(alias.asname or alias.name.partition(".")[0], kinds)
            case ast.ImportFrom(module=module, names=aliases):
                for alias in aliases:
                    known = module == "tensorrt"
                    self.add(
                        alias.asname or alias.name, self.attribute(node, Module(), alias.name) if known else FOREIGN
                    )
            case ast.FunctionDef() if node in self.tracker.tree.body:
                pass  # followed where it is called
            case ast.ClassDef(body=body) if node in self.tracker.tree.body:
                self.child({}).block([part for part in body if not isinstance(part, ast.FunctionDef)])
            case ast.ClassDef(name=name, bases=bases, body=body):
                self.add(name, self.derived(node, [self.value(base) for base in bases], body))
            case ast.Pass() | ast.Break() | ast.Continue() | ast.Global() | ast.Nonlocal():
                pass
            case _:
                self.tracker.fault(node, f"a statement that is not followed: {type(node).__name__}")

    def branch(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        true, false = self.narrowed(test)
        before = self.versions
        for part, versions in ((body, true), (orelse, false)):
            self.versions = versions
            self.block(part)
        ends = [
            part and isinstance(part[-1], ast.Return | ast.Raise | ast.Continue | ast.Break) for part in (body, orelse)
        ]
        self.versions = (NOTHING if ends[0] else true) | (NOTHING if ends[1] else false)
        assert self.versions <= before

    def derived(self, node: ast.AST, bases: list[Kinds], body: list[ast.stmt]) -> Kinds:
        """A class of the function's own: what it overrides must exist in the class of TensorRT that it extends."""
        found = [kind for kinds in bases for kind in kinds if isinstance(kind, Class)]
        for inner in body:
            if isinstance(inner, ast.FunctionDef):
                for kind in found:
                    self.tracker.look_up(inner, kind.name, inner.name, self.versions)
                child = self.child({argument.arg: FOREIGN for argument in inner.args.args})
                if inner.args.args and found:
                    child.names[inner.args.args[0].arg] = frozenset(Instance(kind.name) for kind in found)
                child.block(inner.body)
        return frozenset(found) or UNKNOWN
