"""What this machine has for building bundles and for reaching targets, read from the metadata of its packages: nothing is imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from cswap_deploy.findings import Finding, ok, release, size_text


def findings() -> tuple[Finding, ...]:
    return (*_own_python(), *_packages(), *_torch_build(), *_ssh_client(), *_work_disk(), *_own_cores())


HOST_COMMAND = 'pip install "cswap-deploy[host]"'
MODULES = {"pillow": "PIL"}
"""Modules that are not named like their package."""
LEAST_WORK = 2 << 30
"""Free bytes that a work folder should find; a build of a small network takes a tenth of it."""


def _own_python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info >= (3, 11):
        yield ok("python", f"Python {version}")
    else:
        text = f"Python {version} serves deploy, measure, show and verify; building bundles needs 3.11"
        yield Finding("python", "note", text, "for build and prepare use Python 3.11 or newer")


def _packages() -> Iterator[Finding]:
    """The packages of the [host] part, as the installed cswap-deploy asks for them."""
    try:
        wanted = metadata.requires("cswap-deploy") or []
    except metadata.PackageNotFoundError:
        yield Finding("cswap-deploy", "missing", "it runs from a folder, not installed", HOST_COMMAND)
        return
    for line in wanted:
        requirement, _, marker = line.partition(";")
        if re.search(r"extra == ['\"]host['\"]", marker) and (found := re.match(r"([\w.-]+)\s*(.*)", requirement)):
            yield _package(found[1], found[2].strip())


def _package(name: str, needs: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _unlisted_package(name)
    if not _satisfies(version, needs):
        return Finding(
            name, "problem", f"{name} {version} is installed, {needs} is needed", f'pip install "{name}{needs}"'
        )
    return ok(name, f"{name} {version}")


def _unlisted_package(name: str) -> Finding:
    """A module may come from another package, as onnxruntime does from onnxruntime-gpu."""
    module = MODULES.get(name, name.replace("-", "_"))
    if _is_there(module):
        others = metadata.packages_distributions().get(module, [])
        named = ", ".join(f"{other} {metadata.version(other)}" for other in others)
        return ok(name, f"module {module} from {named or 'a folder of the search path'}")
    if "tegra" in platform.release():
        text = f"{name} is not installed; only building bundles needs it, deploy and measure do not"
        return Finding(name, "note", text, "build on a workstation: here pip would replace NVIDIA's own packages")
    return Finding(name, "missing", f"{name} is not installed", HOST_COMMAND)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _satisfies(version: str, needs: str) -> bool:
    """Whether a version is within `>=a,<b` or `==c`; releases only, other forms are not judged."""
    found = release(version)
    for part in filter(None, (item.strip() for item in needs.split(","))):
        sign, bound = part.rstrip("0123456789."), release(part.lstrip("<>=~!"))
        width = max(len(found), len(bound))
        left, right = (item + (0,) * (width - len(item)) for item in (found, bound))
        if {">=": left < right, "<": left >= right, "==": left != right}.get(sign, False):
            return False
    return True


def _torch_build() -> Iterator[Finding]:
    """Which CUDA torch was built for, as far as its version tells without importing it."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    build = version.partition("+")[2]
    if cuda := re.fullmatch(r"cu(\d+)(\d)", build):
        yield ok("torch build", f"for CUDA {cuda[1]}.{cuda[2]}")
    elif build:
        yield ok("torch build", "for the CPU only" if build == "cpu" else f"named {build}")
    else:
        ask = 'python -c "import torch; print(torch.version.cuda, torch.cuda.is_available())"'
        yield Finding("torch build", "note", f"the version {version} does not tell whether it carries CUDA", ask)


def _ssh_client() -> Iterator[Finding]:
    if shutil.which("ssh"):
        yield ok("ssh", "OpenSSH's client is there")
    else:
        text = "no ssh on the PATH: targets other than local cannot be reached"
        yield Finding("ssh", "missing", text, "sudo apt install openssh-client")


def _work_disk() -> Iterator[Finding]:
    runs = Path.cwd() / "runs"
    place = runs if runs.is_dir() else Path.cwd()
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield Finding(
            "disk", "problem", f"{place} may not be written to", "start in another folder, or give --work DIR"
        )
    elif free < LEAST_WORK:
        text = f"{size_text(free)} free where {runs} lies, too little for a build"
        yield Finding(
            "disk", "problem", text, f"free {size_text(LEAST_WORK)} there, or give --work DIR on another disk"
        )
    else:
        yield ok("disk", f"{size_text(free)} free where {runs} lies")


def _own_cores() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield ok("cores", f"{usable or 'unknown'} of {os.cpu_count() or 'unknown'} cores usable")
