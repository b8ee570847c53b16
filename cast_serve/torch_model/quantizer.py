"""How transformers is told to build a model with packed linears: as a quantization method of its own."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cast_serve.torch_model.modules import PackedLinear, QuantizedEmbedding, QuantizedLinear
from conversion.families import family_of, place_in_blocks
from conversion.packed_checkpoint import QUANT_METHOD


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What the quantizer must know of a packed checkpoint.

    Attributes:
        sparse_layers: its packed linears, by their place in the blocks.
        kind: what takes the place of each.
        quantized_embedding: whether the embedding and lm_head are quantized.
    """

    def __init__(self, sparse_layers: list[str], kind: type[PackedLinear], quantized_embedding: bool) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.sparse_layers = sparse_layers
        self.kind = kind
        self.quantized_embedding = quantized_embedding


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts empty packed linears in the place of dense ones while the model has no weights yet."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        family, sparse = family_of(model.config.model_type), set(self.quantization_config.sparse_layers)
        kind = self.quantization_config.kind
        for name, module in list(model.named_modules()):
            if place_in_blocks(family, name) in sparse:
                assert isinstance(module, nn.Linear | Conv1D)
                model.set_submodule(name, kind(*_features(module), bias=module.bias is not None))
                # GPT-2 would initialize the weight that it expects in there.
                model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        if self.quantization_config.quantized_embedding:
            _quantize_embedding(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _quantize_embedding(model: PreTrainedModel) -> None:
    """The two share their panels where they are tied; transformers knows how to tie parameters only."""
    embedding: Any = model.get_input_embeddings()
    size = embedding.num_embeddings, embedding.embedding_dim
    model.set_input_embeddings(QuantizedEmbedding(*size, dtype=torch.get_default_dtype()))
    model.set_output_embeddings(QuantizedLinear(size[1], size[0], bias=False))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(K, N)."""
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (module.nx, module.nf)
