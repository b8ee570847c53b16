"""What the GPU kernels compute, against float64, at odd shapes; and where in a tile they are wrong, should they be."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.cuda import cusparselt, dense_quantized, warpgroup
from cast_serve.kernels.cuda.measurement import Gpu, methods_in_8_bits
from cast_serve.kernels.cuda.plan import Plan
from cast_serve.kernels.cuda.random_weights import QuantizedWeight, Weight, random_values
from cast_serve.kernels.cuda.warpgroup import WarpgroupTile
from cast_serve.kernels.cuda.weight_only import Method
from conversion.quantization.formats import FP8, INT4, INT8, Quantization, ValueFormat, dequantize, encode

DTYPE = torch.bfloat16
SHAPES = [
    *[(1, 16, 64), (1, 1, 8), (3, 24, 72), (8, 136, 1032), (9, 40, 200), (16, 330, 576), (17, 576, 1536)],
    *[(33, 150, 4200), (64, 300, 640), (70, 48, 264), (1, 4096, 4096), (16, 4096, 11008), (64, 11008, 4096)],
    *[(200, 330, 1096), (513, 4096, 4096)],
]
"""Rows of x, weight rows, columns."""
TINY_SHAPES = SHAPES[:5]
TWICE = 2 * torch.finfo(torch.bfloat16).eps
"""The limit where weights, or sums, are rounded to bfloat16, and y once more."""
BY_TRITON = {"triton", "dense int8", "dense int4 g32"}
"""Compiled anew for most shapes: fewer are tried."""


def relative_error(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor, scales: Tensor | float = 1.0) -> float:
    """The largest error over the magnitude of its terms; infinite where there is a NaN."""
    x, dense, bias = x.double(), dense.double(), bias.double()
    expected, magnitude = x @ dense.T * scales + bias, x.abs() @ dense.abs().T * scales + bias.abs()
    return ((y.double() - expected).abs() / magnitude).nan_to_num(torch.inf).max().item()


def small_m_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype) -> float:
    device = machine.device
    weight, x = Weight(N, K, dtype, device), random_values(M, K, dtype, device)
    bias = torch.randn(N, device=device).to(dtype)
    return relative_error(machine.small_m(x, *weight.packed, N, bias), x, weight.dense, bias)


def tiled_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype, cut: Plan | None = None) -> float:
    device = machine.device
    weight, x = Weight(N, K, dtype, device), random_values(M, K, dtype, device)
    bias = torch.randn(N, device=device).to(dtype)
    return relative_error(machine.tiled(x, *weight.packed, N, bias, cut=cut), x, weight.dense, bias)


def warpgroup_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype, tile: WarpgroupTile) -> float:
    return tiled_error(machine, M, N, K, dtype, cut=warpgroup.cut_into(tile, M, N, K))


def triton_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype) -> float:
    device = machine.device
    weight, x = Weight(N, K, dtype, device), random_values(M, K, dtype, device)
    bias = torch.randn(N, device=device).to(dtype)
    return relative_error(machine.triton(x, weight.values, weight.bitmask, bias), x, weight.dense, bias)


def expand_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype) -> float:
    weight = Weight(N, K, dtype, machine.device)
    return (machine.expand(*weight.packed, N, K).float() - weight.dense).abs().nan_to_num(torch.inf).max().item()


def weight_only_error(
    machine: Gpu,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    values: ValueFormat,
    group_size: int | None,
    method: Method = "small_m",
) -> float:
    device = machine.device
    weight, x = QuantizedWeight(N, K, values, group_size, device), random_values(M, K, dtype, device)
    bias = torch.randn(N, device=device).to(dtype)
    y = machine.weight_only(x, weight.packed, N, values.bits, group_size, bias, method=method)
    return relative_error(y, x, weight.dense, bias)


def in_8_bits_error(
    machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype, values: ValueFormat, method: Method
) -> float:
    """Of a product of x as `quantize_rows` rounds it."""
    device = machine.device
    weight, x = QuantizedWeight(N, K, values, None, device), random_values(M, K, dtype, device)
    bias = torch.randn(N, device=device).to(dtype)
    y = machine.weight_only(x, weight.packed, N, values.bits, None, bias, method=method)
    rounded, scale = machine.quantize_rows(x, values.dtype)
    return relative_error(y, rounded, weight.dense, bias, scale.double()[:, None])


def dense_quantized_error(
    machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype, values: ValueFormat, group_size: int | None
) -> float:
    device = machine.device
    codes = torch.randint(values.lowest, values.highest + 1, (N, K), device=device)
    quantization = Quantization(values, group_size)
    stored, scale = encode(codes, values), torch.rand(N, quantization.groups(K), device=device) + 0.1
    x, bias = random_values(M, K, dtype, device), torch.randn(N, device=device).to(dtype)
    rows = dense_quantized.pack(stored, scale, group_size)
    y = machine.dense_quantized(x, rows, N, values.bits, group_size, bias)
    return relative_error(y, x, dequantize(stored, None, scale, quantization), bias)


def rounding_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype) -> float:
    """Of rows of x rounded to 8 bits, relative to the row's largest value."""
    x = torch.randn(M, K, device=machine.device).to(torch.bfloat16)
    rounded, scale = machine.quantize_rows(x, dtype)
    error = (rounded.float() * scale[:, None] - x.float()).abs() / x.float().abs().amax(1, keepdim=True)
    return error.nan_to_num(torch.inf).max().item()


def cusparselt_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype) -> float:
    if not cusparselt.fits(N, K):
        return 0.0
    device = machine.device
    weight, x = Weight(N, K, dtype, device), random_values(M, K, dtype, device)
    bias = torch.randn(N, device=device).to(dtype)
    compressed = cusparselt.compress(weight.dense.to(dtype))
    return relative_error(cusparselt.linear(x, compressed, bias), x, weight.dense, bias)


def cusparselt_8_bit_error(machine: Gpu, M: int, N: int, K: int, dtype: torch.dtype) -> float:
    if not cusparselt.fits(N, K, itemsize=1):
        return 0.0
    device = machine.device
    weight, x = Weight(N, K, dtype, device), random_values(M, K, dtype, device)
    x_scale, w_scale = torch.rand(M, device=device), torch.rand(N, device=device) / 1000
    bias = torch.randn(N, device=device)
    compressed = cusparselt.compress_codes(weight.values, weight.bitmask)
    y = cusparselt.linear_8_bit(x, x_scale, compressed, w_scale, bias)
    return relative_error(y, x, weight.dense, bias, x_scale.double()[:, None] * w_scale.double())


def tile_map(machine: Gpu, dtype: torch.dtype) -> dict[str, Any]:
    """The weight of one step as the kernel sees it (x is the identity); if that is wrong, an x where it is."""
    weight, x = Weight(16, 64, dtype, machine.device), torch.eye(64).to(machine.device, dtype)
    seen = machine.small_m(x, *weight.packed, 16).float().T
    right = seen == weight.dense
    if right.all():
        return {"right": True}
    pattern = ["".join(".x"[not value] for value in row) for row in right.tolist()]
    return {"right": False, "where": pattern, "seen": seen.tolist(), "weight": weight.dense.tolist()}


def same_again(machine: Gpu, multiply: Callable[..., Tensor], M: int) -> bool:
    """Whether 50 calls whose K is split give the same bits."""
    device = machine.device
    weight, x = Weight(264, 4096, DTYPE, device), torch.randn(M, 4096).to(device, DTYPE)
    first = multiply(x, *weight.packed, 264)
    return all(torch.equal(multiply(x, *weight.packed, 264), first) for _ in range(50))


Kind = tuple[str, Callable[..., float], list[torch.dtype], float | None]
"""Name, the error it makes, dtypes, and the limit of it; None: what rounding y makes."""
WIDE = [torch.bfloat16, torch.float16]


class Checks:
    """Attributes: errors: what each check found, with its limit; wrong: the names of those that failed."""

    def __init__(self) -> None:
        self.errors: dict[str, Any] = {}
        self.wrong: list[str] = []

    def attempt(
        self, name: str, check: Callable[[], dict[str, Any]], is_right: Callable[[dict[str, Any]], bool]
    ) -> None:
        try:
            found = check()
        except Exception as failure:  # Triton has exceptions of its own; the other checks must still run
            found = {"failure": str(failure)}
        self.errors[name] = found
        if "failure" in found or not is_right(found):
            self.wrong.append(name)
            print(f"WRONG: {name}: {str(found)[:200]}", flush=True)

    def compare(self, machine: Gpu, kinds: list[Kind], shapes: list[tuple[int, int, int]]) -> None:
        """Every kind at every shape."""
        for name, measure, dtypes, limit in kinds:
            for dtype in dtypes:
                bound = torch.finfo(dtype if dtype.itemsize == 2 else torch.bfloat16).eps if limit is None else limit
                for shape in shapes[::4] if name in BY_TRITON else shapes:

                    def check(
                        measure: Callable[..., float] = measure,
                        shape: tuple[int, int, int] = shape,
                        dtype: torch.dtype = dtype,
                        bound: float = bound,
                    ) -> dict[str, Any]:
                        return {"error": measure(machine, *shape, dtype), "limit": bound}

                    label = f"{name} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}"
                    self.attempt(label, check, lambda found: found["error"] <= found["limit"])

    def result(self) -> dict[str, Any]:
        return {"ok": not self.wrong, "wrong": self.wrong, "checks": self.errors}


def kinds_of(machine: Gpu) -> list[Kind]:
    """All kernels and libraries but the kernel for Hopper."""
    eight_bits = [torch.int8, *([torch.float8_e4m3fn] if machine.capability >= (8, 9) else [])]
    kinds: list[Kind] = [
        ("small_m", small_m_error, WIDE, None),
        ("tiled", tiled_error, WIDE, None),
        ("expand", expand_error, WIDE, 0.0),
        ("weight only int8", partial(weight_only_error, values=INT8, group_size=None), WIDE, None),
        ("weight only fp8", partial(weight_only_error, values=FP8, group_size=None), WIDE, None),
        ("weight only int4 g64", partial(weight_only_error, values=INT4, group_size=64), WIDE, None),
        ("weight only int4 g128", partial(weight_only_error, values=INT4, group_size=128), WIDE, None),
        ("tiled int8", partial(weight_only_error, values=INT8, group_size=None, method="tiled"), WIDE, None),
        ("tiled fp8", partial(weight_only_error, values=FP8, group_size=None, method="tiled"), WIDE, None),
        ("tiled int4 g64", partial(weight_only_error, values=INT4, group_size=64, method="tiled"), WIDE, None),
        ("expanded int8", partial(weight_only_error, values=INT8, group_size=None, method="expanded"), WIDE, TWICE),
        ("expanded int4 g64", partial(weight_only_error, values=INT4, group_size=64, method="expanded"), WIDE, TWICE),
        ("rows rounded", rounding_error, eight_bits, 1 / 16),
    ]
    for values in (INT8, FP8):
        if "tiled_8_bit" in methods_in_8_bits(machine, Quantization(values, None)):
            measure = partial(in_8_bits_error, values=values, method="tiled_8_bit")
            kinds.append((f"tiled in 8 bits, {values.name}", measure, WIDE, None))
    if machine.has_triton:
        kinds += [
            ("triton", triton_error, WIDE, None),
            ("dense int8", partial(dense_quantized_error, values=INT8, group_size=None), WIDE, None),
            ("dense int4 g32", partial(dense_quantized_error, values=INT4, group_size=32), WIDE, None),
        ]
    if machine.has_cusparselt:
        kinds.append(("cusparselt", cusparselt_error, WIDE, None))
        kinds.append(("cusparselt", cusparselt_8_bit_error, eight_bits, TWICE))
    return kinds


def warpgroup_kinds() -> list[Kind]:
    """The kernel for Hopper with each of its tiles, and with quantized weights."""
    by_tile = {tile.entry.name: partial(warpgroup_error, tile=tile) for tile in warpgroup.TILES}
    quantized = partial(weight_only_error, method="warpgroup")
    in_8_bits = partial(in_8_bits_error, method="warpgroup_8_bit")
    return [
        *[(name, measure, WIDE, None) for name, measure in by_tile.items()],
        ("warpgroup int8", partial(quantized, values=INT8, group_size=None), WIDE, None),
        ("warpgroup fp8", partial(quantized, values=FP8, group_size=None), WIDE, None),
        ("warpgroup int4 g64", partial(quantized, values=INT4, group_size=64), WIDE, TWICE),
        *[
            (f"warpgroup in 8 bits, {values.name}", partial(in_8_bits, values=values), WIDE, None)
            for values in (INT8, FP8)
        ],
    ]


def correctness(machine: Gpu, shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Every error with its limit, the tiles as the kernel sees them, and whether all is well."""
    machine.compile()
    checks = Checks()
    for dtype in WIDE:
        checks.attempt(f"tile {dtype}", partial(tile_map, machine, dtype), lambda found: found["right"])
    checks.compare(machine, kinds_of(machine), shapes)
    for name, multiply, M in (("small_m", machine.small_m, 5), ("tiled", machine.tiled, 100)):
        again = partial(same_again, machine, multiply, M)
        checks.attempt(f"{name}, same bits again", lambda again=again: {"same": again()}, lambda found: found["same"])  # type: ignore[misc]
    return checks.result()
