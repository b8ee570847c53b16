"""CUDA C++ of the kernels for weights and outputs of given types."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from cast_serve.kernels.cuda.plan import Kernel, Types
from cast_serve.kernels.cuda.small_m import VARIANTS
from cast_serve.kernels.cuda.tiled import tiles
from cast_serve.kernels.cuda.warpgroup import TILES as WARPGROUP_TILES

CSRC = Path(__file__).parent / "csrc"
SOURCES = ("tensor_core.cuh", "weights.cuh", "small_m.cuh", "tiled.cuh", "expand.cuh", "quantize.cuh")
HOPPER_SOURCES = (*SOURCES, "hopper.cuh", "warpgroup.cuh")


def linear_kernels(types: Types, hopper: bool = False) -> tuple[Kernel, ...]:
    """The kernels that multiply by a weight; `hopper`: those of sm_90a.

    Products in 8 bits are for many rows of x, since few wait for the weight. Hopper has no mma.sp of 8-bit floats.
    """
    few = () if types.in_8_bits else VARIANTS
    many = () if hopper and types.weight == "E4m3" else tiles(types)
    return (*few, *many, *(WARPGROUP_TILES if hopper else ()))


def macros(types: Types, linear: Iterable[Kernel]) -> list[str]:
    """What makes the kernels `linear` and `expand`, or for products in 8 bits `quantize_rows`, which rounds x."""
    made = [kernel.macro(types) for kernel in linear]
    if types.in_8_bits:
        return [*made, f"CAST24_QUANTIZE({types.output}, {types.weight})"]
    return [*made, f"CAST24_EXPAND({types.weight}, {types.output})"]


@cache
def source(types: Types, linear: tuple[Kernel, ...] | None = None, *, hopper: bool = False) -> str:
    """CUDA C++, without includes, of these kernels or of all."""
    names = HOPPER_SOURCES if hopper else SOURCES
    parts = [(CSRC / name).read_text().replace("#pragma once\n", "") for name in names]
    return "\n".join([*parts, *macros(types, linear_kernels(types, hopper) if linear is None else linear)]) + "\n"
