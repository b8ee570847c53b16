"""How a layer's output error depends on its weights: X^T X of the inputs, and how error spreads over columns."""

import torch
from torch import Tensor

from conversion.errors import InputError

DAMPING = 0.01
FIT_STEPS = 20


def damped(gram: Tensor, part: float = DAMPING) -> Tensor:
    """Return X^T X [K, K] with `part` of the mean of its diagonal added: it inverts.

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
    diagonal += torch.where(mean > 0, part * mean, 1)
    return hessian


def error_spread(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse: row i holds how column i's error spreads over those after it."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def fit_kept(sparse: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Return the weight [N, K] with the zeros of `sparse` whose outputs are nearest to those of `target`.

    Conjugate gradients from `sparse` on, in each row under its own mask, in units in which the diagonal of the Hessian
    [K, K] is one.
    """
    mask = sparse != 0
    scale = hessian.diagonal().sqrt()
    hessian = hessian / scale / scale[:, None]
    fitted = sparse * scale
    residual = ((target * scale - fitted) @ hessian) * mask
    direction = residual
    size = residual.square().sum(1, keepdim=True)
    smallest = torch.finfo(size.dtype).tiny
    for _ in range(FIT_STEPS):
        curved = (direction @ hessian) * mask
        length = size / (direction * curved).sum(1, keepdim=True).clamp(min=smallest)
        fitted = fitted + length * direction
        residual = residual - length * curved
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp(min=smallest) * direction
    return fitted / scale
