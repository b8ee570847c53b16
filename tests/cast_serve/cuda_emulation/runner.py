"""Builds the emulation and runs kernels in it."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cast_serve.kernels.cuda.small_m import CSRC, LinearArguments, Plan, Types, Variant

HERE = Path(__file__).parent


class Emulation:
    """Kernels of `variants` for each of `types`, compiled for the CPU."""

    def __init__(self, directory: Path, variants: Sequence[Variant], types: Sequence[Types]) -> None:
        lines = [variant.macro(t).replace(variant.name, _name(variant, t), 1) for t in types for variant in variants]
        table = ", ".join(
            f'{{"{_name(variant, t)}", {_name(variant, t)}, {32 * variant.warps}}}'
            for t in types
            for variant in variants
        )
        (directory / "variants.inc").write_text("\n".join([*lines, f"#define CAST24_VARIANTS {table}", ""]))
        library = directory / "emulation.so"
        command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
        includes = [f"-I{HERE}", f"-I{directory}", f"-I{CSRC}"]
        subprocess.run([*command, *includes, str(HERE / "run.cpp"), "-o", str(library)], check=True)
        self._emulate = ctypes.CDLL(str(library)).emulate
        self._emulate.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 3, *[ctypes.c_int64] * 3]
        self._emulate.argtypes += [ctypes.c_int, ctypes.c_uint]

    def linear(
        self,
        types: Types,
        x: Tensor,
        fragments: Tensor,
        metadata: Tensor,
        rows: int,
        plan: Plan,
        *,
        bias: Tensor | None = None,
        x_scale: Tensor | None = None,
        w_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> Tensor:
        """y [M, rows] of x [M, K], last axis contiguous. Every byte of the weight must be read once per block of M."""
        batch, columns = x.shape
        y = torch.full((batch, rows), float("nan"), dtype=dtype or x.dtype)
        partial = torch.full((plan.partial_bytes // 4 + 4,), float("nan"))
        counters = torch.zeros(plan.counters, dtype=torch.int32)

        def pointer(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        arguments = LinearArguments(
            *map(pointer, (fragments, metadata, x, x_scale, w_scale, bias, y, partial, counters)),
            x.stride(0) * x.itemsize,
            *(batch, rows, columns, plan.row_tiles, plan.steps, plan.steps_per_split),
        )
        x_bytes = ((batch - 1) * x.stride(0) + columns) * x.itemsize
        sizes = (fragments.nbytes, metadata.nbytes, x_bytes)
        name = _name(plan.variant, types).encode()
        result = self._emulate(name, ctypes.byref(arguments), *plan.grid, *sizes, plan.grid[2], seed)
        assert result == 0, "a byte of the weight was not read exactly once" if result == 1 else "no such kernel"
        assert not counters.any(), "counters must be 0 again"
        return y


def _name(variant: Variant, types: Types) -> str:
    return f"{types.weight}_{types.output}_{variant.name}"
