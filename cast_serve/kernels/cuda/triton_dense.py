"""The product with a dense quantized weight, lm_head's: x keeps its 16 bits, codes are read once for 128 rows of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_serve.kernels.cuda.dense_quantized import row_bytes
from cast_serve.kernels.cuda.triton_linear import WARPS, block


def columns_of_step(rows: int, group_size: int | None) -> int:
    """Columns that a block of so many rows of x takes at once, all of one group: what registers hold."""
    return min(group_size or 128, 128 if rows <= 32 else 64)


@triton.jit
def _dense_quantized(  # type: ignore[no-untyped-def]
    x, codes, scales, bias, y, M, N, K, x_stride, row_bytes,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [ROWS, OUTPUTS] of a block; `codes` and `scales` are the same bytes. GROUP is 0 for one scale a row."""
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dtype = x.dtype.element_ty
    first_scale = scales + n * (row_bytes // 4) + K * BITS // 32
    sums = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    PER_BYTE: tl.constexpr = 8 // BITS
    for start in range(0, K, COLUMNS):
        part = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
        at = start // PER_BYTE + tl.arange(0, COLUMNS // PER_BYTE)
        there = (n[:, None] < N) & (at[None, :] < K // PER_BYTE)
        stored = tl.load(codes + n[:, None] * row_bytes + at[None, :], mask=there, other=0)
        given = (m[:, None] < M) & (at[None, :] < K // PER_BYTE)
        for place in tl.static_range(PER_BYTE):
            code = (((stored >> (4 * place)) & 15) ^ 8).to(tl.int8) - 8 if BITS == 4 else stored
            inputs = tl.load(x + m[:, None] * x_stride + PER_BYTE * at[None, :] + place, mask=given, other=0.0)
            part = tl.dot(inputs, tl.trans(code.to(tl.float32).to(dtype)), part)
        if GROUP > 0:
            scale = tl.load(first_scale + start // GROUP, mask=n < N, other=0.0)
            part *= scale[None, :]
        sums += part
    if GROUP == 0:
        sums *= tl.load(first_scale, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], sums.to(dtype), mask=(m[:, None] < M) & (n[None, :] < N))


def dense_quantized_linear(
    x: Tensor, rows: Tensor, out_features: int, bits: int, group_size: int | None, bias: Tensor | None = None
) -> Tensor:
    """Multiply by what `dense_quantized.pack` returned.

    Args:
        x: [M, K] bfloat16 or float16.
        bias: [out_features] of x's dtype.

    Returns:
        [M, out_features] of x's dtype, sums in float32. Codes are exact in 16 bits: terms are not rounded.

    Raises:
        RuntimeError: bytes that are not those of such a weight.
    """
    M, K = x.shape
    width = row_bytes(K, bits, group_size)
    if rows.dtype != torch.uint8 or rows.shape != (out_features, width) or not rows.is_contiguous():
        raise RuntimeError(
            f"cast24: {list(rows.shape)} {rows.dtype} is not the packed form of a dense weight {[out_features, K]} of "
            f"{bits} bits with groups of {group_size}"
        )
    y = x.new_empty(M, out_features)
    if M == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    at_once, outputs = block(M)
    grid = (triton.cdiv(out_features, outputs), triton.cdiv(M, at_once))
    codes = rows.view(torch.int8) if bits == 8 else rows
    _dense_quantized[grid](
        *(x, codes, rows.view(torch.float32), rows if bias is None else bias, y),
        *(M, out_features, K, x.stride(0), width),
        HAS_BIAS=bias is not None,
        BITS=bits,
        GROUP=group_size or 0,
        ROWS=at_once,
        OUTPUTS=outputs,
        COLUMNS=columns_of_step(at_once, group_size),
        num_warps=WARPS,
    )
    return y
