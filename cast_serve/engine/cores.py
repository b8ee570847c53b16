"""How many cores this process may compute on."""

import os
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def usable_cores(cpus: Path = _CPUS, cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Physical cores within the process's affinity (taskset, cpusets) and its control group's quota (containers).

    ONNX Runtime's own default counts the machine's cores: within a container or under taskset its spinning threads then
    take the cores from each other.
    """
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cores = {_siblings(cpus, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min([len(cores), *_quotas(cgroups, membership)]))


def _siblings(cpus: Path, cpu: int) -> str:
    """The hardware threads of the core that has this one."""
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quotas(cgroups: Path, membership: Path) -> list[int]:
    """Whole CPUs that the process's control group (version 2) and each one around it grant."""
    try:
        group = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        group = "/"
    own = cgroups / group.lstrip("/")
    granted = []
    for folder in (own, *own.parents):
        if folder.is_relative_to(cgroups) and (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                granted.append(int(quota) // int(period))
    return granted
