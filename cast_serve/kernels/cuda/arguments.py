"""What the kernels are given: structures that are the same in csrc/."""

import ctypes

from cast_serve.kernels.cuda.tensor_map import TensorMap


class LinearArguments(ctypes.Structure):
    """The structure of the same name in csrc/small_m.cuh."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("w_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("M", ctypes.c_int),
        ("N", ctypes.c_int),
        ("K", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("steps_per_split", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("group_steps", ctypes.c_int),
    ]


class WarpgroupArguments(ctypes.Structure):
    """The structure of the same name in csrc/warpgroup.cuh, whose size is a multiple of the map's alignment, 64."""

    _fields_ = [("x", TensorMap), ("linear", LinearArguments), ("padding", ctypes.c_longlong * 2)]


class ExpandArguments(ctypes.Structure):
    """The structure of the same name in csrc/expand.cuh."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("w_scale", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("N", ctypes.c_int),
        ("K", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("group_steps", ctypes.c_int),
    ]


class QuantizeArguments(ctypes.Structure):
    """The structure of the same name in csrc/quantize.cuh."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("quantized", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("quantized_stride", ctypes.c_longlong),
        ("K", ctypes.c_int),
        ("for_products", ctypes.c_int),
    ]
