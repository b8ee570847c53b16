"""Builds the driver and the operator."""

import ctypes
import subprocess
from pathlib import Path

from cast_serve.kernels.cuda.source import CSRC
from tests.cast_serve.cuda_emulation.runner import Emulation

HERE = Path(__file__).parent
MULTIPROCESSORS = 20


class FakeCuda:
    """Attributes: operators: the library for ONNX Runtime, whose Sparse24MatMulGpu runs in the emulation."""

    def __init__(self, directory: Path, emulation: Emulation) -> None:
        driver, self.operators = directory / "driver.so", directory / "operators.so"
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", f"-I{CSRC.parents[1] / 'csrc'}"]
        defined = [f'-DEMULATION="{emulation.library}"', f"-DMULTIPROCESSORS={MULTIPROCESSORS}"]
        subprocess.run([*command, *defined, str(HERE / "driver.cpp"), "-o", str(driver)], check=True)
        defined = [f'-DCAST24_CUDA_DRIVER="{driver}"', '-DCAST24_GPU_PROVIDER="CPUExecutionProvider"']
        subprocess.run([*command, *defined, str(HERE / "ops.cpp"), "-o", str(self.operators), "-ldl"], check=True)
        self._launched = ctypes.CDLL(str(driver)).launched
        self._launched.restype = ctypes.c_char_p
        self._seen = 0

    def launches(self) -> list[str]:
        """Kernel and grid of every launch since the last call."""
        new = []
        while (launch := self._launched(self._seen)) is not None:
            new.append(launch.decode())
            self._seen += 1
        return new
