"""The product where NVRTC is missing: a Triton kernel on the portable tensors, 9/16 of the dense bytes for each block.

It makes each of the four columns of a group dense in registers, so the multiply-adds are those of a dense product: as
fast as memory for few rows of x, slower than cuBLAS for many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 32
"""Groups of four columns in a step."""
WARPS = 8
"""Of a block: with four, sums of 128 rows do not fit the registers."""


def block(M: int) -> tuple[int, int]:
    """Rows of x and outputs that a block computes, for M rows of x."""
    rows = min(max(16, triton.next_power_of_2(M)), 128)
    return rows, 32 if rows <= 32 else 64


@triton.jit
def _linear24(  # type: ignore[no-untyped-def]
    x, pairs, bitmask, bias, y, M, N, groups, x_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y [ROWS, OUTPUTS] of a block; a pair is the two kept values of a group, as one integer of 32 bits."""
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dtype = x.dtype.element_ty
    sums = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for start in range(0, groups, GROUPS):
        g = start + tl.arange(0, GROUPS)
        there = (n[:, None] < N) & (g[None, :] < groups)
        pair = tl.load(pairs + n[:, None] * groups + g[None, :], mask=there, other=0)
        first = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        second = ((pair >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        byte = tl.load(bitmask + n[:, None] * (groups // 2) + g[None, :] // 2, mask=there, other=0).to(tl.int32)
        nibble = byte >> (4 * (g[None, :] % 2)).to(tl.int32)
        for column in tl.static_range(4):
            earlier = (nibble & ((1 << column) - 1)) != 0  # then this one, if kept, is the second
            kept = ((nibble >> column) & 1) != 0
            w = tl.where(kept, tl.where(earlier, second, first), 0.0)
            given = (m[:, None] < M) & (g[None, :] < groups)
            part = tl.load(x + m[:, None] * x_stride + 4 * g[None, :] + column, mask=given, other=0.0)
            sums = tl.dot(part, tl.trans(w), sums)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], sums.to(dtype), mask=(m[:, None] < M) & (n[None, :] < N))


def triton_linear(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a 2:4 weight in the portable format.

    Args:
        x: [M, K] of values' dtype, its rows contiguous.
        values: [N, K/2] bfloat16 or float16. bitmask: [N, K/8] uint8. Both contiguous.
        bias: [N] of values' dtype.

    Returns:
        [M, N] of values' dtype, sums in float32.
    """
    M, N, groups = x.shape[0], values.shape[0], values.shape[1] // 2
    y = x.new_empty(M, N)
    if M == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, outputs = block(M)
    grid = (triton.cdiv(N, outputs), triton.cdiv(M, rows))
    _linear24[grid](
        *(x, values.view(torch.int32), bitmask, values if bias is None else bias, y, M, N, groups, x.stride(0)),
        HAS_BIAS=bias is not None,
        ROWS=rows,
        OUTPUTS=outputs,
        GROUPS=GROUPS,
        num_warps=WARPS,
    )
    return y
