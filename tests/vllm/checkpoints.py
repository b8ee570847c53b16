"""Tiny random 2:4 models, large enough for vLLM's attention: dense, packed, and packed models unpacked again."""

from functools import cache
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SmolLM3Config,
)

from conversion import save_packed
from conversion.dense_model import dense_model
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.quantization.formats import Quantization
from tests.cast_serve import tiny_tokenizers
from tests.conversion.models import make_model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_SHAPE = {
    "vocab_size": 321,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=False),  # has biases
    # down_proj keeps its 100 columns dense, no multiple of 8
    "llama-ignore": LlamaConfig(**(_SHAPE | {"intermediate_size": 100}), tie_word_embeddings=False),
    "smollm3": SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0], pad_token_id=0),
    "granite": GraniteConfig(**_SHAPE, embedding_multiplier=3.0, residual_multiplier=0.3, logits_scaling=2.0),
    "gpt2": GPT2Config(
        vocab_size=321, n_positions=256, n_embd=128, n_inner=192, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2
    ),
    "opt": OPTConfig(
        vocab_size=321,
        hidden_size=128,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=128,
        bos_token_id=0,
        eos_token_id=2,
    ),
}


class Checkpoints:
    """Makes each directory once, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dense = cache(self._dense)
        self.packed = cache(self._packed)
        self.unpacked = cache(self._unpacked)

    def _dense(self, name: str) -> Path:
        """A 2:4 model, stored dense, float32."""
        directory = self.folder / name
        make_model(CONFIGS[name], sparse=True).save_pretrained(directory)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizers.byte_level(), bos_token="<|endoftext|>", eos_token="<|im_end|>"
        )
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory)
        return directory

    def _packed(
        self,
        name: str,
        quantization: Quantization | None = None,
        embedding: Quantization | None = None,
        value_dtype: str | None = None,
    ) -> Path:
        directory = self.folder / f"packed-{len(list(self.folder.iterdir()))}"
        save_packed(
            self.dense(name), directory, value_dtype=value_dtype, quantization=quantization, embedding=embedding
        )
        return directory

    def _unpacked(self, packed: Path) -> Path:
        """The same weights, dequantized, as a plain float32 model."""
        directory = packed.with_name(f"{packed.name}-unpacked")
        dense_model(PackedCheckpoint(packed), torch.float32).save_pretrained(directory)
        return directory
