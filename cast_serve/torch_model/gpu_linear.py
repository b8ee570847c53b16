"""The packed linears on a GPU, and which kind each device takes."""

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from cast_serve.kernels.cuda import cusparselt, linear, torch_ops, weight_only
from cast_serve.torch_model.modules import QuantizedLinear, SparseLinear
from conversion.errors import InputError

SparseMemory = Literal["low", "fast"]
"""low: one copy of the weight, 9/16 of a dense one; many rows of x meet it by the product that is the fastest.
fast: also cuSPARSELt's copy, as large again, for many rows of x; quantized weights meet those rounded to 8 bits."""


def sparse_memory() -> SparseMemory:
    """What the environment variable CAST24_SPARSE_MEMORY asks for; low unless it does."""
    chosen = os.environ.get("CAST24_SPARSE_MEMORY", "low")
    for mode in get_args(SparseMemory):
        if chosen == mode:
            return mode
    raise InputError(f"CAST24_SPARSE_MEMORY is '{chosen}': set it to {' or '.join(get_args(SparseMemory))}")


class GpuSparseLinear(SparseLinear):
    """x [..., K] of a floating dtype -> [..., N] of the same, with a 2:4 weight of bfloat16 or float16 values."""

    compressed: Tensor | None

    def pack(self, values: Tensor, bitmask: Tensor) -> None:
        """Take values [N, K/2], of which float32 becomes bfloat16, and bitmask [N, K/8] on the GPU."""
        values = values.bfloat16() if values.dtype == torch.float32 else values
        panel_values, panel_indices = linear.prepack(values, bitmask)
        self.register_buffer("panel_values", panel_values, persistent=False)
        self.register_buffer("panel_indices", panel_indices, persistent=False)
        compressed = None
        if (
            sparse_memory() == "fast"
            and not linear.is_portable(panel_values)
            and cusparselt.available()
            and cusparselt.fits(self.out_features, self.in_features)
        ):
            sizes = self.out_features, self.in_features
            compressed = cusparselt.compress(linear.expand(panel_values, panel_indices, *sizes))
        self.register_buffer("compressed", compressed, persistent=False)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.cast24.linear_cuda(
            x, self.panel_values, self.panel_indices, self.compressed, self.out_features, bias
        )
        return y


class GpuQuantizedLinear(QuantizedLinear):
    """x [..., K] of a floating dtype -> [..., N] of the same, with a 2:4 weight of int8, int4 or fp8 codes."""

    compressed: Tensor | None

    def pack(
        self,
        values: Tensor,
        bitmask: Tensor | None,
        scale: Tensor,
        group_size: int | None,
        *,
        float_activations: bool,
    ) -> None:
        """Take codes, bitmask and scales on the GPU.

        Args:
            values, bitmask, scale, group_size: as `prepack_quantized` takes them.
            float_activations: never round x, so that neither cuSPARSELt nor a kernel that does so is used.
        """
        super().pack(values, bitmask, scale, group_size, float_activations=float_activations)
        compressed = None
        sizes = self.out_features, self.in_features
        if bitmask is not None and not float_activations:
            if (
                sparse_memory() == "fast"
                and cusparselt.available()
                and cusparselt.takes(values.dtype, group_size, *sizes)
            ):
                compressed = cusparselt.compress_codes(values, bitmask)
            if compressed is not None or torch_ops.rounds(self.panels, *sizes, self.bits, self.group_size):
                weight_only.prepare_products_in_8_bits(values.dtype, values.device)
        self.register_buffer("compressed", compressed, persistent=False)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.cast24.linear_quantized_cuda(
            x,
            self.panels,
            self.compressed,
            self.out_features,
            self.bits,
            self.group_size,
            self.float_activations,
            bias,
        )
        return y


SPARSE: dict[str, type[SparseLinear]] = {"cpu": SparseLinear, "cuda": GpuSparseLinear}
"""What holds 2:4 weights of floating-point values, by the type of device."""
QUANTIZED: dict[str, type[QuantizedLinear]] = {"cpu": QuantizedLinear, "cuda": GpuQuantizedLinear}
"""What holds 2:4 weights of codes, by the type of device."""
