"""A device in place of a real one: its latency is a formula over the shapes in the ONNX files, so that a test knows the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cswap_deploy.artifacts import File
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DeviceError

ROUNDS, SAMPLES = 8, 9


@dataclass(frozen=True)
class Simulated(Target):
    """Layers count in blocks of `step` channels on both sides; `base_ns`, `layer_ns` and `block_ns`: of a network, a layer and a block."""

    step: int = field(default=16, metadata={"key": False})
    base_ns: int = field(default=2_000_000, metadata={"key": False})
    block_ns: int = field(default=200_000, metadata={"key": False})
    layer_ns: int = field(default=0, metadata={"key": False})
    noise: float = field(default=0.002, metadata={"key": False})
    slower: float = field(default=1.0, metadata={"key": False})
    """Of a file that holds its own weights, as what ships does, unless it is the dense one."""
    processor: str = field(default="simulated", metadata={"key": False})
    asked: list[str] = field(default_factory=list, metadata={"key": False})
    failing: list[int] = field(default_factory=list, metadata={"key": False})
    """Numbers of the measurements at which the connection ends."""

    def ask_with_log(self, verb: str, seconds: float, **request: Any) -> tuple[dict[str, Any], str]:
        return self.answer(verb, request), ""

    def answer(self, verb: str, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(verb)
        if verb == "probe":
            absent = {"version": None, "gpu": None, "compute_capability": None, "module": False, "precision": None}
            return {**self.machine, "onnxruntime": {"version": "0"}, "tensorrt": absent, "id": "0"}
        if verb == "layers":
            return {"layers": []}
        assert verb == "measure", verb
        if self.asked.count("measure") in self.failing:
            raise DeviceError(f"{self.name}: the connection ended during measure", public="the connection ended")
        paths = [Path(model["path"]) for model in request["models"]]
        times = [self.latency_ns(path) for path in paths]
        times[1:] = [
            ns * (1 if has_shared_weights(path) else self.slower) for ns, path in zip(times[1:], paths[1:], strict=True)
        ]
        random = np.random.default_rng(len(self.asked))
        rounds = [
            [(ns * (1 + self.noise * random.standard_normal(SAMPLES))).astype(int).tolist() for ns in times]
            for _ in range(ROUNDS)
        ]
        state = {
            **self.machine,
            "load": [0.0],
            "temperature_c": None,
            "system": "none",
            "machine": "none",
            "python": "3",
        }
        memory = {"peak_mb": [1.0] * len(times)} if request["memory"] else None
        facts = [{"runtime": "onnxruntime 0"} for _ in times]
        return {"rounds": rounds, "models": facts, "overhead": 0.0, "memory": memory, "before": state, "after": state}

    @property
    def machine(self) -> dict[str, Any]:
        cpu = {"model": self.processor, "cores": 1, "governor": None, "mhz": None, "max_mhz": None}
        return {"cpu": cpu, "board": None}

    def put(self, *files: File, names: tuple[str, ...] = ()) -> list[dict[str, str]]:
        return [{"path": str(file.path), "sha256": file.sha256} for file in files]

    def latency_ns(self, path: Path) -> float:
        shapes = [shape for shape in weights(path) if len(shape) > 1]
        blocks = sum(-(-shape[0] // self.step) * -(-shape[1] // self.step) for shape in shapes)
        return self.base_ns + self.layer_ns * len(shapes) + self.block_ns * blocks


def has_shared_weights(path: Path) -> bool:
    return any(item.external_data for item in onnx.load(path, load_external_data=False).graph.initializer)


def weights(path: Path) -> list[tuple[int, ...]]:
    """Shapes of the weights of convolutions and linear layers."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    names = [node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    for place, name in enumerate(names):
        while name in made and made[name].op_type in ("QuantizeLinear", "DequantizeLinear"):
            name = made[name].input[0]
        names[place] = name
    return [shapes[name] for name in names if name in shapes]
