"""What GPT-2 and OPT share: LayerNorm with bias, a two-layer MLP, and learned positions instead of rotary ones."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from conversion.onnx.stock_graph import TransformersDecoder


class LearnedPositionsDecoder(TransformersDecoder):
    """A decoder whose embedding adds a row of a position table. Adds the graph input `position_ids`, int64 [1, T]."""

    def __init__(self, config: Any, *args: Any) -> None:
        config.intermediate_size = self.mlp_size(config)
        config.hidden_act = config.activation_function
        config.rms_norm_eps = self.norm_epsilon(config)
        super().__init__(config, *args)
        self.layernorm_attrs["simple"] = False
        self.mlp_attrs |= {"use_proj": False, "use_fc": True}

    def mlp_size(self, config: Any) -> int:
        raise NotImplementedError

    def norm_epsilon(self, config: Any) -> float:
        raise NotImplementedError

    def position_table(self) -> Tensor:
        """Row p belongs to position p."""
        raise NotImplementedError

    def block(self, layer: Any) -> SimpleNamespace:
        """The parts of a block under the names that the builder looks for."""
        raise NotImplementedError

    def make_attention_init(self, config: Any) -> None:
        super().make_attention_init(config)
        self.attention_attrs |= {"rope": False, "use_rope_in_attn": False}
        self.input_names["position_ids"] = "position_ids"

    def make_layer(self, layer_id: int, layer: Any) -> None:
        super().make_layer(layer_id, self.block(layer))

    def make_embedding(self, embedding: Tensor) -> None:
        super().make_embedding(embedding)
        tokens = self.layernorm_attrs["root_input"]
        table, gather, add = (
            "model.embed_positions.weight",
            "/model/embed_positions/Gather",
            "/model/embed_positions/Add",
        )
        self.make_initializer(self.position_table(), table, to=self.io_dtype)
        shape = self.make_hidden_state_shape()
        self.make_gather(gather, [table, self.input_names["position_ids"]], self.io_dtype, shape, axis=0)
        self.make_add(add, [tokens, f"{gather}/output_0"], self.io_dtype, shape)
        self.layernorm_attrs["root_input"] = self.layernorm_attrs["skip_input"] = f"{add}/output_0"


def linear(weight: Tensor, bias: Tensor | None) -> SimpleNamespace:
    """What the builder needs of an nn.Linear: weight [out, in] and bias [out]."""
    return SimpleNamespace(weight=weight, bias=bias)
