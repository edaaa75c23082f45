"""The package keeps to its floors and its habits: read from the syntax trees, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cswap_deploy"

FLOORS = {
    0: "artifacts codec digests errors interrupts keys progress recipe recipe_file runtimes schema_words sources stage terminal wording",
    1: "bom bundle choice half handoff image_input int8 isolated onnx_facts ort_format signing usability vectors "
    "device device.* external_data model factory checkpoint data images intervals samples "
    "paths prepared units attention onnx_file preprocess runtime manifest facts details report report.* "
    "prune.batches prune.groups prune.dims prune.rules prune.arranging prune.tracing prune.attributes "
    "prune.proposals prune.branches prune.proof prune.absent "
    "prune.head_dims prune.rotation prune.costs prune.ablation prune.descent prune.observe prune.rows "
    "prune.cut prune.compensate prune.refit prune.least_squares prune.elimination prune.curves prune.damage prune.allocate "
    "prune.search prune.renewed prune.select prune.replay prune.criteria prune.criteria.* prune.folded prune.reading prune.residual "
    "repeats budget.values budget.shared budget.sizes budget.emptied budget.narrow "
    "budget.design budget.staircase budget.loop budget.account "
    "prune.reachable prune.systems prune.producers prune.grouped prune.suffix prune.exact prune.attribution prune.verdicts "
    "prune.gradients prune.screened",
    2: "prune budget export variants accuracy engine latency assembling",
    3: "pipeline outline engines metering surveying planning sweeping errands checks measuring verify engine_check doctor doctor_host "
    "findings schemas starter",
    4: "cli session running console console.* __main__",
}
"""Modules by floor: values, nouns, stages, the line, the command line. A stage imports no other stage."""

LIGHT = {"numpy", "pydantic", "pydantic_core", "ruamel", "typing_extensions"}
"""What the lowest floor may import besides the standard library."""

HEAVY = set(
    "torch timm onnx onnxruntime onnxscript onnxsim safetensors scipy PIL torch_pruning tensorrt model_signing cryptography".split()
)
ONLY_IN = {"timm": "model"}
LATE = {"prune.absent"}
"""Modules that are classes of a heavy library: they import it with themselves, and are imported inside functions alone."""


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Import:
    """One imported name, dotted; `deferred`: inside a function; `typing`: under TYPE_CHECKING."""

    name: str
    line: int
    deferred: bool
    typing: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


class Module:
    """A source file; `name` is dotted and without the package's own."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.tree = ast.parse(source)

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, deferred=False, typing=False))

    @cached_property
    def floor(self) -> int | None:
        found = [
            floor for floor, names in FLOORS.items() if any(fnmatchcase(self.name, name) for name in names.split())
        ]
        return found[0] if found else None

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def _imports(node: ast.AST, *, deferred: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (Import(alias.name, child.lineno, deferred, typing) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                yield from (Import(f"{base}.{alias.name}", child.lineno, deferred, typing) for alias in names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _imports(child, deferred=True, typing=typing)
            case ast.If(test=test) if ast.unparse(test).endswith("TYPE_CHECKING"):
                yield from _imports(child, deferred=deferred, typing=True)
            case _:
                yield from _imports(child, deferred=deferred, typing=typing)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): Module(_name(path), path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def inner(module: Module) -> Iterator[tuple[str, Import]]:
    """The package's modules that a module imports; "" is the package itself."""
    for found in module.imports:
        if found.top != ROOT.name:
            continue
        dotted = found.name.removeprefix(ROOT.name).removeprefix(".")
        yield (dotted if dotted in MODULES else dotted.rpartition(".")[0]), found


def floor_faults(module: Module) -> list[str]:
    """Imports that point up, or from one stage to another."""
    faults = []
    for name, found in inner(module):
        if name not in MODULES:
            faults.append(f"{module.name}:{found.line} imports {name}, which does not exist")
            continue
        here, there = module.floor, MODULES[name].floor
        if name == "" or here is None or there is None:
            continue
        if there > here or here == there == 2:
            faults.append(
                f"{module.name}:{found.line} (floor {here}) imports {name} (floor {there}); "
                "pass in what it needs as an argument"
            )
    return faults


def heavy_faults(module: Module) -> list[str]:
    """Heavy libraries that are imported with the module, or outside the one file that may."""
    faults = [
        f"{module.name}:{found.line} imports {found.top} when it is itself imported; do it inside a function"
        for found in module.imports
        if found.top in HEAVY and module.name not in LATE and not (found.deferred or found.typing)
    ]
    faults += [
        f"{module.name}:{found.line} imports {late}, and with it a heavy library, when it is itself imported; do it inside a function"
        for found in module.imports
        for late in LATE
        if f"{found.name}.".startswith(f"cswap_deploy.{late}.") and not (found.deferred or found.typing)
    ]
    faults += [
        f"{module.name}:{found.line} imports {found.top}; only {ONLY_IN[found.top]} may"
        for found in module.imports
        if found.top in ONLY_IN and module.name != ONLY_IN[found.top]
    ]
    return faults


def danger_faults(module: Module) -> list[str]:
    """Calls that run text, unpickle, go through a shell, or print outside the command line."""
    forbidden = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.unsafe_load"}
    faults = []
    for name, call in module.calls():
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        place = f"{module.name}:{call.lineno}"
        if name in forbidden:
            faults.append(f"{place} calls {name}")
        if name == "print" and module.name not in ("session", "device.agent", "device.errand"):
            faults.append(f"{place} prints; use progress.note")
        if given.get("shell", "False") != "False":
            faults.append(f"{place} runs a shell; pass a list of arguments")
        if name == "torch.load" and given.get("weights_only") != "True":
            faults.append(f"{place} calls torch.load without weights_only=True")
        if name.endswith("YAML") and given.get("typ") == "'unsafe'":
            faults.append(f"{place} reads YAML unsafely")
    faults += [
        f"{module.name}:{found.line} imports PyYAML; use ruamel" for found in module.imports if found.top == "yaml"
    ]
    return faults


def size_faults(module: Module) -> list[str]:
    """Functions past a screen, and public ones and classes of more than 12 lines that do not say what they do.

    Methods may leave it to their protocol's docstring.
    """
    faults = []
    public = [node for node in module.tree.body if isinstance(node, Definition) and not node.name.startswith("_")]
    for node in ast.walk(module.tree):
        if not isinstance(node, Definition):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        place = f"{module.name}:{node.lineno} {node.name}"
        if lines > 60 and not isinstance(node, ast.ClassDef):
            faults.append(f"{place} has {lines} lines; look for the noun that wants to get out")
        if lines > 12 and node in public and ast.get_docstring(node) is None:
            faults.append(f"{place} has {lines} lines and no docstring")
    return faults


# --- the package -----------------------------------------------------------------------------------------------------


def test_every_module_has_a_floor() -> None:
    homeless = [name for name, module in MODULES.items() if module.floor is None and name != ""]
    assert homeless == [], f"place {homeless} on a floor in FLOORS of this file"


@pytest.mark.parametrize("check", [floor_faults, heavy_faults, danger_faults, size_faults])
def test_package_keeps_to(check: object) -> None:
    assert callable(check)
    faults = [fault for module in MODULES.values() for fault in check(module)]
    assert faults == [], "\n" + "\n".join(faults)


def test_imports_are_absolute_and_have_no_cycle() -> None:
    relative = [
        f"{name}:{found.line}" for name, module in MODULES.items() for found in module.imports if found.top == ""
    ]
    assert relative == [], "sources.py follows absolute imports only"
    graph = {
        name: {
            other for other, found in inner(module) if not found.typing and other not in ("", name) and other in MODULES
        }
        for name, module in MODULES.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_values_need_only_light_libraries() -> None:
    foreign = [
        f"{name}:{found.line} imports {found.top}"
        for name, module in MODULES.items()
        for found in module.imports
        if module.floor == 0 and found.top not in LIGHT | {ROOT.name} | sys.stdlib_module_names
    ]
    assert foreign == []


def test_package_itself_imports_its_parts_lazily() -> None:
    eager = [found.name for name, found in inner(MODULES[""]) if not (found.deferred or found.typing) and name != ""]
    assert eager == []


def test_reading_recipes_and_work_folders_loads_nothing_heavy() -> None:
    program = (
        "import sys, cswap_deploy.recipe, cswap_deploy.stage, cswap_deploy.data\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert HEAVY & set(loaded) == set()


# --- the checks see what they are for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "name", "source", "words"),
    [
        (floor_faults, "artifacts", "from cswap_deploy.data import index", "imports data (floor 1)"),
        (floor_faults, "model", "def f():\n    from cswap_deploy import prune", "imports prune (floor 2)"),
        (floor_faults, "accuracy", "import cswap_deploy.prune", "accuracy:1 (floor 2) imports prune (floor 2)"),
        (floor_faults, "model", "import cswap_deploy.gone.too", "imports gone, which does not exist"),
        (heavy_faults, "data", "import torch.nn", "imports torch when it is itself imported"),
        (heavy_faults, "data", "try:\n    import scipy\nexcept ImportError: pass", "data:2 imports scipy"),
        (heavy_faults, "export", "def f():\n    import timm", "only model may"),
        (danger_faults, "data", "print(1)", "prints"),
        (danger_faults, "data", "eval('1')", "calls eval"),
        (danger_faults, "data", "subprocess.run('ls', shell=True)", "runs a shell"),
        (danger_faults, "model", "torch.load(path, weights_only=False)", "without weights_only"),
        (danger_faults, "recipe_file", "import yaml", "imports PyYAML"),
        (size_faults, "data", "def f():\n" + "    pass\n" * 60, "has 61 lines; look"),
        (
            size_faults,
            "data",
            "class A:\n" + "    pass\n" * 12,
            "A has 13 lines and no docstring",
        ),
    ],
)
def test_check_refuses(check: object, name: str, source: str, words: str) -> None:
    assert callable(check)
    assert any(words in fault for fault in check(Module(name, source))), check(Module(name, source))


@pytest.mark.parametrize(
    ("check", "name", "source"),
    [
        (floor_faults, "pipeline", "from cswap_deploy import prune, export\nfrom cswap_deploy.data import index"),
        (heavy_faults, "data", "def f():\n    import torch\nif TYPE_CHECKING:\n    from torch import nn"),
        (danger_faults, "session", "print(1)\nmodel.eval()\ntorch.load(path, weights_only=True)"),
        (size_faults, "data", "def _f():\n" + "    pass\n" * 59),
    ],
)
def test_check_accepts(check: object, name: str, source: str) -> None:
    assert callable(check)
    assert check(Module(name, source)) == []
