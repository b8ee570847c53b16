"""Random 2:4 weights, made on a device, for measurements and checks."""

from functools import cached_property

import torch
from torch import Tensor

from cast_serve.kernels.cuda import weight_only
from cast_serve.kernels.cuda.layout import to_fragments
from conversion.quantization.formats import INT4, ValueFormat, encode


class Weight:
    """A random 2:4 weight [N, K], made on the device.

    Attributes:
        values, bitmask: of the portable format.
        dense: float32.
    """

    def __init__(self, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = random_values(N, K // 2, dtype, device)
        kept = torch.rand(N, K // 4, 4, device=device).topk(2).indices.sort(-1).values
        dense = torch.zeros(N, K // 4, 4, device=device).scatter_(-1, kept, self.values.float().view(N, K // 4, 2))
        nibbles = (1 << kept).sum(-1).view(N, K // 8, 2)
        self.dense = dense.view(N, K)
        self.bitmask = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """In fragments, of 16-bit values."""
        return to_fragments(self.values, self.bitmask)


def random_values(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal ones; those of 8-bit types use most of the type's range."""
    values = torch.randn(rows, columns, device=device)
    return (values * 24).clamp(-127, 127).to(dtype) if dtype.itemsize == 1 else values.to(dtype)


class QuantizedWeight:
    """A random quantized 2:4 weight [N, K], made on the device.

    Attributes:
        stored, bitmask, scale: of the portable format.
        dense: float32.
    """

    def __init__(self, N: int, K: int, values: ValueFormat, group_size: int | None, device: torch.device) -> None:
        weight = Weight(N, K, torch.int8 if values is INT4 else values.dtype, device)
        self.stored, self.bitmask = weight.values, weight.bitmask
        self.scale = torch.rand(N, 1 if group_size is None else -(-K // group_size), device=device) + 0.1
        dense = weight.dense
        if values is INT4:
            codes, dense = ((each.float() / 16).round().clamp(-8, 7) for each in (self.stored, dense))
            self.stored = encode(codes, INT4)
        self.dense = dense * self.scale.repeat_interleave(group_size or K, 1)[:, :K]
        self.group_size = group_size

    @cached_property
    def packed(self) -> Tensor:
        return weight_only.pack(self.stored, self.bitmask, self.scale, self.group_size)
