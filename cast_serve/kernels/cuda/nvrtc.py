"""CUDA C++ to machine code with NVRTC, which comes with torch: nobody needs nvcc. What was compiled is kept on disk.

The bindings are NVIDIA's own (`cuda-bindings`), which find the library wherever pip or the system put it.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conversion.errors import InputError

_OPTIONS = ("--std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True)
class Compiled:
    """Attributes: code: a cubin, or PTX; log: the compilers' report, with registers and spills of every kernel."""

    code: bytes
    log: str


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"kernels for GPUs need NVRTC and its bindings ({error}): pip install 'cast-serve[gpu]'"
        ) from error
    return nvrtc


@cache
def available() -> bool:
    try:
        _nvrtc()
    except InputError:
        return False
    return True


def compile_source(source: str, architecture: str) -> Compiled:
    """Compile for an architecture: "sm_90" or the like gives a cubin, "compute_90" PTX.

    Raises:
        InputError: NVRTC is missing; RuntimeError: it refuses the source, with its log.
    """
    nvrtc = _nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"cast24.cu", 0, [], [])
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_OPTIONS)]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.rstrip(b"\0").decode(errors="replace")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC could not compile for {architecture}: {result.name}\n{text}")
    size, get = (
        (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        if architecture.startswith("compute")
        else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    )
    code = bytearray(size(program)[1])
    get(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return Compiled(bytes(code), text)


def target(capability: tuple[int, int]) -> str:
    """What to compile for: the device (Hopper with wgmma), or the newest PTX, which the driver compiles on."""
    nvrtc = _nvrtc()
    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    known = nvrtc.nvrtcGetSupportedArchs()[1] if count else []
    wanted = capability[0] * 10 + capability[1]
    if wanted == 90:
        return "sm_90a"
    return f"sm_{wanted}" if wanted in known else f"compute_{max(arch for arch in known if arch <= wanted)}"


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cast-serve" / "kernels"


def cached_code(source: str, architecture: str) -> bytes:
    """Machine code of `source`, from the cache or compiled now; a cache that cannot be written is done without."""
    _, major, minor = _nvrtc().nvrtcVersion()
    key = hashlib.sha256("\0".join((source, architecture, f"{major}.{minor}", *_OPTIONS)).encode()).hexdigest()
    path = cache_directory() / f"{key[:32]}.{architecture}"
    if path.is_file():
        return path.read_bytes()
    code = compile_source(source, architecture).code
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # several processes may start at once: each writes a file of its own, and the last one to finish names it
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(code)
        os.replace(partial.name, path)
    except OSError:
        pass
    return code
