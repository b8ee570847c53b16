"""OPT, which the stock model builder lacks."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from conversion.errors import InputError
from conversion.onnx.learned_positions import LearnedPositionsDecoder

# transformers keeps OPT's first two position rows for padding.
POSITION_OFFSET = 2


class OPT(LearnedPositionsDecoder):
    """transformers' OPTForCausalLM with LayerNorm before each sub-layer (all published sizes but 350M)."""

    def __init__(self, config: Any, *args: Any) -> None:
        if (
            not config.do_layer_norm_before
            or config._remove_final_layer_norm
            or config.word_embed_proj_dim != config.hidden_size
            or not config.layer_norm_elementwise_affine
        ):
            raise InputError(
                "this OPT variant cannot be exported: it normalises after each sub-layer or projects its embedding "
                "(as OPT-350M does); use another size"
            )
        super().__init__(config, *args)

    def mlp_size(self, config: Any) -> int:
        size: int = config.ffn_dim
        return size

    def norm_epsilon(self, config: Any) -> float:
        return 1e-5  # torch.nn.LayerNorm's default; OPT's config has none

    def blocks(self) -> Any:
        return self.weights.model.decoder.layers

    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.weights.model.decoder.final_layer_norm
        return norm

    def position_table(self) -> Tensor:
        table: Tensor = self.weights.model.decoder.embed_positions.weight
        return table[POSITION_OFFSET:]

    def block(self, layer: Any) -> SimpleNamespace:
        return SimpleNamespace(
            input_layernorm=layer.self_attn_layer_norm,
            self_attn=layer.self_attn,
            post_attention_layernorm=layer.final_layer_norm,
            mlp=layer,
        )
