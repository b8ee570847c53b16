"""Keep the two largest magnitudes of each group; nothing else changes."""

import torch

from cast_train.mask import nm_mask


def magnitude(weight: torch.Tensor, shrink: float) -> torch.Tensor:
    """Return `weight` [N, K] with the masked entries multiplied by `shrink` (0 cuts them)."""
    return torch.where(nm_mask(weight), weight, weight * shrink)
