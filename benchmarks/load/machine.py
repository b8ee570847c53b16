"""The machine a measurement was taken on."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.load.measurements import Machine

PACKAGES = ("cast-serve", "onnxruntime", "locust", "numpy")
BUSY_CORES = 0.1
"""More than this, kept busy by others on an idle machine, makes a measurement worth little."""


def available_cores() -> int:
    """Cores this process may use, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine() -> Machine:
    return Machine(
        cpu=_cpu_model(),
        cores=available_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    )


def machine_cpu_s() -> float:
    """Seconds that all cores together have been busy since the machine started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return float(sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


def warn_if_busy(console: Console) -> None:
    """Look for two seconds whether anything runs, and say so."""
    clock, busy = time.perf_counter(), machine_cpu_s()
    time.sleep(2.0)
    cores = (machine_cpu_s() - busy) / (time.perf_counter() - clock)
    if cores > BUSY_CORES:
        console.print(
            f"[yellow]warning:[/] {cores:.2f} cores are busy before the test has begun: results will be noisy"
        )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
