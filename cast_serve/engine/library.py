"""What the kernel library has executed in this process's ONNX Runtime sessions."""

import ctypes

from cast_serve.kernels import library


def executed(op: str) -> tuple[int, int]:
    """Nodes of custom op `op` in this process's live sessions that have run, and the bytes of the weights they read."""
    count = library().cast24_ort_executed
    count.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64)]
    count.restype = ctypes.c_int64
    weight_bytes = ctypes.c_int64()
    nodes = count(op.encode(), ctypes.byref(weight_bytes))
    return nodes, weight_bytes.value
