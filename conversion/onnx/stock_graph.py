"""The decoder graph of onnxruntime-genai's model builder, made from a transformers model in memory."""

import contextlib
import copy
import io
import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime_genai
import torch
from onnxruntime_genai.models import builders
from transformers import PreTrainedModel

from conversion.errors import InputError

onnxruntime_genai.disable_telemetry_events()
logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # the builder's imports turn INFO on

# Rotary tables of these kinds depend on the length of the sequence, so no fixed table is right.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class TransformersDecoder(builders.base.Model):
    """Walks a transformers decoder in order, where the stock builder guesses each module's role from its shape."""

    weights: Any

    def make_model(self, input_path: PreTrainedModel) -> None:
        self.make_inputs_and_outputs()
        self.weights = input_path
        self.make_preprocessing_nodes()
        self.make_embedding(self.weights.get_input_embeddings().weight)
        for layer_id, layer in enumerate(self.blocks()):
            self.make_layer(layer_id, layer)
        simple = self.layernorm_attrs["simple"]
        self.make_layernorm(self.num_layers, self.final_norm(), skip=True, simple=simple, location="final_norm")
        self.make_lm_head(self.weights.get_output_embeddings())

    def blocks(self) -> Any:
        return self.weights.model.layers

    def final_norm(self) -> torch.nn.Module:
        norm: torch.nn.Module = self.weights.model.norm
        return norm

    def make_rope_init(self, config: Any) -> None:
        """Nothing to parse: the tables come from the transformers model, whatever its rope type, for whole heads."""
        self.rope_attrs["partial_rotary_factor"] = 1.0

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [context, head_dim], as the transformers model computes them."""
        positions = torch.arange(self.rope_attrs["cache_length"])[None]
        cos, sin = self.weights.model.rotary_emb(torch.zeros(1), positions)
        return cos[0], sin[0]


class Llama(TransformersDecoder, builders.LlamaModel):
    pass


class Mistral(TransformersDecoder, builders.MistralModel):
    pass


class Qwen2(TransformersDecoder, builders.QwenModel):
    pass


class Qwen3(TransformersDecoder, builders.Qwen3Model):
    pass


class SmolLM3(Llama):
    def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        """Without positions in some of the layers, where the stock builder makes rotary nodes of their own."""
        rotates = bool(self.weights.config.no_rope_layers[layer_id])
        self.attention_attrs |= {"rope": rotates, "use_rope_in_attn": rotates}
        super().make_attention(layer_id, attention, root_input, **kwargs)


class Granite(Llama):
    """x + r f(norm(x)) is r times x / r + f(norm(x / r)), epsilon over r^2: so blocks are those of a Llama."""

    def __init__(self, config: Any, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.embed_attrs["scale"] = config.embedding_multiplier / config.residual_multiplier
        self.attention_attrs["scale"] = config.attention_multiplier
        self.layernorm_attrs["epsilon"] = config.rms_norm_eps / config.residual_multiplier**2

    def final_norm(self) -> torch.nn.Module:
        """With the scale of the logits in its weight: so the graph ends in lm_head, as others do."""
        norm = copy.deepcopy(super().final_norm())
        norm.weight.data /= self.weights.config.logits_scaling
        return norm


def stock_graph(model: PreTrainedModel) -> ir.Model:
    """The graph of `stock_builder` for CPUs, in float32."""
    graph: ir.Model = stock_builder(model, "cpu", ir.DataType.FLOAT).model
    return graph


def stock_builder(model: PreTrainedModel, provider: str, dtype: ir.DataType) -> builders.base.Model:
    """Build the graph that `onnxruntime_genai.models.builder` would build for this model; it is the result's `model`.

    Weights are shared with `model` and converted to `dtype` one at a time when the graph is saved. GPT-2 and OPT, which
    the stock builder lacks, get a graph of the same form with `position_ids` as an extra input.

    Args:
        provider: as that builder names it: "cpu" or "cuda".
        dtype: of weights, activations and logits.

    Raises:
        InputError: a variant of the architecture that the graph cannot express.
    """
    from conversion.onnx.gpt2 import GPT2
    from conversion.onnx.opt import OPT

    families = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3, "smollm3": SmolLM3}
    families |= {"granite": Granite, "gpt2": GPT2, "opt": OPT}
    family = families[model.config.model_type]
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise InputError(f"rope type '{rope_type}' cannot be exported: its tables change with the sequence length")
    with contextlib.redirect_stdout(io.StringIO()):  # the builder tells its steps
        builder = family(config, dtype, dtype, provider, str(Path.cwd()), {})
        builder.make_model(model)
    builder.model.graph.sort()
    return builder
