"""Quantized 2:4 weights: made 16-bit floats on their way to the product, or multiplied in 8 bits by x rounded to them.

In memory they lie in the order of the fragments like 16-bit ones (`layout`), in one tensor of bytes: kept values, then
metadata, then scales. A lane has its 16 values of a step together: 16 bytes, 8-bit floats or integers 128 too large, or
8 bytes of half bytes, each 8 too large, value i of a tile in half byte i // 2 + 4 (i % 2). Sums of a group of columns
are scaled in float32, so the only rounding is that of the product's terms, none.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cast_serve.kernels.cuda import tiled, warpgroup
from cast_serve.kernels.cuda.layout import LANES, ROWS, STEP, to_fragments
from cast_serve.kernels.cuda.linear import (
    TYPES,
    Launch,
    Planner,
    expand,
    multiprocessors,
    packed_linear,
    prepare,
    quantize_rows,
)
from cast_serve.kernels.cuda.plan import Plan, Types
from conversion.errors import InputError
from conversion.quantization.formats import INT4, decode, groups_of

OUTPUTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
WEIGHT_ONLY = [Types(weight, output) for weight in ("W8", "F8", "W4") for output in OUTPUTS.values()]


Method = Literal["small_m", "tiled", "warpgroup", "expanded", "tiled_8_bit", "warpgroup_8_bit"]
PLANNERS: dict[str, Planner] = {"tiled": tiled.plan, "warpgroup": warpgroup.plan}
IN_8_BITS: dict[str, Planner] = {"tiled_8_bit": tiled.plan, "warpgroup_8_bit": warpgroup.plan}
"""Methods that round x, row by row, to the type of weights of 8 bits with one scale a row."""


class Parts(NamedTuple):
    """Views of a packed weight's bytes.

    Attributes:
        fragments: [row tiles, steps, 32, 2 * bits] uint8.
        metadata: [row tiles, steps, 32] uint32.
        scale: [row tiles, groups, 16] float32.
    """

    fragments: Tensor
    metadata: Tensor
    scale: Tensor


def packed_bytes(out_features: int, columns: int, bits: int, group_size: int | None) -> int:
    return sum(_sizes(out_features, columns, bits, group_size))


def _sizes(out_features: int, columns: int, bits: int, group_size: int | None) -> tuple[int, int, int]:
    lanes, groups = -(-out_features // ROWS) * -(-columns // STEP) * LANES, groups_of(columns, group_size)
    return lanes * 2 * bits, lanes * 4, -(-out_features // ROWS) * groups * ROWS * 4


def pack(values: Tensor, bitmask: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """`packed_in_fragments`, on whose device kernels for x of the default dtype are then loaded."""
    check_group_size(group_size)
    floats, bits = values.dtype == torch.float8_e4m3fn, 4 if values.dtype == torch.uint8 else 8
    prepare(_types(bits, floats, torch.get_default_dtype()), values.device)
    return packed_in_fragments(values, bitmask, scale, group_size)


def prepare_products_in_8_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Load what rounds x to this dtype, and the kernels of `IN_8_BITS`.

    For x of both dtypes: a first call, which may be one that a graph captures, would else compile them.
    """
    for output in OUTPUTS:
        prepare(TYPES[dtype, output], device)


def packed_in_fragments(values: Tensor, bitmask: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """The bytes of a weight, on its device.

    They are uint8, or float8_e4m3fn where the values are, which tells them apart.

    Args:
        values: codes [N, K/2] int8 or float8_e4m3fn, or [N, K/4] uint8 with two int4 in each, the earlier one in the
            low half.
        bitmask: [N, K/8] uint8.
        scale: [N, G] float32, of `group_size` columns each, a multiple of 64; None for one scale a row.

    Raises:
        InputError: groups that the kernel has no multiple of, wrong shapes, or a damaged bitmask.
    """
    check_group_size(group_size)
    floats, bits = values.dtype == torch.float8_e4m3fn, 4 if values.dtype == torch.uint8 else 8
    codes = values.view(torch.uint8) if floats else values if bits == 8 else decode(values, INT4).to(torch.int8)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    groups = groups_of(columns, group_size)
    if scale.shape != (rows, groups) or scale.dtype != torch.float32:
        raise InputError(f"scale must be float32 {[rows, groups]}, not {scale.dtype} {list(scale.shape)}")
    # as 16-bit integers they take the places of 16-bit floats
    fragments, metadata = to_fragments(codes.to(torch.int16), bitmask)
    row_tiles, steps = metadata.shape[:2]
    of_steps = fragments.view(row_tiles, steps, 2, LANES, 8).transpose(2, 3)
    if bits == 8:
        stored = (of_steps if floats else of_steps + 128).to(torch.uint8)
    else:
        halves = (of_steps + 8).view(row_tiles, steps, LANES, 2, 2, 2, 2).to(torch.uint8)
        # value i = 4 a + 2 b + c is in half byte 2 a + b + 4 c: byte a + 2 c, its low half for b = 0
        stored = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(-1, -2)
    scales = torch.nn.functional.pad(scale, (0, 0, 0, row_tiles * ROWS - rows))
    scales = scales.view(row_tiles, ROWS, groups).transpose(1, 2)
    packed = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in (stored, metadata, scales)])
    return packed.view(torch.float8_e4m3fn) if floats else packed


def check_group_size(group_size: int | None) -> None:
    """InputError if the kernel has no such groups."""
    if group_size is not None and group_size % STEP:
        raise InputError(
            f"on GPUs groups must be a multiple of {STEP} columns, and {group_size} is not: quantize again"
        )


def _types(bits: int, floats: bool, dtype: torch.dtype) -> Types:
    return Types("F8" if floats else f"W{bits}", OUTPUTS.get(dtype, "Bf16"))


def parts(packed: Tensor, out_features: int, columns: int, bits: int, group_size: int | None) -> Parts:
    """What `pack` put together; RuntimeError if the bytes are not those of such a weight."""
    sizes = _sizes(out_features, columns, bits, group_size)
    if packed.dtype not in (torch.uint8, torch.float8_e4m3fn) or packed.shape != (sum(sizes),):
        raise RuntimeError(
            f"cast24: {list(packed.shape)} {packed.dtype} is not the packed form of a weight {[out_features, columns]} "
            f"of {bits} bits with groups of {group_size}"
        )
    values, metadata, scale = packed.view(torch.uint8).split(sizes)
    row_tiles, steps = -(-out_features // ROWS), -(-columns // STEP)
    return Parts(
        values.view(row_tiles, steps, LANES, 2 * bits),
        metadata.view(torch.uint32).view(row_tiles, steps, LANES),
        scale.view(torch.float32).view(row_tiles, -1, ROWS),
    )


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bits: int,
    group_size: int | None,
    bias: Tensor | None = None,
    *,
    method: Method = "small_m",
    cut: Plan | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """x [M, K] bfloat16 or float16 times what `pack` returns, plus bias of x's dtype: [M, out_features] of x's dtype.

    Args:
        method: the kernel for few rows, or one of those for many, of which "warpgroup" rounds the weight to x's dtype
            where a row has several scales; "expanded" makes the weight dense for the call, and lets cuBLAS multiply;
            those of `IN_8_BITS` round x.
        cut: the call cut into blocks, for one of the kernels.
    """
    K, floats = x.shape[1], packed.dtype == torch.float8_e4m3fn
    fragments, metadata, scale = parts(packed, out_features, K, bits, group_size)
    if method in IN_8_BITS:
        dtype = torch.float8_e4m3fn if floats else torch.int8
        rounded, x_scale = quantize_rows(x, dtype, for_products=True, launch=launch)
        if cut is None:
            cut = IN_8_BITS[method](len(x), out_features, K, multiprocessors(x.device), TYPES[dtype, x.dtype])
        return packed_linear(
            *(rounded, fragments, metadata, out_features, bias),
            x_scale=x_scale,
            w_scale=scale,
            dtype=x.dtype,
            types=TYPES[dtype, x.dtype],
            cut=cut,
            launch=launch,
        )
    types = _types(bits, floats, x.dtype)
    group_steps = metadata.shape[1] if group_size is None else group_size // STEP
    if method == "expanded":
        dense = expand(
            *(fragments, metadata, out_features, K),
            w_scale=scale,
            types=types,
            group_steps=group_steps,
            launch=launch,
        )
        return torch.nn.functional.linear(x, dense, bias)
    if cut is None and method in PLANNERS:
        cut = PLANNERS[method](len(x), out_features, K, multiprocessors(x.device), types)
    return packed_linear(
        *(x, fragments, metadata, out_features, bias),
        w_scale=scale,
        types=types,
        group_steps=group_steps,
        cut=cut,
        launch=launch,
    )
