"""SparseGPT (Frantar & Alistarh, arXiv:2301.00774): prune column by column, let later columns absorb the error."""

import torch

from cast_train.mask import nm_mask
from conversion.hessian import damped, error_spread

BLOCK_COLUMNS = 128


def sparsegpt(weight: torch.Tensor, gram: torch.Tensor, shrink: float) -> torch.Tensor:
    """Return the reconstructed `weight` [N, K]; masked entries are `shrink` times what they would have been.

    `gram` is X^T X [K, K] of the layer's inputs. K must be a multiple of 4.
    """
    pruned = weight.clone()
    pruned[:, gram.diagonal() == 0] = 0
    spread = error_spread(damped(gram))

    columns = weight.shape[1]
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        block = pruned[:, start:stop]
        block_spread = spread[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if i % 4 == 0:
                group = slice(i, i + 4)
                kept = nm_mask((block[:, group] / block_spread.diagonal()[group]).abs())
            old = block[:, i].clone()
            new = torch.where(kept[:, i % 4], old, old * shrink)
            errors[:, i] = (old - new) / block_spread[i, i]
            block[:, i:] -= errors[:, i : i + 1] * block_spread[i : i + 1, i:]
            block[:, i] = new
        pruned[:, stop:] -= errors @ spread[start:stop, stop:]
    return pruned
