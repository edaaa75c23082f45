"""Boards as their kernels describe them: files of /proc, /sys, /etc and /var below a folder, in the form that each L4T release has.

Values were put together from public descriptions of these files, not copied from one board. `FACTS` is what the agent must read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

L4T = "# R{} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
CONF = "".join(
    f"< POWER_MODEL ID={number} NAME={name} >\n" for number, name in enumerate(("15W", "25W", "MAXN_SUPER", "7W"))
)
CPU = "sys/devices/system/cpu/cpu0/cpufreq/"


def devfreq(name: str, current: int, low: int, high: int, load: int | None) -> dict[str, str]:
    """Hz, and the load per mille."""
    folder = f"sys/class/devfreq/{name}"
    files = {"cur_freq": current, "min_freq": low, "max_freq": high, "governor": "nvhost_podgov"}
    return {f"{folder}/{key}": f"{value}\n" for key, value in files.items()} | (
        {f"{folder}/device/load": f"{load}\n"} if load is not None else {}
    )


def ina3221(place: str, *channels: tuple[str, int, int]) -> dict[str, str]:
    """Channels of label, mV and mA, from 1; channel 7 is the sum of shunt voltages."""
    folder = f"sys/bus/i2c/devices/{place}"
    files = {f"{folder}/name": "ina3221\n", f"{folder}/hwmon/hwmon1/in7_label": "sum of shunt voltages\n"}
    for number, (label, millivolt, milliampere) in enumerate(channels, 1):
        files |= {f"{folder}/hwmon/hwmon1/in{number}_label": f"{label}\n"}
        files |= {f"{folder}/hwmon/hwmon1/in{number}_input": f"{millivolt}\n"}
        files |= {f"{folder}/hwmon/hwmon1/curr{number}_input": f"{milliampere}\n"}
    return files


def zones(**degrees: int) -> dict[str, str]:
    """Milli-degrees by zone; -256000 is one that is off."""
    named = {name.replace("_", "-"): value for name, value in degrees.items()}
    return {
        f"sys/class/thermal/thermal_zone{number}/{key}": f"{value}\n"
        for number, (name, temp) in enumerate(named.items())
        for key, value in (("type", name), ("temp", temp))
    }


def clocks(current: int, low: int, high: int, most: int, governor: str) -> dict[str, str]:
    """kHz."""
    values = {"scaling_cur_freq": current, "scaling_min_freq": low, "scaling_max_freq": high, "cpuinfo_max_freq": most}
    return {CPU + key: f"{value}\n" for key, value in values.items()} | {CPU + "scaling_governor": f"{governor}\n"}


ARM = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n"
FILES: dict[str, dict[str, str]] = {
    "Orin Nano, JetPack 6": {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "proc/meminfo": "MemTotal:        7802808 kB\nMemFree:          400000 kB\nMemAvailable:    6100000 kB\n",
        "proc/cpuinfo": ARM,
        "etc/nv_tegra_release": L4T.format(36, "4.3"),
        "etc/nvpmodel.conf": CONF,
        "var/lib/nvpmodel/status": "pmode:0002\n",
        **devfreq("17000000.gpu", 1_020_000_000, 1_020_000_000, 1_020_000_000, 37),
        **devfreq("15340000.vic", 115_200_000, 115_200_000, 729_600_000, None),
        **ina3221("1-0040", ("VDD_IN", 5040, 1200), ("VDD_CPU_GPU_CV", 5032, 330), ("VDD_SOC", 5032, 460)),
        **zones(cpu_thermal=48906, gpu_thermal=49593, cv0_thermal=-256000, tj_thermal=49593),
        **clocks(1_728_000, 1_728_000, 1_728_000, 1_728_000, "performance"),
    },
    "AGX Orin, JetPack 5": {
        "proc/device-tree/model": "Jetson AGX Orin\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0000\0nvidia,tegra23x\0nvidia,tegra234\0",
        "proc/meminfo": "MemTotal:       31262492 kB\nMemAvailable:   27000000 kB\n",
        "proc/cpuinfo": ARM,
        "etc/nv_tegra_release": L4T.format(35, "4.1"),
        "var/lib/nvpmodel/status": "pmode:0003\n",
        **devfreq("17000000.ga10b", 306_000_000, 306_000_000, 1_300_500_000, 0),
        **ina3221("1-0040", ("VDD_GPU_SOC", 19_936, 160), ("VDD_CPU_CV", 19_936, 40), ("VIN_SYS_5V0", 4984, 600)),
        **ina3221("1-0041", ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 19_936, 24), ("NC", 0, 0)),
        **zones(CPU_therm=43500, GPU_therm=-256000),
        **clocks(729_600, 729_600, 2_201_600, 2_201_600, "schedutil"),
    },
    "Thor, JetPack 7": {
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3971-0089+p3834-0008\0nvidia,tegra264\0",
        "proc/meminfo": "MemTotal:      128790572 kB\nMemAvailable:  120000000 kB\n",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 2000.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd83\n" * 2,
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA Thor\nIRQ:   \t\t 300\n",
        "etc/nv_tegra_release": L4T.format(38, "2.0"),
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
        "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNULL\n",
        **devfreq("gpu-gpc-0", 1_575_000_000, 315_000_000, 1_575_000_000, None),
        **zones(tj_thermal=51000),
        **clocks(2_601_000, 972_000, 2_601_000, 2_601_000, "performance"),
    },
    "x86 with a GPU": {
        "proc/meminfo": "MemTotal:       32768000 kB\nMemAvailable:   20480000 kB\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i7-10700 CPU @ 2.90GHz\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4060\nIRQ:   \t\t 140\n",
        **zones(x86_pkg_temp=55000, acpitz=27800),
        **clocks(800_000, 800_000, 4_800_000, 4_800_000, "powersave"),
    },
}
FACTS: dict[str, dict[str, Any]] = {
    "Orin Nano, JetPack 6": {
        "board": {
            "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "l4t": "36.4.3", "chip": "tegra234",
            "power_mode": "MAXN_SUPER", "gpu_clocks_locked": True,
        },
        "gpu": {"mhz": 1020, "min_mhz": 1020, "max_mhz": 1020, "locked": True, "governor": "nvhost_podgov", "load": 3.7},
        "rails_mw": {"VDD_IN": 6048.0, "VDD_CPU_GPU_CV": 1660.56, "VDD_SOC": 2314.72},
        "temperature_c": 49.593,
        "zones_c": {"cpu-thermal": 48.906, "gpu-thermal": 49.593, "tj-thermal": 49.593},
        "memory_mb": 7619, "memory_free_mb": 5957,
        "cpu": {"mhz": 1728, "max_mhz": 1728, "locked": True, "governor": "performance", "model": "ARMv8 Processor rev 1 (v8l)"},
    },
    "AGX Orin, JetPack 5": {
        "board": {"model": "Jetson AGX Orin", "l4t": "35.4.1", "chip": "tegra234", "power_mode": "mode 3", "gpu_clocks_locked": False},
        "gpu": {"mhz": 306, "min_mhz": 306, "max_mhz": 1300, "locked": False, "governor": "nvhost_podgov", "load": 0.0},
        "rails_mw": {"VDD_GPU_SOC": 3189.76, "VDD_CPU_CV": 797.44, "VIN_SYS_5V0": 2990.4, "VDDQ_VDD2_1V8AO": 478.464},
        "temperature_c": 43.5, "zones_c": {"CPU-therm": 43.5},
        "memory_mb": 30529,
        "cpu": {"mhz": 729, "max_mhz": 2201, "locked": False, "governor": "schedutil"},
    },
    "Thor, JetPack 7": {
        "board": {
            "model": "NVIDIA Jetson AGX Thor Developer Kit", "l4t": "38.2.0", "chip": "tegra264", "power_mode": "120W",
            "gpu_clocks_locked": False,
        },
        "gpu": {"mhz": 1575, "min_mhz": 315, "max_mhz": 1575, "locked": False, "governor": "nvhost_podgov", "load": None},
        "rails_mw": {}, "temperature_c": 51.0,
        "cpu": {"mhz": 2601, "locked": False, "model": f"{os.uname().machine} 0x41 0xd83"},
        "tensorrt": {"gpu": "NVIDIA Thor"},
    },
    "x86 with a GPU": {
        "board": None, "gpu": None, "rails_mw": {}, "temperature_c": 55.0, "memory_mb": 32000,
        "cpu": {"mhz": 800, "max_mhz": 4800, "model": "Intel(R) Core(TM) i7-10700 CPU @ 2.90GHz"},
        "tensorrt": {"gpu": "NVIDIA GeForce RTX 4060"},
    },
}  # fmt: skip


def lay_out(name: str, folder: Path) -> Path:
    for path, text in FILES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder
