"""The kernel for few rows of x: its variants, and how one call is cut into blocks."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cast_serve.kernels.cuda.layout import ROWS, STEP

CSRC = Path(__file__).parent / "csrc"
SOURCES = ("tensor_core.cuh", "weights.cuh", "small_m.cuh", "expand.cuh", "quantize.cuh")


@dataclass(frozen=True)
class Types:
    """What a kernel is made for: names of types in csrc/, of the weight and of y."""

    weight: str
    output: str


@dataclass(frozen=True)
class Variant:
    """Template arguments of `small_m_linear`, see csrc/small_m.cuh.

    Attributes:
        column_tiles: rows of x in a block, by 8.
        row_tiles: weight tiles of 16 rows in a warp.
        warps: in a block.
        warps_k: of these, how many share the columns of a weight tile; the others have tiles of their own.
        depth: steps of 64 columns that are on their way from memory.
        blocks: of a multiprocessor, for which registers are shared out.
    """

    column_tiles: int
    row_tiles: int = 1
    warps: int = 8
    warps_k: int = 1
    depth: int = 4
    blocks: int = 2

    @property
    def name(self) -> str:
        arguments = (self.column_tiles, self.row_tiles, self.warps, self.warps_k, self.depth, self.blocks)
        return "small_m_" + "_".join(map(str, arguments))

    def macro(self, types: Types) -> str:
        return (
            f"CAST24_SMALL_M({self.name}, {types.weight}, {types.output}, {self.column_tiles}, {self.row_tiles}, "
            f"{self.warps}, {self.warps_k}, {self.depth}, {self.blocks})"
        )


VARIANTS = (
    Variant(1, warps_k=4),
    Variant(2, warps_k=2),
    Variant(4),
    Variant(8, row_tiles=2, warps=4, depth=2),
)
"""For up to 8, 16, 32 and 64 rows of x. In the last, two weight tiles share each fragment of x from shared memory."""
MAX_ROWS = 8 * VARIANTS[-1].column_tiles


@cache
def source(types: Types, variants: tuple[Variant, ...] = VARIANTS) -> str:
    """CUDA C++ of the variants, without includes."""
    parts = [(CSRC / name).read_text().replace("#pragma once\n", "") for name in SOURCES]
    return "\n".join([*parts, *(variant.macro(types) for variant in variants), others(types)]) + "\n"


def others(types: Types) -> str:
    """The kernel `expand`; for products in 8 bits `quantize_rows`, which rounds x."""
    if types.weight in ("S8", "E4m3"):
        return f"CAST24_QUANTIZE({types.output}, {types.weight})"
    return f"CAST24_EXPAND({types.weight}, {types.output})"


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
    ]


@dataclass(frozen=True)
class Plan:
    """How one call is cut into blocks.

    Attributes:
        grid: blocks along N, splits of K, blocks along M.
    """

    variant: Variant
    grid: tuple[int, int, int]
    row_tiles: int
    steps: int
    steps_per_split: int

    @property
    def splits(self) -> int:
        return self.grid[1]

    @property
    def partial_bytes(self) -> int:
        """Of the partial sums: 16 for each lane and tile of 16 x 8; none without splits."""
        if self.splits == 1:
            return 0
        return self.grid[2] * self.splits * self.row_tiles * self.variant.column_tiles * 512

    @property
    def counters(self) -> int:
        return self.grid[0] * self.grid[2]


@cache
def plan(
    M: int, N: int, K: int, multiprocessors: int, variant: Variant | None = None, splits: int | None = None
) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into blocks: K is split as far as that gives every multiprocessor its blocks.

    Args:
        variant, splits: instead of those chosen here.
    """
    if variant is None:
        variant = next((v for v in VARIANTS if 8 * v.column_tiles >= M), VARIANTS[-1])
    row_tiles, steps = -(-N // ROWS), -(-K // STEP)
    along_n = -(-row_tiles * variant.warps_k // (variant.row_tiles * variant.warps))
    along_m = -(-M // (8 * variant.column_tiles))
    if splits is None:
        splits = variant.blocks * multiprocessors // (along_n * along_m)
    splits = max(1, min(splits, steps // (variant.depth * variant.warps_k)))
    steps_per_split = -(-steps // splits)
    return Plan(variant, (along_n, -(-steps // steps_per_split), along_m), row_tiles, steps, steps_per_split)
