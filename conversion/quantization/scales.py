"""The scale of each group: the one under which rounding to nearest costs least."""

import torch
from torch import Tensor

from conversion.quantization.formats import Quantization

# Tried scales, relative to the one that maps a group's largest magnitude to the lowest code. Below 1 the largest
# weights are clipped, above 1 an unsymmetric format uses its shorter side.
_RATIOS = [0.6 + 0.025 * i for i in range(23)]


def fit_scales(weight: Tensor, quantization: Quantization, importance: Tensor | None = None) -> Tensor:
    """Return scales [N, G] for `weight` [N, K] (masked entries zero), in its dtype; a group of zeros gets 1.

    Scales of an unsymmetric format (-8..7) take the sign that puts the largest magnitude of their group at the lowest
    code, where there is one more.

    Args:
        weight: what will be rounded.
        quantization: format and groups.
        importance: [K], by which the squared error of each column counts (the mean square of its input); None counts
            all alike.
    """
    grouped = quantization.by_group(weight)
    counts = quantization.by_group(weight.new_ones(1, weight.shape[1]) if importance is None else importance[None])
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    if quantization.values.lowest == -quantization.values.highest:
        extreme = -extreme.abs()
    largest = extreme / quantization.values.lowest
    best, least = largest, torch.full_like(largest, torch.inf)
    for ratio in _RATIOS:
        scale = largest * ratio
        error = (counts * (grouped - quantization.values.round(grouped / scale) * scale) ** 2).sum(-1, keepdim=True)
        better = error < least
        least = error.where(better, least)
        best = scale.where(better, best)
    return torch.where(best != 0, best, 1)[..., 0]  # also where a scale is too small for the dtype
