"""2:4 sparse and dense linear layers on the CPU, for ONNX Runtime and for torch.

`torch.ops.cast24.linear` and `torch.ops.cast24.linear_packed` are registered by importing this package after torch, or
by importing `cast_serve.kernels.torch_ops`, which imports torch itself. Without torch in the process this package never
imports it: serving on ONNX Runtime needs only `library_path`.
"""

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.errors import InputError

if TYPE_CHECKING:
    from cast_serve.kernels.torch_ops import prepack, prepack_quantized

__all__ = ["ISAS", "isa", "library", "library_path", "prepack", "prepack_quantized", "set_isa"]

ISAS = {
    "x86_64": ("avx512wide", "avx512bf16", "avx512vnni", "avx512", "avx2", "portable"),
    "aarch64": ("neondot", "neon", "portable"),
}.get(platform.machine(), ("portable",))
"""Instruction sets that the kernels are written for on this kind of machine, in order of preference."""


def library_path() -> Path:
    """Where libcast24.so is: the C API of `csrc/cast24.h` and, for ONNX Runtime, `RegisterCustomOps`."""
    path = Path(__file__).parent / "libcast24.so"
    if not path.exists():
        raise InputError(f"the kernel library {path} is not built: install the package again, with a C++ compiler")
    return path


@cache
def library() -> ctypes.CDLL:
    """The kernel library, loaded."""
    loaded = ctypes.CDLL(str(library_path()))
    loaded.cast24_isa.restype = ctypes.c_char_p
    loaded.cast24_set_isa.argtypes = [ctypes.c_char_p]
    for name in ("cast24_prepack_f32", "cast24_prepack_bf16"):
        prepack_function = getattr(loaded, name)
        prepack_function.restype = ctypes.c_int64
        prepack_function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] + [
            ctypes.c_void_p
        ] * 2
    loaded.cast24_quantized_panel_bytes.restype = ctypes.c_int64
    loaded.cast24_quantized_panel_bytes.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    loaded.cast24_prepack_quantized.restype = ctypes.c_int64
    loaded.cast24_prepack_quantized.argtypes = [
        *[ctypes.c_void_p] * 3,
        *[ctypes.c_int64] * 3,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    loaded.cast24_quantized_rows.restype = None
    loaded.cast24_quantized_rows.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return loaded


def isa() -> str:
    """The instruction set in use: one of ISAS, the best that this machine supports unless told otherwise.

    The environment variable CAST24_ISA names another; one that the machine lacks is refused with a line on stderr.
    """
    return library().cast24_isa().decode()


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in this process; InputError if the machine lacks it."""
    if library().cast24_set_isa(name.encode()) != 0:
        raise InputError(f"instruction set '{name}' is unknown or this machine lacks it: use one of {', '.join(ISAS)}")


def __getattr__(name: str) -> Any:
    if name in ("prepack", "prepack_quantized"):
        from cast_serve.kernels import torch_ops

        return getattr(torch_ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "torch" in sys.modules and (Path(__file__).parent / "_torch.so").exists():
    from cast_serve.kernels import torch_ops as torch_ops
