"""Tiny random models of every family, dense and exactly 2:4."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from conversion import save_packed
from conversion.families import family_of, in_scope

_LLAMA_LIKE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# 56 is no multiple of a panel's 16 rows: then gate and up cannot be one operator.
_WHOLE_PANELS = {**_LLAMA_LIKE, "intermediate_size": 64}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=True),
    "llama-untied-rope3": LlamaConfig(
        **_LLAMA_LIKE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": MistralConfig(**_WHOLE_PANELS, sliding_window=3),
    "qwen2": Qwen2Config(**_LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_WHOLE_PANELS, head_dim=16),
    "smollm3": SmolLM3Config(
        **_WHOLE_PANELS,
        no_rope_layers=[1, 0],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "granite": GraniteConfig(
        **_WHOLE_PANELS,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.3,
        rms_norm_eps=0.01,
        logits_scaling=2.0,
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=56, bos_token_id=1, eos_token_id=2
    ),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
}


def make_model(config: PretrainedConfig, *, sparse: bool, seed: int = 0) -> PreTrainedModel:
    """A model with weights large enough that every part of the graph shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if sparse:
            prune(model)
    return model


def packed(folder: Path, name: str, **how: Any) -> Path:
    """A packed checkpoint of the 2:4 model `name`, which lies beside it as "model"; `how` as `save_packed` takes it."""
    make_model(CONFIGS[name], sparse=True).save_pretrained(folder / "model")
    save_packed(folder / "model", folder / "packed", **how)
    return folder / "packed"


def prune(model: PreTrainedModel) -> None:
    """Zero the two smallest of every group of four, in place."""
    family = family_of(model.config.model_type)
    for name, parameter in model.named_parameters():
        if in_scope(family, name, parameter.shape):
            weight = parameter.data.T if family.transposed else parameter.data
            groups = weight.reshape(weight.shape[0], -1, 4)
            smallest = groups.abs().argsort(dim=-1, stable=True)[..., :2]
            pruned = groups.scatter(-1, smallest, 0.0).reshape(weight.shape)
            parameter.data.copy_(pruned.T if family.transposed else pruned)
