"""The values of expressions, and the versions that a condition leaves."""

from __future__ import annotations

import ast
from typing import Any

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
    Method,
    Module,
    Null,
    Own,
    Unknown,
    holds_tensorrt,
    kinds_of_result,
    plain,
)
from facts.scope import Scope
from facts.versions import FACTS, overloads, takes

CONSUMERS = {"write_bytes", "int", "str", "len", "bool", "bytes", "memoryview", "print", "isinstance"}
"""Foreign calls that may be given TensorRT's objects: what comes out is none."""
PASSING = {"list", "sorted", "reversed", "iter", "set", "next", "min", "max", "filter"}


class Expressions(Scope):
    """What this does not know is a fault, and Unknown."""

    def value(self, node: ast.expr) -> Kinds:
        match node:
            case ast.Constant(value=None):
                return frozenset({Null()})
            case ast.Constant(value=value):
                return frozenset({Const(value)}) if isinstance(value, str | int) else FOREIGN
            case ast.Name():
                return self.name(node)
            case ast.Attribute(value=value, attr=name):
                owners = self.value(value) - {Null()} or UNKNOWN
                return NOTHING.union(*(self.attribute(node, kind, name) for kind in owners))
            case ast.Call():
                return self.called(node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                before, found = self.versions, NOTHING
                for part, versions in zip((body, orelse), self.narrowed(test)):
                    self.versions = versions
                    found |= self.value(part) if self.versions else NOTHING
                self.versions = before
                return found
            case ast.BoolOp(values=values):
                before, found = self.versions, NOTHING
                for value in values:
                    found |= self.value(value)
                    self.versions = self.narrowed(value)[not isinstance(node.op, ast.And)]
                self.versions = before
                return found
            case ast.Tuple(elts=elts) | ast.List(elts=elts) | ast.Set(elts=elts):
                return frozenset({self.items(elts)})
            case ast.Dict(keys=keys, values=values):
                for key in keys:
                    if key:
                        self.value(key)
                kept = [self.value(v) if k else self.elements(v, self.value(v)) for k, v in zip(keys, values)]
                return frozenset({Items(every=NOTHING.union(*kept))})
            case ast.Subscript(value=value, slice=index):
                number = index.value if isinstance(index, ast.Constant) and isinstance(index.value, int) else None
                if isinstance(index, ast.Slice):
                    return frozenset({Items(every=self.place(node, self.value(value), None))})
                self.value(index)
                return self.place(node, self.value(value), number)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self.comprehended(node)
            case ast.Lambda(args=args, body=body):
                self.child({argument.arg: UNKNOWN for argument in args.args}).value(body)
                return FOREIGN
            case ast.Starred(value=value) | ast.NamedExpr(value=value) | ast.Await(value=value):
                kinds = self.value(value)
                if isinstance(node, ast.NamedExpr):
                    self.bind(node.target, kinds)
                return kinds
            case ast.Yield(value=value):
                self.returned |= self.value(value) if value else FOREIGN
                return FOREIGN
            case ast.BinOp(left=left, right=right):
                return self.merged(*(plain(self.value(part)) for part in (left, right)))
            case ast.UnaryOp() | ast.Compare() | ast.JoinedStr() | ast.FormattedValue() | ast.Slice():
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self.value(child)
                return FOREIGN
            case _:
                self.tracker.fault(node, f"an expression that is not followed: {type(node).__name__}")
                return UNKNOWN

    def items(self, elements: list[ast.expr]) -> Items:
        found = [self.elements(e, self.value(e)) if isinstance(e, ast.Starred) else self.value(e) for e in elements]
        if any(isinstance(element, ast.Starred) for element in elements):
            return Items(every=NOTHING.union(*found))
        return Items(places=tuple(found))

    def comprehended(self, node: Any) -> Kinds:
        scope = self.child({})
        for generator in node.generators:
            scope.bind(generator.target, scope.elements(generator.iter, scope.value(generator.iter)))
            for test in generator.ifs:
                scope.versions = scope.narrowed(test)[0]
        results = [
            scope.value(part) for part in ([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
        ]
        return frozenset({Items(every=results[-1])})

    def narrowed(self, test: ast.expr) -> tuple[frozenset[str], frozenset[str]]:
        """Versions in which a condition can be true, and in which it can be false."""
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                true, false = self.narrowed(operand)
                return false, true
            case ast.BoolOp(op=op, values=values):
                before, decided = self.versions, NOTHING
                for value in values:
                    true, false = self.narrowed(value)
                    self.versions, done = (true, false) if isinstance(op, ast.And) else (false, true)
                    decided |= done
                rest, self.versions = self.versions, before
                return (rest, decided) if isinstance(op, ast.And) else (decided, rest)
            case ast.Call(func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(name))]):
                having = self.versions
                for kind in self.value(owner):
                    having &= self.having(kind, name)
                return having, self.versions - having
            case _:
                self.value(test)
                return self.versions, self.versions

    def called(self, node: ast.Call) -> Kinds:
        lambdas = [
            argument for argument in [*node.args, *(k.value for k in node.keywords)] if isinstance(argument, ast.Lambda)
        ]
        positional = [self.value(argument) for argument in node.args if argument not in lambdas]
        named = {k.arg or "**": self.value(k.value) for k in node.keywords if k.value not in lambdas}
        callees = self.value(node.func)
        for body in lambdas:  # sorted(…, key=lambda …): given what the others hold
            receiver = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NOTHING
            held = [
                self.elements(node, frozenset({k}))
                for ks in [*positional, receiver]
                for k in ks
                if isinstance(k, Items)
            ]
            inside = NOTHING.union(*held) or FOREIGN
            self.child({argument.arg: inside for argument in body.args.args}).value(body.body)
        called_name = node.func.id if isinstance(node.func, ast.Name) else ""
        if (
            called_name in ("getattr", "hasattr", "map", "zip", "enumerate", "type", "__import__")
            and callees == FOREIGN
        ):
            return self.builtin(node, called_name, positional)
        found = NOTHING
        for callee in callees:
            found |= self.entered(node, callee, positional, named)
        return found

    def entered(self, node: ast.Call, callee: Any, positional: list[Kinds], named: dict[str, Kinds]) -> Kinds:
        spread = [k for a, k in zip(node.args, positional) if isinstance(a, ast.Starred)]
        match callee:
            case Method(owner=owner, name=name):
                return self.method(node, owner, name)
            case Class(name=name) if name in FACTS["classes"]:
                self.method(node, name, "__init__")
                return frozenset({Instance(name)})
            case Class(name=name):
                return frozenset({Instance(name)})
            case Function():
                flat = [] if spread else positional
                return self.tracker.call(callee, flat, named, self.versions, node)
            case Own(name=name, made=False):
                if (name, "__init__") in self.tracker.functions:
                    made = Function("__init__", name, bound=True)
                    self.tracker.call(made, [] if spread else positional, named, self.versions, node)
                return frozenset({Own(name, made=True)})
            case Items() | Const():  # x.split(), x.items(): see `attribute`
                return self.parted(node, callee)
            case Foreign():
                return self.foreign(node, [*positional, *named.values()])
            case Null():
                return NOTHING
            case _:
                if any(map(holds_tensorrt, positional)):
                    self.tracker.fault(node, f"{ast.unparse(node.func)}(…) is unknown and is given objects of TensorRT")
                return UNKNOWN

    def parted(self, node: ast.Call, kind: Any) -> Kinds:
        if isinstance(kind, Const):
            return frozenset(
                {Items(every=frozenset(Const(part) for part in str(kind.value).split()))} if kind.value else ()
            )
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if method == "items":
            return frozenset({Items(every=frozenset({Items(places=(FOREIGN, kind.all))}))})
        return frozenset({kind}) if method == "values" else kind.all | FOREIGN

    def foreign(self, node: ast.Call, given: list[Kinds]) -> Kinds:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if not any(map(holds_tensorrt, given)) or name in CONSUMERS:
            return FOREIGN
        if name == "tuple" and all(
            isinstance(k, Instance | Foreign) and k != Instance("ILayer") for ks in given for k in ks
        ):
            return NOTHING.union(*(frozenset({Items(every=self.elements(node, kinds))}) for kinds in given))
        if name in PASSING or name == "tuple":
            held = NOTHING.union(*(self.elements(node, kinds) for kinds in given))
            return held if name in ("next", "min", "max") else frozenset({Items(every=held)})
        self.tracker.fault(node, f"{ast.unparse(node.func)}(…) is given objects of TensorRT and may hide them")
        return UNKNOWN

    def builtin(self, node: ast.Call, name: str, given: list[Kinds]) -> Kinds:
        """Builtins through which TensorRT's objects and names pass."""
        match name, given:
            case "hasattr", _:
                return FOREIGN
            case "getattr", [owners, texts, *default]:
                if not holds_tensorrt(owners) and not owners & UNKNOWN:
                    return FOREIGN
                if not all(isinstance(text, Const) for text in texts):
                    self.tracker.fault(node, f"{ast.unparse(node)}: cannot tell which attribute this is")
                    return UNKNOWN
                found = NOTHING.union(*default)
                for owner in owners:
                    for text in texts:
                        scope = self.child({})
                        scope.versions = self.having(owner, text.value) if default else self.versions
                        found |= scope.attribute(node, owner, text.value) if scope.versions else NOTHING
                return found
            case "map", [callees, *iterables]:
                arguments = [self.elements(node, kinds) for kinds in iterables]
                stand_in = ast.Call(node.args[0], [ast.Name("_") for _ in arguments], [], lineno=node.lineno)
                results = [self.entered(stand_in, callee, arguments, {}) for callee in callees]
                return frozenset({Items(every=NOTHING.union(*results))})
            case (("zip" | "enumerate"), _):
                held = tuple(self.elements(node, kinds) for kinds in given)
                places = (FOREIGN, *held[:1]) if name == "enumerate" else held
                return frozenset({Items(every=frozenset({Items(places=places)}))})
            case "type", [_, bases, _]:
                return self.elements(node, bases)
            case "__import__", [names]:
                return frozenset(
                    Module() if k == Const("tensorrt") else Foreign() if isinstance(k, Const) else Unknown()
                    for k in names
                )
            case _:
                return FOREIGN if not any(map(holds_tensorrt, given)) else UNKNOWN

    def method(self, node: ast.Call, owner: str, name: str) -> Kinds:
        """A call of TensorRT's: the arguments must fit a signature of every version."""
        found = NOTHING
        starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
        for version, text in self.tracker.look_up(node, owner, name, self.versions).items():
            fitting = [part for part in overloads(text) if starred or takes(part, len(node.args), keywords)]
            if not fitting:
                call = f"{owner or 'tensorrt'}.{name} with {len(node.args)} arguments" + "".join(
                    f", {k}=" for k in keywords
                )
                self.tracker.fault(node, f"{call} does not fit {text} of TensorRT {version}")
            for part in fitting:
                found |= kinds_of_result(name, part)
        return found or UNKNOWN
