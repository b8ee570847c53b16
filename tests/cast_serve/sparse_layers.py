"""Random 2:4 layers with their dense weight, for kernels to be tested against."""

from typing import NamedTuple

import torch


class SparseLayer(NamedTuple):
    values: torch.Tensor
    bitmask: torch.Tensor
    dense: torch.Tensor


def random_layer(rows: int, columns: int, dtype: torch.dtype) -> SparseLayer:
    """Kept columns and values are drawn group by group; nothing of the packing code under test is used."""
    values = torch.randn(rows, columns // 2).to(dtype)
    kept = torch.rand(rows, columns // 4, 4).argsort(-1)[..., :2].sort(-1).values
    dense = torch.zeros(rows, columns // 4, 4, dtype=dtype).scatter_(-1, kept, values.view(rows, columns // 4, 2))
    nibbles = (1 << kept).sum(-1).view(rows, columns // 8, 2)
    return SparseLayer(values, (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8), dense.view(rows, columns))
