"""Readers that share no kernel with ONNX Runtime say what PyTorch says of our files; benchmarks/onnx_consumers.py asks about more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Built, benchmark, make_project

from cswap_deploy.vectors import softmax

consumers = benchmark("consumers")
LIMIT = 1e-3
INT8 = 0.07
"""Other kernels round otherwise; of the largest logit."""


def asked(name: str, path: Path, inputs: np.ndarray) -> np.ndarray:
    if why := consumers.missing(name):
        pytest.skip(why)
    return np.concatenate([consumers.CONSUMERS[name](path, image[None]) for image in inputs])


@pytest.mark.parametrize("name", consumers.CONSUMERS)
def test_the_float32_file(name: str, quickstart: Built) -> None:
    vectors = quickstart.bundle.folder / "test_vectors"
    inputs, wanted = np.load(vectors / "input.npy")[:2], np.load(vectors / "output.npy")[:2]
    assert consumers.difference(asked(name, quickstart.bundle.folder / "model.onnx", inputs), wanted) < LIMIT


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Built:
    project = make_project(tmp_path_factory.mktemp("small") / "project")
    return project.build("prune.target=null", "variants=[fp16, int8, int8-arm, int8-tensorrt]")


@pytest.mark.parametrize("name", ["openvino", "tract", "web"])  # the reference has no DequantizeLinear of opset 18
@pytest.mark.parametrize("kind", ["fp16", "int8", "int8-arm", "int8-tensorrt"])
def test_files_of_fewer_bits(name: str, kind: str, small: Built) -> None:
    vectors = small.bundle.folder / "test_vectors"
    inputs, wanted = np.load(vectors / "input.npy")[:2], np.load(vectors / "output.npy")[:2]
    path = small.bundle.folder / small.manifest["onnx"]["variants"][kind]["file"]
    found = asked(name, path, inputs)
    assert consumers.difference(found, wanted) < (1e-2 if kind == "fp16" else INT8)
    assert np.array_equal(softmax(found).argmax(1), wanted.argmax(1))


def test_a_difference_is_seen() -> None:
    wanted = np.float32([[1, -4]])
    assert consumers.difference(wanted + np.float32([[0, 0.4]]), wanted) == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="expected"):
        consumers.difference(wanted[:, :1], wanted)
