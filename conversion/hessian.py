"""How a layer's output error depends on its weights: X^T X of the inputs, and how error spreads over columns."""

import torch
from torch import Tensor

from conversion.errors import InputError

DAMPING = 0.01


def damped(gram: Tensor) -> Tensor:
    """Return X^T X [K, K] with part of the mean of its diagonal added: it inverts.

    The mean is that of inputs that fire; others count next to nothing. InputError if an input was not finite.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise InputError(
            "on the calibration text the model computes numbers that are not finite: its weights are damaged (NaN or "
            "infinite), so copy it again from where it came from"
        )
    mean = diagonal.sum() / (diagonal > 0).sum().clamp(min=1)
    diagonal += torch.where(mean > 0, DAMPING * mean, 1)
    return hessian


def error_spread(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse: row i holds how column i's error spreads over those after it."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
