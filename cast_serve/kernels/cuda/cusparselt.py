"""The product for many rows of x: NVIDIA's cuSPARSELt, through torch, on a copy of the weight in its own layout."""

import torch
from torch import Tensor

from cast_serve.kernels.cuda.linear import quantize_rows
from conversion.packed import unpack24


def available() -> bool:
    return torch.cuda.is_available() and torch.backends.cusparselt.is_available()


def fits(out_features: int, columns: int, itemsize: int = 2) -> bool:
    """Whether a weight [out_features, columns] of a type of 2 bytes, or 1, can be compressed."""
    unit = 32 // itemsize
    return out_features % unit == 0 and columns % unit == 0


def takes(values: torch.dtype, group_size: int | None, out_features: int, columns: int) -> bool:
    """Whether `compress_codes` takes a quantized weight: its scales must be one a row."""
    return group_size is None and values in (torch.int8, torch.float8_e4m3fn) and fits(out_features, columns, 1)


def compress(dense: Tensor) -> Tensor:
    """cuSPARSELt's layout, which depends on its version and on the GPU, of a 2:4 weight [N, K]: 9/16 of its bytes.

    Of an int8 or float8_e4m3fn weight it is 10/16.
    """
    return torch._cslt_compress(dense.contiguous())


def compress_codes(values: Tensor, bitmask: Tensor) -> Tensor:
    """`compress` a weight of kept values [N, K/2], int8 or float8_e4m3fn, and bitmask [N, K/8]."""
    dense = unpack24(values.view(torch.int8), bitmask)  # not every operation takes 8-bit floats
    return compress(dense.view(values.dtype))


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int = 0) -> Tensor:
    """x [M, K] times the compressed weight, plus bias [N] of x's dtype: [M, N]. `algorithm` as `search` found it."""
    M = x.shape[0]
    product = torch._cslt_sparse_mm(compressed, _rows(x).t(), bias, transpose_result=True, alg_id=algorithm)
    return product[:M]


def linear_8_bit(x: Tensor, x_scale: Tensor, compressed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in 8 bits by a compressed weight of x's dtype, int8 or float8_e4m3fn.

    Args:
        x: [M, K]. x_scale: [M] float32, w_scale: [N] float32, of rows.
        bias: [N], of any floating dtype.

    Returns:
        [M, N] bfloat16; sums are rounded to bfloat16 before they are scaled.
    """
    M = x.shape[0]
    product = torch._cslt_sparse_mm(compressed, _rows(x).t(), out_dtype=torch.bfloat16, transpose_result=True)[:M]
    y = product * x_scale[:, None] * w_scale
    return (y if bias is None else y + bias).to(torch.bfloat16)


def linear_rounding(x: Tensor, compressed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_8_bit` on x [M, K] bfloat16 or float16, rounded row by row to the weight's type."""
    return linear_8_bit(*quantize_rows(x, compressed.dtype), compressed, w_scale, bias)


def search(x: Tensor, compressed: Tensor) -> int:
    """The fastest algorithm at x's shape. Waits for the GPU."""
    return int(torch._cslt_sparse_mm_search(compressed, _rows(x).t(), transpose_result=True))


def _rows(x: Tensor) -> Tensor:
    """x with rows of zeros up to a multiple of 8, of 8-bit types 16."""
    missing = -x.shape[0] % (16 // x.itemsize)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x.contiguous()
