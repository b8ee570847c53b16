"""CUDA C++ of the kernels for weights and outputs of given types."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from cast_serve.kernels.cuda.plan import Kernel, Types
from cast_serve.kernels.cuda.small_m import VARIANTS
from cast_serve.kernels.cuda.tiled import tiles

CSRC = Path(__file__).parent / "csrc"
SOURCES = ("tensor_core.cuh", "weights.cuh", "small_m.cuh", "tiled.cuh", "expand.cuh", "quantize.cuh")


def linear_kernels(types: Types) -> tuple[Kernel, ...]:
    """The kernels that multiply by a weight."""
    return (*VARIANTS, *tiles(types))


def macros(types: Types, linear: Iterable[Kernel]) -> list[str]:
    """What makes the kernels `linear` and `expand`, or for products in 8 bits `quantize_rows`, which rounds x."""
    made = [kernel.macro(types) for kernel in linear]
    if types.in_8_bits:
        return [*made, f"CAST24_QUANTIZE({types.output}, {types.weight})"]
    return [*made, f"CAST24_EXPAND({types.weight}, {types.output})"]


@cache
def source(types: Types, linear: tuple[Kernel, ...] | None = None) -> str:
    """CUDA C++, without includes, of these kernels or of all."""
    parts = [(CSRC / name).read_text().replace("#pragma once\n", "") for name in SOURCES]
    return "\n".join([*parts, *macros(types, linear_kernels(types) if linear is None else linear)]) + "\n"
