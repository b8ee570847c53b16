"""A Llama of random weights that does nothing but decode: one token of each sequence, keys and values cached.

Fused as serving engines do it (q, k and v in one product, gate and up in another), so that what is measured are the
products and not the launches of a framework.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaConfig

MakeLinear = Callable[[int, int], nn.Module]
"""out_features, in_features -> a linear without bias, of random weights."""
THETA = 500000.0


class Block(nn.Module):
    """Attention and feed-forward, [B, hidden] -> [B, hidden]; keys and values are [B, kv_heads, length, head]."""

    cache: Tensor

    def __init__(
        self, config: LlamaConfig, linear: MakeLinear, batch: int, length: int, options: dict[str, object]
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.head, self.epsilon = config.hidden_size // config.num_attention_heads, config.rms_norm_eps
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.qkv = linear((self.heads + 2 * self.kv_heads) * self.head, hidden)
        self.o = linear(hidden, hidden)
        self.gate_up = linear(2 * intermediate, hidden)
        self.down = linear(hidden, intermediate)
        self.norms = nn.Parameter(torch.ones(2, hidden, **options))  # type: ignore[call-overload]
        self.set_batch(batch, length, options)

    def set_batch(self, batch: int, length: int, options: dict[str, object]) -> None:
        """Make room for `length` tokens of `batch` sequences."""
        sizes = (2, batch, self.kv_heads, length, self.head)
        self.register_buffer("cache", torch.zeros(sizes, **options), persistent=False)  # type: ignore[call-overload]

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], position: int) -> Tensor:
        batch = x.shape[0]
        qkv = self.qkv(rms_norm(x, x.shape[-1:], self.norms[0], self.epsilon)).view(batch, -1, self.head)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        self.cache[0, :, :, position] = rotated(k, rotation)
        self.cache[1, :, :, position] = v
        keys, values = self.cache[:, :, :, : position + 1]
        q = rotated(q, rotation)[:, :, None]
        attended = scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + self.o(attended.reshape(batch, -1))
        gate, up = self.gate_up(rms_norm(x, x.shape[-1:], self.norms[1], self.epsilon)).chunk(2, dim=-1)
        y: Tensor = x + self.down(silu(gate) * up)
        return y


class Decoder(nn.Module):
    """Token ids [B] -> the next ones [B]. Embedding and lm_head are not tied; the embedding is dense."""

    def __init__(
        self,
        config: LlamaConfig,
        linear: MakeLinear,
        lm_head: MakeLinear,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.epsilon = config.rms_norm_eps
        self.length, self.options = length, {"device": device, "dtype": dtype}
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size, **self.options))  # type: ignore[call-overload]
        self.lm_head = lm_head(config.vocab_size, config.hidden_size)
        self.norm = nn.Parameter(torch.ones(config.hidden_size, **self.options))  # type: ignore[call-overload]
        self.blocks = nn.ModuleList(
            Block(config, linear, 1, length, self.options) for _ in range(config.num_hidden_layers)
        )
        head = config.hidden_size // config.num_attention_heads
        frequencies = THETA ** -(torch.arange(0, head, 2, device=device) / head)
        angles = torch.arange(length, device=device)[:, None] * frequencies.repeat(2)
        self.rotations = [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles]
        self.requires_grad_(False)

    def set_batch(self, batch: int) -> None:
        for block in self.blocks:
            assert isinstance(block, Block)
            block.set_batch(batch, self.length, self.options)

    def forward(self, ids: Tensor, position: int) -> Tensor:
        return self.logits(ids, position).argmax(-1)

    def logits(self, ids: Tensor, position: int) -> Tensor:
        """[B, vocabulary] after tokens ids [B], which are the ones at `position` of each sequence."""
        x = self.embedding[ids]
        for block in self.blocks:
            x = block(x, self.rotations[position], position)
        logits: Tensor = self.lm_head(rms_norm(x, x.shape[-1:], self.norm, self.epsilon))
        return logits


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [..., head]: the halves of a head are the two coordinates."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
