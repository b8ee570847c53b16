"""The kernel for many rows on Hopper, in a process of its own: right, in graphs, and beside cuBLAS.

Copies that cross blocks can hang where they are wrong, and nothing else should be lost then.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import graphs, quantized
from benchmarks.gpu.graphs import method_in_graph
from benchmarks.gpu.kernel_checks import DTYPE, Checks, same_again, warpgroup_kinds
from benchmarks.gpu.timed import timed
from cast_serve.kernels.cuda import warpgroup
from cast_serve.kernels.cuda.linear import TYPES
from cast_serve.kernels.cuda.measurement import Gpu, Layer, QuantizedLayer
from conversion.quantization.formats import FP8, INT8, Quantization

Record = dict[str, Any]


def checks(machine: Gpu, shapes: list[tuple[int, int, int]]) -> Record:
    """Every tile at odd shapes, the same bits again, and in a graph; "ok" if all is well."""
    found = Checks()
    found.compare(machine, warpgroup_kinds(), shapes)
    again = partial(same_again, machine, partial(machine.tiled, planner=warpgroup.plan), 300)
    found.attempt("same bits again", lambda: {"same": again()}, lambda each: each["same"])
    if machine.device.type == "cuda":
        in_8_bits = partial(QuantizedLayer, graphs.N, graphs.K, machine, Quantization(FP8, None))
        for make, method in (
            (partial(Layer, graphs.N, graphs.K, machine), "warpgroup"),
            (in_8_bits, "warpgroup_8_bit"),
        ):
            found.attempt(f"graph, {method}", partial(method_in_graph, make, method), lambda each: each["ok"])
    return found.result()


def race(machine: Gpu, shapes: list[tuple[int, int]], batches: list[int]) -> Iterator[Record]:
    """Seconds of each tile and of cuBLAS on a dense weight, and which tile would have been taken."""
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            calls = {"dense": layer.cublas(M), "tiled": layer.tiled(M)}
            for tile in warpgroup.TILES:
                calls[tile.entry.name] = layer.tiled(M, warpgroup.cut_into(tile, M, N, K))
            seconds, failures = timed(machine, calls.items())
            taken = warpgroup.plan(M, N, K, machine.multiprocessors, TYPES[DTYPE, DTYPE]).kernel.entry.name
            record = {"M": M, "N": N, "K": K, "taken": taken, "seconds": seconds, "failures": failures}
            print(record, flush=True)
            yield record


def race_in_8_bits(machine: Gpu, shapes: list[tuple[int, int]], batches: list[int]) -> Iterator[Record]:
    """Seconds of products in 8 bits, beside cuBLAS on dense weights; only ours include that x is rounded."""
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            x = [torch.randn(M, K, device=machine.device).to(DTYPE) for _ in range(8)]
            calls = {"dense": layer.cublas(M)}
            for values in (INT8, FP8):
                candidate = quantized.sparse(machine, N, K, values, None, x, "warpgroup_8_bit")
                calls[f"2:4 {values.name}"] = list(candidate.calls)
            if machine.device.type == "cuda":
                calls["dense fp8"] = list(quantized.dense_fp8(machine, N, K, x).calls)
            seconds, failures = timed(machine, calls.items())
            record = {"M": M, "N": N, "K": K, "in_8_bits": True, "seconds": seconds, "failures": failures}
            print(record, flush=True)
            yield record


def hopper(
    machine: Gpu, odd_shapes: list[tuple[int, int, int]], shapes: list[tuple[int, int]], batches: list[int]
) -> Iterator[Record]:
    """What `checks` finds, then the races; nothing on other GPUs."""
    if machine.is_hopper:
        yield checks(machine, odd_shapes)
        yield from race(machine, shapes, batches)
        yield from race_in_8_bits(machine, shapes, batches)
