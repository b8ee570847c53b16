"""The kernel library as the engine sees it: where it is, which instruction set it uses, what it has executed."""

import ctypes
from functools import cache
from pathlib import Path

import cast_serve
from conversion.errors import InputError

# Found by path: importing cast_serve.kernels registers torch operators, and serving needs no torch.
LIBRARY = Path(cast_serve.__file__).parent / "kernels" / "libcast24.so"


def require_library() -> Path:
    """The path of the kernel library, for `register_custom_ops_library`; InputError if it is not built."""
    if not LIBRARY.is_file():
        raise InputError(f"the kernel library {LIBRARY} is not built: install the package again, with a C++ compiler")
    return LIBRARY


@cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(require_library()))
    library.cast24_isa.restype = ctypes.c_char_p
    library.cast24_ort_executed.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64)]
    library.cast24_ort_executed.restype = ctypes.c_int64
    return library


def instruction_set() -> str:
    """Name of the instruction set in use: "avx512", "avx2" or "portable"."""
    return _load().cast24_isa().decode()


def executed(op: str) -> tuple[int, int]:
    """Nodes of custom op `op` in this process's live sessions that have run, and the bytes of the weights they read."""
    weight_bytes = ctypes.c_int64()
    nodes = _load().cast24_ort_executed(op.encode(), ctypes.byref(weight_bytes))
    return nodes, weight_bytes.value
