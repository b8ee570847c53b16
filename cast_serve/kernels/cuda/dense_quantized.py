"""Dense quantized weights on a GPU, where embedding and lm_head share one copy: a row's codes, then its scales.

The rows lie one after the other in one tensor of bytes, so that looking some up is plain indexing. `triton_dense`
multiplies by them.
"""

import importlib.util

import torch
from torch import Tensor

from conversion.errors import InputError
from conversion.quantization.formats import INT4, INT8, Quantization, dequantize, groups_of

ALIGNMENT = 16
"""Bytes of which a row is a multiple: what a thread reads at once."""


def pack(values: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """Return rows [N, bytes] uint8, on the device of the weight.

    Args:
        values: codes [N, K] int8, or [N, K/2] uint8 with two int4 in each, the earlier one in the low half.
        scale: [N, G] float32, of `group_size` columns each; None is one scale a row.

    Raises:
        InputError: shapes or dtypes that do not belong together, or no Triton, whose kernel is the only one.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("a quantized embedding on a GPU needs Triton: pip install triton")
    if values.dtype not in (torch.int8, torch.uint8) or values.dim() != 2:
        raise InputError(f"codes must be int8 or uint8 matrices, not {values.dtype}")
    bits = 8 if values.dtype == torch.int8 else 4
    rows, columns = values.shape[0], values.shape[1] * 8 // bits
    groups = groups_of(columns, group_size)
    if columns % 8 or scale.dtype != torch.float32 or scale.shape != (rows, groups):
        raise InputError(
            f"{[rows, columns]} codes in groups of {group_size} need a multiple of 8 columns and a float32 scale "
            f"{[rows, groups]}, not {scale.dtype} {list(scale.shape)}"
        )
    stored = torch.cat([values.view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=1)
    return torch.nn.functional.pad(stored, (0, row_bytes(columns, bits, group_size) - stored.shape[1]))


def row_bytes(columns: int, bits: int, group_size: int | None) -> int:
    """Bytes of a packed row."""
    used = columns * bits // 8 + 4 * groups_of(columns, group_size)
    return used + -used % ALIGNMENT


def lookup(ids: Tensor, rows: Tensor, columns: int, bits: int, group_size: int | None) -> Tensor:
    """Rows `ids` (any shape) of what `pack` returned, dequantized: [..., columns] float32."""
    codes_end = columns * bits // 8
    scale_end = codes_end + 4 * groups_of(columns, group_size)
    found = rows[ids.flatten()]
    codes, scale = found[:, :codes_end], found[:, codes_end:scale_end].contiguous().view(torch.float32)
    values = INT4 if bits == 4 else INT8
    dense = dequantize(codes.contiguous().view(values.dtype), None, scale, Quantization(values, group_size))
    return dense.view(*ids.shape, columns)
