"""What the agent reads on four boards, and what the host says about the conditions of a measurement."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import boards
import pytest
import sshd
from test_agent import Agent, here

from cswap_deploy import manifest
from cswap_deploy.device import conditions, protocol
from cswap_deploy.report import words

NANO = "Orin Nano, JetPack 6"


def on(folder: Path, name: str) -> Agent:
    return Agent(
        folder / "cache", {"CSWAP_DEPLOY_ROOT": str(boards.lay_out(name, folder / "root")), "PATH": "/usr/bin:/bin"}
    )


@pytest.mark.parametrize("name", boards.FACTS)
def test_probe_reads_a_board(tmp_path: Path, name: str) -> None:
    document = on(tmp_path, name).ask("probe")
    for key, expected in boards.FACTS[name].items():
        if isinstance(expected, dict) and key in ("cpu", "tensorrt"):
            assert {part: document[key][part] for part in expected} == expected
        else:
            assert document[key] == pytest.approx(expected) if key == "rails_mw" else document[key] == expected, key


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    """No folder at all, and files without a number in them."""
    document = Agent(tmp_path / "cache", {"CSWAP_DEPLOY_ROOT": str(tmp_path / "nowhere")}).ask("probe")
    assert document["board"] is document["gpu"] is document["temperature_c"] is None
    assert document["cpu"]["governor"] is document["cpu"]["mhz"] is document["cpu"]["locked"] is None
    assert document["rails_mw"] == document["zones_c"] == {} and document["memory_mb"] == 0
    agent = on(tmp_path, NANO)
    for path in (tmp_path / "root").rglob("*"):
        if path.is_file() and path.name != "model":
            path.write_bytes(b"\xff garbage \0\n")
    document = agent.ask("probe")
    assert document["board"] | {"model": ""} == {
        "model": "", "l4t": None, "chip": None, "power_mode": None, "gpu_clocks_locked": None
    }  # fmt: skip
    assert document["gpu"]["mhz"] is document["gpu"]["load"] is None and document["rails_mw"] == {}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of microseconds, on a machine that is described as an Orin Nano."""
    folder = tmp_path_factory.mktemp("board")
    model = sshd.classifier(folder / "model.onnx")
    agent = on(folder, NANO)
    document = agent.ask(
        "measure",
        runtime="onnxruntime",
        models=[here(model)],
        warmup_s=0,
        duration_s=0.6,
        cold=3,
        pause_s=0.01,
        energy_s=0.5,
    )
    assert "error" not in document and not list((agent.store / "tmp").iterdir())
    return document


def test_a_board_is_watched_while_it_measures(measured: dict[str, Any]) -> None:
    moments = measured["watch"]["moments"]
    times = [ns for ns, _ in moments]
    assert times == sorted(times) and len(moments) >= 8, "ten a second, before, during and after"
    assert times[0] < measured["idle_until_ns"] < measured["sampling_ns"][0] < times[-1]
    assert all(state["gpu"]["mhz"] == 1020 and state["rails_mw"]["VDD_IN"] == 6048 for _, state in moments)
    [energy], [cold] = measured["energy"], measured["cold"]
    assert energy["runs"] > 10 and energy["end_ns"] - energy["start_ns"] >= 0.5e9 and len(cold) == 3


def longer(document: dict[str, Any]) -> dict[str, Any]:
    """The same as if the run for the energy had taken 20 s of 400 inferences."""
    changed = deepcopy(document)
    start = changed["energy"][0]["start_ns"]
    changed["energy"] = [{"start_ns": start, "end_ns": start + 20_000_000_000, "runs": 400}]
    return changed


def test_conditions_of_a_board_that_is_as_it_should_be(measured: dict[str, Any]) -> None:
    found = conditions.describe(longer(measured))
    assert (found["device"], found["power_mode"], found["l4t"]) == (
        boards.FACTS[NANO]["board"]["model"],
        "MAXN_SUPER",
        "36.4.3",
    )
    assert (
        found["gpu_mhz_lowest"] == found["gpu_mhz_highest"] == 1020
        and found["throttled"] is False
        and found["hottest_c"] == 49.593
    )
    assert found["power_w"] == found["idle_power_w"] == pytest.approx(6.048)
    assert found["rails_w"] == pytest.approx({"VDD_IN": 6.048, "VDD_CPU_GPU_CV": 1.66056, "VDD_SOC": 2.31472})
    assert words.fact(found["rails_w"]) == "VDD_CPU_GPU_CV 1.661, VDD_IN 6.048, VDD_SOC 2.315", "as the report shows it"
    assert (found["jetpack"], found["cuda"]) == ("6.2", None), "ONNX Runtime on the CPU takes no CUDA"
    assert conditions.energy_mj(longer(measured)) == (pytest.approx(6.048 * 20 / 400 * 1000),)
    assert found["gpu_load_before_percent"] == pytest.approx(3.7)
    assert list(conditions.faults(found, "tensorrt")) == []


def test_energy_of_a_short_run_is_not_given(measured: dict[str, Any]) -> None:
    assert conditions.energy_mj(measured) == ()


def test_energy_is_not_given_where_not_all_of_the_power_is_known(measured: dict[str, Any]) -> None:
    changed = longer(measured)
    for _, state in changed["watch"]["moments"]:
        del state["rails_mw"]["VDD_IN"]
    assert conditions.energy_mj(changed) == () and conditions.describe(changed)["power_w"] is None


def test_an_agx_board_s_power_is_the_sum_of_three_rails() -> None:
    rails = boards.FACTS["AGX Orin, JetPack 5"]["rails_mw"]
    assert conditions._total(rails) == pytest.approx(3189.76 + 797.44 + 2990.4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mhz": 816}, "its clock fell to 816 of 1020 MHz although it is locked"),
        ({"load": 55.0}, "something else used the GPU before (55 % load"),
        ({"mhz": 816, "locked": False}, None),
    ],
)
def test_what_disturbs_a_measurement_is_said(
    measured: dict[str, Any], change: dict[str, Any], words: str | None
) -> None:
    changed = deepcopy(measured)
    for _, state in changed["watch"]["moments"]:
        state["gpu"] |= change
    faults = list(conditions.faults(conditions.describe(changed), "tensorrt"))
    assert (len(faults) == 1 and words in faults[0]) if words else faults == []


def test_a_clock_that_is_not_locked_matters_to_engines_only(measured: dict[str, Any]) -> None:
    changed = deepcopy(measured)
    changed["after"]["board"]["gpu_clocks_locked"] = False
    found = conditions.describe(changed)
    assert ["not locked" in text for text in conditions.faults(found, "tensorrt")] == [True]
    assert list(conditions.faults(found, "onnxruntime")) == []


def test_tegrastats_serves_where_nothing_else_can_be_read(tmp_path: Path) -> None:
    """A program that prints its lines until it is ended, as the real one does."""
    line = "RAM 519/7607MB (lfb 61x4MB) GR3D_FREQ 0%@[1018] tj@49.5C VDD_IN 5971mW/5971mW VDD_SOC 2308mW/2308mW"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tegrastats"
    program.write_text(f'#!/bin/sh\nwhile :; do echo "{line}"; {shutil.which("sleep")} 0.05; done\n')
    program.chmod(0o755)
    agent = Agent(tmp_path / "cache", {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    if agent.ask("probe")["gpu"]:
        pytest.skip("this machine is a Jetson")
    model = sshd.classifier(tmp_path / "model.onnx")
    document = agent.ask("measure", runtime="onnxruntime", models=[here(model)], warmup_s=0, duration_s=0.05)
    assert "error" not in document and line in document["watch"]["tegrastats"]
    assert [*manifest.faults(document, protocol.response_schema("measure"))] == []
    document["after"]["gpu"] = {"max_mhz": 1020, "governor": None}
    found = conditions.describe(document)
    assert found["power_w"] == pytest.approx(5.971) and found["gpu_mhz_lowest"] == found["gpu_mhz_highest"] == 1018
