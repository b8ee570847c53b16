"""A tiny random 2:4 Llama with a tokenizer and a chat template, exported for the engine."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conversion.onnx import export
from tests.cast_serve import tiny_tokenizers
from tests.conversion.models import prune

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
CONTEXT = 256


class Tiny:
    """A random 2:4 Llama as transformers runs it, and where its export lies."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizers.byte_level(), bos_token="<|endoftext|>", eos_token="<|im_end|>"
        )
        self.tokenizer.chat_template = TEMPLATE
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
        )
        self.model = LlamaForCausalLM(config).eval()
        prune(self.model)
        self.hf = folder / "hf"
        self.onnx = folder / "onnx"
        self.model.save_pretrained(self.hf)
        self.tokenizer.save_pretrained(self.hf)
        export(self.hf, self.onnx)

    def greedy(self, prompt_ids: list[int], count: int) -> list[int]:
        """The most likely continuation, the end token excluded."""
        out = self.model.generate(torch.tensor([prompt_ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        ids = out[0, len(prompt_ids) :].tolist()
        return ids[: ids.index(2)] if 2 in ids else ids

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
