"""Coordinate descent on rounded weights (as QuantEase does, arXiv:2309.01885): what one pass of GPTQ leaves over."""

import torch
from torch import Tensor

from conversion.quantization.formats import ValueFormat

BLOCK_COLUMNS = 128
SWEEPS = 2


def refine(
    codes: Tensor, weight: Tensor, mask: Tensor, hessian: Tensor, scale: Tensor, value_format: ValueFormat
) -> Tensor:
    """Return codes [N, K] whose output error trace((W - Q) H (W - Q)^T) is at most that of `codes`.

    Each sweep gives every kept entry in turn its best code with all others held. Unlike GPTQ's pass it looks at kept
    entries only, and it can undo what later columns made wrong. Arguments as for `gptq`.
    """
    codes = codes.clone()
    for _ in range(SWEEPS):
        pull = (weight - codes * scale) @ hessian  # [N, K], minus half the gradient
        for start in range(0, codes.shape[1], BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, codes.shape[1])
            steps = torch.empty_like(codes[:, start:stop])
            for i in range(start, stop):
                best = codes[:, i] * scale[:, i] + pull[:, i] / hessian[i, i]
                new = value_format.round(best / scale[:, i]) * mask[:, i]
                steps[:, i - start] = (new - codes[:, i]) * scale[:, i]
                codes[:, i] = new
                pull[:, i:stop] -= steps[:, i - start, None] * hessian[i, i:stop]
            pull[:, stop:] -= steps @ hessian[start:stop, stop:]
    return codes
