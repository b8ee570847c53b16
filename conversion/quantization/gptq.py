"""GPTQ (Frantar et al., arXiv:2210.17323) under a mask: round column by column, let later columns absorb the error."""

import torch
from torch import Tensor

from conversion.hessian import error_spread
from conversion.quantization.formats import ValueFormat

BLOCK_COLUMNS = 128


def gptq(weight: Tensor, mask: Tensor, hessian: Tensor, scale: Tensor, value_format: ValueFormat) -> Tensor:
    """Return codes [N, K] of `weight`, 0 where masked, that disturb the layer's output less than nearest rounding.

    Columns go by falling importance (diagonal of the Hessian). An error also flows to masked columns still to come,
    which are then rounded to their only value, zero, and hand it on: the optimal step while their turn has not come
    (as in SparseGPT). Passing it to kept columns alone left 4 to 38 % more output error on SmolLM2's layers.

    Args:
        weight: [N, K], masked entries zero.
        mask: [N, K] bool, True where kept.
        hessian: [K, K], from `conversion.hessian.damped`.
        scale: [N, K], of every entry.
        value_format: of the codes.
    """
    order = hessian.diagonal().argsort(descending=True)
    left, mask, scale = weight[:, order], mask[:, order], scale[:, order]
    spread = error_spread(hessian[order][:, order])
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = value_format.round(left[:, i] / scale[:, i]) * mask[:, i]
            errors[:, i - start] = (left[:, i] - codes[:, i] * scale[:, i]) / spread[i, i]
            left[:, i:stop] -= errors[:, i - start, None] * spread[i, i:stop]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return torch.empty_like(codes).index_copy_(1, order, codes)
