"""The tensor memory accelerator's description of x: a matrix, and the boxes that are copied of it."""

import ctypes
from functools import cache, lru_cache
from typing import Any

_UINT8, _UINT16, _SWIZZLE_128B, _L2_PROMOTION_256B = 0, 1, 3, 3  # of CUtensorMapDataType, ...Swizzle, ...L2promotion
_SIZE, _ALIGNMENT = 128, 64


class TensorMap(ctypes.Structure):
    """A matrix and the size of its boxes; of as many bytes as the driver's encoding of it.

    itemsize: bytes of a value, 1 or 2.
    stride: bytes from row to row, at least those of a row, a multiple of 16, as the address is.
    """

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("itemsize", ctypes.c_longlong),
        ("columns", ctypes.c_longlong),
        ("rows", ctypes.c_longlong),
        ("stride", ctypes.c_longlong),
        ("box_columns", ctypes.c_longlong),
        ("box_rows", ctypes.c_longlong),
        ("unused", ctypes.c_longlong * 9),
    ]


def encoded(described: TensorMap) -> TensorMap:
    """The same as the GPU takes it: rows of boxes, 128 bytes, swizzled; zeros for what is outside of the matrix."""
    sizes = (described.columns, described.rows, described.stride, described.box_columns, described.box_rows)
    return TensorMap.from_buffer_copy(_encode(described.address, described.itemsize, *sizes))


@lru_cache(4096)
def _encode(
    address: int, itemsize: int, columns: int, rows: int, stride: int, box_columns: int, box_rows: int
) -> bytes:
    # cuda.bindings has this function too, but leaves the map where Python puts the object: not aligned as it must be
    room = ctypes.create_string_buffer(_SIZE + _ALIGNMENT)
    aligned = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        ctypes.c_int(_UINT8 if itemsize == 1 else _UINT16),
        ctypes.c_uint32(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(stride),
        (ctypes.c_uint32 * 2)(box_columns, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_L2_PROMOTION_256B),
        ctypes.c_int(0),
    )
    if error != 0:
        raise RuntimeError(f"the CUDA driver answered {error} to a tensor map of {rows} x {columns}, {stride} apart")
    return ctypes.string_at(aligned, _SIZE)


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
