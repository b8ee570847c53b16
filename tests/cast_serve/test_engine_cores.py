"""How many threads the engine takes where it may not have the whole machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cast_serve.engine.cores import usable_cores
from tests.cast_serve.tiny_llama import Tiny


def machine(
    folder: Path, siblings: dict[int, str], quotas: dict[str, str], group: str = "/"
) -> tuple[Path, Path, Path]:
    """A fake /sys/devices/system/cpu, /sys/fs/cgroup and /proc/self/cgroup."""
    for cpu, text in siblings.items():
        (folder / f"cpus/cpu{cpu}/topology").mkdir(parents=True)
        (folder / f"cpus/cpu{cpu}/topology/thread_siblings_list").write_text(text + "\n")
    for name, text in quotas.items():
        (folder / "cgroups" / name).mkdir(parents=True, exist_ok=True)
        (folder / "cgroups" / name / "cpu.max").write_text(text + "\n")
    (folder / "membership").write_text(f"1:name=systemd:/other\n0::{group}\n")
    return folder / "cpus", folder / "cgroups", folder / "membership"


HYPERTHREADS = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}


@pytest.mark.parametrize(
    ("affinity", "quotas", "group", "cores"),
    [
        (set(range(8)), {}, "/", 4),
        ({0, 4}, {}, "/", 1),
        ({0, 1, 6}, {".": "max 100000"}, "/", 3),
        (set(range(8)), {".": "250000 100000"}, "/", 2),
        (set(range(8)), {"box": "300000 100000", "box/server": "max 100000"}, "/box/server", 3),
        (set(range(8)), {"box/server": "50000 100000"}, "/box/server", 1),
        (set(range(8)), {"elsewhere": "100000 100000"}, "/box/server", 4),
    ],
)
def test_cores_are_those_of_affinity_and_quota(
    affinity: set[int],
    quotas: dict[str, str],
    group: str,
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    assert usable_cores(*machine(tmp_path, HYPERTHREADS, quotas, group)) == cores


def test_without_those_files_each_cpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 6})
    assert usable_cores(tmp_path, tmp_path, tmp_path / "none") == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system sets no affinity")
def test_an_engine_on_one_core_takes_no_further_thread(tiny: Tiny) -> None:
    """Two spinning threads on one core halve its tokens per second."""
    code = f"""
import os, threading
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from pathlib import Path
from cast_serve.engine.onnx_model import ort
from cast_serve.engine import Engine
before = len(os.listdir("/proc/self/task"))
engine = Engine(Path({str(tiny.onnx)!r}))
print(len(os.listdir("/proc/self/task")) - before)
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"  # the engine's own
