"""Wanda (Sun et al., arXiv:2306.11695): rank weights by |w| * ||x||_2 of their input channel; no reconstruction."""

import torch

from cast_train.mask import nm_mask


def wanda(weight: torch.Tensor, gram: torch.Tensor, shrink: float) -> torch.Tensor:
    """Return `weight` [N, K] with the masked entries multiplied by `shrink`; `gram` is X^T X [K, K] of the inputs."""
    return torch.where(nm_mask(weight.abs() * gram.diagonal().sqrt()), weight, weight * shrink)
