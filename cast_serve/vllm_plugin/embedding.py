"""How vLLM loads and runs a quantized token embedding and lm_head; tied, they share one weight."""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from cast_serve.kernels import isa
from cast_serve.torch_model.modules import QuantizedEmbedding
from cast_serve.vllm_plugin.linear import SCALE, VALUES, multiply
from cast_serve.vllm_plugin.parameters import check_loaded, counting
from conversion.errors import InputError
from conversion.quantization.formats import Quantization, check_scale, check_values

if TYPE_CHECKING:
    from cast_serve.vllm_plugin.config import Cast24Config


class QuantizedEmbeddingMethod(QuantizeMethodBase):
    """The stored tensors while they are loaded; after that one module, which is lm_head's weight too."""

    def __init__(self, config: "Cast24Config", quantization: Quantization, name: str) -> None:
        self.config = config
        self.quantization = quantization
        self.name = name or "embed_tokens"

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows, columns, quantization = sum(output_partition_sizes), input_size, self.quantization
        self.rows, self.columns, self.dtype = rows, columns, params_dtype
        self.config.report.expect()
        for name, width, dtype in (
            (VALUES, quantization.stored_shape(rows, columns)[1], quantization.values.dtype),
            (SCALE, quantization.groups(columns), torch.float32),
        ):
            parameter = Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
            loader = counting(extra_weight_attrs["weight_loader"], self.name, width)
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": loader, "loaded_rows": 0})
            layer.register_parameter(name, parameter)

    def tie_weights(self, layer: VocabParallelEmbedding, embed_tokens: VocabParallelEmbedding) -> Any:
        """Let the embedding be lm_head: its method knows both uses."""
        self.config.report.withdraw()
        return embed_tokens

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        check_loaded(layer, [VALUES, SCALE], self.name, int(layer.org_vocab_size))
        values, scale = layer.weight_values.data, layer.weight_scale.data
        del layer.weight_values, layer.weight_scale
        used = layer.num_org_embeddings_per_partition  # vLLM fills the rest with zeros
        try:
            check_values(values, self.quantization.values)
            check_scale(scale[:used])
            lookup = QuantizedEmbedding(self.rows, self.columns, self.dtype)
            lookup.pack(values, scale, self.quantization.group_size)
        except InputError as error:
            raise InputError(f"layer '{self.name}': {error}") from None
        layer.lookup = lookup
        layer.packed = lookup.tied_linear(float_activations=self.config.float_activations)
        self.config.report.packed(
            self.name,
            f"the dense int{lookup.bits} kernel ({'CUDA' if values.is_cuda else isa()})",
            lookup.panels.nbytes,
            self.rows * self.columns * self.dtype.itemsize,
        )

    def apply(self, layer: VocabParallelEmbedding, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return multiply(layer.packed, x, bias)

    def embedding(self, layer: VocabParallelEmbedding, input_: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = layer.lookup(input_)
        return rows
