"""Modules whose weights lie in the kernels' layout only. They are made empty and get their weights by `pack`."""

import torch
from torch import Tensor, nn

from cast_serve.kernels.torch_ops import prepack, prepack_quantized


class PackedLinear(nn.Module):
    """What the linears here share: sizes and bias. Buffers are not in the state dict: panels are no storage format."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N], with a bias [N] of the caller's."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SparseLinear(PackedLinear):
    """x [..., K] float32 or bfloat16 -> [..., N], with a 2:4 weight of float32 or bfloat16 values."""

    panel_values: Tensor
    panel_indices: Tensor

    def pack(self, values: Tensor, bitmask: Tensor) -> None:
        """Take values [N, K/2], of which float16 becomes float32, and bitmask [N, K/8] of a packed checkpoint."""
        values = values.float() if values.dtype == torch.float16 else values
        panel_values, panel_indices = prepack(values, bitmask)
        self.register_buffer("panel_values", panel_values, persistent=False)
        self.register_buffer("panel_indices", panel_indices, persistent=False)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.cast24.linear_packed(x, self.panel_values, self.panel_indices, self.out_features, bias)
        return y


class QuantizedLinear(PackedLinear):
    """x [..., K] float32 or bfloat16 -> [..., N], with a quantized weight, 2:4 or dense."""

    panels: Tensor

    def pack(
        self,
        values: Tensor,
        bitmask: Tensor | None,
        scale: Tensor,
        group_size: int | None,
        *,
        float_activations: bool,
    ) -> None:
        """Take int8 or int4 codes, bitmask and scales of a packed checkpoint; see `prepack_quantized`.

        Args:
            values, bitmask, scale, group_size: as `prepack_quantized` takes them.
            float_activations: multiply by x as it is, instead of rounded to 8 bits.
        """
        panels, bits, group = prepack_quantized(values, bitmask, scale, group_size)
        self.use(panels, bits, group, sparse=bitmask is not None, float_activations=float_activations)

    def use(self, panels: Tensor, bits: int, group_size: int, *, sparse: bool, float_activations: bool) -> None:
        """Take panels that are already packed."""
        self.bits, self.group_size = bits, group_size
        self.sparse, self.float_activations = sparse, float_activations
        self.register_buffer("panels", panels, persistent=False)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.cast24.linear_quantized(
            x,
            self.panels,
            self.out_features,
            self.bits,
            self.sparse,
            self.group_size,
            self.float_activations,
            bias,
        )
        return y


class QuantizedEmbedding(nn.Module):
    """Token ids, int64 [...] -> rows [..., H] of a dense quantized weight, in `dtype`."""

    panels: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype

    def pack(self, values: Tensor, scale: Tensor, group_size: int | None) -> None:
        """Take int8 or int4 codes [V, H] and scales [V, G] of a packed checkpoint."""
        panels, self.bits, self.group_size = prepack_quantized(values, None, scale, group_size)
        self.register_buffer("panels", panels, persistent=False)

    def tied_linear(self, *, float_activations: bool) -> QuantizedLinear:
        """A lm_head on the same panels."""
        linear = QuantizedLinear(self.embedding_dim, self.num_embeddings, bias=False)
        linear.use(self.panels, self.bits, self.group_size, sparse=False, float_activations=float_activations)
        return linear

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = torch.ops.cast24.quantized_rows(
            ids, self.panels, self.num_embeddings, self.embedding_dim, self.bits, self.group_size
        )
        return rows.to(self.dtype)
