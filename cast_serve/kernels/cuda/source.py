"""CUDA C++ of the kernels for weights and outputs of given types."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from cast_serve.kernels.cuda import warpgroup
from cast_serve.kernels.cuda.plan import Kernel, Types
from cast_serve.kernels.cuda.small_m import VARIANTS
from cast_serve.kernels.cuda.tiled import tiles

CSRC = Path(__file__).parent / "csrc"
SOURCES = ("tensor_core.cuh", "weights.cuh", "small_m.cuh", "tiled.cuh", "expand.cuh", "quantize.cuh")
HOPPER_SOURCES = (*SOURCES, "hopper.cuh", "warpgroup.cuh")


def linear_kernels(types: Types, hopper: bool = False) -> tuple[Kernel, ...]:
    """The kernels that multiply by a weight; `hopper`: those too that only sm_90a has."""
    return (*VARIANTS, *tiles(types), *(warpgroup.tiles(types) if hopper else ()))


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
