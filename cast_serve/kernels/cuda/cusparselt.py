"""The product for many rows of x: NVIDIA's cuSPARSELt, through torch, on a copy of the weight in its own layout."""

from typing import NamedTuple

import torch
from torch import Tensor

from cast_serve.kernels.cuda.linear import quantize_rows
from conversion.packed import unpack24


class Algorithm(NamedTuple):
    """How cuSPARSELt multiplies: one of its algorithms, the parts that K is split into, and how they are added up."""

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1


DEFAULT = Algorithm()


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


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: Algorithm = DEFAULT) -> Tensor:
    """x [M, K] times the compressed weight, plus bias [N] of x's dtype: [M, N]. `algorithm` as `search` found it."""
    return _multiply(x, compressed, bias, algorithm)


def _multiply(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    product = torch._cslt_sparse_mm(
        *(compressed, _rows(x).t(), bias),
        out_dtype=_out_dtype(x),
        transpose_result=True,
        alg_id=algorithm.number,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return product[: x.shape[0]]


def linear_8_bit(
    x: Tensor,
    x_scale: Tensor,
    compressed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    algorithm: Algorithm = DEFAULT,
) -> Tensor:
    """Multiply in 8 bits by a compressed weight of x's dtype, int8 or float8_e4m3fn.

    Args:
        x: [M, K]. x_scale: [M] float32, w_scale: [N] float32, of rows.
        bias: [N], of any floating dtype.

    Returns:
        [M, N] bfloat16; sums are rounded to bfloat16 before they are scaled.
    """
    y = _multiply(x, compressed, None, algorithm) * x_scale[:, None] * w_scale
    return (y if bias is None else y + bias).to(torch.bfloat16)


def linear_rounding(
    x: Tensor, compressed: Tensor, w_scale: Tensor, bias: Tensor | None, algorithm: Algorithm = DEFAULT
) -> Tensor:
    """`linear_8_bit` on x [M, K] bfloat16 or float16, rounded row by row to the weight's type."""
    return linear_8_bit(*quantize_rows(x, compressed.dtype), compressed, w_scale, bias, algorithm)


def search(x: Tensor, compressed: Tensor) -> Algorithm:
    """The fastest algorithm at x's shape and type, that of the weight. Waits for the GPU."""
    # torch._cslt_sparse_mm_search does not say how K was split
    mm_search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]  # only where torch has cuSPARSELt
    found = mm_search(compressed, _rows(x).t(), None, None, _out_dtype(x), True)
    return Algorithm(*found[:3])


def _out_dtype(x: Tensor) -> torch.dtype | None:
    """Of the product: torch takes one for 8-bit types only."""
    return torch.bfloat16 if x.itemsize == 1 else None


def _rows(x: Tensor) -> Tensor:
    """x with rows of zeros up to a multiple of 8, of 8-bit types 16."""
    missing = -x.shape[0] % (16 // x.itemsize)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x.contiguous()
