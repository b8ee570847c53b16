"""The N:M mask (CAST, Sec. III, Eq. 3-6)."""

import torch
from torch import Tensor

from conversion.errors import InputError


@torch.no_grad()
def nm_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Mark the `n` largest magnitudes of every `m` consecutive entries along the last axis.

    Exactly `n` are kept in every group: of equal magnitudes the lower index wins (the paper's `|w| >= xi` would keep
    more on a tie).

    Args:
        weight: [..., C] with finite entries and C a multiple of `m`; for a linear layer C is the input axis.

    Returns:
        bool tensor of weight's shape, True where the entry is kept.

    Raises:
        InputError: C is not a multiple of `m`, or not 0 < n <= m.
    """
    if not 0 < n <= m:
        raise InputError(f"a {n}:{m} pattern is impossible: keep between 1 and {m} of every {m} weights")
    if weight.dim() == 0 or weight.shape[-1] % m:
        raise InputError(f"{n}:{m} needs a last axis divisible by {m}, got a weight of shape {list(weight.shape)}")
    columns = weight.detach().abs().reshape(-1, m).unbind(dim=1)
    # beaten_by[i] counts the entries of its group that are kept before entry i; bytes, so that few are moved.
    beaten_by = [torch.full_like(columns[0], m - 1 - i, dtype=torch.uint8) for i in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            i_wins = (columns[i] >= columns[j]).view(torch.uint8)
            beaten_by[i] -= i_wins
            beaten_by[j] += i_wins
    return torch.stack([count < n for count in beaten_by], dim=1).reshape(weight.shape)
