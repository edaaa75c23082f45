"""What the double's classes do where the agent needs it. `self._` holds an object's state; `double.py` checks arguments.

FAKE_TENSORRT_FAIL holds words: `start` no builder can be made, `build` no engine comes out, `cache` a stored timing cache
is refused, `context` an engine yields no context, `enqueue` an inference is refused, `fault` one ends in a CUDA error,
`capture` a CUDA graph breaks, `loop` an engine refuses to be captured, `no-dla` the board has none, `units-16` no engine
comes out of a network with a layer of 16 units.

FAKE_TENSORRT_STEPS, as `8 1000 100 50`, makes a latency up so that a test knows the truth: layers count in blocks of 8 channels on
both sides, an inference takes 1000 microseconds, 100 for each block and 50 for each layer, give or take 0.4 %. The process's clock
then shows what the inferences would have taken, and nothing else, however busy the machine is. Nothing real has these numbers.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from functools import cache
from typing import Any

from double import VERSION, new

NAMES: dict[str, Any] = {}
"""The module's names, once it is made."""
TYPES = {
    "bool": "BOOL", "float16": "HALF", "float32": "FLOAT", "fp8": "FP8", "int32": "INT32", "int8": "INT8", "uint8": "UINT8",
    "bfloat16": "BF16", "int4": "INT4", "int64": "INT64", "e8m0": "E8M0", "fp4": "FP4",
}  # fmt: skip
LAYERS = {
    "Conv": "CONVOLUTION", "Relu": "ACTIVATION", "MaxPool": "POOLING",
    "GlobalAveragePool": "REDUCE", "ReduceMean": "REDUCE", "Gemm": "MATRIX_MULTIPLY",
    "MatMul": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX", "LayerNormalization": "NORMALIZATION", "Flatten": "SHUFFLE",
    "Add": "ELEMENTWISE", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Cast": "CAST",
}  # fmt: skip
ONNX_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(uint8)": "UINT8"}
NUMPY_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT32": "int32",
    "BOOL": "bool",
}
MAGIC = b"NO ENGINE, A TEST DOUBLE\n"
CACHE = f"NO TIMING CACHE, A TEST DOUBLE OF {VERSION}\n".encode()
FAILS = os.environ.get("FAKE_TENSORRT_FAIL", "").split()
DYNAMIC = -1
STEPS = [int(number) for number in os.environ.get("FAKE_TENSORRT_STEPS", "").split()]
REFUSED = [int(word[len("units-") :]) for word in FAILS if word.startswith("units-")]
DLA_CORES = 0 if "no-dla" in FAILS else 2
ON_DLA = ("CONVOLUTION", "ACTIVATION", "POOLING", "ELEMENTWISE", "MATRIX_MULTIPLY", "QUANTIZE", "DEQUANTIZE")


class Clock:
    """The made-up one."""

    ns = 0


if STEPS:
    time.perf_counter_ns = lambda: Clock.ns


def nptype(trt_type: Any) -> Any:
    import numpy as np

    if trt_type.name not in NUMPY_TYPES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return np.dtype(NUMPY_TYPES[trt_type.name]).type


def log(severity: str, text: str) -> None:
    sys.stderr.write(f"[11/24/2026-00:00:00] [TRT] [{severity}] {text}\n")


class Dims:
    def __init__(self, shape: Any = ()) -> None:
        self._.shape = tuple(shape)

    def __len__(self) -> int:
        return len(self._.shape)

    def __getitem__(self, index: Any) -> Any:
        return self._.shape[index]


class Logger:
    def __init__(self, min_severity: Any = None) -> None:
        self._.severity = min_severity


class Builder:
    def __init__(self, logger: Any) -> None:
        if "start" in FAILS:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def num_DLA_cores(self) -> int:  # noqa: N802
        return DLA_CORES

    def create_network(self, flags: int = 0) -> Any:
        known = {1 << int(flag): flag.name for flag in NAMES["NetworkDefinitionCreationFlag"]}
        if flags & ~sum(known):
            raise TypeError(f"create_network: unknown flags {flags}")
        return new(
            "INetworkDefinition", layers=[], outputs=0, flags=[name for bit, name in known.items() if flags & bit]
        )

    def create_builder_config(self) -> Any:
        return new("IBuilderConfig", profiles=[], cache=None, names=[], flags=set())

    def create_optimization_profile(self) -> Any:
        return new("IOptimizationProfile", shapes={})

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        """The ONNX file with what an engine keeps of its configuration. None: it cannot be built."""
        if "build" in FAILS:
            log("E", "Error Code 10: Internal Error (Could not find any implementation for node /conv1/Conv.)")
            return None
        profiles = [profile._.shapes for profile in config._.profiles]
        if network._.dynamic and not profiles:
            log("E", "Network has dynamic or shape inputs, but no optimization profile has been defined.")
            return None
        if any(shape[0] in REFUSED for shape in network._.weights):
            log("E", "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[...]}.)")
            return None
        if text := misfit(network, config):
            log("E", text)
            return None
        if config._.cache is None:
            config._.cache = new("ITimingCache", bytes=b"")
        config._.cache._.bytes = (config._.cache._.bytes or CACHE) + b"a timing\n"
        verbosity = getattr(getattr(config._, "profiling_verbosity", None), "name", "LAYER_NAMES_ONLY")
        document = {"version": VERSION, "profiles": profiles, "layers": network._.names, "verbosity": verbosity}
        return memory(MAGIC + json.dumps(document).encode() + b"\n" + network._.onnx)


def misfit(network: Any, config: Any) -> str:
    """Why TensorRT would not build this with such a configuration; empty: it would."""
    by_flags = hasattr(NAMES["BuilderFlag"], "FP16")
    kinds = [layer._.kind for layer in network._.layers]
    if by_flags and "QUANTIZE" in kinds and "INT8" not in config._.flags:
        return "Network has QuantizeLinear nodes, but the INT8 flag is not set"
    if getattr(getattr(config._, "default_device_type", None), "name", "GPU") != "DLA":
        return ""
    if getattr(config._, "DLA_core", -1) not in range(DLA_CORES):
        return "Error Code 4: the DLA core does not exist"
    if by_flags and not config._.flags & {"FP16", "INT8"}:
        return "Default DLA is enabled but neither FP16 nor INT8 mode is"
    if config._.profiles:
        return "Dynamic shapes are not supported on the DLA"
    left = [layer._.name for layer in network._.layers if layer._.kind not in ON_DLA]
    if left and "GPU_FALLBACK" not in config._.flags:
        return f"{left[0]}: DLA layer cannot run, and GPU fallback is disabled"
    return ""


def memory(content: bytes) -> Any:
    """IHostMemory is a buffer: until Python 3.12 only a class of C's can be one, so this one is ctypes'."""

    class IHostMemory(ctypes.c_char * len(content)):
        nbytes = property(len)

        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("__") and name not in ("nbytes", "dtype"):
                raise AttributeError(f"'tensorrt.IHostMemory' object has no attribute {name!r}")
            return super().__getattribute__(name)

    return IHostMemory.from_buffer_copy(content)


class INetworkDefinition:
    def num_layers(self) -> int:
        return len(self._.layers)

    def num_outputs(self) -> int:
        return self._.outputs

    def get_layer(self, index: int) -> Any:
        return self._.layers[index]


class ILayer:
    def name(self) -> str:
        return self._.name

    def type(self) -> Any:
        return getattr(NAMES["LayerType"], self._.kind)

    def num_outputs(self) -> int:
        return 1

    def get_output(self, index: int) -> Any:
        return new("ITensor", name=f"{self._.name}_output", dtype=NAMES["DataType"].FLOAT)

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._.output_type = dtype


class OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._.network, self._.errors = network, []

    def parse_from_file(self, model: str) -> bool:
        import onnx

        try:
            parsed = onnx.load(model)
        except Exception:
            self._.errors = [(-1, "ModelImporter.cpp: Failed to parse ONNX model from file: " + model, "", "")]
            return False
        for number, node in enumerate(parsed.graph.node):
            if not onnx.defs.has(node.op_type, node.domain):
                text = f"In node {number} with name: {node.name}: UNSUPPORTED_NODE: No importer for {node.op_type}"
                self._.errors.append((number, text, node.name, node.op_type))
        state, nodes = self._.network._, parsed.graph.node
        state.outputs = len(parsed.graph.output)
        state.onnx, state.names = parsed.SerializeToString(), [node.name for node in nodes]
        state.layers = [new("ILayer", name=node.name, kind=LAYERS.get(node.op_type, "UNARY")) for node in nodes]
        state.weights = weights_of(parsed)
        assert not any(node.op_type == "ConstantOfShape" for node in nodes), "TensorRT takes no such weights"
        state.dynamic = any(size.dim_param for i in parsed.graph.input for size in i.type.tensor_type.shape.dim)
        return not self._.errors

    def num_errors(self) -> int:
        return len(self._.errors)

    def get_error(self, index: int) -> Any:
        return new("ParserError", error=self._.errors[index])


def weights_of(model: Any) -> list[tuple[int, ...]]:
    """Shapes of the weights of convolutions and linear layers, also behind quantisation."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        name = node.input[1] if node.op_type in ("Conv", "Gemm", "MatMul") else ""
        while name in made and made[name].op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            name = made[name].input[0]
        found += [shapes[name]] if name in shapes else []
    return found


def made_up_ns(model: Any) -> int:
    """Its latency, as FAKE_TENSORRT_STEPS has it."""
    step, base_us, block_us, layer_us = STEPS
    shapes = [*weights_of(model)]
    blocks = sum(-(-shape[0] // step) * -(-shape[1] // step) for shape in shapes)
    return 1000 * (base_us + block_us * blocks + layer_us * len(shapes))


class ParserError:
    def node(self) -> int:
        return self._.error[0]

    def desc(self) -> str:
        return self._.error[1]

    def node_name(self) -> str:
        return self._.error[2]

    def node_operator(self) -> str:
        return self._.error[3]


class IBuilderConfig:
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...

    def set_flag(self, flag: Any) -> None:
        self._.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._.flags.discard(flag.name)

    def can_run_on_DLA(self, layer: Any) -> bool:  # noqa: N802
        return layer._.kind in ON_DLA

    def add_optimization_profile(self, profile: Any) -> int:
        if not all(low <= opt <= high for s in profile._.shapes.values() for low, opt, high in zip(*s, strict=True)):
            return -1
        self._.profiles.append(profile)
        return len(self._.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        return new("ITimingCache", bytes=bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        """False: it was stored by another version or on another device."""
        stored = cache._.bytes
        if stored and not ignore_mismatch and ("cache" in FAILS or not stored.startswith(CACHE)):
            return False
        self._.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._.cache


class ITimingCache:
    def serialize(self) -> Any:
        return memory(self._.bytes)


class IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._.shapes[input] = [list(shape) for shape in (min, opt, max)]


class Runtime:
    def __init__(self, logger: Any) -> None:
        if "start" in FAILS:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def num_DLA_cores(self) -> int:  # noqa: N802
        return DLA_CORES

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """None: no engine, or one of another version."""
        head, _, rest = bytes(serialized_engine)[len(MAGIC) :].partition(b"\n")
        if not bytes(serialized_engine).startswith(MAGIC):
            log("E", "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag does not match)")
            return None
        document = json.loads(head)
        if document["version"] != VERSION:
            log(
                "E",
                f"The engine plan file is not compatible: it is of version {document['version']}, expected {VERSION}",
            )
            return None
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(rest, options, providers=["CPUExecutionProvider"])
        tensors = {
            item.name: (item, "OUTPUT") for item in session.get_outputs()
        }  # outputs first: the order is not promised
        tensors |= {item.name: (item, "INPUT") for item in session.get_inputs()}
        import onnx

        made_up = made_up_ns(onnx.load_from_string(rest)) if STEPS else 0
        return new("ICudaEngine", session=session, tensors=tensors, document=document, made_up_ns=made_up)


class ICudaEngine:
    def num_io_tensors(self) -> int:
        return len(self._.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return getattr(NAMES["TensorIOMode"], self._.tensors[name][1])

    def get_tensor_shape(self, name: str) -> Any:
        return NAMES["Dims"]([size if isinstance(size, int) else DYNAMIC for size in self._.tensors[name][0].shape])

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(NAMES["DataType"], ONNX_TYPES[self._.tensors[name][0].type])

    def create_execution_context(self, strategy: Any = None) -> Any:
        if "context" in FAILS:
            log("E", "IExecutionContext::IExecutionContext: Error Code 2: OutOfMemory")
            return None
        return new("IExecutionContext", engine=self, shapes={}, addresses={}, enqueued=False, profiler=None)

    def device_memory_size(self) -> int:
        return 3 << 20

    device_memory_size_v2 = device_memory_size

    def create_engine_inspector(self) -> Any:
        return new("EngineInspector", engine=self)


class EngineInspector:
    def get_engine_information(self, format: Any) -> str:
        """Layers are names only, unless the engine was built with detailed verbosity; 11 says `I/O Tensors`."""
        document = self._.engine._.document
        layers = [
            {"Name": n, "LayerType": "double"} if document["verbosity"] == "DETAILED" else n for n in document["layers"]
        ]
        tensors = list(self._.engine._.tensors)
        return json.dumps({"Layers": layers, "Bindings" if VERSION < "11" else "I/O Tensors": tensors})


class IProfiler:
    def __init__(self) -> None: ...


class IExecutionContext:
    def set_input_shape(self, name: str, shape: Any) -> bool:
        """False: not a shape of this engine, or outside its profile."""
        state = self._.engine._
        built, given = tuple(self._.engine.get_tensor_shape(name)), tuple(shape)
        if len(built) != len(given) or any(b not in (g, DYNAMIC) for b, g in zip(built, given, strict=True)):
            return False
        for profile in state.document["profiles"]:
            low, _, high = profile[name]
            if not all(a <= g <= b for a, g, b in zip(low, given, high, strict=True)):
                return False
        self._.shapes[name] = given
        return True

    def get_tensor_shape(self, name: str) -> Any:
        item, mode = self._.engine._.tensors[name]
        if mode == "INPUT":
            return NAMES["Dims"](self._.shapes.get(name, tuple(self._.engine.get_tensor_shape(name))))
        batch = next(iter(self._.shapes.values()), (DYNAMIC,))[0]
        return NAMES["Dims"]([size if isinstance(size, int) else batch for size in item.shape])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._.addresses[name] = memory
        return name in self._.engine._.tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        """It runs when the stream is waited for; see cudart.c."""
        tensors = self._.engine._.tensors
        if "enqueue" in FAILS or set(self._.addresses) != set(tensors) or not stream_handle:
            log("E", "IExecutionContext::enqueueV3: Error Code 3: API Usage Error")
            return False
        library = cuda()
        if number := library.double_capturing():
            if "loop" in FAILS:
                log(
                    "E",
                    "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)",
                )
                return False
            CAPTURED.setdefault(number, []).append(self)
        else:
            WAITING.append(self)
        library.double_enqueued()
        return True

    def profiler(self) -> Any:
        return self._.profiler


WAITING: list[Any] = []
CAPTURED: dict[int, list[Any]] = {}
"""Of each graph."""


@cache
def cuda() -> Any:
    """The double of libcudart, told to run what waits. Errors: it is the real one."""
    library = ctypes.CDLL("libcudart.so")
    library.double_bytes_at.restype, library.double_bytes_at.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    KEPT.append(ctypes.CFUNCTYPE(ctypes.c_int)(run_waiting))
    library.double_on_wait(KEPT[0])
    KEPT.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: WAITING.extend(CAPTURED[number])))
    library.double_on_launch(KEPT[1])
    return library


KEPT: list[Any] = []


def run_waiting() -> int:
    """A CUDA error code."""
    if "fault" in FAILS:
        return 719
    while WAITING:
        if not run(WAITING.pop(0)):
            return 700
    return 0


def run(context: Any) -> bool:
    """ONNX Runtime between device addresses. False: one of them is not on the device, or too small."""
    import numpy as np

    state, feeds, start = context._.engine._, {}, time.perf_counter()
    for name, address in context._.addresses.items():
        kind = nptype(context._.engine.get_tensor_dtype(name))
        shape = tuple(context.get_tensor_shape(name))
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if cuda().double_bytes_at(address) < size:
            return False
        if state.tensors[name][1] == "INPUT":
            feeds[name] = np.frombuffer(ctypes.string_at(address, size), kind).reshape(shape)
    names = [item.name for item in state.session.get_outputs()]
    for name, value in zip(names, state.session.run(names, feeds), strict=True):
        ctypes.memmove(context._.addresses[name], value.ctypes.data, value.nbytes)
    Clock.ns += round(state.made_up_ns * (1 + 0.001 * (Clock.ns % 9 - 4)))
    if context._.profiler:
        for name in state.document["layers"]:
            context._.profiler.report_layer_time(name, 1000 * (time.perf_counter() - start))
    return True
