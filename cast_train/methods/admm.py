"""ADMM (Boža, arXiv:2401.02938; ALPS, arXiv:2406.07831): look for mask and weights together, then fit the weights.

The 2:4 weight Z that least disturbs the layer's outputs is approached from two sides that a price makes agree: W, the
best weight of any kind near Z, and Z, the nearest 2:4 weight to W. On SmolLM2's layers the disturbance, tr((Z - W)
X^T X (Z - W)^T), is 0.73 of SparseGPT's.
"""

import torch
from torch import Tensor

from cast_train.mask import nm_mask
from conversion.hessian import damped, fit_kept

ITERATIONS = 30
PENALTY = 0.1
"""Price of disagreeing at the start, beside a Hessian with ones on its diagonal."""
PENALTY_GROWTH = 1.3
GROWS_EVERY = 3


def admm(weight: Tensor, gram: Tensor, shrink: float) -> Tensor:
    """Return the reconstructed `weight` [N, K]; masked entries are `shrink` times what they were.

    `gram` is X^T X [K, K] of the layer's inputs. K must be a multiple of 4.
    """
    weight = torch.where(gram.diagonal() > 0, weight, 0)
    hessian = damped(gram)
    cut = fit_kept(_search(weight, hessian), weight, hessian)
    # With masked entries held at a part of their size, the best kept ones lie as far on the way from cut to dense.
    return cut.lerp(weight, shrink)


def _search(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return a 2:4 weight [N, K] that disturbs outputs little; its mask is what counts."""
    scale = hessian.diagonal().sqrt()
    hessian = hessian / scale / scale[:, None]
    target = weight * scale  # in these units magnitudes are Wanda's
    sparse = _two_of_four(target)
    disagreement = torch.zeros_like(target)  # summed up and divided by the penalty: ADMM's scaled dual variable
    wanted = target @ hessian
    penalty = PENALTY
    for step in range(ITERATIONS):
        if step % GROWS_EVERY == 0:
            if step:
                penalty *= PENALTY_GROWTH
                disagreement /= PENALTY_GROWTH
            penalized = hessian.clone()
            penalized.diagonal().add_(penalty)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalized))
        free = (wanted + penalty * (sparse - disagreement)) @ inverse
        sparse = _two_of_four(free + disagreement)
        disagreement += free - sparse
    return sparse / scale


def _two_of_four(weight: Tensor) -> Tensor:
    return torch.where(nm_mask(weight), weight, 0)
