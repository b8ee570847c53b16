"""GPT-2, which the stock model builder lacks."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from conversion.errors import InputError
from conversion.onnx.learned_positions import LearnedPositionsDecoder, linear


class GPT2(LearnedPositionsDecoder):
    """transformers' GPT2LMHeadModel. Its Conv1D weights are [in, out]."""

    def __init__(self, config: Any, *args: Any) -> None:
        if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
            raise InputError(
                "this GPT-2 variant cannot be exported: it scales attention unusually or attends to an encoder"
            )
        super().__init__(config, *args)

    def mlp_size(self, config: Any) -> int:
        size: int = config.n_inner or 4 * config.n_embd
        return size

    def norm_epsilon(self, config: Any) -> float:
        epsilon: float = config.layer_norm_epsilon
        return epsilon

    def blocks(self) -> Any:
        return self.weights.transformer.h

    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.weights.transformer.ln_f
        return norm

    def position_table(self) -> Tensor:
        table: Tensor = self.weights.transformer.wpe.weight
        return table

    def block(self, layer: Any) -> SimpleNamespace:
        query, key, value = (
            linear(weight.T, bias)
            for weight, bias in zip(layer.attn.c_attn.weight.chunk(3, 1), layer.attn.c_attn.bias.chunk(3), strict=True)
        )
        return SimpleNamespace(
            input_layernorm=layer.ln_1,
            self_attn=SimpleNamespace(q_proj=query, k_proj=key, v_proj=value, o_proj=_conv1d(layer.attn.c_proj)),
            post_attention_layernorm=layer.ln_2,
            mlp=SimpleNamespace(fc1=_conv1d(layer.mlp.c_fc), fc2=_conv1d(layer.mlp.c_proj)),
        )


def _conv1d(conv: Any) -> SimpleNamespace:
    return linear(conv.weight.T, conv.bias)
