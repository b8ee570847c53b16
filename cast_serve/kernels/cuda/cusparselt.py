"""The product for many rows of x: NVIDIA's cuSPARSELt, through torch, on a copy of the weight in its own layout."""

import torch
from torch import Tensor

ROWS = 8
"""x has a multiple of these rows there."""


def available() -> bool:
    return torch.cuda.is_available() and torch.backends.cusparselt.is_available()


def fits(out_features: int, columns: int) -> bool:
    """Whether a weight [out_features, columns] of a 16-bit type can be compressed."""
    return out_features % 16 == 0 and columns % 16 == 0


def compress(dense: Tensor) -> Tensor:
    """cuSPARSELt's layout, which depends on its version and on the GPU, of a 2:4 weight [N, K]: 9/16 of its bytes."""
    return torch._cslt_compress(dense.contiguous())


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int = 0) -> Tensor:
    """x [M, K] times the compressed weight, plus bias [N] of x's dtype: [M, N]. `algorithm` as `search` found it."""
    M = x.shape[0]
    product = torch._cslt_sparse_mm(compressed, _rows(x).t(), bias, transpose_result=True, alg_id=algorithm)
    return product[:M]


def search(x: Tensor, compressed: Tensor) -> int:
    """The fastest algorithm at x's shape. Waits for the GPU."""
    return int(torch._cslt_sparse_mm_search(compressed, _rows(x).t(), transpose_result=True))


def _rows(x: Tensor) -> Tensor:
    """x with rows of zeros up to a multiple of ROWS."""
    return torch.nn.functional.pad(x.contiguous(), (0, 0, 0, -x.shape[0] % ROWS))
