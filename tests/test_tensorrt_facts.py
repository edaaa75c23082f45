"""What the agent asks of TensorRT and of trtexec exists in the versions that it supports, or is asked for first.

TensorRT is not installed where these tests run. tests/facts holds what its Python module offers, by version, and what
trtexec takes; tests/facts/tracker.py finds what the agent touches, and it is tested here as well.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from facts.tracker import Tracker
from facts.versions import FACTS, takes

FOLDER = Path(__file__).parent / "facts"
AGENT = (Path(__file__).parents[1] / "cswap_deploy" / "device" / "agent.py").read_text("utf-8")
SUPPORTED = ("8.6.1", "10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106")
TRTEXEC = json.loads((FOLDER / "trtexec.json").read_text("utf-8"))


# --- the Python module -----------------------------------------------------------------------------------------------


def test_agent_touches_only_what_every_supported_tensorrt_has() -> None:
    tracker = Tracker(AGENT, SUPPORTED)
    assert tracker.run() == []
    asked = {
        ("Builder", "build_serialized_network"),
        ("IExecutionContext", "execute_async_v3"),
        ("BuilderFlag", "INT8"),
    }
    assert asked <= tracker.touched and len(tracker.touched) > 50, "the tracker no longer sees the agent's calls"


@pytest.mark.parametrize(
    ("text", "replacement", "words"),
    [
        (
            'elif hasattr(trt.BuilderFlag, "FP16"):',
            "elif settings:",
            "BuilderFlag.FP16 does not exist in TensorRT 11.4",
        ),
        (
            'if hasattr(creation, "EXPLICIT_BATCH") else 0',
            "if True else 0",
            "EXPLICIT_BATCH does not exist in TensorRT 11",
        ),
        (
            "get_tensor_name(index)",
            "get_binding_name(index)",
            "ICudaEngine.get_binding_name does not exist in TensorRT 10.3",
        ),
        ("self.context.execute_async_v3(", "self.context.execute_async_v2(", "execute_async_v2 does not exist"),
        ("self.context.profiler =", "self.context.profile =", "IExecutionContext.profile does not exist"),
        (
            "config.builder_optimization_level =",
            "config.builder_optimisation_level =",
            "does not exist in TensorRT 11.4",
        ),
        ('"NORMALIZATION", "SOFTMAX"', '"LAYERNORM", "SOFTMAX"', "LayerType.LAYERNORM does not exist in TensorRT 10.3"),
        ("fault.desc()", "fault.description()", "ParserError.description does not exist"),
        (
            "set_timing_cache(cache, False)",
            "set_timing_cache(cache)",
            "IBuilderConfig.set_timing_cache with 1 arguments",
        ),
        ("layer.precision = ", "layer.dtype = ", "ILayer.dtype does not exist in TensorRT 10.3"),
    ],
)
def test_a_change_of_the_agent_is_noticed(text: str, replacement: str, words: str) -> None:
    assert text in AGENT, "the agent no longer reads so: write this change in its new words"
    faults = Tracker(AGENT.replace(text, replacement), SUPPORTED).run()
    assert any(words in fault for fault in faults), faults


def test_any_other_name_is_noticed() -> None:
    """Each twelfth place where the agent's TensorRT half writes one of TensorRT's names."""
    tracker = Tracker(AGENT, SUPPORTED)
    tracker.run()
    names, start = {name for _, name in tracker.touched}, AGENT[: AGENT.index("def tensorrt_facts")].count("\n")
    nodes = [n for n in ast.walk(tracker.tree) if isinstance(n, ast.Attribute) and n.attr in names and n.lineno > start]
    assert len(nodes) > 60
    for node in nodes[::12]:
        assert node.end_lineno and node.end_col_offset
        lines = [line.encode() for line in AGENT.splitlines(keepends=True)]
        line, end = lines[node.end_lineno - 1], node.end_col_offset
        lines[node.end_lineno - 1] = line[:end] + b"_other" + line[end:]
        faults = Tracker(b"".join(lines).decode(), SUPPORTED).run()
        assert any(f"{node.attr}_other" in fault for fault in faults), ast.unparse(node)


IN_A_FUNCTION = "import tensorrt as trt\ndef f(name: str, some, n: int):\n    builder = trt.Builder(trt.Logger())\n"
REFUSED = {
    "misspelt": ("builder.create_netwerk()", "Builder.create_netwerk does not exist in TensorRT 10.3.0"),
    "misspelt class": ("trt.Bilder(trt.Logger())", "tensorrt.Bilder does not exist"),
    "gone": ("builder.platform_has_fast_fp16", "Builder.platform_has_fast_fp16 does not exist in TensorRT 11.4.0.106"),
    "not yet there": ("trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", "does not exist in TensorRT 10.3.0"),
    "wrong guard": ('if hasattr(trt.BuilderFlag, "TF32"): trt.BuilderFlag.FP16', "FP16 does not exist in TensorRT 11"),
    "wrong side": (
        'if not hasattr(trt.BuilderFlag, "FP16"): trt.BuilderFlag.FP16',
        "FP16 does not exist in TensorRT 11",
    ),
    "either": ('if n or hasattr(trt.BuilderFlag, "FP16"): trt.BuilderFlag.FP16', "FP16 does not exist in TensorRT 11"),
    "guard that goes on": (
        'if not hasattr(trt.BuilderFlag, "FP16"): n\n    trt.BuilderFlag.FP16',
        "FP16 does not exist",
    ),
    "unknown owner": ("some.create_network()", "some.create_network: cannot tell what some is"),
    "unknown name": ("getattr(builder, name)", "cannot tell which attribute"),
    "hidden": ("facts = dict(builder=builder)", "may hide them"),
    "hidden in a dictionary": ("facts = {}\n    facts[name] = builder", "hides an object of TensorRT"),
    "hidden in a list": ("many = []\n    many.append(builder)", "may hide them"),
    "found in a list": ("[builder][0].netwerk", "Builder.netwerk does not exist"),
    "found in a loop": ("for one in [builder]: one.netwerk", "Builder.netwerk does not exist"),
    "result": (
        "builder.create_builder_config().max_workspace_size",
        "max_workspace_size does not exist in TensorRT 10.3",
    ),
    "helper": ("g(builder)\ndef g(made): made.netwerk", "line 5: Builder.netwerk does not exist"),
    "read only": ("builder.num_DLA_cores = 1", "Builder.num_DLA_cores cannot be set"),
    "too many": (
        "builder.create_network(0, 1)",
        "Builder.create_network with 2 arguments does not fit (flags: int = 0)",
    ),
    "keyword": ("builder.create_network(flag=0)", "with 0 arguments, flag= does not fit"),
    "no constructor": ("trt.IHostMemory()", "IHostMemory.__init__ does not exist"),
    "override": (
        "class P(trt.IProfiler):\n        def report_layer(self, name, ms): ...",
        "IProfiler.report_layer does",
    ),
    "function inside": ("def g(): builder.netwerk", "a statement that is not followed: FunctionDef"),
    "class body": ("\nclass A:\n    kind = trt.Bilder", "tensorrt.Bilder does not exist"),
    "syntax": ("while n:\n        match n:\n            case 1: builder.x", "a statement that is not followed: Match"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tracker_refuses(case: str) -> None:
    source, words = REFUSED[case]
    faults = Tracker(IN_A_FUNCTION + "    " + source + "\n", SUPPORTED).run()
    assert any(words in fault for fault in faults), faults


ACCEPTED = {
    "guard": 'if hasattr(trt.BuilderFlag, "FP16"): trt.BuilderFlag.FP16',
    "guard under another name": 'flags = trt.BuilderFlag\n    n if not hasattr(flags, "FP16") else flags.FP16',
    "guard and more": 'if n and hasattr(trt.BuilderFlag, "FP16") and trt.BuilderFlag.FP16: pass',
    "early guard": 'if not hasattr(trt.BuilderFlag, "FP16"): return\n    trt.BuilderFlag.FP16',
    "guarded helper": 'if hasattr(trt.BuilderFlag, "FP16"): g(trt)\ndef g(module): module.BuilderFlag.INT8',
    "property guard": 'if hasattr(builder, "max_batch_size"): builder.max_batch_size',
    "default": 'getattr(trt.BuilderFlag, "FP16", None)',
    "plain results": "text = str(builder.num_DLA_cores)\n    name.join(text).netwerk()",
    "overloads": 'e = trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"")\n    e.get_tensor_format(name, n)',
    "subclass": "class P(trt.IProfiler):\n        def report_layer_time(self, name, ms): ...\n    P()",
    "maybe none": "made = builder.create_network() if n else None\n    if made: made.num_layers",
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_tracker_accepts(case: str) -> None:
    assert Tracker(IN_A_FUNCTION + "    " + ACCEPTED[case] + "\n", SUPPORTED).run() == []


@pytest.mark.parametrize(
    ("signature", "positional", "keywords", "fits"),
    [
        ("(a: int, b: list[str, int] = None)", 1, set(), True),
        ("(a: int, b: list[str, int] = None)", 1, {"b"}, True),
        ("(a: int, b: int)", 1, set(), False),
        ("(a: int, b: int)", 1, {"a"}, False),
        ("(a: int)", 2, set(), False),
        ("()", 0, set(), True),
    ],
)
def test_signature_takes(signature: str, positional: int, keywords: set[str], fits: bool) -> None:
    assert takes(signature, positional, keywords) == fits


def test_facts_hold_what_the_agent_branches_on() -> None:
    """The generator has kept versions apart: read here by eye from NVIDIA's presence table."""
    flags = FACTS["enums"]["BuilderFlag"]["members"]
    assert [versions for versions, names in flags.items() if "FP16" in names.split()] == [
        "8.6.1 10.3.0 10.13.3.9 10.16.1.11"
    ]
    members = FACTS["classes"]["Builder"]["members"]
    assert members["8.6.1"].keys() == {"build_engine", "max_batch_size"}
    assert members["*"]["create_network"] == "(flags: int = 0) -> INetworkDefinition"


# --- trtexec ---------------------------------------------------------------------------------------------------------


def accepted(flag: str) -> set[str]:
    """Versions of trtexec that take a flag, with or without effect."""
    found = [versions for versions, flags in TRTEXEC["flags"].items() if flag in flags.split()]
    return {version for versions in found for version in (TRTEXEC["versions"] if versions == "*" else versions.split())}


def flags_in(node: ast.AST) -> Iterator[str]:
    """Flags that a piece of code writes; where a flag is put together, the pieces must be literal."""
    inside = {id(value) for part in ast.walk(node) if isinstance(part, ast.JoinedStr) for value in part.values}
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in inside:
            text = part.value
        elif isinstance(part, ast.JoinedStr):
            text = "".join(value.value if isinstance(value, ast.Constant) else "\0" for value in part.values)
        else:
            continue
        if not text.startswith("--"):
            continue
        flag = text.partition("=")[0]
        yield from (flag.replace("\0", piece) for piece in pieces(node, part)) if "\0" in flag else [flag]


def pieces(node: ast.AST, text: ast.AST) -> list[str]:
    """What the loop around a text with a gap puts into it. AssertionError: not a literal."""
    for loop in ast.walk(node):
        if isinstance(loop, ast.ListComp) and any(part is text for part in ast.walk(loop.elt)):
            return list(ast.literal_eval(loop.generators[0].iter))
    raise AssertionError(f"{ast.unparse(text)}: this test cannot tell which flag this is")


def asked_for(function: ast.FunctionDef) -> set[str]:
    """Flags that pass through `[… for flag in flags if flag in known]`, or are looked for, in what --help printed."""
    texts = {  # names bound to run_trtexec(["--help"])
        name
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for name, value in zip(unpacked(node.targets[0]), unpacked(node.value))
        if isinstance(name, ast.Name) and ast.unparse(value) == "run_trtexec(['--help'])"
        for name in [name.id]
    }
    found: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.Compare(left=ast.Constant(value=str(flag)), ops=[ast.In()], comparators=[ast.Name(id=name)]):
                found |= {flag} if name in texts else set()
            case ast.ListComp(elt=ast.Name(id=flag), generators=[ast.comprehension() as loop]):
                wanted = {f"{flag} in {text}" for text in texts}
                if ast.unparse(loop.target) == flag and wanted & {ast.unparse(test) for test in loop.ifs}:
                    found |= {f for value in values_of(function, loop.iter) for f in flags_in(value)}
    return found


def unpacked(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def values_of(function: ast.FunctionDef, node: ast.expr) -> list[ast.expr]:
    if not isinstance(node, ast.Name):
        return [node]
    assigned = [part for part in ast.walk(function) if isinstance(part, ast.Assign)]
    return [part.value for part in assigned if ast.unparse(part.targets[0]) == node.id]


def flag_faults(source: str) -> list[str]:
    faults = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and "tegrastats" not in ast.unparse(function):
            for flag in sorted(set(flags_in(function)) - asked_for(function)):
                missing = set(TRTEXEC["versions"]) - accepted(flag)
                faults += [f"{function.name}: trtexec {version} has no {flag}" for version in sorted(missing)]
    return faults


def test_agent_writes_only_flags_that_every_trtexec_takes() -> None:
    assert flag_faults(AGENT) == []
    written = {flag for flag in flags_in(ast.parse(AGENT)) if accepted(flag)}
    assert {"--onnx", "--minShapes", "--exportTimes", "--fp16", "--noDataTransfers"} <= written


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('run_trtexec(["--fp16"])', "trtexec 11.0 has no --fp16"),
        ('run_trtexec([f"--workspace={n}"])', "trtexec 10.3 has no --workspace"),
        ('[f"--{k}Shape=1" for k in ("min", "max")]', "trtexec 8.6.1 has no --maxShape"),
        ('known = "--fp16"\n    [flag for flag in ["--fp16"] if flag in known]', "trtexec 11.1 has no --fp16"),
        ('known = run_trtexec(["--help"])\n    [flag for flag in ["--int8"]]', "trtexec 11.1 has no --int8"),
    ],
)
def test_flag_check_refuses(source: str, words: str) -> None:
    assert any(words in fault for fault in flag_faults(f"def f(n):\n    {source}\n"))


def test_flag_check_refuses_what_it_cannot_read() -> None:
    with pytest.raises(AssertionError, match="cannot tell which flag this is"):
        flag_faults('def f(n):\n    [f"--{n}=1"]\n')


def test_flag_check_accepts_what_help_was_asked_for() -> None:
    source = (
        'n, known = 1, run_trtexec(["--help"])\n    some = ["--int8"]\n    [flag for flag in some if flag in known]'
    )
    assert flag_faults(f"def f():\n    {source}\n") == []
