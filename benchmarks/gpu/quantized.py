"""Quantized weights, few rows of x and many: 2:4 beside what torch has for dense ones."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.cuda import cusparselt
from cast_serve.kernels.cuda.measurement import Call, Candidate, Gpu, fastest, methods_in_8_bits
from cast_serve.kernels.cuda.random_weights import QuantizedWeight, Weight
from cast_serve.kernels.cuda.small_m import MAX_ROWS
from cast_serve.kernels.cuda.weight_only import Method
from conversion.quantization.formats import FP8, INT4, INT8, Quantization, ValueFormat

GROUP = 128
"""Columns that share a scale of 4-bit weights."""


def sparse(
    machine: Gpu,
    N: int,
    K: int,
    values: ValueFormat,
    group_size: int | None,
    x: list[Tensor],
    method: Method | None = None,
) -> Candidate:
    """Our quantized 2:4 weight by `method`, which may include that x is rounded, or as x in 16 bits has it."""
    first = QuantizedWeight(N, K, values, group_size, machine.device).packed
    inputs = cycle(x)
    weights = [first.clone() for _ in range(machine.copies(first.nbytes))]
    multiply = partial(machine.weight_only, method=method or ("small_m" if len(x[0]) <= MAX_ROWS else "tiled"))
    calls: list[Call] = [partial(multiply, next(inputs), weight, N, values.bits, group_size) for weight in weights]
    return Candidate(calls, first.nbytes)


def sparse_8_bit(machine: Gpu, N: int, K: int, dtype: torch.dtype, x: list[Tensor]) -> Candidate:
    """cuSPARSELt in 8 bits, x rounded beforehand."""
    device = machine.device
    random = Weight(N, K, dtype, device)
    first = cusparselt.compress_codes(random.values, random.bitmask)
    inputs = cycle([each.to(dtype) for each in x])
    scales = torch.ones(len(x[0]), device=device), torch.ones(N, device=device)
    weights = [first.clone() for _ in range(machine.copies(first.nbytes))]
    algorithm = fastest(next(inputs), first)
    multiply = partial(cusparselt.linear_8_bit, x_scale=scales[0], w_scale=scales[1], bias=None, algorithm=algorithm)
    calls: list[Call] = [partial(multiply, next(inputs), compressed=weight) for weight in weights]
    return Candidate(calls, first.nbytes, algorithm)


def dense_int4(machine: Gpu, N: int, K: int, x: list[Tensor]) -> Candidate:
    """torch's own 4-bit weight-only product."""
    device, inputs = machine.device, cycle(x)
    scales = torch.rand(K // GROUP, N, 2, device=device).to(torch.bfloat16)
    weights = []
    for _ in range(machine.copies(N * K // 2)):
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
        weights.append(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    multiply = torch.ops.aten._weight_int4pack_mm
    calls: list[Call] = [partial(multiply, next(inputs), weight, GROUP, scales) for weight in weights]
    return Candidate(calls, N * K // 2 + scales.nbytes)


def dense_fp8(machine: Gpu, N: int, K: int, x: list[Tensor]) -> Candidate:
    """cuBLAS in 8-bit floats, x rounded beforehand."""
    device, one = machine.device, torch.ones((), device=machine.device)
    inputs = cycle([each.to(torch.float8_e4m3fn) for each in x])
    weights = [torch.randn(N, K, device=device).to(torch.float8_e4m3fn).t() for _ in range(machine.copies(N * K))]
    multiply = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    calls: list[Call] = [partial(multiply, next(inputs), weight) for weight in weights]
    return Candidate(calls, N * K)


def race(machine: Gpu, shapes: list[tuple[int, int]], batches: list[int], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Seconds of every candidate that runs, and its weight's bytes/s as a part of the copy's."""
    for N, K in shapes:
        for M in batches:
            x = [torch.randn(M, K, device=machine.device).to(torch.bfloat16) for _ in range(8)]
            makers: dict[str, Callable[[], Candidate]] = {
                "2:4 int8": partial(sparse, machine, N, K, INT8, None, x),
                "2:4 fp8": partial(sparse, machine, N, K, FP8, None, x),
                f"2:4 int4 g{GROUP}": partial(sparse, machine, N, K, INT4, GROUP, x),
                f"dense int4 g{GROUP} (torch)": partial(dense_int4, machine, N, K, x),
                "dense fp8 (cuBLAS)": partial(dense_fp8, machine, N, K, x),
            }
            if M > MAX_ROWS:
                makers["2:4 int8 (cuSPARSELt)"] = partial(sparse_8_bit, machine, N, K, torch.int8, x)
                makers["2:4 fp8 (cuSPARSELt)"] = partial(sparse_8_bit, machine, N, K, torch.float8_e4m3fn, x)
                for values in (INT8, FP8):
                    if "tiled_8_bit" in methods_in_8_bits(machine, Quantization(values, None)):
                        name = f"2:4 {values.name} in 8 bits"
                        makers[name] = partial(sparse, machine, N, K, values, None, x, "tiled_8_bit")
            found: dict[str, Any] = {}
            for name, make in makers.items():
                try:
                    candidate = make()
                    seconds = machine.seconds(candidate.calls)
                except Exception as failure:  # each library has its own; the others must still run
                    found[name] = {"failure": str(failure)[:500]}
                    continue
                of_copy = candidate.weight_bytes / seconds / bandwidth
                found[name] = {"seconds": seconds, "bytes": candidate.weight_bytes, "of_copy_bandwidth": of_copy}
            times = {
                name: f"{entry['seconds'] * 1e6:.1f} us" if "seconds" in entry else "failed"
                for name, entry in found.items()
            }
            print(f"{N} x {K}, M = {M}: {times}", flush=True)
            yield {"M": M, "N": N, "K": K, "candidates": found}
