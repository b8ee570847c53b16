"""Builds the emulation and runs kernels in it."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cast_serve.kernels.cuda.plan import Entry, Kernel, Types
from cast_serve.kernels.cuda.source import CSRC, linear_kernels, macros
from cast_serve.kernels.cuda.weight_only import WEIGHT_ONLY

HERE = Path(__file__).parent
ALL_TYPES = [Types(weight, weight) for weight in ("Bf16", "Fp16")]
ALL_TYPES += [Types(weight, output) for weight in ("S8", "E4m3") for output in ("Bf16", "Fp16")]
ALL_TYPES += WEIGHT_ONLY


class Emulation:
    """The kernels `linear`, or all, for each of `types`, compiled for the CPU into `library`."""

    def __init__(self, directory: Path, types: Sequence[Types], linear: Sequence[Kernel] | None = None) -> None:
        lines, names = [], []
        for kinds in types:
            of_all_gpus = dict.fromkeys((*linear_kernels(kinds), *linear_kernels(kinds, hopper=True)))
            chosen = tuple(of_all_gpus) if linear is None else linear
            *multiply, last = macros(kinds, chosen)
            for kernel, macro in zip(chosen, multiply, strict=True):
                names.append(_name(kinds, kernel.entry.name))
                lines.append(macro.replace(kernel.entry.name, names[-1], 1))
            other = "quantize_rows" if kinds.in_8_bits else "expand"
            names.append(_name(kinds, other))
            lines.append(f"#define {other} {names[-1]}\n{last}\n#undef {other}")
        entries = ", ".join(f"ENTRY({name})" for name in names)
        (directory / "kernels.inc").write_text("\n".join([*lines, f"#define KERNELS {entries}", ""]))
        self.library = directory / "emulation.so"
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
        includes = [f"-I{HERE}", f"-I{directory}", f"-I{CSRC}"]
        subprocess.run([*command, *includes, str(HERE / "run.cpp"), "-o", str(self.library)], check=True)
        self._emulate = ctypes.CDLL(str(self.library)).emulate


class Launcher:
    """Takes the place of `linear.launch_on_gpu`, with tensors on the CPU.

    Args:
        readable: the tensors that a kernel may read; None if that is not to be checked.

    Attributes:
        reads: of each readable tensor, how often each of its bytes was read.
    """

    def __init__(self, emulation: Emulation, readable: Sequence[Tensor] | None, seed: int = 0) -> None:
        self._emulation, self._seed = emulation, seed
        self._readable, self._unchecked = readable or (), readable is None
        self.reads: list[Tensor] = []

    def __call__(
        self,
        types: Types,
        entry: Entry,
        grid: tuple[int, int, int],
        arguments: ctypes.Structure,
        overlap: bool,
    ) -> None:
        # a view's rows may have gaps between them
        sizes = [
            tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize for tensor in self._readable
        ]
        starts = (ctypes.c_void_p * len(sizes))(*(tensor.data_ptr() for tensor in self._readable))
        reads = torch.zeros(sum(sizes), dtype=torch.uint8)
        result = self._emulation._emulate(
            _name(types, entry.name).encode(),
            (ctypes.c_int * 3)(*grid),
            entry.threads,
            entry.cluster,
            entry.shared_bytes,
            ctypes.byref(arguments),
            -1 if self._unchecked else len(sizes),
            starts,
            (ctypes.c_int64 * len(sizes))(*sizes),
            ctypes.c_void_p(reads.data_ptr()),
            ctypes.c_uint(self._seed),
        )
        assert result == 0, f"no kernel {entry.name} for {types}"
        self.reads = list(reads.split(sizes))


def _name(types: Types, kernel: str) -> str:
    return f"{types.weight}_{types.output}_{kernel}"
