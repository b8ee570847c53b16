"""A `cast serve` process under measurement: started, asked what it runs, weighed, stopped."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.load.measurements import Memory, ServedModel
from conversion.errors import InputError

START_TIMEOUT_S = 1800.0
"""The first start of a model converts it for the runtime, which takes minutes for a large one."""
LOG_TAIL_LINES = 8
STOP_TIMEOUT_S = 10.0


def serve_command(model: Path, port: int, threads: int | None) -> list[str]:
    command = [sys.executable, "-m", "cast_serve.cli", "serve", str(model), "--port", str(port)]
    return command if threads is None else [*command, "--threads", str(threads)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weight_files_bytes(directory: Path) -> int:
    """Bytes of a model directory's weight files; of the graph and its weights where it is for ONNX Runtime."""
    files = [*directory.glob("*.safetensors")] or directory.glob("model.onnx*")
    return sum(path.stat().st_size for path in files)


class Server:
    """One server process on a free port of this machine; use as a context manager.

    Args:
        name: how messages call it.
        model: the directory it serves.
        log: file that receives its output.
        command: argument list that serves `model` on a port.
    """

    def __init__(self, name: str, model: Path, log: Path, command: Callable[[Path, int], Sequence[str]]) -> None:
        self.name = name
        self.model = model
        self.log = log
        self.port = free_port()
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self.start_s = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command(self.model, self.port), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._running
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server is started by entering its context"
        return self._process

    def wait_ready(self, poll_s: float = 0.1) -> None:
        """Return when /health answers 200. InputError with the end of the log if the server dies or stays silent."""
        while True:
            self.check_alive()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    self.start_s = time.perf_counter() - self._started
                    return
            except (urllib.error.URLError, OSError):
                pass
            if time.perf_counter() - self._started > START_TIMEOUT_S:
                raise InputError(f"the {self.name} server did not answer in {START_TIMEOUT_S:.0f} s{self.log_tail()}")
            time.sleep(poll_s)

    def check_alive(self) -> None:
        """InputError with the end of the log if the process has ended."""
        code = self._running.poll()
        if code is not None:
            raise InputError(f"the {self.name} server ({self.model}) ended with exit code {code}{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of the log, ready to follow a sentence."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LOG_TAIL_LINES:]
        return "".join(["; its last output:", *(f"\n    {line}" for line in lines)]) if lines else ""

    def describe(self) -> ServedModel:
        """Ask GET /v1/models/{id} what the server runs."""
        model_id = self._get_json("/v1/models")["data"][0]["id"]
        proof = self._get_json(f"/v1/models/{urllib.parse.quote(model_id)}")["cast24"]
        return ServedModel(
            directory=str(self.model),
            id=model_id,
            disk_bytes=weight_files_bytes(self.model),
            start_s=self.start_s,
            **proof,
        )

    def memory(self) -> Memory:
        process = psutil.Process(self._running.pid)
        try:
            full = process.memory_full_info()
            unique, proportional = full.uss, getattr(full, "pss", None)
        except (psutil.AccessDenied, AttributeError):
            unique = proportional = None
        return Memory(
            resident=self.resident(),
            peak_resident=_peak_resident(process.pid),
            unique=unique,
            proportional=proportional,
            reported=self._reported_memory(),
        )

    def resident(self) -> int:
        """Resident set size in bytes."""
        return int(psutil.Process(self._running.pid).memory_info().rss)

    def cpu_s(self) -> float:
        """Processor seconds used so far."""
        times = psutil.Process(self._running.pid).cpu_times()
        return float(times.user + times.system)

    def _reported_memory(self) -> int | None:
        for line in self._get("/metrics").decode().splitlines():
            if line.startswith("cast:resident_memory_bytes "):
                return int(float(line.split()[1]))
        return None

    def _get_json(self, path: str) -> Any:
        return json.loads(self._get(path))

    def _get(self, path: str) -> bytes:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                return bytes(answer.read())
        except (urllib.error.URLError, OSError) as error:
            self.check_alive()
            raise InputError(f"the {self.name} server did not answer {path}: {error}{self.log_tail()}") from None


def _peak_resident(pid: int) -> int:
    """VmHWM, the largest resident set so far (Linux); the present one elsewhere."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return int(psutil.Process(pid).memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
