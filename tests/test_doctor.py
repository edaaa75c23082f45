"""doctor names what is missing with the command that helps, and says unknown where it does not know."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from cswap_deploy import doctor, doctor_host
from cswap_deploy.errors import DeviceError
from cswap_deploy.findings import Finding

AGENT = Path(doctor.__file__).parent / "device" / "agent.py"
NO_TENSORRT = {
    "version": None, "module": False, "trtexec": None, "gpu": None, "compute_capability": None, "precision": None,
    "dla_cores": None, "reason": "ModuleNotFoundError: No module named 'tensorrt'",
}  # fmt: skip
NO_ONNXRUNTIME = {"version": None, "providers": [], "reason": "ModuleNotFoundError: No module named 'onnxruntime'"}
ORIN_NANO: dict[str, Any] = {
    "schema": "cswap-deploy/agent/1", "verb": "probe", "python": "3.10.12", "machine": "aarch64",
    "system": "Linux 5.15.148-tegra",
    "cpu": {"model": "ARMv8 Processor", "cores": 6, "governor": "schedutil", "mhz": 1510, "max_mhz": 1728},
    "memory_mb": 7620, "memory_free_mb": 5100, "disk_free_mb": 53000, "load": [0.1, 0.2, 0.3], "numpy": "1.26.4",
    "onnxruntime": {"version": "1.23.2", "providers": ["CPUExecutionProvider"], "reason": ""},
    "tensorrt": {
        "version": "10.3.0", "module": True, "trtexec": "/usr/src/tensorrt/bin/trtexec", "gpu": "Orin",
        "compute_capability": "8.7", "precision": "flags", "dla_cores": 0, "reason": "",
    },
    "board": {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "l4t": "36.4.3",
        "power_mode": "MAXN_SUPER", "gpu_clocks_locked": True,
    },
    "store": {"folder": "/home/x/.cache/cswap-deploy", "bytes": 3 << 20, "limit_bytes": 4 << 30},
}  # fmt: skip
THOR: dict[str, Any] = {
    **ORIN_NANO, "python": "3.12.3", "system": "Linux 6.8.12-tegra", "memory_mb": 125_000, "memory_free_mb": 110_000,
    "cpu": {"model": "Neoverse-V3AE", "cores": 14, "governor": "performance", "mhz": 2601, "max_mhz": 2601},
    "tensorrt": {**ORIN_NANO["tensorrt"], "version": "10.13.3.9", "gpu": "NVIDIA Thor", "compute_capability": "11.0"},
    "board": {"model": "NVIDIA Jetson AGX Thor Developer Kit", "l4t": "38.4.0", "power_mode": "120W", "gpu_clocks_locked": False},
}  # fmt: skip
JETPACK5: dict[str, Any] = {
    **ORIN_NANO, "python": "3.8.10", "system": "Linux 5.10.104-tegra", "numpy": "1.17.4", "onnxruntime": NO_ONNXRUNTIME,
    "tensorrt": {**ORIN_NANO["tensorrt"], "version": "8.5.2.2"},
    "board": {"model": "NVIDIA Jetson AGX Orin Developer Kit", "l4t": "35.4.1", "power_mode": "MODE_30W", "gpu_clocks_locked": None},
}  # fmt: skip
LAPTOP: dict[str, Any] = {
    **ORIN_NANO, "python": "3.12.3", "machine": "x86_64", "system": "Linux 6.8.0-45-generic", "numpy": "2.2.0",
    "cpu": {"model": "Intel Core i7", "cores": 8, "governor": "powersave", "mhz": 800, "max_mhz": 4700},
    "tensorrt": NO_TENSORRT, "board": None,
}  # fmt: skip
BARE: dict[str, Any] = {
    "schema": "cswap-deploy/agent/1", "verb": "probe", "python": "3.8.2", "machine": "aarch64", "system": None,
    "cpu": {"model": None, "cores": None, "governor": None, "mhz": None, "max_mhz": None}, "memory_mb": None,
    "memory_free_mb": None, "disk_free_mb": None, "load": [], "numpy": "1.24.4", "onnxruntime": NO_ONNXRUNTIME,
    "tensorrt": NO_TENSORRT, "board": None, "store": None,
}  # fmt: skip
PROBES = {"orin": ORIN_NANO, "thor": THOR, "jetpack5": JETPACK5, "laptop": LAPTOP, "bare": BARE}
BOARD = "ssh://me@board"


def changed(probe: dict[str, Any], **places: Any) -> dict[str, Any]:
    """A probe with other values: `board__l4t="36.5.0"` sets one within a part."""
    copy = deepcopy(probe)
    for place, value in places.items():
        part, _, key = place.partition("__")
        if key:
            copy[part][key] = value
        else:
            copy[part] = value
    return copy


def asked(probe: dict[str, Any], name: str = BOARD) -> dict[str, Finding]:
    findings = doctor.target(name, probe)
    assert len({finding.topic for finding in findings}) == len(findings)
    for finding in findings:
        assert (finding.fix == "") == (finding.state == "ok"), finding
        assert finding.text
    return {finding.topic: finding for finding in findings}


def states(found: dict[str, Finding]) -> dict[str, str]:
    """What is not ok."""
    return {topic: finding.state for topic, finding in found.items() if finding.state != "ok"}


# --- whole boards


def test_a_jetson_as_it_should_be_has_one_thing_to_fix():
    found = asked(ORIN_NANO)
    assert states(found) == {"cpu governor": "note"}
    assert found["cpu governor"].fix == "sudo jetson_clocks"
    assert (
        found["target"].text.startswith("ssh://me@board: NVIDIA Jetson Orin Nano")
        and "1510 of 1728 MHz" in found["target"].text
    )
    assert found["jetpack"].text == "JetPack 6.2 (L4T 36.4.3)"
    assert (
        "TensorRT 10.3.0 through its Python module; Orin, compute capability 8.7, DLA cores 0" in found["tensorrt"].text
    )
    assert found["memory"].text == "5.0 of 7.4 GiB free"
    assert found["store"].text == "3.0 MiB of 4.0 GiB in /home/x/.cache/cswap-deploy"


def test_a_thor_in_a_slow_mode():
    found = asked(THOR)
    assert states(found) == {"power mode": "note", "gpu clocks": "note"}
    assert found["jetpack"].text == "JetPack 7.1 (L4T 38.4.0)"
    assert found["power mode"].text.startswith("120W is not a MAXN mode")
    assert found["power mode"].fix == "sudo nvpmodel -m ID (the IDs: grep POWER_MODEL /etc/nvpmodel.conf)"
    assert found["gpu clocks"].fix == "sudo jetson_clocks"


def test_a_jetpack_5_board_is_driven_from_a_workstation():
    found = asked(JETPACK5)
    assert states(found) == {
        "python": "note", "jetpack": "note", "onnxruntime": "note", "tensorrt": "note", "power mode": "note",
        "gpu clocks": "note", "cpu governor": "note",
    }  # fmt: skip
    assert found["jetpack"].text == "JetPack 5.1 (L4T 35.4.1): over ssh only, and unchecked"
    assert found["python"].fix == "use it from a workstation: --on ssh://me@board"
    assert "opset" in found["tensorrt"].text and "JetPack 6" in found["tensorrt"].fix
    assert found["power mode"].fix == "sudo nvpmodel -m 0"
    assert found["gpu clocks"].text.startswith("unknown") and found["gpu clocks"].fix == "sudo jetson_clocks --show"


def test_a_laptop_without_gpu_measures_onnx_runtime():
    found = asked(LAPTOP, "local")
    assert states(found) == {"tensorrt": "note", "cpu governor": "note"}
    assert "no NVIDIA GPU was seen" in found["tensorrt"].text
    assert "--on ssh://" in found["tensorrt"].fix
    assert found["cpu governor"].fix == "sudo cpupower frequency-set -g performance"
    assert not {"jetpack", "power mode", "gpu clocks"} & set(found)


def test_a_bare_machine_is_unknown_in_most_and_lacks_its_runtime():
    found = asked(BARE)
    assert states(found) == {
        "python": "note", "onnxruntime": "missing", "tensorrt": "note", "cpu governor": "note", "load": "note",
        "memory": "note", "disk": "note",
    }  # fmt: skip
    assert "a machine of unknown model, unknown system, aarch64, unknown cores" in found["target"].text
    assert found["onnxruntime"].fix == "python3 -m pip install onnxruntime"
    for topic in ("memory", "disk", "load", "cpu governor"):
        assert found[topic].text.startswith("unknown")


# --- refusals and problems


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "cswap-deploy/agent/2"}, "probe.schema: expected cswap-deploy/agent/1"),
        ({"verb": "measure"}, "expected probe"),
        ({"python": None}, "probe.python: expected string"),
        ({"cpu": 6}, "probe.cpu"),
        ({"cpu__cores": "6"}, "probe.cpu"),
        ({"load": [0.1, "x"]}, "probe.load"),
        ({"tensorrt__precision": "half"}, "probe.tensorrt"),
        ({"memory_free_mb": float("nan")}, "probe.memory_free_mb"),
        ({"board": "Orin"}, "probe.board"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_probe_is_refused(changes, words):
    with pytest.raises(DeviceError, match=r"ssh://me@board did not answer with a probe.*same version") as caught:
        doctor.target(BOARD, changed(ORIN_NANO, **changes))
    assert words in str(caught.value)


@pytest.mark.parametrize("missing", ["schema", "python", "machine"])
def test_a_probe_without_its_first_facts_is_refused(missing):
    with pytest.raises(DeviceError, match=f"'{missing}' is missing"):
        doctor.target("local", {key: value for key, value in BARE.items() if key != missing})


@pytest.mark.parametrize("name", PROBES)
def test_what_may_be_null_may_be_absent(name):
    short = {key: PROBES[name][key] for key in ("schema", "python", "machine")}
    assert "tensorrt" in asked(short)
    for key, part in PROBES[name].items():
        if isinstance(part, dict):
            asked(changed(PROBES[name], **{key: {}}))
            asked(changed(PROBES[name], **{key: dict.fromkeys(part)}))


@pytest.mark.parametrize(
    ("changes", "topic", "words", "fix"),
    [
        ({"python": "3.6.9"}, "python", "Python 3.6.9 is too old", "Python 3.8 or newer"),
        ({"python": "garbage"}, "python", "too old", "Python 3.8 or newer"),
        ({"board__l4t": "32.7.4"}, "jetpack", "JetPack 4 or older, which is not supported", "flash JetPack 5 or newer"),
        ({"tensorrt__version": "8.4.1.5"}, "tensorrt", "8.5 is the oldest supported", "update to JetPack 5.1 or newer"),
        ({"tensorrt__version": "11.0.0"}, "tensorrt", "11.0 to 11.4.0 do not support JetPack", "libnvinfer-bin"),
        ({"load": [5.0, 1, 1]}, "load", "5.0 over the last minute on 6 cores", "stop what else runs there"),
        ({"memory_free_mb": 600}, "memory", "0.6 of 7.4 GiB free", "sudo systemctl isolate multi-user.target"),
        ({"disk_free_mb": 300}, "disk", "300 MiB free", "free 1 GiB"),
        ({"tensorrt": {**NO_TENSORRT, "reason": "ImportError: libnvinfer.so.10: no such file"}}, "tensorrt",
         "is there, but cannot be used: ImportError: libnvinfer.so.10", "--runtime nvidia"),
    ],
)  # fmt: skip
def test_problems_of_a_board(changes, topic, words, fix):
    finding = asked(changed(ORIN_NANO, **changes))[topic]
    assert finding.state == "problem"
    assert words in finding.text and fix in finding.fix


# --- packages


@pytest.mark.parametrize(
    ("probe", "fix"),
    [
        (ORIN_NANO, 'python3 -m pip install "numpy<2"'),
        (JETPACK5, 'python3 -m pip install "numpy<2"'),
        (THOR, "sudo apt install python3-numpy"),
        (LAPTOP, "python3 -m pip install numpy"),
    ],
)
def test_missing_numpy(probe, fix):
    finding = asked(changed(probe, numpy=None))["numpy"]
    assert (finding.state, finding.fix) == ("missing", fix)


def test_numpy_2_on_jetpack_6_is_worth_a_note():
    finding = asked(changed(ORIN_NANO, numpy="2.2.1"))["numpy"]
    assert (finding.state, finding.fix) == ("note", 'python3 -m pip install "numpy<2"')
    assert asked(changed(THOR, numpy="2.2.1"))["numpy"].state == "ok"


def test_missing_onnxruntime_matters_only_without_tensorrt():
    broken = {**NO_ONNXRUNTIME, "reason": "ImportError: numpy.core.multiarray failed to import"}
    finding = asked(changed(ORIN_NANO, onnxruntime=broken))["onnxruntime"]
    assert finding.state == "note" and "numpy.core.multiarray failed" in finding.text
    finding = asked(changed(THOR, onnxruntime=broken, tensorrt=NO_TENSORRT))["onnxruntime"]
    assert (finding.state, finding.fix) == ("missing", "python3 -m pip install --break-system-packages onnxruntime")


def test_missing_tensorrt_comes_from_apt_on_a_jetson_and_from_pip_beside_a_gpu():
    finding = asked(changed(ORIN_NANO, tensorrt=NO_TENSORRT))["tensorrt"]
    assert (finding.state, finding.fix) == ("missing", "sudo apt install python3-libnvinfer libnvinfer-bin")
    assert "never from pip" in finding.text
    hidden = changed(ORIN_NANO, tensorrt=NO_TENSORRT, board=None)  # a container: only the kernel's name tells
    assert asked(hidden)["tensorrt"].fix == "sudo apt install python3-libnvinfer libnvinfer-bin"
    finding = asked(changed(LAPTOP, tensorrt__gpu="NVIDIA GeForce RTX 4060"))["tensorrt"]
    assert (finding.state, finding.fix) == ("missing", 'python3 -m pip install "cswap-deploy[tensorrt]"')


def test_trtexec_alone_will_do():
    only = {
        "module": False,
        "version": "10.3.0",
        "reason": NO_TENSORRT["reason"],
        "gpu": None,
        "compute_capability": None,
    }
    found = asked(changed(ORIN_NANO, tensorrt={**ORIN_NANO["tensorrt"], **only, "dla_cores": None}))
    assert found["tensorrt"].state == "ok"
    assert (
        "through trtexec only; GPU's name unknown, compute capability unknown, DLA cores unknown"
        in found["tensorrt"].text
    )
    assert found["tensorrt module"].state == "note"
    assert found["tensorrt module"].fix.startswith("sudo apt install python3-libnvinfer")
    unknown = asked(changed(ORIN_NANO, tensorrt__version="unknown", tensorrt__module=False))
    assert unknown["tensorrt"].state == "ok"


def test_tensorrt_11_is_strongly_typed():
    found = asked(changed(THOR, tensorrt__version="11.4.1", tensorrt__precision="typed", board__l4t="39.2.0"))
    assert found["tensorrt"].state == "ok"
    assert found["precision"].state == "note" and "strongly typed" in found["precision"].text


# --- boards


@pytest.mark.parametrize(
    ("l4t", "name"),
    [
        ("35.1.0", "5.0.2"), ("35.2.1", "5.1"), ("35.6.2", "5.1"), ("36.3.0", "6.0"), ("36.4.0", "6.1"),
        ("36.4.4", "6.2.1"), ("36.4.7", "6.2.1"), ("36.5.0", "6.2.2"), ("38.2.1", "7.0"), ("39.2.0", "7.2"),
    ],
)  # fmt: skip
def test_l4t_names_its_jetpack(l4t, name):
    finding = asked(changed(ORIN_NANO, board__l4t=l4t))["jetpack"]
    unchecked = ": over ssh only, and unchecked" if name.startswith("5") else ""
    assert (finding.state, finding.text) == ("note" if unchecked else "ok", f"JetPack {name} (L4T {l4t}){unchecked}")


@pytest.mark.parametrize(
    ("l4t", "text"),
    [
        ("36.4.40", "L4T 36.4.40: JetPack 6, exact name unknown"),
        ("36.40.0", "L4T 36.40.0: JetPack 6, exact name unknown"),
        ("41.0", "L4T 41.0: JetPack unknown"),
        (None, "unknown: /etc/nv_tegra_release cannot be read"),
    ],
)
def test_a_release_that_is_not_in_the_table_is_not_guessed(l4t, text):
    finding = asked(changed(ORIN_NANO, board__l4t=l4t))["jetpack"]
    assert (finding.state, finding.text) == ("note", text)


@pytest.mark.parametrize(
    ("mode", "model", "fix"),
    [
        ("25W", ORIN_NANO["board"]["model"], "sudo nvpmodel -m 2"),
        ("15W", "NVIDIA Jetson Orin NX", "sudo nvpmodel -m ID (the IDs: grep POWER_MODEL /etc/nvpmodel.conf)"),
        ("mode 0", "NVIDIA Jetson AGX Orin Developer Kit", "sudo nvpmodel -q; then sudo nvpmodel -m 0"),
        (None, None, "sudo nvpmodel -q shows it, sudo nvpmodel -m ID (the IDs: grep POWER_MODEL /etc/nvpmodel.conf) sets"),
    ],
)  # fmt: skip
def test_the_power_mode_is_set_by_number_only_where_the_number_is_known(mode, model, fix):
    finding = asked(changed(ORIN_NANO, board__power_mode=mode, board__model=model))["power mode"]
    assert finding.state == "note" and finding.fix.startswith(fix)


def test_a_raspberry_pi_is_no_jetson():
    pi = {"model": "Raspberry Pi 5 Model B Rev 1.0", "l4t": None, "power_mode": None, "gpu_clocks_locked": None}
    found = asked(changed(LAPTOP, board=pi, machine="aarch64"))
    assert "Raspberry Pi 5" in found["target"].text
    assert not {"jetpack", "power mode", "gpu clocks"} & set(found)


# --- unreachable


def test_an_unreachable_target_keeps_its_reason_and_gets_a_way_out():
    (finding,) = doctor.unreachable(BOARD, "Permission denied (publickey)", "ssh-copy-id me@board")
    assert (finding.state, finding.fix) == ("problem", "ssh-copy-id me@board")
    assert finding.text == "ssh://me@board cannot be asked: Permission denied (publickey)"
    (finding,) = doctor.unreachable("ssh://me@board:22; rm -r x", "timed out", "")
    assert shlex.split(finding.fix.partition(": ")[2]) == ["ssh", "ssh://me@board:22; rm -r x", "python3", "--version"]
    (finding,) = doctor.unreachable("local", "python3: not found", "")
    assert finding.fix == "try it by hand: python3 --version"


# --- this machine


def test_this_machine_names_every_package_with_its_version():
    found = {finding.topic: finding for finding in doctor.host()}
    for name in ("torch", "timm", "onnx", "onnxruntime", "safetensors", "pillow", "scipy", "onnxsim"):
        assert found[name] == Finding(name, "ok", f"{name} {metadata.version(name)}", "")
    assert f"Python {platform.python_version()}" in found["python"].text
    assert {"ssh", "disk", "cores", "torch build"} <= set(found)
    assert f"of {os.cpu_count()} cores" in found["cores"].text
    assert all((finding.fix == "") == (finding.state == "ok") for finding in found.values())


def test_reading_this_machine_imports_nothing_heavy(tmp_path: Path):
    code = "import sys; from cswap_deploy import doctor; doctor.host(); print(*{n.split('.')[0] for n in sys.modules})"
    done = run("-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "timm", "onnx", "onnxruntime", "scipy", "PIL"} & set(done.stdout.split())


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    """Pretend that exactly these packages are installed; `-` is written `_`."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name.replace("-", "_")]

    monkeypatch.setattr(metadata, "version", version)


def test_packages_that_are_missing_or_of_another_version_come_with_the_command(monkeypatch):
    versions(monkeypatch, torch="2.15.0+cu126", timm="1.0.20", onnx="1.17.0", onnxsim="0.8.0", onnxruntime_gpu="1.23")
    monkeypatch.setattr(doctor_host, "find_spec", lambda name: object() if name == "onnxruntime" else None)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = {finding.topic: finding for finding in doctor.host()}
    assert found["scipy"] == Finding("scipy", "missing", "scipy is not installed", 'pip install "cswap-deploy[host]"')
    assert found["onnx"].state == "problem" and found["onnx"].fix.startswith('pip install "onnx')
    assert found["onnxsim"].fix == 'pip install "onnxsim==0.8.1"'
    assert found["timm"].state == "ok"
    assert found["torch build"].text == "for CUDA 12.6"
    assert found["onnxruntime"] == Finding("onnxruntime", "ok", "module onnxruntime from onnxruntime-gpu 1.23", "")
    assert (found["ssh"].state, found["ssh"].fix) == ("missing", "sudo apt install openssh-client")


def test_on_a_jetson_the_host_s_packages_are_not_urged(monkeypatch):
    versions(monkeypatch)
    monkeypatch.setattr(doctor_host, "find_spec", lambda _: None)
    monkeypatch.setattr(platform, "release", lambda: "5.15.148-tegra")
    found = {finding.topic: finding for finding in doctor.host()}
    assert found["torch"].state == "note" and "replace NVIDIA's own" in found["torch"].fix
    assert "torch build" not in found


def test_running_from_a_folder_is_said(monkeypatch):
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    found = {finding.topic: finding for finding in doctor.host()}
    assert found["cswap-deploy"].state == "missing" and "pip install" in found["cswap-deploy"].fix


def test_a_full_or_closed_disk_is_a_problem(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 39, 300 << 20))
    (finding,) = doctor_host._work_disk()
    assert finding.state == "problem" and "300.0 MiB free" in finding.text and "--work DIR" in finding.fix
    monkeypatch.setattr(os, "access", lambda *_: False)
    (finding,) = doctor_host._work_disk()
    assert finding.state == "problem" and "may not be written to" in finding.text


@pytest.mark.parametrize(
    ("version", "needs", "fits"),
    [
        ("1.18", ">=1.18,<2", True), ("1.18.0", "<2,>=1.18", True), ("2.0", ">=1.18,<2", False), ("1.9", ">=1.18", False),
        ("2.15.0+cpu", ">=2.9", True), ("2.5.0a0+872d972e41.nv24.08", ">=2.9", False), ("1.6.1", "==1.6.1", True),
        ("1.6.10", "==1.6.1", False), ("1.6", "==1.6.0", True), ("3", "~=2.1", True), ("1", "", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(version, needs, fits):
    assert doctor_host._satisfies(version, needs) is fits


def test_the_agent_s_own_probe_is_understood(tmp_path: Path):
    if not AGENT.exists():
        pytest.skip("the agent is not part of this checkout")
    agent = subprocess.Popen(
        [sys.executable, str(AGENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert agent.stdin and agent.stdout
    agent.stdin.write('{"schema": "cswap-deploy/agent/1", "verb": "probe"}\n')
    agent.stdin.flush()
    probe = json.loads(agent.stdout.readline())
    agent.communicate(timeout=30)
    found = asked(probe, "local")
    assert found["python"].text == f"Python {platform.python_version()}"
    assert found["store"].text.endswith(f"in {tmp_path / 'cswap-deploy'}")


def test_doctor_compares_the_target_with_a_recipe(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {name: resnet18}\ncalibration: {images: images}\nengine: {precision: fp16}\n"
    )
    done = run("-m", "cswap_deploy", "doctor", tmp_path / "r.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)["target"]["findings"]}
    if "ok" in {finding["state"] for topic, finding in found.items() if topic == "tensorrt"}:
        pytest.skip("this machine has TensorRT")
    assert (
        found["recipe: tensorrt"]["state"] == "problem"
        and "an engine needs TensorRT" in found["recipe: tensorrt"]["text"]
    )
