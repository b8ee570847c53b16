"""Quantized values that a device has no kernel for: they become floats again, for the kernels of those."""

import torch
from torch import Tensor

from conversion.quantization.formats import FP8, Quantization, decode


def has_kernel(quantization: Quantization, device: str) -> bool:
    """Whether a type of device, "cpu" or "cuda", multiplies by such values as they are.

    CPUs have no kernel for 8-bit floats, GPUs none for groups that are no multiple of 64 columns.
    """
    if device == "cuda":
        return (quantization.group_size or 0) % 64 == 0
    return quantization.values is not FP8


def widened(values: Tensor, scale: Tensor, quantization: Quantization, columns: int, dtype: torch.dtype) -> Tensor:
    """Kept values [N, columns / 2] of `dtype` from those of a packed checkpoint as stored, and scales [N, G]."""
    # a group of 4 columns, of which 2 are kept, shares its scale
    return (decode(values, quantization.values) * quantization.spread(scale, columns)[:, ::2]).to(dtype)
